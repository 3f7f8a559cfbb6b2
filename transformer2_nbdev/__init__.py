__version__ = "0.1.0"

# `import transformer2_nbdev` registers SVF with PEFT and brings in neither torch nor PEFT: where PEFT is loaded already it registers
# at once, otherwise as soon as something imports PEFT. (nbdev_export rewrites the version line above and leaves the rest alone.)
import importlib as _importlib, sys as _sys
from importlib.abc import MetaPathFinder as _MetaPathFinder


class _WithPeft(_MetaPathFinder):
    "Finds nothing itself: what the other finders find for `peft` is made to import `adapter` after it has run."
    def find_spec(self, name, path=None, target=None):
        if name != "peft": return None
        found = (f.find_spec(name, path, target) for f in _sys.meta_path if f is not self and hasattr(f, "find_spec"))
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
elif not any(type(f).__name__ == "_WithPeft" for f in _sys.meta_path): _sys.meta_path.insert(0, _WithPeft())
