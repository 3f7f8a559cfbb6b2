#!/usr/bin/env python
"""Run notebooks in place under nbdev_test's rules and keep their outputs.

    python docs/execute.py [notebook ...]            (default: all)
    python docs/execute.py --alone [notebook ...]    from the installed package, in an empty folder

The rules are nbdev_test's: cells headed `#| gpu`, `#| network`, `#| slow` (settings.ini, tst_flags) or `#| eval: false` do not run unless
`--flags` names them, and keep the outputs they have. Every notebook gets a fresh process with one thread and a fixed hash seed, so that a
second run writes the same bytes wherever seeds are set. The first error stops everything; a notebook that failed is left as it was.

`--alone` is what a reader on another machine has: a copy of one notebook, the package that is
installed (a wheel, not this clone), no hub, no published data. It writes nothing back.
"""
import argparse, base64, hashlib, io, os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENV = dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONHASHSEED="0", IN_TEST="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
DPI = 90                                   # of figures that do not choose their own
MAX_NB, MAX_FIG = 250_000, 50_000          # bytes a notebook and a figure may weigh; more is reported


def notebooks() -> list:
    "Every notebook of the book in order, the front door first; those that ask a real model, by name."
    return [ROOT / "index.ipynb", *sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))]


def stable_ids(cells):
    "Give cells without an id one that follows from their source, so that rebuilding a notebook does not churn ids."
    seen = set()
    for c in cells:
        for n in range(len(cells) + 1):
            new = hashlib.sha256(f"{n}:{c['cell_type']}:{''.join(c['source'])}".encode()).hexdigest()[:8]
            if c.get("id", new) not in seen: break
            c.pop("id", None)
        seen.add(c.setdefault("id", new))


RE_LIBRARY_WARNING = re.compile(r"^\S*site-packages/\S+:\d+: \w*Warning: .*\n(?:[ \t]+.*\n)?|^Failed to load CPU gemm_4bit_forward.*\n?", re.M)


def lighter(png: str) -> str: # base64, in and out
    "The same picture with a palette of 256 colours, a third of the bytes, where no eye sees the difference"
    import numpy as np
    from PIL import Image
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    small, out = picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE), io.BytesIO()
    moved = np.abs(np.asarray(small.convert("RGB")).astype(int) - np.asarray(picture)).mean()
    small.save(out, "PNG", optimize=True)
    text = base64.b64encode(out.getvalue()).decode()
    return text if moved < .25 and len(text) < len(png) else png


def two_resolutions(shell) -> dict: # filled while figures are shown: {two pixels a point: one pixel a point}
    "Have the shell draw every figure twice, so that a notebook that grows too heavy can keep the small ones"
    from IPython.core.pylabtools import print_figure
    from matplotlib.figure import Figure
    shell._run("set_matplotlib_formats('retina', pil_kwargs={'optimize': True})")
    png, small = shell.display_formatter.formatters["image/png"], {}
    draw = png.lookup_by_type(Figure)
    def both(fig):
        picture, size = draw(fig)
        small[picture.strip()] = print_figure(fig, base64=True, pil_kwargs={"optimize": True})
        return picture, size
    png.for_type(Figure, both)
    return small


def fit(nb, small: dict) -> None: # small: as from `two_resolutions`, by the picture that is shown
    "Replace the largest pictures by their small ones until the notebook is as light as it may be"
    import json
    shown = [o for c in nb.cells for o in c.get("outputs", []) if o.get("data", {}).get("image/png") in small]
    for o in sorted(shown, key=lambda o: -len(o["data"]["image/png"])):
        if len(json.dumps(nb, indent=1, ensure_ascii=False).encode()) < .98 * MAX_NB: return
        o["data"]["image/png"] = small[o["data"]["image/png"]]


def lighten(outputs: list, small: dict) -> None:
    "Make every picture lighter, and its small one"
    for o in outputs:
        if not (png := "".join(o.get("data", {}).get("image/png", ""))): continue
        o["data"]["image/png"] = light = lighter(png)
        if png.strip() in small: small[light] = lighter(small[png.strip()])


def quiet(outputs: list) -> list:
    "Outputs as a terminal would leave them, without progress bars, libraries' warnings to their own users and this machine's paths."
    kept = []
    for o in outputs:
        if o.get("output_type") == "stream":
            lines = "".join(o["text"]).split("\n")
            if o["name"] == "stderr": lines = [l for l in lines if "\r" not in l]
            text = RE_LIBRARY_WARNING.sub("", "\n".join(l.rstrip("\r").rpartition("\r")[2] for l in lines)).replace(f"{ROOT}/", "")
            if not text.strip(): continue
            o["text"] = text.splitlines(keepends=True)
        kept.append(o)
    return kept


def run(path: Path, flags: set, clone: bool = True) -> str: # clone: import the library from here
    "Execute one notebook in this process, write it, and say what it took."
    import json
    from execnb.nbio import dict2nb, write_nb
    from execnb.shell import CaptureShell
    from fastcore.basics import str2bool
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor, extract_directives

    raw = json.loads(path.read_text(encoding="utf-8"))
    stable_ids(raw["cells"])
    nb = dict2nb(raw)
    skip = set(get_config(path=ROOT).tst_flags.split()) - flags
    front = getattr(NBProcessor(path, procs=FrontmatterProc, process=True).nb, "frontmatter_", {})
    if str2bool(front.get("skip_exec", False)): return "skip_exec"

    def skipped(cell):
        if cell.cell_type != "code": return True
        d = extract_directives(cell, remove=False)
        return d.get("eval:", [""])[0].lower() == "false" or bool(skip & d.keys())

    shell, start = CaptureShell(path, mpl_format="png"), time.time()
    shell._run(f"import matplotlib; matplotlib.rcParams['figure.dpi'] = {DPI}; matplotlib.rcParams['savefig.dpi'] = 'figure'; del matplotlib")
    small = two_resolutions(shell)
    if clone: sys.path.insert(0, str(ROOT))
    else: not_the_clone()
    os.chdir(path.parent)
    for i, cell in enumerate(nb.cells):
        if skipped(cell): continue
        cell.outputs = []
        shell.cell(cell)
        if shell.exc:
            sys.exit(f"{shell.prettytb(fname=path)}\n{path.name}: cell {i} ({cell.id}) failed with {type(shell.exc).__name__}: {shell.exc}\n"
                     f"{cell.source}\n(the notebook was not written)")
        cell.outputs = quiet(cell.outputs)
        lighten(cell.outputs, small)
    fit(nb, small)
    clean_nb(nb)
    write_nb(nb, path)
    return f"{time.time() - start:.1f} s, {path.stat().st_size / 1000:.0f} kB" + "".join(heavy(nb, path))


def not_the_clone():
    "Refuse to import the library from this clone."
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "docs")]
    import transformer2_nbdev
    if Path(transformer2_nbdev.__file__).resolve().is_relative_to(ROOT / "transformer2_nbdev"):
        sys.exit("--alone wants the package installed from a wheel, and this Python imports the clone")


def alone(path: Path, python: str = sys.executable, flags: str = "", timeout: float = None):
    "A copy of one notebook in an empty folder, run by `python`: the finished process, its text in stdout"
    drop = ("PYTHONPATH", "TRANSFORMER2_DATA")
    env = {k: v for k, v in os.environ.items() if k not in drop} | ENV
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(path, folder))
        env |= dict(HF_HUB_OFFLINE="1", HF_HOME=f"{folder}/.hub")
        command = [python, __file__, "--here", "--alone", "--flags", flags, str(copy)]
        return subprocess.run(command, env=env, cwd=folder, timeout=timeout, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def heavy(nb, path: Path):
    "Name what outgrew the limits."
    if path.stat().st_size > MAX_NB: yield f"\n  heavy: the notebook has {path.stat().st_size} bytes, the limit is {MAX_NB}"
    for i, c in enumerate(nb.cells):
        for o in c.get("outputs", []):
            size = len("".join(o.get("data", {}).get("image/png", ""))) * 3 // 4
            if size > MAX_FIG: yield f"\n  heavy: cell {i} has a figure of {size} bytes, the limit is {MAX_FIG}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks; default: all, in reading order")
    parser.add_argument("--flags", default="", help='run cells with these flags too, e.g. "gpu slow"')
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)      # one notebook in this process
    parser.add_argument("--alone", action="store_true",
                        help="copies in an empty folder, from the installed package")
    args = parser.parse_args()
    if args.here: return print(run(args.paths[0].resolve(), set(args.flags.split()), not args.alone))
    for path in [p.resolve() for p in args.paths] or notebooks():
        if not path.is_file(): sys.exit(f"{path}: no such notebook")
        print(f"{path.name:24}", end="", flush=True)
        if args.alone:
            done = alone(path, flags=args.flags)
            print(done.stdout, end="")
            if done.returncode: sys.exit(1)
            continue
        if subprocess.run([sys.executable, __file__, "--here", "--flags", args.flags, str(path)], env={**os.environ, **ENV}).returncode: sys.exit(1)


if __name__ == "__main__": main()
