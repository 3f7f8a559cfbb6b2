"""The sandbox's walls beside bubblewrap and other packages: what each stops, and what it costs.

usage: python benchmarks/sandbox_walls.py [--repeats 15] [--libraries FOLDER] [--out FILE]
Needs bubblewrap (apt-get install bubblewrap). FOLDER, optional, is where pip install --target put
landlock, py-landlock, pyseccomp and seccompy. Contenders take turns; times are quartiles.
"""
import argparse, json, marshal, os, platform, socket, statistics, subprocess, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from transformer2_nbdev import sandbox

ap = argparse.ArgumentParser()
ap.add_argument("--repeats", type=int, default=15)
ap.add_argument("--libraries", default=None)
RECORDS = Path(__file__).resolve().parent.parent / "transformer2_nbdev" / "data" / "records"
ap.add_argument("--out", default=str(RECORDS / "sandbox-walls.json"))
args = ap.parse_args()

# The same keeper, judge and protocol; only the program's side is started by bubblewrap, in an
# interpreter of its own, since bubblewrap starts programs and cannot take in a running process.
BUBBLEWRAP = '''
_ours = _confine
_AGAIN = """
import sys
sys.path[:] = [p for p in sys.path if p]
import os, marshal, types, json
m = sys.modules["sandbox"] = types.ModuleType("sandbox")
cfg = json.loads(os.read(6, 1 << 20))
exec(marshal.loads(os.read(5, 1 << 24)), m.__dict__)
os.closerange(5, 99)
m._inside(cfg)
"""
def _inside(cfg):
    "In the second interpreter, within bubblewrap's walls; with ours on top where asked for."
    if cfg["isolation"] == "bubblewrap+":
        _limit(AS=cfg["memory_mb"] << 20, FSIZE=cfg["disk_mb"] << 20, NOFILE=64, CORE=0,
               CPU=cfg["cpu"])
        _seccomp(_filter(False, os.getpid()))
    sys.path[:] = cfg["path"]
    os.environ.update(HOME=os.getcwd(), TMPDIR=os.getcwd())
    _send(4, ["ready", None])
    _serve(3, 4, cfg["main"])

def _confine(cfg, rx, tx):
    if not cfg["isolation"].startswith("bubblewrap"): return _ours(cfg, rx, tx)
    _send(tx, ["pid", os.getpid()])
    code, rest = cfg["code"].encode("latin-1"), json.dumps(dict(cfg, code="")).encode()
    for fd, data in ((5, code), (6, rest)):
        made = os.memfd_create("x")
        os.write(made, data)
        os.lseek(made, 0, 0)
        if made != fd: os.dup2(made, fd)
        os.set_inheritable(fd, True)
    how = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
           "--size", str(cfg["disk_mb"] << 20), "--tmpfs", "/box", "--tmpfs", "/tmp",
           "--dev", "/dev"]
    for p in cfg["readable"]:
        if os.path.islink(p): how += ["--symlink", os.readlink(p), p]
        elif not p.startswith("/dev"): how += ["--ro-bind", p, p]
    os.execv("/usr/bin/bwrap", [*how, "--chdir", "/box", "--",
                               os.path.realpath(sys.executable), "-s", "-S", "-B", "-c", _AGAIN])
'''
source = Path(sandbox.__file__).read_text() + BUBBLEWRAP
sandbox._compiled = marshal.dumps(compile(source, sandbox.__file__, "exec"))
plain_config = sandbox._config
def config(mode, *rest, **kw):
    cfg = plain_config(mode, *rest, **kw)
    if not mode.startswith("bubblewrap"): return cfg
    return dict(cfg, code=sandbox._compiled.decode("latin-1"))
sandbox._config = config
MODES = ["bubblewrap", "bubblewrap+", "namespaces", "filters", "limits"]


def probes(secret, bystander, port, mark):
    "Programs that print DID when they succeed at something that is not theirs to do."
    call = "import ctypes, os\nl = ctypes.CDLL(None)\n"
    return {
        "read a file of yours": f"open({secret!r}).read(); print('DID')",
        "write beside it": f"open({secret!r} + '2', 'w').close(); print('DID')",
        "change its mode": f"import os; os.chmod({secret!r}, 0o600); print('DID')",
        "learn its size": f"import os; os.stat({secret!r}); print('DID')",
        "connect to a port here": "import socket\n"
                                  f"socket.create_connection(('127.0.0.1', {port}), 1)\n"
                                  "print('DID')",
        "make a socket": "import socket; socket.socket(); print('DID')",
        "see your processes": f"import os; os.stat('/proc/{bystander}/status'); print('DID')",
        "signal one": f"import os; os.kill({bystander}, 0); print('DID')",
        "slow one down": f"import os; os.setpriority(0, {bystander}, 5); print('DID')",
        "signal one through a file": "import fcntl, os\nr, w = os.pipe()\n"
                                     f"fcntl.fcntl(r, fcntl.F_SETOWN, {bystander}); print('DID')",
        "have user number 0": "import os\nif os.getuid() == 0: print('DID')",
        "make a user namespace": call + "if l.unshare(0x10000000) == 0: print('DID')",
        "use io_uring": call + "b = ctypes.create_string_buffer(200)\n"
                        "if l.syscall(425, 8, b) >= 0: print('DID')",
        "be traced": call + "if l.ptrace(0, 0, 0, 0) == 0: print('DID')",
        "read the key ring": call + "if l.syscall(250, 0, -3, 0) >= 0: print('DID')",
        "start 100 processes": "import os, time\nn = 0\ntry:\n    while n < 100:\n"
                               "        if os.fork() == 0: time.sleep(9)\n        n += 1\n"
                               "except OSError: pass\n"
                               "if n == 100: print('DID')",
        "take 2 GB of memory": "x = bytearray(2 << 30); print('DID')",
        "write 200 MB": "for i in range(20): open(str(i), 'wb').write(bytes(10 << 20))\n"
                        "print('DID')",
        "outlive its time": "import os, time\nif os.fork() == 0:\n    os.setsid()\n"
                            "    if os.fork() == 0:\n"
                            f"        os.execv('/bin/sleep', ['sleep', '{mark}'])\n"
                            "    os._exit(0)\ntime.sleep(.3)",
    }

def alive(mark):
    "The process numbers of those that were to outlive their time."
    found = []
    for p in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in p.read_bytes().split(b"\0")[1:2]: found.append(int(p.parent.name))
        except OSError: pass
    return found

stops = {}
with tempfile.TemporaryDirectory() as d:
    os.chmod(d, 0o755)
    secret, server = f"{d}/secret", socket.create_server(("127.0.0.1", 0))
    for mode in MODES:
        Path(secret).write_text("secret")
        os.chmod(secret, 0o644)
        other = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
        mark = f"77{MODES.index(mode)}.{os.getpid()}"
        tried = probes(secret, other.pid, server.getsockname()[1], mark)
        for name, program in tried.items():
            out = sandbox._run(mode, program, "", timeout=5, disk_mb=64, memory_mb=1024)
            assert out.status != "unconfined", out
            did = "DID" in out.output or (name == "outlive its time" and alive(mark) != [])
            stops.setdefault(name, {})[mode] = not did
        other.kill()
        other.wait()
        for pid in alive(mark): os.kill(pid, 9)

def quartiles(xs): return [round(1000 * x, 1) for x in statistics.quantiles(xs, n=4)]
times = {m: [] for m in MODES}
for i in range(args.repeats):
    for mode in MODES if i % 2 else MODES[::-1]:
        began = time.perf_counter()
        out = sandbox._run(mode, "def f(x): return x + 1", "assert f(1) == 2")
        times[mode].append(time.perf_counter() - began)
        assert out.passed, (mode, out)

imports = {}
for name in ("landlock", "py_landlock", "pyseccomp", "seccompy") if args.libraries else ():
    code = (f"import sys, time, json, ctypes\nsys.path.insert(0, {args.libraries!r})\n"
            f"t = time.perf_counter()\nimport {name}\nprint(time.perf_counter() - t)")
    start = [sys.executable, "-s", "-S", "-B", "-c", code]
    runs = [subprocess.run(start, capture_output=True, text=True, check=True) for _ in range(11)]
    imports[name] = quartiles([float(r.stdout) for r in runs])

version = subprocess.run(["bwrap", "--version"], capture_output=True, text=True).stdout.strip()
record = dict(
    command=f"python benchmarks/sandbox_walls.py --repeats {args.repeats} --libraries FOLDER",
    repeats=args.repeats, user="root" if os.geteuid() == 0 else "an ordinary user",
    load=round(os.getloadavg()[0], 1),
    versions=dict(python=platform.python_version(), kernel=platform.release().split("-")[0],
                  bubblewrap=version, landlock_abi=sandbox._landlock_abi()),
    milliseconds={m: quartiles(t) for m, t in times.items()},
    import_milliseconds=imports, stops=stops)
Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
print(json.dumps(record, indent=1))
