"The judge imports nothing that a program could have put in its way, under every set of walls."
import os, sys
from pathlib import Path
import pytest
from transformer2_nbdev.sandbox import run_program, _run, _MODES, _config

SAID = "PLANTED-CODE-RAN"
PLANT = f"print({SAID!r}, __name__, flush=True)\n"


def _available(walls):
    try: return _run(walls, "", "").status == "pass"
    except Exception: return False

WALLS = [w for w in _MODES if _available(w)]

# modules that a judge may want while it works: for values, for failures, for tests, for codecs
NAMES = """traceback linecache tokenize fractions decimal datetime random collections json ast warnings
locale encodings site sitecustomize usercustomize string math_helpers copy re enum typing numbers
contextlib statistics _strptime calendar __main__ sandbox marshal types operator codecs""".split()

LEAVE = {
    "modules": "for n in NAMES: open(n + '.py', 'w').write(PLANT)",
    "packages": "for n in NAMES:\n    os.makedirs(n)\n    open(n + '/__init__.py', "
                "'w').write(PLANT)",
    "bytecode": "import py_compile\nos.makedirs('__pycache__')\nopen('plant.py', "
                "'w').write(PLANT)\n"
                "for n in NAMES:\n"
                "    py_compile.compile('plant.py', n + '.pyc')\n"
                "    py_compile.compile('plant.py', "
                "f'__pycache__/{n}.{sys.implementation.cache_tag}.pyc')",
    "extensions": "for n in NAMES: open(n + '.so', 'wb').write(b'not even a library')",
    "site files": "open('x.pth', 'w').write('import os; os.write(1, b\"' + PLANT + '\")')\n"
                  "open('pyvenv.cfg', "
                  "'w').write('home = .\\ninclude-system-site-packages = true')\n"
                  "open('python311._pth', 'w').write('.')\n"
                  "v = f'lib/python{sys.version_info[0]}.{sys.version_info[1]}'\n"
                  "for d in (v, v + '/site-packages', '.local/' + v + '/site-packages'):\n"
                  "    os.makedirs(d, exist_ok=True)\n"
                  "    for n in NAMES: open(f'{d}/{n}.py', 'w').write(PLANT)",
    "sources": "for n in ('<tests>', '<string>', '<program>', 'tests'): open(n, 'w').write(PLANT)\n"
               "os.mkfifo('<frozen importlib._bootstrap>')",
    "entry points": "os.makedirs('p.dist-info')\n"
                    "open('p.dist-info/entry_points.txt', 'w').write('[x]\\ny = random:z')\n"
                    "open('p.dist-info/METADATA', 'w').write('Name: p\\nVersion: 1')",
    "locale": "os.makedirs('C/LC_MESSAGES')\nopen('C/LC_MESSAGES/messages.mo', 'wb').write(b'x')\n"
              "open('setup.cfg', 'w').write('[x]')\nopen('.pdbrc', 'w').write(PLANT)",
}
HEAD = f"import os, sys\nNAMES = {NAMES!r}\nPLANT = {PLANT!r}\n"

NEEDY = """
import random, string, datetime
def late():
    import statistics, copy, locale
    return copy.copy(statistics.mean([1, 3]))
assert 'é'.encode('utf-16') and 'x'.encode('idna') == b'x' and late() == 2
assert datetime.datetime.strptime('2025', '%Y').year == 2025 and random.Random(0).random() < 1
from fractions import Fraction
assert f(1) == Fraction(1, 3), str(f(1))
"""
THIRD = "def f(x):\n    from fractions import Fraction\n    return Fraction(1, 3)\n"
HALF = "def f(x):\n    from fractions import Fraction\n    return Fraction(1, 2)\n"


@pytest.mark.parametrize("walls", WALLS)
@pytest.mark.parametrize("kind", LEAVE)
def test_what_a_program_leaves_is_not_imported(kind, walls):
    right = run_program(HEAD + THIRD + LEAVE[kind], NEEDY, walls=walls, timeout=10)
    assert right.passed and SAID not in right.output, right
    wrong = run_program(HEAD + HALF + LEAVE[kind], NEEDY, walls=walls, timeout=10)
    assert wrong.status == "fail" and "f(1) == Fraction" in wrong.detail and SAID not in wrong.output, wrong


@pytest.mark.parametrize("walls", WALLS)
def test_planting_during_a_call(walls):
    "Between two questions of one test, when the judge is certainly running."
    plant = HEAD + "def f(x):\n    " + LEAVE["modules"].replace("\n", "\n    ") + "\n    return x\n"
    tests = "assert f(1) == 1\nimport calendar, locale, string\nassert f(2) == 2 and string.digits"
    out = run_program(plant, tests, walls=walls, timeout=10)
    assert out.passed and SAID not in out.output, out


@pytest.fixture
def planted(tmp_path):
    "A folder full of planted modules, with the layout of a home and of an installation."
    exec(f"import os, sys\nos.chdir({str(tmp_path)!r})\nNAMES = {NAMES!r}\nPLANT = {PLANT!r}\n"
         + LEAVE["modules"] + "\n" + LEAVE["site files"], {})
    os.chdir(Path(__file__).parent.parent)
    return tmp_path

@pytest.mark.parametrize("walls", WALLS)
def test_the_callers_environment_and_folder_do_not_reach_the_judge(planted, walls, monkeypatch):
    for name in """PYTHONPATH PYTHONUSERBASE PYTHONSTARTUP PYTHONHOME PYTHONPLATLIBDIR PYTHONEXECUTABLE
                   PYTHONCASEOK PYTHONPYCACHEPREFIX LD_LIBRARY_PATH LD_PRELOAD LD_AUDIT LOCPATH HOME
                   NLSPATH TERMINFO""".split():
        monkeypatch.setenv(name, str(planted / "random.py" if "STARTUP" in name else planted))
    for name, value in dict(PYTHONINSPECT="1", PYTHONWARNINGS="error", PYTHONBREAKPOINT="random.z",
                            PYTHONHASHSEED="7", PYTHONOPTIMIZE="2",
                                PYTHONIOENCODING="ascii").items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(planted)
    out = run_program(THIRD, NEEDY, walls=walls, timeout=10)
    assert out.passed and SAID not in out.output and "LD_" not in out.output, out
    assert run_program(HALF, NEEDY, walls=walls,
                       timeout=10).status == "fail"      # asserts still count


@pytest.mark.parametrize("walls", WALLS)
def test_installed_packages_cannot_be_changed_under_the_judge(walls, tmp_path, monkeypatch):
    "A site folder that belongs to the caller: the tests may import from it, the program may not add to it."
    site = tmp_path / "site-packages"
    site.mkdir()
    for p in (*tmp_path.parents, tmp_path, site):
        if p != Path("/") and os.access(p, os.W_OK) and p.stat().st_uid == os.geteuid():
            p.chmod(p.stat().st_mode | 0o55)
    (site / "helper_there.py").write_text("VALUE = 5")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    program = (f"def f(x):\n    for n in ('helper_late', 'fractions', 'locale'):\n"
               f"        try: open({str(site)!r} + '/' + n + '.py', "
               f"'w').write({PLANT!r} + 'VALUE = 6')\n"
               f"        except OSError: pass\n    return x\n")
    use = "import helper_there\nassert f(5) == helper_there.VALUE"
    assert run_program("def f(x): return x", use, walls=walls).passed
    late = "assert f(6) == 6\nimport locale\nfrom helper_late import VALUE\nassert VALUE == f(6)"
    out = run_program(program, late, walls=walls)
    assert out.status == "fail" and "helper_late" in out.detail and SAID not in out.output, out


def test_the_judge_keeps_its_path_only_where_it_is_guarded():
    cfg = lambda walls: _config(walls, "/tmp/x", 1, 64, 8, 4, False)
    assert cfg("namespaces")["guarded"]
    if os.geteuid() != 0 and not os.access(os.path.dirname(os.__file__), os.W_OK): return
    if not cfg("limits")["drop_root"]: assert not cfg("limits")["guarded"]
