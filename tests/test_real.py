"""Room 20: fair tasks, experts that load on their own model, a record that can be made again."""
import os, subprocess, sys, warnings
from pathlib import Path

import pytest, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from reader import ROOT
from transformer2_nbdev import real, record, shipped
from transformer2_nbdev.evaluate import evaluate, unpack
from transformer2_nbdev.tasks import get_task

DATA = Path(os.environ.get("TRANSFORMER2_DATA", ROOT.parent / "shared" / "data"))
NEEDED = ("gsm8k/train.jsonl", "mbpp/mbpp.jsonl", "arc/ARC-Easy-train.jsonl",
          "humaneval/HumanEval.jsonl")
EXPERTS = sorted(p for p in shipped("real").iterdir() if p.is_dir())


@pytest.fixture(scope="module")
def data():
    if missing := [n for n in NEEDED if not (DATA / n).exists()]:
        pytest.skip(f"not here: {', '.join(missing)} below {DATA}")
    return str(DATA)


@pytest.fixture(scope="module")
def chat():
    "The real model's folder"
    folder = os.environ.get("TRANSFORMER2_CHAT")
    if not folder:
        pytest.skip("TRANSFORMER2_CHAT is not set: python benchmarks/get_smollm2.py FOLDER "
                    "makes the folder it names")
    return folder


def load(folder): return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_no_question_stands_in_two_splits(data):
    splits = *real.PARTS, "transfer"
    seen = {s: {e["question"] for e in real.subject_rows(data, s)} for s in splits}
    for a in seen:
        for b in seen:
            if a != b: assert not seen[a] & seen[b], (a, b)
    counts = {s: len(q) for s, q in seen.items()}
    assert counts == dict(train=600, validation=87, test=90, transfer=300)


def test_subjects_come_in_turn_and_evenly(data):
    for split in (*real.PARTS, "transfer"):
        gold = [e["gold"] for e in real.subject_rows(data, split)]
        assert gold[:3] == list(real.SUBJECTS)
        assert all(gold.count(k) == len(gold) / 3 for k in real.SUBJECTS)


def test_unseen_questions_are_of_test_sets(data):
    tests = {e.get("question") or e["prompt"] for n in ("gsm8k", "humaneval", "arc_challenge")
             for e in get_task(n, data).examples("test")}
    assert {e["question"] for e in real.subject_rows(data, "transfer")} <= tests
    own = {e["question"] for n in ("gsm8k", "arc_easy")
           for e in get_task(n, data).examples("test")}
    assert not own & {e["question"] for e in real.subject_rows(data, "test")}


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="no split 'dev'; there are train"):
        real.subject_rows(None, "dev")


@pytest.mark.parametrize("said, right, parsed", [
    ("math", True, "math"), (" Math.\n", True, "math"), ("code", False, "code"),
    ("maths", False, None), ("math or code", False, None), ("", False, None),
    ("the math teacher", False, None)])
def test_a_word_is_right_readable_or_neither(said, right, parsed):
    v = real.judge_word(said, "math", list(real.SUBJECTS))
    assert (v.correct, v.parsed, v.reward) == (right, parsed, 1. if right else -1.)


@pytest.mark.parametrize("name", ["real.arc", "real.arc_challenge"])
def test_choices_hold_the_gold_and_are_shown(data, name):
    task = get_task(name, data)
    for split in ("train", "validation", "test"):
        for e in task.examples(split):
            asked = task.prompt(e)[-1]["content"]
            assert all(f"\n- {t}" in asked for t in e["texts"])
            assert task.judge(task.answer(e), e).correct
            assert len({real.plain(t) for t in e["texts"]}) == 4, e


def test_three_examples_stand_before_every_question(data):
    for name in real.TASKS:
        task = get_task(name, data)
        turns = task.prompt(task.examples("test")[0])
        assert [t["role"] for t in turns] == ["user", "assistant"] * 3 + ["user"], name


def test_the_folder_named_is_the_model_and_offline_there_is_none(monkeypatch):
    monkeypatch.setenv("TRANSFORMER2_CHAT", "/some/folder")
    assert real.at_hand() == "/some/folder"
    monkeypatch.delenv("TRANSFORMER2_CHAT")
    monkeypatch.setattr(real, "cached_folder", lambda name: None)
    import huggingface_hub
    def refuse(*_, **__): raise OSError("no network")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    assert real.at_hand() is None


def test_a_complete_folder_is_left_as_it_is(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    command = [sys.executable, ROOT / "benchmarks" / "get_smollm2.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "is complete" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("folder", EXPERTS, ids=lambda p: p.name)
def test_an_expert_is_small_true_and_not_all_ones(folder):
    size = sum(p.stat().st_size for p in folder.iterdir())
    state = load_file(folder / "adapter_model.safetensors")
    d = torch.cat([v.flatten().float() for v in state.values()])
    assert size < 400_000 and d.numel() == 97_920 and d.abs().max() > 1e-3
    card = (folder / "README.md").read_text()
    for said in (f'base_model: "{real.MODEL}"', "apache-2.0", "Q4_1", "seed: 0"):
        assert said in card, said


@pytest.mark.parametrize("folder", EXPERTS, ids=lambda p: p.name)
def test_an_expert_loads_in_silence_on_its_own_weights_and_warns_on_others(chat, folder):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(load(chat), folder)
        PeftModel.from_pretrained(load(chat).bfloat16(), folder)     # the same in another precision
    assert not [str(w.message) for w in said if "other weights" in str(w.message)]
    other = load(chat)                            # as far away as rounding to four bits moves them
    with torch.no_grad():
        for p in other.model.layers.parameters(): p.mul_(1 + .03 * torch.randn_like(p))
    with pytest.warns(UserWarning, match="a base with other weights in 210 of 210"):
        PeftModel.from_pretrained(other, folder)


def test_recorded_answers_come_again(chat, data):
    "The first nine questions, as the record has them"
    tokenizer, model = AutoTokenizer.from_pretrained(chat), load(chat)
    task, rows = get_task("real.dispatch", data), record("real")["rows"]
    for who in ("base", "dispatch"):
        if who != "base": model = PeftModel.from_pretrained(model, shipped(f"real/{who}"))
        now = evaluate(model, tokenizer, task, limit=9, progress=False)
        bits = rows[f"{who}-real.dispatch-test"]["bits"]
        assert [i["correct"] for i in now.items] == unpack(bits)[:9], who
