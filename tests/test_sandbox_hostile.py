"Programs that mean harm. None may pass, outlive its limit by two seconds, or leave a process or a file behind."
import os, subprocess, sys, tempfile, time, uuid
from pathlib import Path
import pytest
from transformer2_nbdev.sandbox import run_program, run_many, _run

TESTS = "assert f(1) == 2\nassert f(41) == 42"
RIGHT = "def f(x): return x + 1\n"
WRONG = "def f(x): return x - 1\n"
TIMEOUT = 1.
MARK = f"sbx{uuid.uuid4().hex[:12]}"      # stands in each program's text and arguments, so that survivors can be found


def _available(walls):
    try: return _run(walls, "", "").status == "pass"
    except Exception: return False

WALLS = [w for w in ("namespaces", "filters") if _available(w)]
if not WALLS: pytest.skip("neither namespaces nor seccomp filters can be had on this machine",
                          allow_module_level=True)


def _survivors():
    "Processes whose memory image or arguments bear our mark, and judges that were not reaped."
    found = []
    for p in Path("/proc").iterdir():
        if not p.name.isdigit() or int(p.name) == os.getpid(): continue
        try: cmd = (p / "cmdline").read_bytes().decode(errors="replace"); parent = int((p / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError: continue
        if MARK in cmd or ("m._judge(" in cmd and parent in (1, os.getpid())):
            found.append((p.name, cmd[:80]))
    return found

def _litter(): return [p for d in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")
                       if os.path.isdir(d) for p in os.listdir(d)
                       if MARK in p or (d == tempfile.gettempdir() and p.startswith("sandbox-"))]

@pytest.fixture(autouse=True)
def _own_temporary_folder(monkeypatch, tmp_path):
    "A folder for temporary files that other programs on this machine do not use."
    with tempfile.TemporaryDirectory(dir="/tmp") as d:
        os.chmod(d, 0o755); monkeypatch.setattr(tempfile, "tempdir", d)
        yield


@pytest.fixture(params=WALLS)
def attack(request):
    "attack(program, ...) -> Outcome, having checked everything that must hold for every hostile program."
    def go(program, tests=TESTS, timeout=TIMEOUT, **kw):
        others, start = set(_survivors()), time.monotonic()
        out = run_program(f"MARK = {MARK!r}\n{program}", tests, timeout=timeout,
                          walls=request.param, **kw)
        seconds = time.monotonic() - start
        assert out.status != "pass", out
        assert seconds < timeout + 2, f"{seconds:.1f} s"
        deadline = time.monotonic() + .5
        while (left := set(_survivors()) - others) and time.monotonic() < deadline: time.sleep(.02)
        assert not left, left
        assert not _litter()
        return out
    go.walls = request.param
    return go


@pytest.mark.parametrize("walls", WALLS)
def test_an_honest_program_passes(walls):
    out = run_program(RIGHT, TESTS, walls=walls)
    assert out.passed and out.output == "" and out.detail == "every test passed"
    assert run_program(WRONG, TESTS, walls=walls).status == "fail"


# --- time, memory, disk, processes ----------------------------------------------------------------
def test_endless_loop(attack): assert attack("while True: pass").status == "timeout"
def test_endless_loop_inside_the_call(attack): assert attack("def f(x):\n"
    "    while True: pass").status == "timeout"
def test_sleep(attack): assert attack("import time; time.sleep(100)").status == "timeout"
def test_uninterruptible_arithmetic(attack):
    assert attack("x = 10 ** 10 ** 9").status in ("timeout", "error")

def test_fork_bomb(attack):
    attack(WRONG + "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")

def test_a_fork_bomb_stays_within_its_number(attack):
    out = attack("import os, time\nn = 0\ntry:\n    while os.fork(): n += 1\n    time.sleep(60)\n"
                 "except OSError: print('children', n, flush=True)\nos._exit(0)", processes=6)
    assert int(out.output.split()[1]) <= 6

def test_thread_bomb(attack):
    attack(WRONG + "import threading, time\nwhile True:\n"
                   "    try: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
                   "    except RuntimeError: pass")

def test_memory_bomb(attack):
    out = attack("x = [0] * (1 << 34)", memory_mb=512)
    assert out.status == "error" and "MemoryError" in out.detail

def test_slow_memory_bomb(attack): attack("x = []\nwhile True: x.append(bytearray(1 << 22))",
                                          memory_mb=512)

def test_memory_bomb_in_the_judge(attack): attack("def f(x): return 'x' * (1 << 28)")

def test_one_huge_file(attack):
    out = attack("import os\nwith open('big', 'wb') as f:\n"
                 "    while True: f.write(bytes(1 << 20))", disk_mb=16)
    assert out.status == "error"

def test_many_files(attack):
    out = attack("i = 0\nwhile True:\n    i += 1\n    open(f'{i}', 'wb').write(bytes(1 << 20))",
                 disk_mb=16)
    assert out.status == "error"

def test_a_deep_and_locked_tree_is_removed(attack):
    attack(WRONG + "import os\nfor i in range(1500): os.mkdir('d'); os.chdir('d')\n"
                   "os.chdir(os.environ['HOME'])\nos.symlink('/', 'd/link')\nos.chmod('d', 0)")

def test_huge_output(attack):
    out = attack("import os\nwhile True: os.write(1, b'x' * 65536)", output_limit=1000)
    assert out.output.startswith("x" * 1000) and len(out.output) < 1100 and "bytes more]" in out.output

def test_deep_recursion(attack): attack("import sys\nsys.setrecursionlimit(1 << 30)\n"
                                        "def f(x): return f(x)", memory_mb=512)

def test_recursion_through_c(attack):
    attack("import sys\nsys.setrecursionlimit(1 << 30)\nx = []\nfor _ in range(10 ** 6): x = [x]\n"
           "def f(_): return x")

def test_crash(attack):
    out = attack("import ctypes; ctypes.string_at(0)")
    assert out.status == "error" and "SIGSEGV" in out.detail


# --- other people's files, secrets, network -------------------------------------------------------
def test_deleting_files_outside(attack, tmp_path):
    tmp_path.chmod(0o777); keep = tmp_path / "keep"; keep.write_text("precious"); keep.chmod(0o666)
    attack(f"import os, shutil\nfor act in (os.remove, shutil.rmtree, lambda p: open(p, 'w')):\n"
           f"    for p in ({str(keep)!r}, {str(tmp_path)!r}):\n"
           f"        try: act(p)\n        except OSError: pass\n" + WRONG)
    assert keep.read_text() == "precious"

def test_writing_outside(attack):
    out = attack(f"""
for d in ('/tmp', '/var/tmp', '/dev/shm', '/root', '/home', '/etc', '/usr/lib', {os.getcwd()!r}, {sys.prefix!r}):
    try: open(d + '/{MARK}', 'w').write('x')
    except OSError: print('refused', d)
""" + WRONG)
    assert out.output.count("refused") >= 8           # a private /tmp may exist inside
    assert not any(os.path.exists(f"{d}/{MARK}") for d in ("/tmp", "/var/tmp", "/dev/shm", "/root",
                                                           "/home", "/etc", "/usr/lib",
                                                               os.getcwd(), sys.prefix))

def test_reading_the_users_files(attack, tmp_path):
    tmp_path.chmod(0o755); secret = tmp_path / "id_rsa"; secret.write_text("SECRET-KEY"); secret.chmod(0o644)
    out = attack(f"""
for p in ({str(secret)!r}, '/etc/passwd', '/etc/shadow', {os.path.abspath(__file__)!r}, '/proc/1/environ', '/proc/{os.getpid()}/maps'):
    try: print('got', p, open(p).read()[:20])
    except OSError as e: print('refused', p)
""" + WRONG)
    assert "got" not in out.output and out.output.count("refused") == 6

def test_reading_the_parents_environment(attack, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_topsecret")
    out = attack(f"""
import os
print(dict(os.environ))
for pid in [{os.getpid()}, os.getppid(), 1, 'self']:
    try: print(open(f'/proc/{{pid}}/environ').read())
    except OSError: pass
""" + WRONG)
    assert "PATH" in out.output and "topsecret" not in out.output and "HF_TOKEN" not in out.output

def test_sockets(attack):
    import socket
    server = socket.create_server(("127.0.0.1", 0)); server.settimeout(.1)
    out = attack(f"""
import socket
for family, kind, to in ((socket.AF_INET, socket.SOCK_STREAM, ('127.0.0.1', {server.getsockname()[1]})), (socket.AF_INET6, socket.SOCK_STREAM, ('::1', 80)),
                         (socket.AF_INET, socket.SOCK_DGRAM, ('8.8.8.8', 53)), (socket.AF_UNIX, socket.SOCK_STREAM, '/run/docker.sock')):
    try: socket.socket(family, kind).connect(to); print('connected')
    except OSError as e: print('refused', e)
""" + WRONG)
    with pytest.raises(TimeoutError): server.accept()
    server.close()
    assert "connected" not in out.output and out.output.count("refused") == 4

def test_io_uring_is_no_way_round(attack):
    out = attack("import ctypes\nl = ctypes.CDLL(None, use_errno=True)\nprint(l.syscall(425, 8, "
                 "ctypes.create_string_buffer(200)), ctypes.get_errno())\n" + WRONG)
    assert out.output.split() == ["-1", "1"]

def test_regaining_privileges(attack):
    out = attack("""
import ctypes, os
l = ctypes.CDLL(None, use_errno=True)
print(l.unshare(0x10000000), l.mount(b'none', b'/', None, 32 | 4096, None), l.chroot(b'.'), l.ptrace(16, os.getppid(), 0, 0))
try: os.setuid(0); print('root', os.listdir('/root'))
except OSError: print('no')
""" + WRONG)
    assert out.output.split() == ["-1"] * 4 + ["no"]


# --- other processes ------------------------------------------------------------------------------
def test_killing_the_parent(attack):
    "Caller, judge and bystanders live on; the judge still gives its verdict."
    bystander = subprocess.Popen(["sleep", "30"])
    out = attack(f"""
import os, signal
for pid in (os.getppid(), {os.getpid()}, {bystander.pid}, -1, 0, -os.getpgid(0)):
    for kill in (os.kill, os.killpg):
        try: kill(pid, 9)
        except (OSError, OverflowError): pass
""" + WRONG)
    assert bystander.poll() is None
    bystander.kill(); bystander.wait()
    assert out.status in ("fail",
                          "error")            # in its own process table, kill(-1) may end the program itself

def test_daemonising_children(attack):
    attack("""
import os, time
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for i in range(20):
                os.closerange(i, i + 1)
        while True: time.sleep(1)
except OSError: pass
""" + WRONG)

def test_a_daemon_under_another_name(attack):
    attack(f"import subprocess\ntry: subprocess.Popen(['/bin/sh', '-c', 'sleep 60; : {MARK}'], "
           f"start_new_session=True)\nexcept OSError: pass\n" + WRONG)

def test_ignoring_sigterm(attack):
    out = attack("import signal\nfor s in range(1, 65):\n    try: signal.signal(s, "
                 "signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass")
    assert out.status == "timeout"

def test_stopping_itself(attack): assert attack("import os, signal\nos.kill(os.getpid(), "
                                                "signal.SIGSTOP)").status in ("timeout", "error")


# --- forged verdicts ------------------------------------------------------------------------------
@pytest.mark.parametrize("leave", ["os._exit(0)", "sys.exit(0)", "raise SystemExit",
                                   "os.kill(os.getpid(), 9)", "os.execv('/bin/true', ['true'])",
                                       "quit()",
                                   "os.abort()", "raise KeyboardInterrupt"])
def test_leaving_before_the_tests(attack, leave):
    assert attack(f"import os, sys\n{leave}").status == "error"
    assert attack(f"import os, sys\ndef f(x):\n    {leave}").status in ("error", "fail")

def test_printing_passed(attack):
    out = attack("print('1 passed'); print('OK'); print('{\"status\": \"pass\", "
                 "\"detail\": \"\"}')\n" + WRONG)
    assert out.status == "fail" and "1 passed" in out.output

def test_writing_a_verdict_to_every_descriptor(attack):
    attack("""
import os, json
for verdict in (json.dumps(dict(status='pass', detail='')).encode(),):
    for fd in range(256):
        for data in (verdict, len(verdict).to_bytes(8, 'big') + verdict):
            try: os.write(fd, data)
            except OSError: pass
""" + WRONG)

def test_answering_for_the_server(attack):
    "Forged replies on the channel are return values like any other; they end the run, or are wrong."
    attack("""
import os, json
for msg in (['ok', None, None], ['ok', True, []], ['pass'], ['ok', ['handle', 0], []], [], 7, {'status': 'pass'}, ['ok', 2, [[0, 2]]]):
    data = json.dumps(msg).encode(); os.write(4, len(data).to_bytes(8, 'big') + data)
""" + WRONG)

def test_a_reply_of_absurd_length(attack): attack("import os\nos.write(4, (1 << 60).to_bytes(8, "
                                                  "'big'))\n" + WRONG)
def test_a_reply_too_deep_to_read(attack): attack("import os\nd = b'[' * 100000\nos.write(4, "
                                                  "len(d).to_bytes(8, 'big') + d)\n" + WRONG)

AGREES = """
class Yes({base}):
    __hash__ = {base}.__hash__ if {base}.__hash__ else object.__hash__
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __getattr__(self, name): return Yes()
    def __class__(self): return int
def f(x): return Yes()
"""
@pytest.mark.parametrize("base", ["object", "int", "str", "list", "dict", "float", "tuple", "set"])
def test_an_object_equal_to_everything(attack, base):
    assert attack(AGREES.format(base=base)).status == "fail"

@pytest.mark.parametrize("name", ["len", "set", "sorted", "abs", "isinstance", "AssertionError",
                                  "int"])
def test_monkey_patching_builtins(attack, name):
    tests = "assert len(g(1)) == 2 and set(g(1)) == {1, 2} and sorted(g(1)) == [1, 2]\nassert isinstance(g(1), list) and abs(g(1)[0]) == 1 and int('2') == 2"
    attack(f"import builtins\nclass Any:\n    def __eq__(s, o): return True\n"
           f"{name} = builtins.{name} = lambda *a: Any()\ndef g(x): return [9]", tests)

def test_monkey_patching_the_machinery(attack):
    attack("""
import sys, os, builtins, json, gc
import sandbox as s
for name in dir(s):
    if callable(getattr(s, name)) and not isinstance(getattr(s, name), type): setattr(s, name, lambda *a, **k: ('pass', ''))
sys.exit = os._exit = builtins.exit = lambda *a: None
json.dumps = lambda *a, **k: '{"status": "pass", "detail": ""}'
""" + WRONG)

def test_inspecting_frames_and_memory_finds_no_tests(attack):
    "The wanted value stands in the tests alone; a search of every frame and object of the process does not find it."
    tests = "assert f('q') == 'the wanted ' + 'value 8675309'"
    out = attack("""
import gc, sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame: seen.append(repr(frame.f_locals) + repr(frame.f_globals)); frame = frame.f_back
    text = ''.join(seen) + ''.join(repr(o) for o in gc.get_objects() if isinstance(o, (str, dict, list, tuple)))
    print('found' if ''.join(reversed('9035768 eulav')) in text else 'not found')
    return None
""", tests, timeout=5)
    assert "not found" in out.output

def test_hidden_state_between_calls(attack): assert attack("n = [1]\ndef f(x):\n"
                                                           "    n[0] += 1; return n[0]").status == "fail"
def test_closing_stdout(attack): attack("import os, sys\n"
                                        "sys.stdout.close(); sys.stderr.close(); os.close(1); os.close(2)\n" + WRONG)
def test_closing_everything(attack): attack("import os\nos.closerange(0, 256)\n" + WRONG)
def test_a_lying_traceback(attack): attack("def f(x):\n    raise type('Passed', (BaseException,), "
                                           "{'__str__': lambda s: 1 / 0})()")
def test_import_hooks(attack): attack("import sys\nclass L:\n    def find_spec(self, "
                                      "*a): import os; os._exit(0)\nsys.meta_path.insert(0, L())\n"
                                      "import nonsense")


# --- the caller -----------------------------------------------------------------------------------
def test_a_dead_caller_takes_its_programs_along():
    code = ("from transformer2_nbdev.sandbox import run_program\n"
            "run_program('while True: pass', 'f()', timeout=60)")
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    children = lambda: [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()
                        and _descends(int(p.name), caller.pid)]
    deadline = time.monotonic() + 20
    while len(found := children()) < 2 and time.monotonic() < deadline: time.sleep(.05)
    assert len(found) >= 2                             # the judge, and at least one more
    time.sleep(.5)
    found = children()
    caller.kill(); caller.wait()
    deadline = time.monotonic() + 2
    while (alive := [p for p in found if _runs(p)]) and time.monotonic() < deadline: time.sleep(.02)
    assert not alive

def test_a_caller_that_dies_while_it_speaks():
    "Half of the first message, and then nothing: the interpreter must end, and not wait or spin."
    from transformer2_nbdev.sandbox import _START, _ENV, _own_code
    for part in (b"", b"\0", (1 << 20).to_bytes(8, "big") + b"x" * 1000,
                 len(_own_code()).to_bytes(8, "big") + _own_code(),
                 len(_own_code()).to_bytes(8, "big") + _own_code() + b"\0\0"):
        p = subprocess.run([sys.executable, "-s", "-S", "-B", "-c", _START % 1], input=part, env=_ENV,
                           capture_output=True, timeout=20, cwd="/")
        assert b'"pass"' not in p.stdout

def _runs(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError: return False

def _descends(pid, ancestor):
    while pid > 1:
        try: pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError: return False
        if pid == ancestor: return True
    return False

def test_from_a_thread_and_in_parallel():
    jobs = [dict(program=p, tests=TESTS) for p in (RIGHT, WRONG, "while True: pass",
                                                   "import os; os._exit(0)") * 2]
    assert [o.status for o in run_many(jobs, workers=4, progress=False, timeout=1)] == ["pass",
        "fail", "timeout", "error"] * 2

def test_no_descriptor_is_lost():
    count = lambda: len(os.listdir("/proc/self/fd"))
    run_program(RIGHT, TESTS); before = count()
    for _ in range(5): run_program("import os; os.closerange(0, 99)", TESTS)
    assert count() == before


# --- what is left over ----------------------------------------------------------------------------
def _zombies():
    "Our children that ended and were not waited for; orphans of our own come to us here, not to process 1."
    found = set()
    for p in Path("/proc").iterdir():
        if not p.name.isdigit(): continue
        try: state, parent = (p / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError: continue
        if state == "Z" and int(parent) == os.getpid(): found.add(int(p.name))
    return found

@pytest.fixture
def heir():
    "This process inherits the orphans of its children, as process 1 otherwise would."
    import ctypes
    prctl = ctypes.CDLL(None).prctl
    prctl(36, 1, 0, 0, 0)
    yield
    prctl(36, 0, 0, 0, 0)
    for pid in _zombies(): os.waitpid(pid, 0)

FORKS = "import os, time\nfor i in range(3):\n    try:\n        if os.fork() == 0: time.sleep(60)\n    except OSError: pass\n"
@pytest.mark.parametrize("walls", [*WALLS, "limits"])
@pytest.mark.parametrize("program, tests", [
    ("while True: pass", TESTS), (RIGHT, "f(1)\nwhile True: pass"), (FORKS + "while True: pass",
        TESTS), (FORKS + RIGHT, TESTS),
    (FORKS + "os._exit(0)", TESTS), ("for i in range(99): open(str(i), "
                                     "'wb').write(bytes(1 << 20))", TESTS),
    ("import os\ntry:\n    if os.fork() == 0:\n        os.setsid()\n        while True: pass\n"
     "except OSError: pass\n" + RIGHT, "f(1)\nwhile True: pass")])
def test_no_zombie_and_no_orphan_is_left(heir, walls, program, tests):
    before = _zombies()
    run_program(f"MARK = {MARK!r}\n" + program, tests, timeout=1, disk_mb=16, walls=walls)
    deadline = time.monotonic() + 1
    while (left := _zombies() - before) and time.monotonic() < deadline: time.sleep(.05)
    assert not left and not _survivors() and not _litter()

def test_other_processes_of_the_user_are_left_alone(attack):
    "Their priority, processor, memory and signals: by every call that names a process or its owner."
    bystander = subprocess.Popen(["sleep", "30"])
    nice, cores = os.getpriority(os.PRIO_PROCESS,
                                 bystander.pid), os.sched_getaffinity(bystander.pid)
    out = attack(f"""
import ctypes, fcntl, os, struct
pid, l = {bystander.pid}, ctypes.CDLL(None, use_errno=True)
r, w = os.pipe()
acts = dict(
    priority=lambda: os.setpriority(os.PRIO_PROCESS, pid, 7), user=lambda: os.setpriority(os.PRIO_USER, {os.geteuid()}, 7),
    group=lambda: os.setpriority(os.PRIO_PGRP, os.getpgid(0), 7), affinity=lambda: os.sched_setaffinity(pid, [0]),
    scheduler=lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)), prlimit=lambda: __import__('resource').prlimit(pid, 7, (9, 9)),
    setown=lambda: fcntl.fcntl(r, 8, pid), setown_ex=lambda: fcntl.fcntl(r, 15, struct.pack('ii', 1, pid)),
    setsig=lambda: fcntl.fcntl(r, 10, 9), ioctl=lambda: fcntl.ioctl(r, 0x8901, struct.pack('i', pid)),
    kill=lambda: os.kill(pid, 9), pidfd=lambda: os.pidfd_open(pid))
for name, act in acts.items():
    try: act(); print('did', name)
    except OSError as e: print('no', name)
for number in (256, 279, 312, 440, 448):
    if l.syscall(number, pid, 0, 0, 0, 0) >= 0: print('did', number)
""" + WRONG)
    assert bystander.poll() is None and os.getpriority(os.PRIO_PROCESS, bystander.pid) == nice
    assert os.sched_getaffinity(bystander.pid) == cores
    bystander.kill()
    bystander.wait()
    harmless = ("user", "group", "setsig") if attack.walls == "namespaces" else ()
    assert [l for l in out.output.splitlines() if l.startswith("did")
            and l.split()[1] not in harmless] == []

def test_mode_owner_and_times_of_files_are_left_alone(attack, tmp_path):
    tmp_path.chmod(0o755)
    keep = tmp_path / "keep"
    keep.write_text("precious")
    keep.chmod(0o644)
    before = keep.stat()
    attack(f"""
import os
p = {str(keep)!r}
for act in (lambda: os.chmod(p, 0), lambda: os.utime(p, (1, 1)), lambda: os.chown(p, os.getuid(), os.getgid()), lambda: os.truncate(p, 0),
            lambda: os.setxattr(p, 'user.x', b'1'), lambda: os.link(p, 'link'), lambda: os.rename(p, 'moved'), lambda: os.chmod({str(tmp_path)!r}, 0)):
    try: act(); print('did')
    except OSError: pass
""" + WRONG)
    after = keep.stat()
    for field in ("st_mode", "st_uid", "st_gid", "st_mtime_ns", "st_atime_ns", "st_size",
                  "st_nlink"):
        assert getattr(before, field) == getattr(after, field), field
    assert keep.read_text() == "precious" and not os.listxattr(keep)

def test_shared_memory_and_queues_of_the_user(attack):
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    number = libc.shmget(0, 4096, 0o1600)
    if number < 0: pytest.skip("no System V shared memory on this machine")
    try:
        out = attack(f"import ctypes\nl = ctypes.CDLL(None)\nl.shmat.restype = ctypes.c_long\n"
                     f"print('shm', l.shmat({number}, None, 0))\n"
                     f"print('rm', l.shmctl({number}, 0, None))\n" + WRONG)
    finally: libc.shmctl(number, 0, None)
    assert out.output.split() == ["shm", "-1", "rm", "-1"]

def test_calls_newer_than_the_table_do_not_exist(attack):
    out = attack("import ctypes\nl = ctypes.CDLL(None, use_errno=True)\nfor n in (471, 500, 999):\n"
                 "    print(l.syscall(n, 0, 0, 0), ctypes.get_errno())\n" + WRONG)
    assert out.output.split() == ["-1", "38"] * 3

def test_a_link_in_place_of_the_folder_is_not_followed(tmp_path):
    "The program's folder lies in one that it does not own; without other walls it may still try."
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "file").write_text("precious")
    keep.chmod(0o500)
    run_program(f"import os\nhere = os.getcwd()\nos.chdir('/')\ntry:\n    os.rmdir(here)\n"
                f"    os.symlink({str(keep)!r}, here)\nexcept OSError: pass\n" + WRONG,
                TESTS, walls="limits")
    assert (keep / "file").read_text() == "precious" and not _litter()

def test_weak_walls_must_be_asked_for(monkeypatch, capfd):
    import transformer2_nbdev.sandbox as s
    monkeypatch.setattr(s, "_best", "limits")
    monkeypatch.setattr(s, "_told", set())
    monkeypatch.delenv("TRANSFORMER2_UNCONFINED", raising=False)
    for go in (lambda: run_program(RIGHT, TESTS), lambda: run_many([dict(program=RIGHT,
        tests=TESTS)], progress=False)):
        with pytest.raises(PermissionError, match="TRANSFORMER2_UNCONFINED=1") as e: go()
        assert "\n" not in str(e.value)
    monkeypatch.setenv("TRANSFORMER2_UNCONFINED", "0")
    with pytest.raises(PermissionError): run_program(RIGHT, TESTS)
    assert run_program(RIGHT, TESTS, unconfined=True).passed and run_program(RIGHT, TESTS,
        walls="limits").passed
    monkeypatch.setenv("TRANSFORMER2_UNCONFINED", "1")
    assert run_program(RIGHT, TESTS).passed
    assert capfd.readouterr().err.count("a program can still") == 1           # told once
    monkeypatch.setattr(s, "_best", WALLS[0])
    assert run_program(RIGHT, TESTS).passed
