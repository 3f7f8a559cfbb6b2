__version__ = "0.1.0"

# Four things live here because every room may need them and none brings in torch or PEFT: the data
# that ships with the package, a progress bar, the way to show an error, and SVF's registration with
# PEFT. (nbdev_export rewrites the version line above and leaves the rest alone.)
import contextlib as _contextlib
import functools as _functools
import importlib as _importlib
import io as _io
import json as _json
import os as _os
import re as _re
import sys as _sys
import tempfile as _tempfile
import time as _time
from importlib.abc import MetaPathFinder as _MetaPathFinder
from pathlib import Path as _Path


# Shipped data ------------------------------------------------------------------------------------

def shipped(name: str) -> _Path: # "stories260k", "records/svd.json", "lab/A", ...
    "The path of a file or folder that ships with the package, in a clone as from a wheel"
    data = _Path(__file__).resolve().parent / "data"
    path = data / name
    if path.exists() and path.resolve().is_relative_to(data): return path
    near = path.parent if path.parent.is_dir() and ".." not in path.parts else data
    there = ", ".join(sorted(p.relative_to(data).as_posix() for p in near.iterdir()))
    raise ValueError(f"no data {name!r} ships with this package: there is {there}")


def record(name: str) -> dict: # "svd", "baselines", ...: what benchmarks/svd.py and so on wrote
    "What a long run measured, with its command, seed and versions"
    return _json.loads(shipped(f"records/{name}.json").read_text(encoding="utf-8"))


# A progress bar ----------------------------------------------------------------------------------

def progress_bar(iterable=None,
                 *,
                 total=None,      # how many steps there will be; None: the iterable's length
                 desc=None,       # what is going on
                 unit="it",       # what one step is
                 delay=2,         # seconds before a bar appears, so that quick work shows none
                 disable=False,
                 **more):         # of tqdm: initial, leave, ...
    "A tqdm bar where people look, one line a minute where no terminal is; $TQDM_DISABLE hides both"
    from tqdm.auto import tqdm
    people = getattr(_sys.stderr, "isatty", bool)() or "ipykernel" in _sys.modules
    make = tqdm if people else _line_a_minute()
    disable = bool(disable or _os.environ.get("TQDM_DISABLE"))
    return make(iterable, total=total, desc=desc, unit=unit, delay=delay, disable=disable, **more)


@_functools.cache
def _line_a_minute():
    "A tqdm that writes whole lines, at most one a minute, for log files"
    from tqdm.std import tqdm

    class LineAMinute(tqdm):
        every = 60  # seconds

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, file=_io.StringIO())  # tqdm's drawing goes nowhere

        def display(self, msg=None, pos=None):
            now = _time.time()
            said = getattr(self, "_said", getattr(self, "start_t", now))
            if msg == "" or now - said < self.every: return
            self._said = now
            print(self._line(), file=_sys.stderr, flush=True)

        def close(self):
            now = _time.time()
            if not self.disable and now - getattr(self, "start_t", now) >= self.every:
                self._said = 0.0  # so that there is a last line
            super().close()

        def _line(self):
            d = self.format_dict
            of = f" of {d['total']}" if d["total"] else ""
            done = f"{(d['prefix'] or 'progress').rstrip(': ')}: {d['n']}{of} {d['unit']}"
            gone = self.format_interval(d["elapsed"])
            if not (d["n"] > d["initial"] and d["total"]): return f"{done}, {gone} gone"
            left = (d["total"] - d["n"]) * d["elapsed"] / (d["n"] - d["initial"])
            more = f", {d['postfix']}" if d["postfix"] else ""
            return f"{done}, {gone} gone, {self.format_interval(left)} left{more}"
    return LineAMinute


# Errors as documentation -------------------------------------------------------------------------

@_contextlib.contextmanager
def expect_fail(kind,        # the exception that the block must raise, or several
                contains="", # a part of its message
                hide=None):  # {text: what to print in its place}; None: temporary folders as FOLDER
    "Run a block that must raise `kind`, and print the line that a user would read"
    try: yield
    except kind as e:
        if contains not in str(e):
            raise AssertionError(f"{contains!r} is not in the message: {e}") from e
        line = f"{type(e).__name__}: {e}"
        for text, shown in (hide or {}).items(): line = line.replace(text, shown)
        temporary = _re.escape(_tempfile.gettempdir()) + r"/\w+"
        if hide is None: line = _re.sub(temporary, "FOLDER", line)
        print(line)
    else: raise AssertionError(f"{kind} was expected, and nothing was raised")


# Registration ------------------------------------------------------------------------------------
# Where PEFT is loaded already SVF is registered at once, else as soon as something imports PEFT.

class _WithPeft(_MetaPathFinder):
    "Finds nothing itself: what others find for `peft` is made to import `adapter` when it has run."
    def find_spec(self, name, path=None, target=None):
        if name != "peft": return None
        found = (f.find_spec(name, path, target) for f in _sys.meta_path
                 if f is not self and hasattr(f, "find_spec"))
        spec = next((s for s in found if s is not None), None)
        if spec is not None and spec.loader is not None: _run_after(spec.loader, _register)
        return spec


def _run_after(loader, action):
    "Have a module's loader call `action` once the module has run."
    run = loader.exec_module

    def exec_module(module):
        run(module)
        action()
    loader.exec_module = exec_module


def _register():
    "Enter SVF into PEFT's tables (importing `adapter` does that)."
    _importlib.import_module("transformer2_nbdev.adapter")


if "peft" in _sys.modules: _register()
elif not any(type(f).__name__ == "_WithPeft" for f in _sys.meta_path):
    _sys.meta_path.insert(0, _WithPeft())
