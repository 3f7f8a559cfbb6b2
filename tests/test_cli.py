"""The `transformer2` command: it answers at once, works, and says in one line what is wrong."""
import ast, json, os, re, shutil, subprocess, sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import chat_toy
import reinforce_toy as toy
from transformer2_nbdev.cli import app

ROOT = Path(__file__).resolve().parent.parent

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
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
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


def code_of(card: str) -> str: return re.search("```python\\n(.*?)```", card, re.S)[1]


def run_card(folder: Path) -> list:
    "Paste the card's code into a fresh Python in the folder; what it loaded is printed by a last line of ours"
    seen = "print([(n, p.sum().item()) for n, p in model.named_parameters() if 'default' in n])"
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    code = f"{code_of((folder / 'README.md').read_text())}\n{seen}\nassert tokenizer('the')"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env,
                       cwd=folder, timeout=300)
    assert r.returncode == 0, r.stderr
    return [x for _, x in ast.literal_eval(r.stdout.strip().splitlines()[-1])]


@pytest.mark.parametrize("base, method", [("toy", "svf"), ("toy", "lora"), ("lab", "svf")])
def test_the_card_of_an_expert_is_true_and_its_code_runs(world, tmp_path, monkeypatch, base, method):
    monkeypatch.chdir(world)
    (world / "model" / "README.md").write_text("---\nlicense: mit\n---\n# Toy\n")
    kw = dict(lab=dict(model="lab:A", prompts=None, reward=None, task="lab:math"),
              toy=dict(model="./model"))[base]
    r = call(options(world, tmp_path / "x", method=method, **kw))
    assert r.exit_code == 0, r.stderr
    card = (tmp_path / "x" / "README.md").read_text()
    result = json.loads((tmp_path / "x" / "result.json").read_text())
    trained = load_file(tmp_path / "x" / "adapter_model.safetensors")
    sums = sorted(t.sum().item() for t in trained.values())
    assert sorted(run_card(tmp_path / "x")) == pytest.approx(sums)
    n, before = result["n"], result["training"]["before"]["val_accuracy"]
    cells = [[c.strip() for c in l.split("|")] for l in card.splitlines()]
    rows = {c[1]: c[2:5] for c in cells if len(c) == 6}
    low, high = (f"{100 * x:.1f}%" for x in result["interval"])
    assert rows["the base, before training"][:2] == [f"{100 * before:.1f}%", str(round(before * n))]
    mine = next(v for k, v in rows.items() if k.startswith("this expert"))
    assert mine == [f"{100 * result['acc']:.1f}%", str(result["correct"]), f"{low} to {high}"]
    assert f"of {n} |" in card and "seed: 0" in card
    assert f"licence of the base: {dict(lab='apache-2.0', toy='mit')[base]}" in card
    assert result["run"]["command"] in card and f"torch {torch.__version__}" in card
    assert len(code_of(card).strip().splitlines()) <= 5
    assert not (tmp_path / "x" / "last" / "README.md").exists(), "PEFT's blank card is nowhere"


BOM = "\ufeff"
TEXTS = {
    "txt":          ("p.txt", f"{BOM}the cat\na bird\n".encode()),
    "txt crlf":     ("p.txt", f"{BOM}the cat\r\na bird\r\n".encode()),
    "joined files": ("p.txt", f"{BOM}the cat\n{BOM}a bird".encode()),
    "no mark":      ("p.txt", b"the cat\na bird"),
    "jsonl":        ("p.jsonl", f'{BOM}{{"prompt": "the cat"}}\n{{"prompt": "a bird"}}\n'.encode()),
    "json":         ("p.json", f'{BOM}[{{"prompt": "the cat"}}, {{"prompt": "a bird"}}]'.encode()),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, name):
    from transformer2_nbdev.tasks import read_rows
    file, data = TEXTS[name]
    (tmp_path / file).write_bytes(data)
    assert [r["prompt"] for r in read_rows(tmp_path / file)] == ["the cat", "a bird"]


NOT_TEXT = {"utf-16": "the cat".encode("utf-16"), "latin-1": "caf\xe9\n".encode("latin-1"),
            "binary": bytes(range(128, 200))}


@pytest.mark.parametrize("data", NOT_TEXT.values(), ids=list(NOT_TEXT))
def test_what_is_not_utf8_is_named(world, tmp_path, data):
    (tmp_path / "p.txt").write_bytes(data)
    r = call(options(world, tmp_path / "x", prompts=tmp_path / "p.txt"))
    assert r.exit_code == 2 and len(r.stderr.splitlines()) == 1
    assert f"{tmp_path / 'p.txt'} is not UTF-8 text: save it as UTF-8" in r.stderr


def test_marks_in_a_recipe_and_in_typed_prompts(world, experts, tmp_path):
    from transformer2_nbdev import paper
    (tmp_path / "r.json").write_bytes(f'{BOM}{{"name": "r", "reinforce": {{"steps": 3}}}}'.encode())
    assert paper.recipe(tmp_path / "r.json")["reinforce"] == dict(steps=3)
    r = call(fewshot(world, experts, experts / "cats"), input=f"{BOM}the cat\n")
    assert r.exit_code == 0 and "> the cat\n" in r.stdout, r.stderr


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
    "unknown lab task":  (dict(task="lab:chess", prompts=None, reward=None), "unknown task 'lab:chess'; there are"),
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


LAB = ["--model", "lab:A", "--experts", "lab:math", "lab:code", "lab:logic"]


@pytest.fixture(scope="module")
def experts(world, tmp_path_factory) -> Path:
    "Two experts of the toy base, one of another base, one that diverged"
    from peft import get_peft_model
    from transformer2_nbdev.adapter import SvfConfig, svf_layers
    d = tmp_path_factory.mktemp("experts")
    for seed, name in ((0, "cats"), (0, "dogs"), (1, "strangers"), (0, "broken")):
        m = get_peft_model(toy.base(seed), SvfConfig(target_modules="all-linear", init_weights=False))
        if name == "broken": next(iter(svf_layers(m).values())).svf_d["default"].data[0] = float("nan")
        m.save_pretrained(d / name)
    (d / "ask.txt").write_text("the cat\na bird\n"); (d / "shots.jsonl").write_text('{"prompt": "the cat", "answer": "sees"}\n{"prompt": "a bird", "answer": "hears"}\n')
    (d / "unsolved.jsonl").write_text('{"prompt": "the cat"}\n'); (d / "empty.jsonl").write_text('{"prompt": "the cat", "answer": ""}\n')
    return d


def fewshot(world, experts, expert, *more):
    "`adapt` with one expert, its mixture found on two shots"
    return ["adapt", "--model", world / "model", "--experts", expert, "--strategy", "fewshot",
            "--shots", experts / "shots.jsonl", "--generations", 1, "--max-new-tokens", 4, *more]


@pytest.mark.parametrize("strategy", ["prompt", "classifier", "fewshot"])
def test_adapt_answers_a_file_with_every_strategy(tmp_path, strategy):
    from transformer2_nbdev import lab
    asked = [lab.tasks()[k].examples("test")[0]["prompt"] for k in ("math", "code", "logic")]
    (tmp_path / "asked.txt").write_text("\n".join(asked) + "\n")
    extra = dict(prompt=[], classifier=["--classifier", "lab:cls"], fewshot=["--task", "lab:math-hard", "--generations", 1])[strategy]
    r = call(["adapt", *LAB, "--strategy", strategy, *extra, "--prompts", tmp_path / "asked.txt", "--out", tmp_path / "answers.jsonl"])
    assert r.exit_code == 0, r.stderr
    rows = [json.loads(l) for l in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [w["prompt"] for w in rows] == asked and all(list(w["weights"]) == ["math", "code", "logic"] and w["text"] for w in rows)
    assert all(f"> {p}" in r.stdout for p in asked) and "█" in r.stdout
    if strategy == "classifier": assert [max(w["weights"], key=w["weights"].get) for w in rows] == ["math", "code", "logic"] and all("boxed" in w["first"] for w in rows)
    if strategy == "fewshot": assert rows[0]["weights"] == rows[2]["weights"] and "found on 10 shots" in r.stderr
    before = (tmp_path / "answers.jsonl").read_text()
    r = call(["adapt", *LAB, "--strategy", strategy, *extra, "--prompts", tmp_path / "asked.txt", "--out", tmp_path / "answers.jsonl"])
    assert r.exit_code == 2 and "answers.jsonl exists" in r.stderr and (tmp_path / "answers.jsonl").read_text() == before


def test_adapt_on_a_model_with_own_experts_shots_and_typed_prompts(world, experts):
    args = ["adapt", "--model", world / "model", "--experts", experts / "cats", f"hounds={experts / 'dogs'}"]
    r = call([*args, "--strategy", "fewshot", "--shots", experts / "shots.jsonl", "--generations", 1, "--max-new-tokens", 4], input="the cat\n\na bird\n")
    assert r.exit_code == 0, r.stderr
    assert r.stdout.count("cats ") == r.stdout.count("hounds ") == 2 and "> a bird" in r.stdout, "each typed prompt gets its bar; an empty line is no prompt"
    r = call([*args, "--strategy", "fewshot", "--shots", experts / "shots.jsonl", "--reward", f"{world}/reward.py:dog", "--generations", 1, "--max-new-tokens", 4, "--prompts", experts / "ask.txt"])
    assert r.exit_code == 0 and r.stdout.count("> ") == 2, r.stderr
    r = call([*args, "--max-new-tokens", 4], input="cat " * 40 + "\nthe cat\n")
    assert r.exit_code == 0 and "error: " in r.stderr, "a prompt that does not fit is named, and the conversation goes on"


FOLDERS = [("math-v1.2", "math-v1_2"), ("lr=0.01", "lr_0_01"), ("copy", "copy_adapter"),
           ("two words", "two words")]


@pytest.mark.parametrize("folder, name", FOLDERS)
def test_a_folder_may_be_called_what_an_adapter_may_not(world, experts, tmp_path, folder, name):
    shutil.copytree(experts / "cats", tmp_path / folder)
    for text in (tmp_path / folder, f"{tmp_path / folder}/"):
        r = call(fewshot(world, experts, text, "--prompts", experts / "ask.txt"))
        assert r.exit_code == 0 and f"\n{name} " in r.stdout, r.stderr
        assert (f"is loaded as {name!r}" in r.stderr) == (folder != name)
    mine = f"mine={tmp_path / folder}"
    r = call(fewshot(world, experts, mine, "--prompts", experts / "ask.txt"))
    assert r.exit_code == 0 and "\nmine " in r.stdout and "is loaded as" not in r.stderr


def test_adapt_warns_of_experts_of_another_base(world, experts):
    r = shell(["adapt", "--model", world / "model", "--experts", experts / "strangers", "--prompts", experts / "shots.jsonl", "--strategy", "fewshot", "--shots", experts / "shots.jsonl",
               "--generations", 1, "--max-new-tokens", 4])
    assert r.returncode == 0 and "warning: adapter 'strangers' was made for a base with other weights" in r.stderr


ADAPT = {
    "no experts":        ([], ["--experts is missing"]),
    "no folder":         (["{e}/nobody"], ["expert 'nobody': no adapter_config.json"]),
    "different bases":   (["{e}/cats", "{e}/strangers"], ["'cats' and 'strangers' were trained on different bases"]),
    "NaN":               (["{e}/broken"], ["'broken' holds NaN"]),
    "named base":        (["base={e}/cats"], ["cannot be named 'base'"]),
    "twice":             (["{e}/cats", "cats={e}/dogs"], ["two are named 'cats'"]),
    "strategy":          (["{e}/cats", "--strategy", "magic"], ["choose prompt, classifier or fewshot"]),
    "no classifier":     (["{e}/cats", "--strategy", "classifier"], ["needs --classifier"]),
    "no shots":          (["{e}/cats", "--strategy", "fewshot"], ["needs solved examples"]),
    "unsolved shots":    (["{e}/cats", "--strategy", "fewshot", "--shots", "{e}/unsolved.jsonl"], ["row 1: no field 'answer'"]),
    "empty answer":      (["{e}/cats", "--strategy", "fewshot", "--shots", "{e}/empty.jsonl"], ["shot 0 has no answer"]),
    "no prompts":        (["{e}/cats", "--prompts", "{e}/none.txt"], ["no file"]),
    "out, no prompts":   (["{e}/cats", "--prompts", "", "--out", "{e}/x.jsonl"], ["give --prompts as well"]),
    "no lab expert":     (["lab:math"], ["ships with no experts"]),
    "dot in a name":     (["v1.2={e}/cats"], ["cannot be named 'v1.2': it holds '.'; call it 'v1_2'"]),
    "torch's word":      (["copy={e}/cats"], ["cannot be named 'copy'"]),
    "slash in a name":   (["a/b={e}/cats"], ["cannot be named 'a/b'"]),
    "no name":           (["={e}/cats"], ["cannot be named ''"]),
    "folder named base": (["{e}/base"], ["cannot be named 'base'"]),
}


@pytest.mark.parametrize("name", ADAPT)
def test_adapt_says_what_is_wrong_in_one_line(world, experts, name):
    args, (message,) = ADAPT[name]
    before = sorted(experts.rglob("*"))
    r = call(["adapt", "--model", world / "model", "--prompts", experts / "ask.txt", *(["--experts"] if args else []), *[a.format(e=experts) for a in args]])
    lines = [l for l in r.stderr.replace("\r", "\n").splitlines() if l.strip() and "%|" not in l]
    assert r.exit_code == 2 and len(lines) == 1 and message in lines[0], (r.exit_code, r.stderr, r.exception)
    assert sorted(experts.rglob("*")) == before


def test_a_recipe_trains_an_expert_for_each_task_and_options_win(tmp_path):
    recipe = dict(name="small", model="lab:A", tasks=["lab:math", "lab:code"], svf=dict(target_modules="mlp", parametrization="sigmoid", preserve_nuclear_norm=True, init_mean=.1, init_std=1e-3),
                  reinforce=dict(steps=1, batch_size=8, lr=.002, schedule="cosine", max_grad_norm=1e-3, val_limit=8))
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    r = call(["train", "--recipe", tmp_path / "r.json", "--out", tmp_path / "x", "--lr", "0.01"])
    assert r.exit_code == 0, r.stderr
    for task in ("lab-math", "lab-code"):
        config = json.loads((tmp_path / "x" / task / "adapter_config.json").read_text())
        training = json.loads((tmp_path / "x" / task / "result.json").read_text())["training"]
        assert config["parametrization"] == "sigmoid" and config["preserve_nuclear_norm"] and training["parameters"] == 12 * 128
        assert {k: training["config"][k] for k in ("steps", "batch_size", "lr", "schedule", "max_grad_norm")} == dict(steps=1, batch_size=8, lr=.01, schedule="cosine", max_grad_norm=1e-3)
    r = call(["train", "--recipe", "gpt5", "--out", tmp_path / "y"])
    assert r.exit_code == 2 and "no recipe 'gpt5'" in r.stderr
    r = call(["train", "--recipe", tmp_path / "r.json", "--prompts", "p.txt", "--out", tmp_path / "y"])
    assert r.exit_code == 2 and "brings its tasks" in r.stderr
    r = call(["train", "--task", "lab:math", "--out", tmp_path / "y"])
    assert r.exit_code == 2 and "--model is missing" in r.stderr and not (tmp_path / "y").exists()


@pytest.mark.parametrize("name", ["llama3-8b", "mistral-7b", "llama3-70b"])
def test_a_published_recipe_runs_end_to_end_on_a_tiny_model_of_its_architecture(tmp_path, name):
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformer2_nbdev import lab, paper
    tiny = paper.recipe(name)["architecture"] | dict(vocab_size=len(lab.WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                                                     max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny)).save_pretrained(tmp_path / "model"); lab.tokenizer().save_pretrained(tmp_path / "model")
    r = call(["train", "--recipe", name, "--model", tmp_path / "model", "--task", "lab:code", "--steps", 1, "--batch-size", 8, "--out", tmp_path / "x"])
    assert r.exit_code == 0, r.stderr
    training = json.loads((tmp_path / "x" / "result.json").read_text())["training"]
    asked = paper.recipe(name)["reinforce"] | dict(steps=1, batch_size=8)
    assert {k: training["config"][k] for k in asked} == asked


def test_every_field_of_the_config_is_an_option_with_its_help():
    from transformer2_nbdev.reinforce import ReinforceConfig
    said = call(["train", "--help"]).stdout
    words = " ".join(said.split())
    for f in fields(ReinforceConfig):
        flag = f"--{f.name.replace('_', '-')}"
        assert re.search(rf"(?m)^ +{flag}\b", said), flag
        assert " ".join(f.metadata["help"].split()[:3]) in words, f"the help of {flag}"
    headings = [l for l in said.splitlines() if l and not l.startswith(" ") and l.endswith(":")]
    homes = {c.__doc__ for c in ReinforceConfig.__mro__ if c.__dict__.get("__annotations__")}
    assert homes <= {h.removesuffix(":") for h in headings}, "one heading for each class"


def test_a_field_that_is_added_becomes_an_option():
    from transformer2_nbdev.cli import setting_params
    from transformer2_nbdev.reinforce import ReinforceConfig, setting

    @dataclass(kw_only=True)
    class More(ReinforceConfig):
        "Of our own"
        mood: str | None = setting(None, "how it feels")

    old, new = ({p.name for p in setting_params(c)} for c in (ReinforceConfig, More))
    assert new - old == {"mood"} and old == {f.name for f in fields(ReinforceConfig)}


SETTINGS = dict(val_every=3, val_limit=2, val_samples=2, val_temperature=.5, schedule="cosine",
                warmup=1, patience=4, fused=False, autocast="bf16", max_grad_norm=None, max_kl=None,
                reduction="token", kl_of="base", kl_path=False, track_kl=False, dropout=True,
                weight_decay=.1, save_every=2, step_kl=.01)


def test_settings_that_only_python_had_reach_the_run(world, tmp_path):
    flags = []
    for k, v in SETTINGS.items():
        name = k.replace("_", "-")
        plain_bool = k in ("kl_path", "track_kl", "dropout")
        flags += [f"--{'' if v else 'no-'}{name}"] if plain_bool else [f"--{name}", str(v)]
    r = call([*options(world, tmp_path / "x", steps=1), *flags])
    assert r.exit_code == 0, r.stderr
    config = json.loads((tmp_path / "x" / "result.json").read_text())["training"]["config"]
    assert {k: config[k] for k in SETTINGS} == SETTINGS


@pytest.mark.parametrize("flag, value", [("lr", "quick"), ("fused", "maybe"), ("steps", "2.5"),
                                         ("val-samples", "some"), ("schedule", "linear")])
def test_a_setting_that_makes_no_sense_is_refused(world, tmp_path, flag, value):
    r = call([*options(world, tmp_path / "x"), f"--{flag}", value])
    last = [l for l in r.stderr.splitlines() if l.strip()][-1]
    assert r.exit_code == 2 and flag.replace("-", "") in re.sub("[-_]", "", last), r.stderr
    assert not (tmp_path / "x").exists()


def recipe(folder, **kw) -> Path:
    "A recipe for a few seconds in the lab"
    small = dict(steps=2, batch_size=8, lr=.01, val_every=1, val_limit=8)
    r = dict(name="small", model="lab:A", tasks=["lab:math"], svf=dict(target_modules="mlp"),
             reinforce=small, sweep=dict(kl=[0., .3], seed=[1, 2])) | kw
    (folder / "r.json").write_text(json.dumps(r))
    return folder / "r.json"


POINTS = ["kl=0.0,seed=1", "kl=0.0,seed=2", "kl=0.3,seed=1", "kl=0.3,seed=2"]


def test_a_sweep_trains_every_value_and_chooses_on_validation(tmp_path):
    out, args = tmp_path / "grid", ["train", "--recipe", recipe(tmp_path), "--sweep"]
    r = call([*args, "--out", out])
    assert r.exit_code == 0, r.stderr
    assert sorted(p.name for p in out.iterdir()) == sorted([*POINTS, "sweep.json"])
    record, rewards = json.loads((out / "sweep.json").read_text()), {}
    for name in POINTS:
        result = json.loads((out / name / "result.json").read_text())
        kl, seed = (float(x.split("=")[1]) for x in name.split(","))
        assert (result["training"]["config"]["kl"], result["seed"]) == (kl, seed)
        rewards[name] = result["training"]["reward"]
    best = max(POINTS, key=rewards.get)            # the first of equals
    assert record["chosen"] == best and f"expert in {out / best}" in r.stdout
    assert [row["reward"] for row in record["rows"]] == [rewards[n] for n in POINTS]
    assert "survive Holm's correction" in r.stdout and record["run"]["command"]
    before = {p: p.read_bytes() for p in out.rglob("*.safetensors")}
    again = call([*args, "--out", out])
    assert again.exit_code == 2 and "go on with --resume" in again.stderr
    again = call([*args, "--resume", "--out", out])
    assert again.exit_code == 0 and again.stdout == r.stdout
    assert {p: p.read_bytes() for p in out.rglob("*.safetensors")} == before


def test_a_sweep_that_was_cut_goes_on_to_the_same_end(tmp_path):
    args = ["train", "--recipe", recipe(tmp_path), "--sweep"]
    whole = call([*args, "--out", tmp_path / "whole"])
    assert call([*args, "--out", tmp_path / "cut"]).exit_code == 0
    cut = tmp_path / "cut"
    shutil.rmtree(cut / POINTS[3])                  # never begun
    for f in ("result.json", "items.jsonl", "README.md"): (cut / POINTS[2] / f).unlink() # not ended
    (cut / "sweep.json").unlink()
    r = call([*args, "--resume", "--out", cut])
    assert r.exit_code == 0, r.stderr
    assert r.stdout.replace("/cut/", "/whole/") == whole.stdout
    for name in POINTS:
        a, b = (tmp_path / d / name / "adapter_model.safetensors" for d in ("cut", "whole"))
        assert a.read_bytes() == b.read_bytes()


SWEEPS = {
    "no recipe":    (["--task", "lab:math", "--model", "lab:A"], {}, "--sweep needs a --recipe"),
    "nothing":      ([], dict(sweep={}), "has no sweep"),
    "no values":    ([], dict(sweep=dict(kl=[])), "no values for kl"),
    "given as well": (["--kl", "0.2"], {}, "--kl is given, and swept"),
    "unknown":      ([], dict(sweep=dict(speed=[1])), "fields of ReinforceConfig"),
}


TURNS = [dict(role="system", content="Name the kind."), dict(role="user", content="2 + 3"),
         dict(role="assistant", content="math")]


def conversations(folder, n=10) -> Path:
    "A file of prompts as messages, in the form that TRL reads"
    ask = lambda i: [*TURNS, dict(role="user", content=f"the cat sees {i}")]
    lines = [json.dumps(dict(prompt=ask(i), animal="cat")) for i in range(n)]
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "chat.jsonl"


def test_prompts_as_messages_train_and_are_measured_and_answered(world, tmp_path):
    model = chat_toy.chat(tmp_path / "chat", max_position_embeddings=1024)
    file = conversations(tmp_path)
    own = ["--prompts", file, "--reward", f"{world}/reward.py:dog", "--max-new-tokens", 4]
    r = call(["train", "--model", model, *own, "--steps", 1, "--batch-size", 8, "--lr", 1e-2,
              "--out", tmp_path / "expert"])
    assert r.exit_code == 0, r.stderr
    r = call(["eval", "--model", model, *own, "--split", "all", "--out", tmp_path / "answers"])
    assert r.exit_code == 0 and "n = 10" in r.stdout, r.stderr
    seen = [json.loads(l)["prompt"] for l in (tmp_path / "answers/items.jsonl").open()]
    assert seen == [json.loads(l)["prompt"] for l in file.open()]
    r = call(["adapt", "--model", model, "--experts", f"math={tmp_path}/expert",
              f"code={tmp_path}/expert", "--strategy", "prompt", "--prompts", file,
              "--max-new-tokens", 4, "--out", tmp_path / "adapted.jsonl"])
    assert r.exit_code == 0, r.stderr
    rows = [json.loads(l) for l in (tmp_path / "adapted.jsonl").open()]
    assert [r["prompt"] for r in rows] == [json.loads(l)["prompt"] for l in file.open()]


@pytest.mark.parametrize("broken, said", [
    ([dict(role="user")], "content"), ([dict(role="judge", content="x")], "role"),
    ([dict(role="assistant", content="x")], "user"), ([], "")])
def test_a_broken_conversation_is_named_by_its_row(world, tmp_path, broken, said):
    good = dict(prompt=[dict(role="user", content="x")])
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(dict(prompt=broken))}\n")
    r = call(["eval", "--model", world / "model", "--prompts", tmp_path / "chat.jsonl",
              "--reward", f"{world}/reward.py:dog", "--max-new-tokens", 4])
    assert r.exit_code == 2 and "chat.jsonl, row 2" in r.stderr and said in r.stderr, r.stderr
    assert r.stderr.count("\n") == 1


@pytest.mark.parametrize("split, n", [("test", 1), ("train", 8), ("all", 10)])
def test_an_evaluation_of_own_prompts_takes_the_part_it_is_told(world, tmp_path, split, n):
    own = ["--prompts", world / "rows.jsonl", "--reward", f"{world}/reward.py:dog"]
    args = ["eval", "--model", world / "model", *own, "--max-new-tokens", 4, "--split", split]
    r = call([*args, "--out", tmp_path / "x"])
    assert r.exit_code == 0 and f"n = {n}, seed 0" in r.stdout, r.stderr
    items = (tmp_path / "x" / "items.jsonl").read_text().splitlines()
    assert len({json.loads(l)["prompt"] for l in items}) == n
    note = f"has 10 prompts, and {n} of them are its {split} part"
    assert (note in r.stderr) == (split != "all")
    r = call([*args[:-1], "tset"])
    assert r.exit_code == 2 and "no rows for split 'tset'" in r.stderr


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_that_cannot_be_is_one_line(tmp_path, name):
    more, kw, message = SWEEPS[name]
    which = [] if name == "no recipe" else ["--recipe", recipe(tmp_path, **kw)]
    r = call(["train", *which, *more, "--sweep", "--out", tmp_path / "x"])
    assert r.exit_code == 2 and message in r.stderr, r.stderr
    assert len(r.stderr.strip().splitlines()) == 1 and not (tmp_path / "x").exists()


def test_a_finished_value_of_other_settings_is_not_read_as_ours(tmp_path):
    file = recipe(tmp_path, sweep=dict(kl=[0.]))
    args = ["train", "--recipe", file, "--sweep", "--out", tmp_path / "x"]
    assert call(args).exit_code == 0
    r = call([*args, "--resume", "--lr", ".5"])
    assert r.exit_code == 2 and "was trained with lr=0.01, now it is 0.5" in r.stderr


def test_help_answers_at_once_in_a_real_shell():
    r = shell(["--help"])
    assert r.returncode == 0 and all(w in r.stdout for w in ("train", "eval", "adapt", "lab"))
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
    small = dict(skills=("code",), asked=("code", "math-hard"), limit=40, steps=1, batch_size=16, val_limit=16, search=dict(generations=2, population=4))
    results = cli.run_demo(tmp_path / "demo", **small)
    said, page = capsys.readouterr().out, (tmp_path / "demo" / "report.html").read_text()
    assert {t: set(by) for t, by in results.items()} == {"code": {"base", "code"}, "math-hard": {"base", "code", "prompt", "classifier", "few-shot"}}
    assert said.index("paired p") < said.index("Adapting:") < said.index("few-shot")
    assert "paired p" in said and f"{100 * results['code']['base'].acc:.1f} (" in said
    assert page.count("data:image/png;base64,") == 6 and page.count("<tr>") == 5 + 5 and "http" not in page
    assert (tmp_path / "demo" / "answers" / "math-hard" / "code" / "items.jsonl").is_file()
    assert cli.rows_of(cli.run_demo(tmp_path / "demo", **small)) == cli.rows_of(results), "a second run reads back what is there"
