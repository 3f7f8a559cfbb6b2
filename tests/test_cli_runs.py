"""Runs from the terminal that go wrong outside: a full disk, a killed process, Ctrl-C, a folder
that cannot be written, odd chat models."""
import json, multiprocessing, os, random, shutil, signal, subprocess, tempfile, time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import chat_toy
from transformer2_nbdev import cli, evaluate

fork = multiprocessing.get_context("fork")
REWARDS = '''
import os, time
def short(text, example): return 1. if len(text) < 12 else -1.
def slow(text, example):
    if (mark := os.environ.get("MARK")): open(mark, "a").close(); time.sleep(.02)
    return short(text, example)
'''


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world():
    "A folder that everybody may read: a chat model, prompts and a reward"
    d = Path(tempfile.mkdtemp(dir="/tmp"))
    d.chmod(0o755)
    chat_toy.chat(d / "model")
    (d / "prompts.txt").write_text("What is 2 + 3?\nthe cat\nsees a dog\nanswer\n")
    (d / "reward.py").write_text(REWARDS)
    yield d
    shutil.rmtree(d)


def command(world, out, reward="short", **kw):
    kw = dict(model=world / "model", prompts=world / "prompts.txt", out=out, steps=4, lr=3e-2,
              reward=f"{world}/reward.py:{reward}", batch_size=16, max_new_tokens=6,
              val_every=2, val_samples=2) | kw
    flags = [[f"--{k.replace('_', '-')}", *([] if v is True else [v])] for k, v in kw.items()]
    return ["train", *[str(x) for f in flags for x in f]]


def call(args): return CliRunner().invoke(cli.app, [str(a) for a in args])


def errors(stderr: str) -> list:
    lines = [l for l in stderr.replace("\r", "\n").splitlines() if l.strip() and "%|" not in l]
    return [l for l in lines if not l.startswith("Stopping after this step")]


def content(out: Path) -> dict:
    "Everything a run wrote, less what may differ between two runs of the same thing"
    files = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    for gone in ("reward.png", "README.md", "state.pt"): files.pop(gone, None)
    found = {name: p.read_bytes() for name, p in files.items()}
    result = json.loads(found.pop("result.json"))
    result.pop("run")
    lines = [json.loads(l) for l in found.pop("metrics.jsonl").splitlines()]
    for m in lines: m.pop("seconds", None)
    return found | dict(result=result, metrics=lines)


def child(args, log, uid=None):
    "The command in a process of its own; stdout and stderr go to files"
    from accelerate import PartialState
    PartialState._reset_state()
    new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    out, err = (os.open(f"{log}.{n}", new) for n in ("out", "err"))
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.setsid()
    # a shell that starts us in the background has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if uid is not None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    torch.set_num_threads(1)
    import sys
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    try: cli.app(args, standalone_mode=True)
    except SystemExit as e: code = e.code or 0
    except BaseException: code = 99
    else: code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(args, log, **kw):
    p = fork.Process(target=child, args=([str(a) for a in args], str(log)), kwargs=kw)
    p.start()
    return p


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    "The run that nothing happened to"
    out = tmp_path_factory.mktemp("whole") / "x"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.time()
    assert call(command(world, out)).exit_code == 0
    torch.set_num_threads(before)
    return content(out), time.time() - began


@pytest.mark.parametrize("lr", ["3e-2", "auto"])
def test_killed_ten_times_at_random_and_resumed_it_is_the_same_run(world, whole, tmp_path, lr):
    want, seconds = whole
    if lr == "auto":
        began = time.time()
        assert call(command(world, tmp_path / "whole", lr=lr)).exit_code == 0
        want, seconds = content(tmp_path / "whole"), time.time() - began
    rng, out, kills = random.Random(3), tmp_path / "x", 0
    for _ in range(10):
        more = dict(resume=True) if (out / "state.pt").is_file() else {}
        p = launch(command(world, out, lr=lr, **more), tmp_path / "log")
        p.join(rng.uniform(.05, .9) * seconds)
        if p.is_alive():
            os.kill(p.pid, signal.SIGKILL)
            kills += 1
        p.join()
        assert p.exitcode in (0, -signal.SIGKILL), Path(f"{tmp_path}/log.err").read_text()
        for f in out.glob("*.json"): json.loads(f.read_text())
        for f in out.glob("*.jsonl"): [json.loads(l) for l in f.read_text().splitlines()]
    assert kills >= 3
    more = dict(resume=True) if (out / "state.pt").is_file() else {}
    r = call(command(world, out, lr=lr, **more))
    assert r.exit_code == 0, r.stderr
    assert content(out) == want
    assert not list(out.glob(".*")), "no half of a file is left"


def test_leftovers_of_a_start_that_was_killed_are_no_obstacle(world, whole, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".state.pt.77.part").write_bytes(b"half")
    (tmp_path / "x" / ".q1.part").mkdir()
    r = call(command(world, tmp_path / "x", resume=True))
    assert r.exit_code == 2 and "nothing to resume" in r.stderr
    assert call(command(world, tmp_path / "x")).exit_code == 0
    assert content(tmp_path / "x") == whole[0] and not list((tmp_path / "x").glob(".*"))


def wait_for(file: Path, p, seconds=120):
    end = time.time() + seconds
    while time.time() < end and p.is_alive() and not file.exists(): time.sleep(.005)
    assert file.exists(), "the run never came so far"


def test_ctrl_c_while_answers_are_judged_loses_nothing(world, whole, tmp_path, monkeypatch):
    out, mark = tmp_path / "x", tmp_path / "judging"
    monkeypatch.setenv("MARK", str(mark))
    p = launch(command(world, out, "slow"), tmp_path / "log")
    wait_for(out / "state.pt", p)
    mark.unlink(missing_ok=True)
    wait_for(mark, p)                                   # in the middle of judging a batch
    os.killpg(p.pid, signal.SIGINT)                     # as a terminal does: to the whole group
    p.join(120)
    said = errors(Path(f"{tmp_path}/log.err").read_text())
    assert p.exitcode == 130 and len(said) == 1, said
    assert "stopped after step" in said[0] and "resume the run" in said[0]
    monkeypatch.delenv("MARK")
    r = call(command(world, out, "slow", resume=True))
    assert r.exit_code == 0 and content(out) == whole[0], r.stderr


def test_a_second_ctrl_c_stops_at_once_and_says_how_to_go_on(world, whole, tmp_path, monkeypatch):
    out, mark = tmp_path / "x", tmp_path / "judging"
    monkeypatch.setenv("MARK", str(mark))
    p = launch(command(world, out, "slow"), tmp_path / "log")
    wait_for(out / "state.pt", p)
    mark.unlink(missing_ok=True)
    wait_for(mark, p)
    os.kill(p.pid, signal.SIGINT)
    time.sleep(.05)
    os.kill(p.pid, signal.SIGINT)
    p.join(120)
    said = errors(Path(f"{tmp_path}/log.err").read_text())
    assert p.exitcode == 130 and len(said) == 1 and "--resume goes on" in said[0], said
    monkeypatch.delenv("MARK")
    assert call(command(world, out, "slow", resume=True)).exit_code == 0
    assert content(out) == whole[0]


def ask(world, out, reward="short"):
    return ["eval", "--model", world / "model", "--prompts", world / "prompts.txt", "--out", out,
            "--reward", f"{world}/reward.py:{reward}", "--max-new-tokens", 6, "--batch-size", 1]


def test_an_evaluation_that_was_stopped_goes_on(world, tmp_path, monkeypatch):
    assert call(ask(world, tmp_path / "whole")).exit_code == 0
    mark = tmp_path / "judging"
    monkeypatch.setenv("MARK", str(mark))
    p = launch(ask(world, tmp_path / "x", "slow"), tmp_path / "log")
    wait_for(mark, p)
    os.killpg(p.pid, signal.SIGINT)
    p.join(120)
    said = errors(Path(f"{tmp_path}/log.err").read_text())
    assert p.exitcode == 130 and len(said) == 1 and "interrupted; " in said[0], said
    monkeypatch.delenv("MARK")
    r = call(ask(world, tmp_path / "x", "slow"))
    assert r.exit_code == 0, r.stderr
    both = [evaluate.load(tmp_path / n).items for n in ("whole", "x")]
    assert both[0] == both[1] and not list((tmp_path / "x").glob("*.partial.*"))


@pytest.fixture
def disk(tmp_path):
    "A disk of one megabyte; mounting one needs to be root"
    d = tmp_path / "disk"
    d.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", d]
    if shutil.which("mount") is None: pytest.skip("there is no `mount` here")
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode: pytest.skip(f"cannot mount a small disk here: {made.stderr.strip()}")
    yield d
    subprocess.run(["umount", "-l", d], check=True)


@pytest.mark.parametrize("kb", [0, 4, 16, 32, 64, 96, 128, 192, 256])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(world, whole, disk, kb):
    out, filler = disk / "x", disk / "filler"
    with open(filler, "wb") as f: f.write(bytes((1024 - kb) * 1024 - 8192 * (kb == 0)))
    while kb == 0 and shutil.disk_usage(disk).free:
        with open(filler, "ab", buffering=0) as f: f.write(bytes(4096))
    r = call(command(world, out))
    if r.exit_code:
        assert r.exit_code == 2 and r.exception.__class__ is SystemExit, r.exception
        assert len(said := errors(r.stderr)) == 1 and "o space" in said[0], said
        for f in out.glob("*.jsonl"): [json.loads(l) for l in f.read_text().splitlines()]
        assert not list(out.glob(".*")), "no half of a file is left"
    filler.unlink()
    if not (out / "result.json").exists():
        begun = (out / "state.pt").is_file()
        assert call(command(world, out, **dict(resume=True) if begun else {})).exit_code == 0
    assert content(out) == whole[0]


def test_an_evaluation_on_a_full_disk(world, disk):
    filler = disk / "filler"
    with pytest.raises(OSError), open(filler, "wb", buffering=0) as f:
        while True: f.write(bytes(4096)) or 1 / 0
    r = call(ask(world, disk / "x"))
    assert r.exit_code == 2 and len(errors(r.stderr)) == 1 and "o space" in r.stderr, r.stderr
    filler.unlink()
    assert call(ask(world, disk / "x")).exit_code == 0


@pytest.mark.parametrize("what", ["train", "eval", "adapt"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(world, tmp_path, what):
    locked = Path(tempfile.mkdtemp(dir="/tmp"))
    locked.chmod(0o555)
    log = Path(tempfile.mkdtemp(dir="/tmp"))
    log.chmod(0o777)
    args = dict(train=command(world, locked / "x"), eval=ask(world, locked / "x"),
                adapt=["adapt", "--model", world / "model", "--experts", world / "none", "--out",
                       locked / "x.jsonl", "--prompts", world / "prompts.txt"])[what]
    try:
        p = launch(args, log / "log", **dict(uid=65534) if os.getuid() == 0 else {})
        p.join(120)
        said = errors((log / "log.err").read_text())
        assert p.exitcode == 2 and len(said) == 1, said
        assert "cannot be written" in said[0] and "read-only for this user" in said[0]
        assert not list(locked.iterdir())
    finally:
        shutil.rmtree(log)
        locked.chmod(0o755)
        shutil.rmtree(locked)


def test_a_disk_that_is_mounted_read_only(world, disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    r = call(command(world, disk / "x"))
    assert r.exit_code == 2 and len(errors(r.stderr)) == 1 and "cannot be written" in r.stderr


# Chat models

def test_pad_that_equals_eos_changes_nothing(world, whole, tmp_path):
    chat_toy.chat(tmp_path / "own pad", pad="<|endoftext|>")
    r = call(command(world, tmp_path / "x", model=tmp_path / "own pad"))
    assert r.exit_code == 0, r.stderr
    mine, theirs = content(tmp_path / "x"), whole[0]
    for k in ("adapter_model.safetensors", "last/adapter_model.safetensors", "items.jsonl"):
        assert mine[k] == theirs[k]
    assert mine["metrics"] == theirs["metrics"]


def test_a_model_without_a_chat_template_gets_plain_prompts_and_a_note(world, tmp_path):
    chat_toy.chat(tmp_path / "plain", template=None)
    r = call(command(world, tmp_path / "x", model=tmp_path / "plain", steps=1))
    assert r.exit_code == 0 and "has no chat template, so prompts are given as plain" in r.stderr
    lines = (tmp_path / "x" / "items.jsonl").read_text().splitlines()
    asked = {json.loads(l)["prompt"] for l in lines}
    assert asked == set((world / "prompts.txt").read_text().splitlines())


def broken(name, folder):
    "What can be wrong with the folder of a chat model"
    config = json.loads((folder / "config.json").read_text())
    weights, template = folder / "model.safetensors", folder / "chat_template.jinja"
    new = dict(more_layers=dict(num_hidden_layers=3), wrong_shape=dict(intermediate_size=64),
               unknown_type=dict(model_type="nonsense", architectures=["X"]))
    if name in new:
        config.pop("layer_types", None)
        (folder / "config.json").write_text(json.dumps(config | new[name]))
    if name == "no_config": (folder / "config.json").unlink()
    if name == "cut_weights": weights.write_bytes(weights.read_bytes()[:5000])
    if name == "lfs_weights": weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    if name == "no_weights": weights.unlink()
    if name == "no_tokenizer": [p.unlink() for p in folder.glob("*token*")]
    if name == "bad_tokenizer": (folder / "tokenizer.json").write_text('{"a"')
    if name == "bad_template": template.write_text("{{ messages[0]['content' }}")
    if name == "raising_template": template.write_text("{{ raise_exception('Only one user') }}")
    if name == "empty_template": template.write_text(" ")


BROKEN = dict(more_layers="lacks 9 weights", wrong_shape="model", unknown_type="nonsense",
              no_config="model", cut_weights="incomplete", lfs_weights="header too large",
              no_weights="no file named model.safetensors", no_tokenizer="its tokenizer",
              bad_tokenizer="its tokenizer", bad_template="its chat template",
              raising_template="its chat template: Only one user",
              empty_template="its chat template: it loses the message")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_chat_model_is_one_line(world, tmp_path, name):
    shutil.copytree(world / "model", tmp_path / "m")
    broken(name, tmp_path / "m")
    r = call(command(world, tmp_path / "x", model=tmp_path / "m"))
    said = errors(r.stderr)
    assert r.exit_code == 2 and len(said) == 1, (r.exit_code, said, r.exception)
    assert said[0].startswith(f"error: model {tmp_path / 'm'}") and BROKEN[name] in said[0]
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_of_another_model_is_named(world, tmp_path):
    from transformers import AutoModelForCausalLM
    shutil.copytree(world / "model", tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    model.resize_token_embeddings(280)
    model.save_pretrained(tmp_path / "m")
    r = call(command(world, tmp_path / "x", model=tmp_path / "m"))
    assert r.exit_code == 2 and "its tokenizer belongs to another model" in r.stderr


def test_an_adapter_is_no_model(world, tmp_path):
    assert call(command(world, tmp_path / "x", steps=1)).exit_code == 0
    r = call(command(world, tmp_path / "y", model=tmp_path / "x"))
    assert r.exit_code == 2 and "is an adapter: give its base as --model" in r.stderr


LEAVES = "import sys\ndef f(text, example): sys.exit(0)\n"
ODD = {"exit in a reward": (dict(reward=LEAVES), "SystemExit"),
       "exit on import": (dict(reward="import sys\nsys.exit(0)\n"), "fails on import: SystemExit"),
       "number": (dict(prompts='{"prompt": 5}\n'), "row 1: the prompt must be text, not int"),
       "null": (dict(prompts='{"prompt": null}\n'), "row 1: the prompt must be text, not NoneType"),
       "empty": (dict(prompts='{"prompt": " "}\n'), "row 1: the prompt is empty"),
       "device": (dict(device="gpu0"), "--device gpu0: no such device"),
       "regex": (dict(target_modules="(("), "no regular expression"),
       "seed": (dict(seed=2**70), "must fit in 63 bits"),
       "file for a model": (dict(model="prompts.jsonl"), "is a file: give the folder"),
       "out below a file": (dict(out="prompts.jsonl/x"), "is a file")}


@pytest.mark.parametrize("name", ODD)
def test_what_else_is_wrong_is_one_line(world, tmp_path, monkeypatch, name):
    kw, message = ODD[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(kw.get("prompts", '{"prompt": "the cat"}\n'))
    (tmp_path / "r.py").write_text(kw.get("reward", "def f(t, e): return 1.\n"))
    kw = {k: v for k, v in kw.items() if k not in ("prompts", "reward")}
    r = call(command(world, kw.pop("out", tmp_path / "x"), prompts=tmp_path / "prompts.jsonl",
                     **kw) + ["--reward", f"{tmp_path}/r.py:f"])
    said = errors(r.stderr)
    assert r.exit_code == 2 and len(said) == 1 and message in said[0], (said, r.exception)
    assert not (tmp_path / "x").exists()
