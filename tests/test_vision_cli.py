"""The command line with a model that sees: its folder, and prompts whose messages name pictures beside their file."""
import json

import pytest
from PIL import Image
from typer.testing import CliRunner
from vision_toy import COLOURS, llava, picture

from transformer2_nbdev import vision
from transformer2_nbdev.cli import app, load_model, targets_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A model's folder, a file of prompts with pictures beside it, and a reward"
    root = tmp_path_factory.mktemp("sees")
    model, processor = llava()
    model.save_pretrained(root / "model"), processor.save_pretrained(root / "model")
    (root / "data" / "img").mkdir(parents=True)
    for c in COLOURS: picture(c).save(root / "data" / "img" / f"{c}.png")
    row = lambda c, text: dict(prompt=[dict(role="user", content=[dict(type="image", image=f"img/{c}.png"), dict(type="text", text=text)])], answer=c)
    rows = [row(c, t) for t in ("Which?", "Which colour is it?") for c in COLOURS] + [dict(prompt="Say a word.", answer="red")]
    (root / "data" / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "reward.py").write_text("def reward(said, e): return 1. if any(c in said for c in e['answer']) else -1.\n")
    return root


def call(*args):
    r = CliRunner().invoke(app, [str(a) for a in args])
    assert r.exit_code == 0, (r.output, r.stderr, r.exception)
    return r


def test_train_eval_and_adapt(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    asked = ["--prompts", "data/p.jsonl", "--reward", "reward.py:reward", "--max-new-tokens", 6]
    call("train", "--model", "model", *asked, "--out", tmp_path / "a", "--steps", 1, "--batch-size", 9, "--val-samples", 1, "--lr", "0.02", "--skip-long")
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["sees"] and len({p for line in (tmp_path / "a" / "items.jsonl").read_text().splitlines() for p in json.loads(line).get("pictures", ["none"])}) == 5
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert not any("vision" in t or "projector" in t for t in config["target_modules"])
    call("eval", "--model", "model", "--expert", tmp_path / "a", *asked, "--split", "all", "--out", tmp_path / "e")
    items = [json.loads(l) for l in (tmp_path / "e" / "items.jsonl").read_text().splitlines()]
    assert len(items) == 9 and "sha256" in items[0]["prompt"][0]["content"][0]
    r = call("adapt", "--model", "model", "--experts", f"one={tmp_path / 'a'}", f"two={tmp_path / 'a' / 'last'}", "--prompts", "data/p.jsonl", "--max-new-tokens", 6, "--out", tmp_path / "said.jsonl")
    said = [json.loads(l) for l in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert len(said) == 9 and set(said[0]["weights"]) == {"one", "two"} and "> Which?" in r.output


def test_a_model_that_sees_is_told_by_its_config(world, tmp_path):
    from chat_toy import chat
    model, processor = load_model(str(world / "model"))
    assert type(model).__name__ == "LlavaForConditionalGeneration" and type(processor).__name__ == "LlavaProcessor"
    names = targets_of(model, "all-linear")
    assert len(names) == 14 and all("language_model" in n for n in names) and targets_of(model, "vision") == "vision"
    model, tokenizer = load_model(str(chat(tmp_path / "m")))
    assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(tokenizer, "image_processor") and targets_of(model, "all-linear") == "all-linear"


def test_what_is_wrong_is_one_line(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    for image, says in {"img/pink.png": "row 1, message 1: no picture data/img/pink.png", "https://a.org/cat.jpg": "nothing is downloaded"}.items():
        (world / "data" / "bad.jsonl").write_text(json.dumps(dict(prompt=[dict(role="user", content=[dict(type="image", image=image)])], answer="x")))
        r = CliRunner().invoke(app, ["eval", "--model", "model", "--prompts", "data/bad.jsonl", "--reward", "reward.py:reward", "--out", str(tmp_path / "x")])
        lines = [l for l in r.stderr.splitlines() if l.strip()]
        assert r.exit_code == 2 and len(lines) == 1 and says in lines[0], r.stderr


def test_the_labs_model_that_sees_is_a_model_like_any_other(tmp_path, monkeypatch):
    "--model lab:V: trained, asked, mixed with its own experts, and its card's lines load it"
    monkeypatch.chdir(tmp_path)
    call("train", "--model", "lab:V", "--task", "lab.read", "--steps", 1, "--batch-size", 8, "--val-limit", 8, "--val-samples", 1, "--out", "new")
    assert json.loads((tmp_path / "new" / "result.json").read_text())["base"] == "lab:V"
    r = call("eval", "--model", "lab:V", "--expert", "new", "--task", "lab.read", "--limit", 4)
    assert "n = 4" in r.output, r.output
    card = (tmp_path / "new" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "new")
    loaded = {}
    exec(card, loaded)
    assert loaded["model"].peft_config["default"].peft_type == "SVF"
    monkeypatch.chdir(tmp_path)
    seen = vision.tasks()["colour"].examples("test")[0]
    Image.fromarray(vision.picture(*seen["facts"])).save(tmp_path / "p.png")
    prompt = [dict(role="user", content=[dict(type="image", image="p.png"), dict(type="text", text="max asks : which colour ?")])]
    (tmp_path / "p.jsonl").write_text(json.dumps(dict(prompt=prompt)) + "\n")
    call("adapt", "--model", "lab:V", "--experts", "lab:read", "lab:colour", "--prompts", "p.jsonl", "--strategy", "prompt", "--out", "a.jsonl")
    answer = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    assert answer["text"].strip() and sum(answer["weights"].values()) == 1


@pytest.mark.parametrize("words, said", [
    (["--model", "lab:W"], "error: no lab base 'W'; there are A, A-sibling, A-control, B, B-wide, V"),
    (["--model", "lab:V", "--expert", "lab:math"], "error: expert lab:math: lab:V ships with cls, colour, count, read"),
    (["--model", "lab:A", "--expert", "lab:read"], "error: expert lab:read: lab:A ships with cls, code, logic, math"),
    (["--model", "lab:V", "--dtype", "nf4"], "error: --dtype nf4: the lab's models are not packed")])
def test_what_the_lab_has_not_is_said_in_one_line(words, said):
    bad = CliRunner().invoke(app, ["eval", *words, "--task", "lab.read", "--limit", "2"])
    assert bad.exit_code == 2 and bad.stderr.strip() == said


def test_an_expert_that_ships_is_named_and_a_plan_reads_a_model_that_sees():
    base, expert = (call("eval", "--model", "lab:V", *e, "--task", "lab.read", "--limit", 60).output for e in ([], ["--expert", "lab:read"]))
    right = [float(said.split("%")[0].split(":")[1]) for said in (base, expert)]
    assert right[1] > right[0] + 10, right
    r = call("plan", "--model", "lab:V", "--gpu", "16GB")
    assert "3,936 learned" in r.output and "--prompt-tokens" in r.stderr
