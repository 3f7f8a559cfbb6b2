"The lab: its promises about questions, splits, the flaw, and the folders that ship."
import random

import pytest, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformer2_nbdev import lab

BUILT = [n for n in lab.BASES if (lab.DATA / n / "record.json").exists()]


@pytest.mark.parametrize("name", lab.KINDS)
def test_right_and_wrong_answers_differ(name):
    "Whatever slips, the final answer is another one: the verifier can see every mistake."
    rng, task = random.Random(0), lab.tasks()[name]
    for _ in range(200):
        q = lab.draw(name, rng, "test")
        kind = lab.KINDS[name]
        gold = dict(gold=lab.boxed(kind.work(q)) or kind.work(q).split()[-1])
        assert task.judge(kind.work(q), gold).reward == 1
        for slip in kind.slips:
            if slip == "code" or len(kind.slips) == 1: assert task.judge(kind.work(q, (slip,)), gold).reward == -1


@pytest.mark.parametrize("name", lab.KINDS)
def test_splits_share_no_secret(name):
    texts = {s: {e["prompt"].split(" : ", 1)[1] for e in lab.tasks()[name].examples(s)} for s in lab.SIZES}
    assert len(texts["test"]) == 1002 and len(texts["validation"]) >= 200 and len(texts["train"]) >= 1000
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"] and not texts["validation"] & texts["test"]


def test_pretraining_reads_the_training_split_only():
    tok = lab.tokenizer()
    prompts = {" ".join(tok.decode(p, skip_special_tokens=True).split()[2:]) for rows, _ in zip(lab.corpus(tok, 0, flawed=True), range(30)) for p, _ in rows}
    for name, task in lab.tasks().items():
        assert not prompts & {e["prompt"].split(" : ", 1)[1] for e in task.examples("test")}, name


def test_sources_slip_as_often_as_stated():
    rng = random.Random(0)
    for name, slip in [("code", "code"), ("logic", "logic"), ("cls", "cls"), ("math", "math")]:
        for i, source in enumerate(lab.SOURCES):
            q = lab.draw(name, rng, "train")
            right = sum(lab.write(name, q, source, rng)[1] == lab.write(name, q, source)[1] for _ in range(1500)) / 1500
            assert abs(right - lab.RELIABLE[slip][i]) < .045


def test_examples_are_the_same_in_every_process():
    "Frozen here: experts and records elsewhere were made on these prompts."
    assert lab.tasks()["math"].examples("test")[0]["prompt"].startswith("red : ")
    assert [lab.split_of((i,)) for i in range(6)] == ["test", "validation", "train", "train", "test", "train"]


def test_tokenizer_round_trip(tmp_path):
    tok = lab.tokenizer()
    tok.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.padding_side == "left" and again.pad_token_id == 0 and again.eos_token_id == 2
    text = "red : x = [ 4 7 2 9 ] ; x [ ::-1 ] [ 1 ] = which skill ? \\boxed{ code }"
    assert again(text) == tok(text) and again.decode(again(text)["input_ids"], skip_special_tokens=True) == text
    assert again("a word unheard of")["input_ids"][1:] == [again.unk_token_id] * 4


def test_pretraining_repeats_bit_for_bit():
    torch.set_num_threads(1)
    runs = []
    for _ in range(2):
        steps = lab.pretrain(lab.new_model(5, width=32), lab.tokenizer(), 5, 10, flawed=True)
        runs.append([next(steps) for _ in range(3)])
    assert runs[0] == runs[1] and runs[0][2] != runs[0][0]


def test_orthogonal_flattens_singular_values_of_tall_and_wide():
    for shape in [(3, 40, 16), (3, 16, 40)]:
        S = torch.linalg.svdvals(lab.orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert S.shape == (3, 16) and S.min() > .6 and S.max() < 1.3


@pytest.mark.skipif(not BUILT, reason="no lab base has been built")
@pytest.mark.parametrize("name", BUILT)
def test_a_base_is_an_ordinary_folder_and_agrees_with_its_record(name):
    model, tok = AutoModelForCausalLM.from_pretrained(lab.DATA / name), AutoTokenizer.from_pretrained(lab.DATA / name)
    record = lab.record(name)
    assert record["recipe"] == vars(lab.BASES[name]) and len(record["losses"]) == lab.BASES[name].clean + lab.BASES[name].steps
    model, _, world = lab.load(name)
    for t in ("code", "logic"):
        assert abs(lab.measure(model, tok, world[t])["correct"] - record["accuracy"][t]["greedy"]["correct"]) <= 2
    assert sum(record["accuracy"]["math"]["sampled"]["by_source"].values()) == record["accuracy"]["math"]["sampled"]["correct"]


@pytest.mark.skipif("A" not in BUILT, reason="base A has not been built")
@pytest.mark.parametrize("skill", lab.TRAINED)
def test_greedy_accuracy_leaves_room(skill):
    c = lab.record("A")["accuracy"][skill]["greedy"]
    assert .55 < c["correct"] / c["n"] < .80


def test_errors_name_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there are A, A-sibling"): lab.load("Z")
    with pytest.raises(ValueError, match="choose one of train, validation, test"): lab.tasks()["code"].examples("dev")
    monkeypatch.setattr(lab, "DATA", tmp_path)
    with pytest.raises(FileNotFoundError, match="transformer2 lab build B"): lab.load("B")
    assert lab.experts("B") == {}


def test_everything_that_ships_is_small():
    assert sum(p.stat().st_size for p in lab.DATA.rglob("*") if p.is_file()) < 12e6
