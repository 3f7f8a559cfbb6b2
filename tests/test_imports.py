"""The rule of the rooms: what a module may import, and that importing one reads and downloads nothing."""
import ast, json, os, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIB = "transformer2_nbdev"
GENERATED = {"__init__", "_modidx"}
ONLY = {"svd": {"torch"}, "svf": {"torch"}}                              # third parties a module may import, anywhere outside a function
NEVER = {m: {"torch"} for m in ("sandbox", "tasks", "verifiers", "benchmarks")}                       # not even inside one
ADAPTATION = {"adapt", "prompt", "classifier", "fewshot", "transfer"}    # these work from saved experts alone
TOOLS = {"fastcore", "nbdev", "execnb", "IPython", "ipykernel", "nbconvert"}


def modules() -> list:
    "The exported modules in reading order, from the notebooks' numbers and their `#| default_exp`."
    order = []
    for nb in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")):
        for c in json.loads(nb.read_text(encoding="utf-8"))["cells"]:
            m = re.search(r"^#\|\s*default_exp\s+(\S+)", "".join(c["source"]), re.M) if c["cell_type"] == "code" else None
            if m: order.append(m[1]); break
    return order


ORDER = modules()


def imports(tree: ast.AST) -> list:
    "(module, level, names, inside a function?) of every import statement."
    found = []
    def visit(node, inside):
        if isinstance(node, ast.Import): found.extend((a.name, 0, (), inside) for a in node.names)
        if isinstance(node, ast.ImportFrom): found.append((node.module or "", node.level, tuple(a.name for a in node.names), inside))
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))
    visit(tree, False)
    return found


def rooms_imported(tree) -> set:
    "Modules of this library that the tree imports."
    found = set()
    for name, level, names, _ in imports(tree):
        parts = ([LIB] if level else []) + [p for p in name.split(".") if p]
        if parts[:1] == [LIB]: found |= {parts[1]} if len(parts) > 1 else set(names)
    return found


def third_parties(tree, inside=None) -> set:
    "Top-level packages outside the standard library and this one; `inside` asks for imports inside (True) or outside (False) functions."
    return {n.split(".")[0] for n, level, _, i in imports(tree) if not level and inside in (None, i)} - sys.stdlib_module_names - {LIB}


def tree_of(module: str) -> ast.AST: return ast.parse((ROOT / LIB / f"{module}.py").read_text(encoding="utf-8"))


def test_the_helpers_see_what_they_should():
    tree = ast.parse("import torch, os\nfrom .svd import Q\nfrom . import svf\nimport transformer2_nbdev.lab\ndef f():\n    import matplotlib.pyplot as p")
    assert rooms_imported(tree) == {"svd", "svf", "lab"}
    assert third_parties(tree) == {"torch", "matplotlib"} and third_parties(tree, inside=False) == {"torch"}


def test_every_notebook_has_its_module_and_every_module_its_notebook():
    assert len(ORDER) == len(set(ORDER)) and ORDER[:2] == ["svd", "svf"]
    assert {p.stem for p in (ROOT / LIB).glob("*.py")} - GENERATED == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_no_module_imports_a_later_room(module):
    allowed = set(ORDER[:ORDER.index(module)])
    assert rooms_imported(tree_of(module)) <= allowed | {"__version__", "progress_bar", "record", "shipped"}
    if module in ADAPTATION: assert "reinforce" not in rooms_imported(tree_of(module))


@pytest.mark.parametrize("module", ORDER)
def test_third_parties(module):
    tree = tree_of(module)
    assert not third_parties(tree) & TOOLS
    assert "matplotlib" not in third_parties(tree, inside=False), "matplotlib belongs inside the functions that plot"
    if module in ONLY: assert third_parties(tree, inside=False) <= ONLY[module]
    if module in NEVER: assert not third_parties(tree) & NEVER[module]


# One process imports every module on its own, in order, with sockets closed and every open() for reading watched.
PROBE = """
import builtins, importlib, io, json, os, socket, sys
def refuse(*a, **k): raise AssertionError("a module opened a connection while it was imported")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
opened, lib, root = [], sys.argv[1], os.path.realpath(sys.argv[2])
def watch(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)) and recording: opened.append(os.fsdecode(args[0]))
recording = False
sys.addaudithook(watch)
report = {}
for name in sys.argv[3:]:
    opened.clear(); recording = True
    importlib.import_module(f"{lib}.{name}")
    recording = False
    data = sorted({p for p in map(os.path.realpath, opened) if not p.endswith((".py", ".pyc", ".so", ".pth"))
                   and (p.startswith((root + "/transformer2_nbdev/", os.environ["TRANSFORMER2_DATA"], os.environ["HF_HOME"])))})
    report[name] = dict(read=data, torch="torch" in sys.modules, pyplot="matplotlib.pyplot" in sys.modules)
print("REPORT" + json.dumps(report))
"""


def probe(names, tmp_path) -> dict:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT),
           "TRANSFORMER2_DATA": os.environ.get("TRANSFORMER2_DATA") or str((ROOT / "../shared/data").resolve())}
    out = subprocess.run([sys.executable, "-c", PROBE, LIB, str(ROOT), *names], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-2000:]
    return json.loads(out.stdout.split("REPORT")[1])


def test_nothing_is_read_or_downloaded_at_import(tmp_path):
    without_torch = [m for m in ORDER if m in NEVER]
    report = probe(without_torch + [m for m in ORDER if m not in NEVER], tmp_path)
    assert list(report) and set(report) == set(ORDER)
    for name, seen in report.items():
        assert not seen["read"], f"{name} reads {seen['read']} while it is imported"
        assert not seen["torch"] or name not in without_torch, f"{name} brings in torch"
    assert not report["svf"]["pyplot"]


def test_links_to_this_project_come_from_settings(settings):
    "Moving the project is one edit of settings.ini; what is written out in notebooks and modules has to agree with it."
    pattern = re.compile(r"github\.com/([\w.-]+/transformer2[\w-]*)")
    files = [ROOT / "index.ipynb", ROOT / "README.md", ROOT / "CITATION.cff", *sorted((ROOT / "nbs").glob("*.ipynb")), *sorted((ROOT / LIB).glob("*.py"))]
    wrong = {f"{f.name}: {m}" for f in files for m in pattern.findall(f.read_text(encoding="utf-8")) if m != f"{settings['user']}/{settings['repo']}"}
    assert not wrong
    assert f"version: {settings['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
