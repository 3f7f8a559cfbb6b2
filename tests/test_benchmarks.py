"The paper's data sets as tasks: every published gold answer is correct, splits share nothing, broken files are named."
import json, os, sys
from pathlib import Path
import pytest
from transformer2_nbdev.benchmarks import BENCHMARKS, SOURCES, _rows, benchmark
from transformer2_nbdev.tasks import Task, get_task, judge_all
from transformer2_nbdev.verifiers import numbers

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TRANSFORMER2_DATA", ROOT.parent / "shared" / "data"))

def data(folder):
    if not (DATA / folder).is_dir(): pytest.skip(f"no published data in {DATA / folder}; set TRANSFORMER2_DATA")
    return DATA


# --- the published gold answers ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, folder, rows", [("gsm8k", "gsm8k", 8792), ("arc_easy", "arc", 4627), ("arc_challenge", "arc", 2291), ("textvqa", "textvqa", 200)])
def test_every_gold_answer_is_correct(name, folder, rows):
    task = get_task(name, data(folder))
    examples = [e for s in ("train", "validation", "test") for e in task.examples(s)]
    assert len(examples) == rows
    wrong = [(e["id"], v.why) for e in examples if not (v := task.judge(task.answer(e), e)).correct and name != "textvqa"]
    assert not wrong
    if name == "textvqa": assert sum(task.judge(task.answer(e), e).correct for e in examples) > .9 * rows     # annotators do not always agree

def test_every_gold_answer_of_gsm8k_is_wrong_for_another_number():
    task = get_task("gsm8k", data("gsm8k"))
    for e in task.examples("test"):
        gold = numbers(e["gold"])[-1][0]
        assert not task.judge(f"#### {gold + 1}", e).correct and not task.judge(f"The answer is {gold * 10 + 1}.", e).correct

@pytest.mark.parametrize("form", ["#### {}", "The answer is {}.", "\\boxed{{{}}}", "So she makes **{}** in all.", "Answer: {}", "1 + 1 = 2, hence x = {}", "It is ${}.",
                                  "#### {}\nThis uses 3 steps.", "The final answer is {}\n\nQuestion: Bob has 3 cats.\nAnswer: 3", "{} dollars", "<think>7</think>{}<|eot_id|>99"])
def test_gsm8k_golds_in_many_forms(form):
    task = get_task("gsm8k", data("gsm8k"))
    wrong = [(e["gold"], task.judge(form.format(e["gold"]), e).why) for e in task.examples("test") if not task.judge(form.format(e["gold"]), e).correct]
    assert not wrong, wrong[:5]

def test_every_gold_program_passes():
    "164 + 974 + 427 programs; one that stands in both forms of MBPP with the same tests is run once."
    runs, rows = {}, {}
    for name, split in (("humaneval", "test"), ("mbpp", "all"), ("mbpp_sanitized", "all")):
        task = get_task(name, data(name.split("_")[0]))
        rows[name] = task.examples(split)
        for e in rows[name]: runs.setdefault((e["solution"].strip(), e["tests"].strip()), (task, e))
    assert {k: len(v) for k, v in rows.items()} == dict(humaneval=164, mbpp=974, mbpp_sanitized=427)
    judge = Task("programs", None, None, verify=lambda task, e: task.judge(task.answer(e), e))
    verdicts = judge_all(judge, [t for t, _ in runs.values()], [e for _, e in runs.values()], workers=2)
    wrong = [(t.name, e["id"], v.why[:200]) for (t, e), v in zip(runs.values(), verdicts) if not v.correct]
    assert not wrong

def test_humaneval_bodies_pass_and_empty_bodies_fail():
    task = get_task("humaneval", data("humaneval"))
    examples = task.examples("test")[::20]
    assert all(v.correct for v in judge_all(task, [e["solution"] for e in examples], examples))
    assert not any(v.correct for v in judge_all(task, ["    pass\n"] * len(examples), examples))

def test_humaneval_helpers_cannot_be_replaced():
    "Two tests call a helper of the prompt; a program that makes both directions the identity must not pass."
    task = get_task("humaneval", data("humaneval"))
    for k, (enc, dec) in {38: ("encode_cyclic", "decode_cyclic"), 50: ("encode_shift", "decode_shift")}.items():
        e = task.examples("test")[k]
        assert not task.judge(f"```python\ndef {enc}(s): return s\ndef {dec}(s): return s\n```", e).correct

def test_splits():
    d = data("gsm8k")
    g = get_task("gsm8k", d)
    assert [len(g.examples(s)) for s in ("train", "validation", "test")] == [3737, 3736, 1319]
    assert not {e["question"] for e in g.examples("train")} & {e["question"] for e in g.examples("validation")}
    m = get_task("mbpp", d)
    assert [len(m.examples(s)) for s in ("train", "validation", "test", "prompt", "all")] == [374, 90, 500, 10, 974]
    assert [len(get_task("mbpp_sanitized", d).examples(s)) for s in ("train", "validation", "test", "prompt")] == [120, 43, 257, 7]

def test_skill_question_never_reads_a_test_row():
    d = data("gsm8k"); data("mbpp"); data("arc")
    cls, seen = get_task("cls", d), {}
    for s in ("train", "validation", "test"):
        rows = cls.examples(s)
        assert rows and {e["gold"] for e in rows} == {"math", "code", "reasoning"}
        seen[s] = {e["question"] for e in rows}
    assert not seen["train"] & seen["validation"] and not seen["train"] & seen["test"] and not seen["validation"] & seen["test"]
    for name in ("gsm8k", "arc_easy", "arc_challenge", "mbpp"):
        t = get_task(name, d)
        assert not {t.prompt(e) for e in t.examples("test")} & set.union(*seen.values())


# --- files and errors --------------------------------------------------------------------------------------------------------
def write(path, *rows): path.parent.mkdir(parents=True, exist_ok=True); path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)); return path

ROW = dict(question="1+1?", answer="#### 2")
@pytest.mark.parametrize("rows, said", [([ROW, "{broken"], "row 2: not JSON"), ([ROW, dict(question="x")], "row 2: no field 'answer'"), ([ROW, dict(question="x", answer="2")], "row 2: its answer has no"),
                                        ([ROW, "[1]"], "row 2: expected an object"), ([], "no rows")])
def test_broken_files_are_named(tmp_path, rows, said):
    write(tmp_path / "gsm8k" / "train.jsonl", *rows)
    with pytest.raises(ValueError, match=said) as e: get_task("gsm8k", tmp_path).examples("train")
    assert "train.jsonl" in str(e.value) and "\n" not in str(e.value)

@pytest.mark.parametrize("source, file, row, said", [
    ("arc_easy", "arc/ARC-Easy-train.jsonl", dict(question="q", choices=dict(text=["a"], label=["A"]), answerKey="B"), "key 'B' is not among"),
    ("arc_easy", "arc/ARC-Easy-train.jsonl", dict(question="q", choices=["a"], answerKey="A"), "row 1"),
    ("mbpp", "mbpp/mbpp.jsonl", dict(task_id=601, text="t", code="def f(): pass", test_list=["assert g() == 1"]), "its tests call nothing"),
    ("mbpp", "mbpp/mbpp.jsonl", dict(task_id=601, text="t", code="def f(:", test_list=["assert f() == 1"]), "row 1"),
    ("math", "math/train.jsonl", dict(problem="p", solution="no box"), "no \\\\boxed"), ("textvqa", "textvqa/TextVQA_0.5.1_train.json", '{"rows": []}', "expected a list")])
def test_changed_schemas_are_named(tmp_path, source, file, row, said):
    write(tmp_path / file, row)
    with pytest.raises(ValueError, match=said): get_task(source, tmp_path).examples("train")

def test_missing_and_unknown(tmp_path):
    with pytest.raises(FileNotFoundError, match="no gsm8k/train.jsonl"): get_task("gsm8k", tmp_path).examples("train")
    with pytest.raises(FileNotFoundError, match="no such folder"): get_task("gsm8k", tmp_path / "absent")
    with pytest.raises(ValueError, match="unknown task 'gsm9k'; there are arc_challenge"): get_task("gsm9k", tmp_path)
    write(tmp_path / "gsm8k" / "train.jsonl", ROW)
    with pytest.raises(ValueError, match="no split 'dev'"): get_task("gsm8k", tmp_path).examples("dev")
    with pytest.raises(ValueError, match="gsm8k.*no rows for split .validation"): get_task("gsm8k", tmp_path).examples("validation")

def test_reading_is_lazy_and_done_once(tmp_path):
    f = write(tmp_path / "gsm8k" / "train.jsonl", ROW, ROW)
    task = get_task("gsm8k", tmp_path)
    first = task.examples("train"); f.unlink()
    assert task.examples("train") == first and task.examples("train")[0] is first[0]

def test_hub_rows_have_the_same_schema(monkeypatch):
    "Without data_dir the hub is asked, with the id, configuration and split the community uses."
    import types
    asked = []
    def load_dataset(*a, split): asked.append((*a, split)); return [dict(ROW), dict(ROW)]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.delenv("TRANSFORMER2_DATA", raising=False); _rows.cache_clear()
    assert get_task("gsm8k").examples("test")[0]["gold"] == "2" and asked == [("openai/gsm8k", "main", "test")]
    _rows.cache_clear()

