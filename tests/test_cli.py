"""The `transformer2` command: it answers at once, works, and says in one line what is wrong."""
import json, os, subprocess, sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import reinforce_toy as toy
from transformer2_nbdev.cli import app

REWARDS = '''
import math
def dog(text, example): return 1. if "dog" in text.split() else -1.
def raises(text, example): raise KeyError("gold")
def nan(text, example): return math.nan
def text(text, example): return "good"
'''


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    "A folder with a model, prompts and rewards"
    d = tmp_path_factory.mktemp("cli")
    toy.base().save_pretrained(d / "model"); toy.tokenizer().save_pretrained(d / "model")
    (d / "prompts.txt").write_text("\n".join(toy.PROMPTS[:4]) + "\n")
    (d / "rows.jsonl").write_text("".join(json.dumps(dict(prompt=p, animal="dog")) + "\n" for p in toy.PROMPTS))
    (d / "long.txt").write_text("dog " * 40 + "\n"); (d / "empty.txt").write_text("\n \n"); (d / "broken.jsonl").write_text('{"prompt": "the cat"}\n{"prompt"\n')
    (d / "reward.py").write_text(REWARDS); (d / "bad.py").write_text("import nowhere_to_be_found\n")
    (d / "full").mkdir(); (d / "full" / "note").write_text("mine")
    return d


def options(d, out, **kw) -> list:
    kw = dict(model=d / "model", prompts=d / "prompts.txt", reward=f"{d}/reward.py:dog", out=out, steps=2, batch_size=16, max_new_tokens=6, lr=3e-2) | kw
    return ["train", *[x for k, v in kw.items() if v is not None for x in ([f"--{k.replace('_', '-')}"] + ([] if v is True else [str(v)]))]]


def call(args, **kw): return CliRunner().invoke(app, [str(a) for a in args], **kw)


def shell(args, **kw):
    root = Path(__file__).resolve().parent.parent
    env = os.environ | dict(PYTHONPATH=str(root), OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, "-c", "from transformer2_nbdev.cli import main; main()", *map(str, args)], capture_output=True, text=True, env=env, timeout=300, **kw)


@pytest.mark.parametrize("method", ["svf", "lora", "ia3"])
def test_train_writes_an_expert_that_loads(world, tmp_path, method):
    r = call(options(world, tmp_path / "x", method=method))
    assert r.exit_code == 0, r.stderr
    assert "validation answers, seed 0; kept step" in r.stdout and len(r.stdout.strip().splitlines()) == 1
    names = {p.name for p in (tmp_path / "x").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "result.json", "items.jsonl", "metrics.jsonl", "reward.png", "last"} <= names
    import transformer2_nbdev.adapter
    from peft import PeftModel
    result = json.loads((tmp_path / "x" / "result.json").read_text())
    assert PeftModel.from_pretrained(toy.base(), tmp_path / "x").active_peft_config.peft_type == method.upper() == result["training"]["method"]
    assert result["n"] == len((tmp_path / "x" / "items.jsonl").read_text().splitlines())
    for k in ("seed", "model", "task", "n", "correct", "interval"): assert k in result
    for k in ("command", "versions", "seconds", "peak_memory_mb"): assert result["run"][k]
    assert (tmp_path / "x" / "reward.png").read_bytes()[:4] == b"\x89PNG"


def test_every_option_reaches_the_run(world, tmp_path):
    kw = dict(steps=1, batch_size=8, lr=.5, kl=.3, samples=4, advantage="group", temperature=.7, top_p=.9, max_new_tokens=5, micro_batch=3, rollout_batch=4, seed=9)
    r = call(options(world, tmp_path / "x", target_modules="q_proj, v_proj", rank=3, prompts=world / "rows.jsonl", **kw))
    assert r.exit_code == 0, r.stderr
    training = json.loads((tmp_path / "x" / "result.json").read_text())["training"]
    assert {k: training["config"][k] for k in kw} == kw and training["parameters"] == 2 * 2 * 3


def test_resume(world, tmp_path):
    assert call(options(world, tmp_path / "x", steps=2)).exit_code == 0
    r = call(options(world, tmp_path / "x", steps=2, resume=True))
    assert r.exit_code == 0 and "all steps done" in r.stdout
    r = call(options(world, tmp_path / "x", steps=3, resume=True))
    assert r.exit_code == 2 and "steps=3: it was started with 2" in r.stderr


BAD = {
    "no model":          (dict(model="./nowhere"), "model ./nowhere: no such folder"),
    "empty model":       (dict(model="{d}/full"), "config"),
    "no prompts":        (dict(prompts="{d}/none.txt"), "none.txt"),
    "empty prompts":     (dict(prompts="{d}/empty.txt"), "no prompts in it"),
    "broken jsonl":      (dict(prompts="{d}/broken.jsonl"), "broken.jsonl"),
    "long prompt":       (dict(prompts="{d}/long.txt"), "the context holds 32"),
    "no reward file":    (dict(reward="{d}/none.py:dog"), "no file"),
    "no such function":  (dict(reward="{d}/reward.py:cat"), "defines no function 'cat'"),
    "not a function":    (dict(reward="{d}/reward.py"), "expected file.py:function"),
    "bad reward file":   (dict(reward="{d}/bad.py:dog"), "fails on import"),
    "reward raises":     (dict(reward="{d}/reward.py:raises"), "KeyError"),
    "reward is NaN":     (dict(reward="{d}/reward.py:nan"), "must be finite"),
    "reward is text":    (dict(reward="{d}/reward.py:text"), "must be a number"),
    "unknown modules":   (dict(target_modules="q_proj,knob_proj"), "no module 'knob_proj'; its linear layers are down_proj"),
    "nothing to train":  (dict(target_modules="^nothing$"), "not found in the base model"),
    "rank 0":            (dict(rank=0), "rank=0"),
    "method":            (dict(method="magic"), "choose svf, lora or ia3"),
    "batch and samples": (dict(batch_size=10, samples=4), "not a multiple"),
    "lr":                (dict(lr=-1), "lr=-1"),
    "dtype":             (dict(dtype="int3"), "choose auto, float32"),
    "no data":           (dict(prompts=None), "--prompts is missing"),
    "task and prompts":  (dict(task="gsm8k"), "give either --task, or both"),
    "unknown task":      (dict(task="chess", prompts=None, reward=None), "unknown task 'chess'"),
    "unknown lab task":  (dict(task="lab:chess", prompts=None, reward=None), "the lab has math"),
    "full folder":       (dict(out="{d}/full"), "is not empty"),
    "out is a file":     (dict(out="{d}/reward.py"), "is a file"),
    "nothing to resume": (dict(resume=True), "nothing to resume"),
}
if not torch.cuda.is_available(): BAD["no GPU"] = (dict(device="cuda"), "no CUDA device")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(world, tmp_path, name):
    kw, message = BAD[name]
    kw = {k: v.format(d=world) if isinstance(v, str) and "{d}" in v else v for k, v in kw.items()}
    before = sorted(world.rglob("*"))
    r = call(options(world, kw.pop("out", tmp_path / "x"), **kw))
    assert r.exit_code == 2 and message in r.stderr, (r.exit_code, r.stderr, r.exception)
    lines = [l for l in r.stderr.replace("\r", "\n").splitlines() if l.strip() and "%|" not in l]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert not any(tmp_path.iterdir()) and [p for p in sorted(world.rglob("*")) if "__pycache__" not in p.parts] == [p for p in before if "__pycache__" not in p.parts]


def test_a_diverged_run_has_its_own_code(world, tmp_path):
    r = call(options(world, tmp_path / "x", lr=1e20, steps=5))
    assert r.exit_code == 1 and "diverged in step" in r.stderr and "last good z is kept" in r.stderr


def test_debug_shows_the_traceback(world):
    r = call(["--debug", *options(world, "unused", model="./nowhere")])
    assert isinstance(r.exception, FileNotFoundError) and r.exit_code == 1


def test_eval_with_and_without_an_expert(world, tmp_path, monkeypatch):
    from transformer2_nbdev import tasks
    monkeypatch.setitem(tasks.TASKS, "dog", lambda name, data_dir: toy.DOG)
    assert call(options(world, tmp_path / "x", steps=1)).exit_code == 0
    plain = call(["eval", "--model", world / "model", "--task", "dog", "--out", tmp_path / "plain"])
    with_expert = call(["eval", "--model", world / "model", "--task", "dog", "--expert", tmp_path / "x", "--limit", 5, "--out", tmp_path / "with"])
    assert plain.exit_code == with_expert.exit_code == 0, plain.stderr + with_expert.stderr
    assert plain.stdout.startswith("dog: ") and "n = 10, seed 0" in plain.stdout and "n = 5, seed 0" in with_expert.stdout
    assert json.loads((tmp_path / "with" / "result.json").read_text())["n"] == 5
    r = call(["eval", "--model", world / "model", "--task", "dog", "--expert", tmp_path / "none"])
    assert r.exit_code == 2 and "no adapter_config.json" in r.stderr


def test_help_answers_at_once_in_a_real_shell():
    r = shell(["--help"])
    assert r.returncode == 0 and all(w in r.stdout for w in ("train", "eval", "lab"))
    r = subprocess.run([sys.executable, "-c", "import sys, transformer2_nbdev.cli; assert not {'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)"],
                       cwd=Path(__file__).resolve().parent.parent)
    assert r.returncode == 0, "nothing heavy is imported before a command runs"


def test_a_real_shell_sees_the_exit_code_and_the_line(world, tmp_path):
    r = shell(options(world, tmp_path / "x", reward=f"{world}/reward.py:nan"))
    assert r.returncode == 2 and r.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in r.stderr and not (tmp_path / "x").exists()
    r = shell(["train", "--model", "m"])
    assert r.returncode == 2 and "--out" in r.stderr


def test_demo_in_small_makes_a_table_and_one_page(tmp_path, capsys):
    from transformer2_nbdev import cli, lab
    if not (lab.DATA / "A" / "config.json").exists(): pytest.skip("lab base A is not built")
    small = dict(skills=("code",), asked=("code", "math-hard"), limit=40, steps=1, batch_size=16, val_limit=16)
    results = cli.run_demo(tmp_path / "demo", **small)
    said, page = capsys.readouterr().out, (tmp_path / "demo" / "report.html").read_text()
    assert {t: set(by) for t, by in results.items()} == {t: {"base", "code"} for t in small["asked"]}
    assert "paired p" in said and f"{100 * results['code']['base'].acc:.1f} (" in said
    assert page.count("data:image/png;base64,") == 4 and page.count("<tr>") == 5 and "http" not in page
    assert (tmp_path / "demo" / "answers" / "math-hard" / "code" / "items.jsonl").is_file()
    assert cli.rows_of(cli.run_demo(tmp_path / "demo", **small)) == cli.rows_of(results), "a second run reads back what is there"
