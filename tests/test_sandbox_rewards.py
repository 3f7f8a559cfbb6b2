"Rewards that could be had without solving the task, and the honest programs beside them."
import os, threading
import pytest
from transformer2_nbdev.sandbox import run_program, _prepare, _cut, _serve, _run_tests, _Line, _MODES, _run, ProgramGone

def passes(program, tests, **kw):
    "The verdict in the sandbox."
    out = run_program(program, tests, timeout=10, **kw)
    assert out.status in ("pass", "fail", "error"), out
    return out.passed

def judged(program, tests, keep=False):
    "The same verdict without walls, the program's side in a thread; for programs that only answer."
    (theirs, to_them), (from_them, back) = os.pipe(), os.pipe()
    thread = threading.Thread(target=_serve, args=(theirs, back, False))
    thread.start()
    try:
        job = dict(_prepare(tests, ()), program=program)
        status, _, again = _run_tests(job, _Line(to_them, from_them, 10, keep))
    except ProgramGone: return False
    finally:
        os.close(to_them)
        thread.join()
        for fd in (theirs, from_them, back): os.close(fd)
    if again and not keep: return judged(program, tests, keep=True)
    return status == "pass"

def _available(walls):
    try: return _run(walls, "", "").status == "pass"
    except Exception: return False

WALLS = [w for w in _MODES if _available(w)]
WITHOUT_SOLVING = [
    ("class A:\n    def __contains__(self, x): return True\ndef f(x): return A()",
     "assert 3 in f(1)"),
    ("def f(x): raise StopIteration", "assert all(map(f, [1, 2]))"),
    ("def f(x):\n    yield from ()", "for a, b in zip(f(1), [1]): assert a == b"),
    ("class math:\n    def isclose(*a): return True\ndef f(x): return 0",
     "assert math.isclose(f(2), 4)"),
    ("import sys\ndef f(x): sys.exit(0)", "try: f(-1)\nexcept Exception: pass"),
    ("def f(xs):\n    xs.clear()\n    return []", "xs = [3, 1]\nassert f(xs) == sorted(xs)")]

@pytest.mark.parametrize("walls", WALLS)
@pytest.mark.parametrize("program, tests", WITHOUT_SOLVING)
def test_nothing_is_paid_without_solving(walls, program, tests):
    assert not passes(program, tests, walls=walls) and not passes(program, tests, walls=walls,
        entry_points=("f",))


# --- values that claim more than they are ---------------------------------------------------------
CLAIMS = {
    "contains": "def __contains__(self, x): return True", "equal":
        "def __eq__(self, x): return True",
    "hash": "def __hash__(self): return 7\n    def __eq__(self, x): return True",
    "bool": "def __bool__(self): return False", "less": "def __lt__(self, x): return True",
    "class": "@property\n    def __class__(self): return list",
    "array": "@property\n    def __array_interface__(self): return dict(data=(id(0), True), "
             "shape=(1,), "
             "typestr='<i8', version=3)",
    "copy": "def __deepcopy__(self, memo): return 3\n    def __reduce__(self): return (int, (3,))",
    "index": "def __index__(self): return 3\n    def __int__(self): return 3",
}
ASKS = ["assert 3 in f(1)", "assert f(1) == 3", "assert 3 == f(1)", "assert not f(1) != 3",
        "assert f(1) in [3, 4]", "assert f(1) in {3: 4}", "assert {f(1): 2}[3] == 2",
            "assert not f(1)",
        "assert f(1) < 3", "assert isinstance(f(1), (int, list))", "assert [3].index(f(1)) == 0",
        "assert range(9)[f(1)] == 3",
        "assert f(1) == f(1)", "a, b = f(1), f(2)\nassert a == b", "assert len({f(1), f(1)}) == 1"]

@pytest.mark.parametrize("base", ["object", "int", "str", "list", "dict", "tuple", "set", "float"])
def test_what_an_object_says_of_itself_is_not_believed(base):
    "Each claim against each question, on an object that is not the wanted value."
    for claim, method in CLAIMS.items():
        if base != "object" and claim in ("class", "array", "copy", "index"): continue
        program = f"class C({base}):\n    {method}\n    try: __hash__\n    except NameError: __hash__ = None\n"
        program += "def f(x): return C()\n"
        for ask in ASKS:
            plain = base != "object"
            if plain and ask in ("assert not f(1)", "assert f(1) < 3", "assert f(1) == f(1)",
                                 ASKS[13], ASKS[14],
                                 "assert isinstance(f(1), (int, list))"):
                                     continue   # true of 0, "" and []
            assert not judged(program, ask), (claim, ask)

def test_honest_containers_still_contain():
    program = "class Bag:\n    def __init__(self, *xs): self.xs = xs\n    def __iter__(self): return iter(self.xs)\n"
    program += "def f(): return Bag(1, 2, 3)\ndef g():\n    yield from 'abc'\ndef d(): return {1: 2}"
    assert judged(program, "assert 3 in f() and 4 not in f() and 'b' in g() and 'z' not in g() "
                           "and 1 in d()")
    assert not judged(program, "assert 4 in f()")

def test_arrays_are_not_read_through_an_address_of_the_programs():
    pytest.importorskip("numpy")
    program = ("import ctypes\nx = (ctypes.c_int64 * 2)(1, 2)\nclass C:\n"
               "    __array_interface__ = dict("
               "data=(ctypes.addressof(x), True), shape=(2,), typestr='<i8', version=3)\n"
               "def f(): return C()")
    assert not judged(program, "import numpy as np\nassert np.array(f()).tolist() == [1, 2]")
    assert judged("def f(): return [1, 2]", "import numpy as np\nassert np.allclose(np.array(f()), "
                                            "[1, 2])")


# --- handles --------------------------------------------------------------------------------------
SAME_HANDLE = """
import json, os, sys
import sandbox
real = sandbox._send
def send(fd, msg):
    if msg[0] == 'ok' and isinstance(msg[1], list) and msg[1][:1] == ['handle']: msg = ['ok', ['handle', KEY], []]
    real(fd, msg)
sandbox._send = send
class P:
    def __init__(self, x): self.x = x
def f(x): return P(x)
"""
@pytest.mark.parametrize("key", ["0", "float('nan')", "True", "None", "[1]", "{'a': 1}", "'x'"])
def test_a_forged_handle_equals_no_other(key):
    program = SAME_HANDLE.replace("KEY", key)
    for ask in ("assert f(1) == f(1)", "a = f(1)\nb = f(1)\nassert a == b", "assert f(1) in [f(2)]",
                "assert len({f(1), f(2)}) == 1", "assert not f(1) != f(2)",
                    "assert [f(1)] == [f(1)]"):
        assert not passes(program, ask), ask

def test_one_object_for_all_equals_no_other():
    program = "class P:\n    def __eq__(self, o): return True\n    def __hash__(self): return 0\none = P()\ndef f(x): return one"
    assert not passes(program, "assert f(1) == f(2)")
    assert passes(program, "a = f(1)\nassert a == a and a in [a]")


# --- tests in which nothing is compared -----------------------------------------------------------
EMPTY = {"list": "return []", "generator": "yield from ()", "iterator": "return iter([])",
         "dict": "return {}",
         "map": "return map(str, [])", "ends": "class E:\n        def __iter__(s): return s\n"
         "        def __next__(s): raise StopIteration\n    return E()",
         "stops": "raise StopIteration", "stops async": "raise StopAsyncIteration"}
LOOPS = ["for a, b in zip(f(), [1, 2]): assert a == b", "for x in f(): assert x in (1, 2)",
         "assert all(a == b for a, b in zip(f(), [1, 2]))", "assert all(x > 0 for x in f())",
         "assert all(f())", "assert not any(x > 2 for x in f())", "assert all(map(lambda x: x > 0, "
             "f()))",
         "assert all([a == b for a, b in zip(f(), [1, 2])])",
         "for i, x in enumerate(f()):\n    if x != i + 1: raise AssertionError",
         "def same(a, b): assert a == b\nfor a, b in zip(f(), [1, 2]): same(a, b)",
         "def check(g):\n    for a, b in zip(g(), [1, 2]): assert a == b\ncheck(f)",
         "def check(g):\n    assert 1 == 1\n    for x in g():\n        assert x < 9\ncheck(f)",
         "assert 1 == 1\nfor a, b in zip(f(), [1, 2]): assert a == b",
         "import unittest\nt = unittest.TestCase()\nfor a, b in zip(f(), [1, 2]): t.assertEqual(a, "
         "b)",
         "it = iter(f())\nwhile (x := next(it, None)) is not None: assert x in (1, 2)",
         "if 1:\n    with open('/dev/null'):\n        try:\n"
         "            for x in f(): assert x > 0\n        finally: pass"]

@pytest.mark.parametrize("tests", LOOPS)
def test_a_loop_over_nothing_compares_nothing(tests):
    for name, body in EMPTY.items(): assert not judged(f"def f():\n    {body}", tests), name
    assert judged("def f(): return [1, 2]", tests)
    assert judged("def f():\n    yield 1\n    yield 2", tests)
    if "f()" in tests and "x < 9" not in tests and tests != "assert all(f())":
        assert not judged("def f(): return [-1, 3]", tests)

@pytest.mark.parametrize("raised", ["StopIteration", "StopIteration(1)", "StopAsyncIteration",
                                    "GeneratorExit"])
def test_an_exception_is_not_the_end_of_a_loop(raised):
    program = f"def f(x): raise {raised}"
    for tests in ("assert all(map(f, [1, 2]))", "assert list(map(f, [1, 2])) == []",
                  "assert sum(map(f, [1])) == 0",
                  "for a, b in zip(map(f, [1, 2]), [2, 4]): assert a == b", "assert [*map(f, "
                      "[1])] == []",
                  "assert not any(filter(f, [1, 2]))", "assert list(iter(lambda: f(1), 0)) == []"):
        assert not judged(program, tests), tests

def test_stop_iteration_where_it_is_meant():
    program = "def g():\n    yield 1"
    assert judged(program, "it = g()\nassert next(it) == 1\ntry: next(it)\n"
                           "except StopIteration: pass\nelse: assert False")
    assert judged(program, "assert list(g()) == [1] and sum(g()) == 1 and next(iter(g()), 5) == 1")

def test_comparing_with_nothing_is_comparing():
    for body in ("return []", "return ''", "return 0", "return None"):
        wanted = body[7:]
        assert judged(f"def f(): {body}", f"assert f() == {wanted}\nassert not f()")
    assert judged("def f(): return []", "assert [x for x in f() if x > 3] == [] and len(f()) == 0")

def test_what_is_empty_now_and_then_may_be():
    "Each statement must have compared something once, not every time."
    tree = "class N:\n    def __init__(self, *c): self.c = list(c)\ndef make(): return N(N(), N(N()))"
    walk = "def check(n):\n    for c in n.c:\n        assert isinstance(c.c, object)\n        check(c)\ncheck(make())"
    assert judged(tree, walk)
    program = "def divisors(n): return [d for d in range(2, n) if n % d == 0]"
    assert judged(program, "for n in (7, 12):\n    for d in divisors(n): assert n % d == 0")

def test_an_expected_exception_is_a_comparison():
    tests = "for x, kind in ((1, ValueError), (0, KeyError)):\n    try: f(x)\n    except kind: pass\n    else: assert False"
    assert judged("def f(x): raise ValueError if x else KeyError", tests)
    assert not judged("def f(x): raise ValueError", tests) and not judged("def f(x): return x",
        tests)
    ends = "g = f()\nwhile True:\n    try: assert next(g) == 1\n    except StopIteration: break"
    assert judged("def f():\n    yield 1", ends) and not judged("def f():\n    yield from ()", ends)

def test_tests_without_comparisons_of_their_own_are_left_alone():
    assert judged("def f(): return 1", "pass") and judged("def f(): return 1", "f()")
    assert judged("def f(): return 1", "total = 0\nfor x in []: total += x\nassert f() == 1")
    assert judged("def f(): return 1", "assert f()") and not judged("def f(): return 0",
        "assert f()")

def test_reports_keep_their_line_numbers():
    tests = "x = 1\n\n\nfor a in [1, 2]:\n    assert f(a) == a\n\nassert f(5) == 6"
    out = run_program("def f(x): return x", tests)
    assert out.status == "fail" and out.detail.endswith("at `assert f(5) == 6`")
    out = run_program("def f(): return []", "x = 1\nfor a in f():\n    assert a")
    assert out.detail == "compared nothing at `for a in f():`"


# --- arguments ------------------------------------------------------------------------------------
EMPTIED = "def f(xs):\n    xs.clear()\n    return type(xs)()"
SORTS = {"new": "def f(xs): return sorted(xs)", "both": "def f(xs):\n    xs.sort()\n    return xs",
         "copy": "def f(xs):\n    xs = list(xs)\n    xs.sort()\n    return xs"}
FROM_ARGUMENT = ["xs = [3, 1, 2]\nassert f(xs) == sorted(xs)", "xs = [3, 1, 2]\nassert sorted(xs) "
                 "== f(xs) ",
                 "xs = [3, 1, 2]\nr = f(xs)\nassert r == sorted(xs)",
                 "xs = [3, 1, 2]\nr = f(xs)\nwant = sorted(xs)\nassert r == want",
                 "for xs in ([3, 1], [2, 1, 5]): assert f(xs) == sorted(xs)",
                 "def check(g):\n    xs = [3, 1, 2]\n    assert g(xs) == sorted(xs)\ncheck(f)",
                 "xs = ys = [3, 1, 2]\nassert f(xs) == sorted(ys)",
                 "def same(a, b): return a == b\nxs = [3, 1, 2]\nassert same(f(xs), sorted(xs))",
                 "xs = [3, 1, 2]\nr = f(xs)\nassert all(a == b for a, b in zip(r, sorted(xs))) "
                 "and len(r) == len(xs)",
                 "cases = [[3, 1], [2, 1]]\nrs = [f(c) for c in cases]\nassert rs == [sorted(d) "
                 "for d in cases]",
                 "cases = [[3, 1], [2, 1]]\nassert [f(c) for c in cases] == [sorted(c) "
                 "for c in cases]"]

@pytest.mark.parametrize("tests", FROM_ARGUMENT)
def test_an_emptied_argument_does_not_agree(tests):
    assert not judged(EMPTIED, tests)
    assert not judged("def f(xs):\n    xs[:] = [1]\n    return [1]", tests)
    for name, program in SORTS.items(): assert judged(program, tests), name

def test_an_emptied_dict_or_set_does_not_agree():
    assert not judged(EMPTIED, "d = {1: 2}\nassert f(d) == dict(d)")
    assert not judged(EMPTIED, "s = {1, 2}\nassert f(s) == set(s)")
    assert judged("def f(d): return dict(d)", "d = {1: 2}\nassert f(d) == dict(d)")

def test_working_in_place_is_seen():
    in_place = "def f(xs): xs.sort()"
    assert judged(in_place, "xs = [3, 1, 2]\nf(xs)\nassert xs == [1, 2, 3]")
    assert judged(in_place, "xs = [3, 1, 2]\nys = sorted(xs)\nf(xs)\nassert xs == ys")
    assert judged(in_place, "xs = [3, 1, 2]\nassert f(xs) is None and xs == [1, 2, 3]")
    assert not judged("def f(xs): pass", "xs = [3, 1, 2]\nf(xs)\nassert xs == [1, 2, 3]")

def test_working_in_place_and_returning_a_length():
    program = "def f(xs):\n    xs[:] = sorted(set(xs))\n    return len(xs)"
    assert judged(program, "xs = [3, 1, 3]\nk = f(xs)\nassert k == 2 and xs[:k] == [1, 3]")
    assert judged(program, "xs = [3, 1, 3]\nk = f(xs)\nwant = [1, 3]\nassert k == len(want)\n"
                           "for i in range(k): assert xs[i] == want[i]")

def test_a_test_that_its_argument_is_left_alone_still_sees_a_change():
    tests = "xs = [3, 1]\nbefore = list(xs)\nf(xs)\nassert xs == before"
    assert judged("def f(xs): return sorted(xs)", tests) and not judged(EMPTIED, tests)


# --- names ----------------------------------------------------------------------------------------
LYING = "class math:\n    pi = 0\n    def isclose(*a, **k): return True\n    def sqrt(x): return 0\ndef f(x): return 0\n"
@pytest.mark.parametrize("program", [LYING, "import math\nmath.isclose = lambda *a, **k: True\n"
                                            "def f(x): return 0",
                                     "import types\nmath = types.ModuleType('math')\n"
                                     "math.isclose = lambda *a: True\ndef f(x): return 0",
                                     "import sys\nclass M:\n"
                                     "    isclose = staticmethod(lambda *a: True)\n"
                                     "math = sys.modules['math'] = M\ndef f(x): return 0"])
def test_a_math_of_its_own(program):
    assert not passes(program, "assert math.isclose(f(2), 4)")
    assert not passes(program, "assert math.isclose(f(2), 4)", entry_points=("f",))
    assert passes("import math\ndef f(x): return x * x", "assert math.isclose(f(2), 4)")
    assert passes("def f(x): return x * x", "assert math.isclose(f(2), "
                                            "4)")     # the tests' own import was missing

def test_functions_of_the_library_where_the_caller_has_listed_names():
    lying = "def isclose(*a): return True\nclass Counter:\n    def __eq__(s, o): return True\ndef f(x): return 0"
    for tests in ("assert isclose(f(2), 4)", "assert Counter(str(f(2))) == Counter('4')",
                  "assert f(2) == sqrt(16)"):
        assert not passes(lying, tests, entry_points=("f",))
        assert passes("def f(x): return x * x", tests, entry_points=("f",))
    assert passes("def count(x): return 3\ndef f(x): return 4", "assert count(f(1)) "
                  "== 3")     # nothing was listed
    assert passes("def count(x): return 3\ndef f(x): return 4", "assert count(f(1)) == 3",
                  entry_points=("f", "count"))

def test_a_program_may_be_asked_for_a_name_of_the_library():
    assert passes("def array(n): return [0] * n", "assert array(2) == [0, 0]")
    assert passes("class queue:\n    def push(self): return 1", "assert queue().push() == 1")
    assert passes("class Q:\n    def push(self): return 1\nqueue = Q()", "assert queue.push() == 1")
    assert passes("class math:\n    def twice(x): return 2 * x", "assert math.twice(2) == 4")
    assert passes("def sum(a): return 6", "assert sum(1) == 6", entry_points=("sum",))

def test_names_of_python_and_of_the_tests_are_the_judges():
    lying = "def all(*a): return True\nlen = sorted = zip = all\n__builtins__['all'] = all\ndef f(x): return 0"
    assert not passes(lying, "assert all(x == 4 for x in [f(2)])")
    assert not passes(lying, "def all(xs): return min(xs)\nassert all([f(2) == 4])")
    assert not passes("__name__ = 'tests'\n__builtins__ = {}\ndef f(x): return 0", "assert f(2) "
                      "== 4 and __name__ == 'tests'")


# --- leaving, and the exceptions that tests expect ------------------------------------------------
LEAVES = ["import os\n    os._exit(0)", "import sys\n    sys.exit(0)", "import os\n"
          "    os.kill(os.getpid(), 9)",
          "import os\n    os.closerange(0, 99)", "import ctypes\n    ctypes.string_at(0)",
          "import os\n    os.write(4, b'garbage' * 99)", "raise SystemExit",
              "raise KeyboardInterrupt",
          "import atexit, os\n    atexit.register(os._exit, 0)\n    os._exit(0)"]
EXPECTS = ["try: f(-1)\nexcept {}: pass\nelse: assert False", "try:\n    f(-1)\n    assert False\n"
           "except {}: pass",
           "import contextlib\nwith contextlib.suppress({}): f(-1)",
           "import unittest\nwith unittest.TestCase().assertRaises({}): f(-1)"]

@pytest.mark.parametrize("leave", LEAVES)
def test_dying_is_no_exception(leave):
    for i, expect in enumerate(EXPECTS):
        kind = ("Exception", "(ValueError, OSError)")[i % 2]
        out = run_program(f"def f(x):\n    {leave}", expect.format(kind), timeout=5)
        assert out.status in ("error", "fail"), (expect, kind, out)

@pytest.mark.parametrize("kind", ["", " BaseException", " Exception"])
def test_a_bare_except_hides_no_death(kind):
    tests = f"for x in (1, 2):\n    try: f(x)\n    except{kind}: pass"
    assert run_program("import os\ndef f(x): os._exit(0)", tests).status == "error"
    assert run_program("def f(x):\n    while True: pass", tests, timeout=1).status == "timeout"
    assert passes("def f(x): raise ValueError", tests)

@pytest.mark.parametrize("kind", ["Exception", "ValueError"])
def test_raising_what_is_expected(kind):
    for expect in EXPECTS: assert passes("def f(x): raise ValueError('no')", expect.format(kind))
    for expect in EXPECTS[:1] + EXPECTS[3:]: assert not passes("def f(x): return 0",
        expect.format(kind))

def test_a_time_out_of_the_programs_own_is_an_exception_like_any_other():
    assert passes("def f(x): raise TimeoutError", "try: f(1)\nexcept TimeoutError: pass\n"
                                                  "else: assert False")
    assert run_program("def f(x): raise TimeoutError", "f(1)").status == "fail"
    assert run_program("raise TimeoutError", "f(1)").status == "error"


# --- numbers, depth, threads ----------------------------------------------------------------------
def test_nan_is_close_to_nothing():
    nan = "def f(x): return float('nan')"
    for tests in ("assert f(1) == 2", "assert abs(f(1) - 2) < 1e-6", "import math\n"
                  "assert math.isclose(f(1), 2)",
                  "assert f(1) == f(1)", "assert [f(1)] == [2]", "assert f(1) <= 2 or f(1) >= 2",
                      "assert f(1) in (1, 2)"):
        assert not passes(nan, tests), tests

def test_depth_and_size_do_not_pass():
    deep = "def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a"
    for tests in ("assert f(1) == f(1)", "assert f(1) == [[]]", "try: assert f(1) == 2\n"
                  "except RecursionError: raise ValueError"):
        assert not passes(deep, tests)
    assert not passes("import os\ndef f(x):\n    d = b'[\"ok\", "
                      "' + b'[' * 10 ** 6 + b']' * 10 ** 6 + b', null]'\n"
                      "    os.write(4, len(d).to_bytes(8, 'big') + d)", "try: f(1)\n"
                          "except Exception: pass")

def test_threads_that_answer_first():
    program = ("import json, os, threading\ndef shout():\n    d = json.dumps(['ok', 3, "
               "[]]).encode()\n"
               "    while True: os.write(4, len(d).to_bytes(8, 'big') + d)\n"
               "threading.Thread(target=shout, daemon=True).start()\ndef f(x): return 0")
    assert not passes(program, "assert f(1) == 3 and f(2) == 4")

def test_builtins_that_were_replaced_stay_in_the_program():
    program = ("import builtins, json, operator\nfor n in dir(builtins):\n"
               "    if n in ('len', 'sorted', 'abs', 'isinstance', 'all', 'any', 'sum', 'min', "
               "'max', 'AssertionError'):\n"
               "        setattr(builtins, n, lambda *a, **k: True)\noperator.eq = lambda a, "
               "b: True\ndef f(x): return 0")
    assert not passes(program, "assert sorted([f(1)]) == [1] and len([f(1)]) == 1 and abs(f(2)) "
                               "== 2")


# --- what reaches the record ----------------------------------------------------------------------
@pytest.mark.parametrize("program", [
    "raise ValueError('x' * (60 << 20))", "def f(x): raise ValueError('x' * (60 << 20))",
    "def f(x): return 'x' * (50 << 20)", "class E(Exception): pass\nE.__name__ = 'E' * 10 ** 6\n"
                                         "def f(x): raise E",
    "import json, os\ndef f(x):\n    d = json.dumps(['raise', 'ValueError', "
    "'x' * (60 << 20)]).encode()\n"
    "    v = memoryview(len(d).to_bytes(8, 'big') + d)\n    while v: v = v[os.write(4, v):]",
    "import json, os\ndef f(x):\n    d = json.dumps(['x' * (60 << 20)]).encode()\n"
    "    v = memoryview(len(d).to_bytes(8, 'big') + d)\n    while v: v = v[os.write(4, v):]",
    "class C:\n    def __str__(self): return 'x' * (50 << 20)\n    __repr__ = __str__\n"
    "def f(x): return C()"])
def test_a_long_text_does_not_reach_the_record(program):
    out = run_program(program, "y = f(1)\nassert y == 2, y", timeout=20)
    assert out.status in ("fail", "error") and len(out.detail) < 1500, out.detail[:2000]

def test_the_record_is_one_printable_line():
    for text in ("a\\nb", "\\x1b[2J", "\\ud800", "\\0", "é"):
        out = run_program(f"def f(x): raise ValueError('{text}')", "f(1)")
        assert out.status == "fail" and out.detail.isprintable() and out.detail.encode(), out.detail
    assert "é" in out.detail and _cut("é") == "é"

def test_tests_are_prepared_once():
    tests = "assert f(1) == 987654321"
    assert _prepare(tests, ("f",))["code"] is _prepare(tests, ("f",))["code"]
