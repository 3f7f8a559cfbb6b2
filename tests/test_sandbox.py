"The sandbox with friendly programs: values that cross, statuses, protections, errors in one line."
import os, subprocess, sys
import pytest
from transformer2_nbdev.sandbox import run_program, run_many, protections, isolation, Outcome


@pytest.mark.parametrize("value", ["None", "True", "-7", "2 ** 300", "1.5", "float('inf')",
                                   "'é\\n'", "b'\\0'", "[1, [2]]", "(1,)", "{1, 2}",
                                       "frozenset([3])",
                                   "{(1, 2): {'a': [None]}}", "range(2, 9, 3)", "1 + 2j", "int",
                                       "__import__('fractions').Fraction(1, 3)",
                                   "__import__('decimal').Decimal('1.10')",
                                       "__import__('datetime').date(2025, 1, 14)",
                                           "__import__('collections').deque([1])",
                                   "__import__('datetime').timedelta(days=-1, microseconds=3)"])
def test_plain_values_cross_unchanged(value):
    out = run_program("def f(x): return x", f"v = {value}\nw = f(v)\nassert w == v and type(w) "
                                            f"is type(v), w")
    assert out.passed, out.detail

def test_subclasses_arrive_as_plain_values():
    program = ("import collections, enum\nP = collections.namedtuple('P', 'x y')\n"
               "class E(enum.IntEnum): A = 3\n"
               "def f(): return P(1, 2), collections.Counter('aab'), collections.defaultdict(int, "
               "a=1), E.A, {1: 2}.keys()")
    assert run_program(program, "assert f() == ((1, 2), {'a': 2, 'b': 1}, {'a': 1}, 3, {1})").passed

def test_numpy_scalars_compare():
    pytest.importorskip("numpy")
    assert run_program("import numpy as np\ndef f(): return np.float64(1.5), np.int64(3)",
                       "assert f() == (1.5, 3)").passed

def test_objects_stay_and_can_be_used():
    program = ("class Node:\n    def __init__(self, v): self.v = v; self.left = None\n"
               "    def total(self): return self.v + (self.left.total() if self.left else 0)\n"
               "def count(n): return 1 + (count(n.left) if n.left else 0)\ndef squares():\n"
               "    for i in range(3): yield i * i")
    tests = ("root = Node(1)\nroot.left = Node(2)\nassert count(root) == 2 and root.total() == 3 "
             "and root.left.v == 2\n"
             "assert list(squares()) == [0, 1, 4]\nassert sum(squares()) == 5 and root == root "
             "and root != root.left")
    out = run_program(program, tests)
    assert out.passed, out.detail

def test_arguments_changed_in_place():
    out = run_program("def f(x, d): x.append(4); x.sort(); d['k'] = 1", "x, d = [3, 5], {}\n"
                      "assert f(x, d) is None and x == [3, 4, 5] and d == {'k': 1}")
    assert out.passed, out.detail

def test_exceptions_keep_their_builtin_type():
    program = "class Mine(Exception): pass\ndef f(x):\n    if x: raise ValueError('no')\n    raise Mine('own')"
    tests = "for x, kind in ((1, ValueError), (0, RuntimeError)):\n    try: f(x)\n    except kind as e: pass\n    else: assert False"
    assert run_program(program, tests).passed

def test_names_of_the_tests_and_of_python_win():
    assert run_program("def sum(a, b): return 6", "assert sum([1, 2]) == 3").passed
    assert run_program("def sum(a, b): return 6", "assert sum(10, 15) == 6", entry_points=("sum",
        )).passed
    assert run_program("def helper(x): return 0\ndef f(x): return helper(x)",
                       "def helper(x): return 1\nassert helper(2) == 1 and f(2) == 0").passed

@pytest.mark.parametrize("program, tests, status, said", [
    ("def f(x): return x", "assert f(1) == 2", "fail", "assert f(1) "
                                                       "== 2"), ("def f(x): return 1 / x", "f(0)",
                                                           "fail", "ZeroDivisionError"),
    ("def g(x): pass", "f(1)", "fail", "NameError"), ("def f(x:", "f(1)", "error",
                                                      "SyntaxError"), ("import nonsense", "f(1)",
                                                          "error", "ModuleNotFoundError"),
    ("1 / 0", "", "error", "ZeroDivisionError"), ("def f(): pass", "assert f(", "fail",
                                                  "SyntaxError"), ("def f(): pass", "f(print)",
                                                      "fail", "cannot pass"),
    ("print('hi')", "", "pass", "no tests"), ("\0", "", "error", "null bytes")])
def test_status_and_reason(program, tests, status, said):
    out = run_program(program, tests)
    assert out.status == status and said in out.detail, out

def test_main_guard_runs_only_without_tests():
    program = "if __name__ == '__main__': print('main')"
    assert run_program(program).output == "main\n" and run_program(program, "pass").output == ""

def test_output_is_kept_in_order_and_cut():
    out = run_program("import sys\nprint('a')\nprint('b', file=sys.stderr)\nprint('x' * 50)",
                      output_limit=20)
    assert out.output.startswith("a\n") and out.output.endswith("bytes more]")

def test_files_can_be_written_inside():
    assert run_program("import tempfile\nopen('a', 'w').write('x')\nwith tempfile.TemporaryFile() "
                       "as f: f.write(b'1')\ndef f(): return open('a').read()", "assert f() "
                           "== 'x'").passed

def test_stdin_is_empty(): assert "EOFError" in run_program("input()").detail

def test_verdicts_do_not_depend_on_the_hash_seed():
    assert len({run_program("print(list(set('transformer')))").output for _ in range(3)}) == 1

def test_protections_and_require():
    p = protections()
    assert p["isolation"] == isolation() and p["verdict"] and p["environment"]
    assert run_program("", require=[k for k, v in p.items() if v and k != "isolation"]).passed
    with pytest.raises(RuntimeError, match="no protection of network, writes"): run_program("",
        require=("network", "writes"), walls="limits")
    with pytest.raises(RuntimeError, match="no protection of magic"): run_program("",
        require=("magic",))

def test_run_many_keeps_order():
    jobs = [dict(program=f"def f(): return {i}", tests=f"assert f() == {i if i % 2 else -1}")
            for i in range(6)]
    out = run_many(jobs, workers=2, progress=False, timeout=10)
    assert [o.passed for o in out] == [False, True] * 3 and all(isinstance(o, Outcome) for o in out)
    assert run_many([], progress=False) == []

def test_import_is_light():
    code = "import sys, transformer2_nbdev.sandbox as s; print([m for m in ('torch', 'numpy', 'transformers', 'subprocess', 'ast') if m in sys.modules])"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    assert subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True,
                          env=env,
                              cwd=os.path.dirname(os.path.dirname(__file__))).stdout.strip() == "[]"

def test_an_ordinary_user_is_protected_too(tmp_path):
    "The same walls without root: a copy of the package, run by user 65534 with the system's Python."
    if os.geteuid() != 0: pytest.skip("this process is an ordinary user already")
    python = next((p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(p)),
                  None)
    if python is None: pytest.skip("no system Python that another user could run")
    import shutil, tempfile, transformer2_nbdev
    with tempfile.TemporaryDirectory(dir="/tmp") as d:
        os.makedirs(f"{d}/transformer2_nbdev")
        source = os.path.dirname(transformer2_nbdev.__file__)
        for f in ("__init__.py", "sandbox.py"): shutil.copy(f"{source}/{f}",
            f"{d}/transformer2_nbdev/{f}")
        subprocess.run(["chmod", "-R", "a+rX", d], check=True)
        code = (f"import os, sys; sys.path.insert(0, "
                f"{d!r}); os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
                f"from transformer2_nbdev.sandbox import *\n"
                "print(isolation(), run_program('def f(): return 1', 'assert f() == 1').status, "
                "run_program('import os; os._exit(0)', 'f()').status)\n"
                "print(run_program(\"for p in ('/etc/passwd', '/proc/1/status', '/home', "
                "'/root'):\\n    try: open(p).close()\\n    except OSError: print('no')\").output.split())")
        out = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/")
    assert out.returncode == 0, out.stderr
    walls, *rest = out.stdout.split("\n")[0].split()
    assert rest == ["pass", "error"]
    if walls != "limits": assert out.stdout.split("\n")[1] == str(["no"] * 4)
