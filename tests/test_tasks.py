"Verifiers, data and prompts: every published gold answer is correct, wrong answers are not, broken files are named."
import json, os, sys, subprocess, threading
from fractions import Fraction
from pathlib import Path
import pytest
from transformer2_nbdev import tasks
from transformer2_nbdev.tasks import *
from transformer2_nbdev.tasks import _rows, SOURCES, TASKS, answer_region, boxed, numbers

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


# --- numbers -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, want", [
    ("The answer is 1,000", 1000), ("The answer is -3", -3), ("$-5", -5), ("-$5", -5), ("The total is $1,234.50.", 1234.5), ("so 3.0", 3), ("72%", 72), ("#### 1,234", 1234),
    ("A: 5\n#### 18\n#### 7", 18), ("#### $18 per day", 18), ("### Step 1\nx\n#### 42", 42), ("**Answer: 42**", 42), ("**Final Answer:** 42 apples", 42),
    ("The final answer is: $\\boxed{42}$. I hope it is correct.", 42), ("\\boxed{3} no, \\boxed{4}", 4), ("\\boxed{\\$1{,}234}", 1234), ("\\boxed{x = 7}", 7), ("\\boxed{\\frac{1}{2}}", .5),
    ("The answer is \\(18\\).", 18), ("The answer is: \n18", 18), ("the answer is 3 * 6 = 18 dollars", 18), ("Therefore, the answer is (18).", 18), ("Answer = 18", 18),
    ("The answer to the question is 18 because 9 * 2 = 18 and not 20.", 18), ("So Janet makes $18 every day.", 18), ("half of 36 is 18", 18), ("2 million", 2000000),
    ("18\n\nQuestion: How many?\nAnswer: 7", 18), ("18\n\nQ: How many?\nA: 7", 18), ("The answer is 18.\n\n### Instruction:\nAdd 3 and 4", 18), ("18</s>7", 18),
    ("<<16-3-4=9>>9 eggs, $<<9*2=18>>18", 18), ("She has 3 1/2 pies", 3.5), ("x^2 is 18", 18), ("nothing", None), ("", None), ("Step 1: nothing", 1),
    ("- 16 eggs\n- 18 dollars", 18), ("16-3-4=9", 9), ("16 - 3 - 4", 4), ("in 2023, H2O", 2023), ("Rs.500", 500), ("£20.", 20), ("1e3", 1000), ("9" * 5000, None),
    ("#### 18.", 18), ("####18", 18), ("The correct answer is 18 hours and the wrong one 20.", 18)])
def test_final_number(text, want):
    x, how = tasks.final_number(text)
    assert (None if x is None else x) == (None if want is None else Fraction(str(want))), (x, how)

def test_a_long_answer_is_read_quickly():
    import time
    start = time.monotonic()
    for text in ("1" * 20000, "1," * 10000, "\\boxed{" * 5000, "#### " * 5000, "the answer is " * 3000, "{" * 20000, "$" * 20000, " " * 20000 + "5", "-" * 20000, "a\n" * 10000):
        tasks.final_number(text), tasks.math_answer(text)
    assert time.monotonic() - start < 20


# --- MATH ----------------------------------------------------------------------------------------------------------------------
SAME = [(r"\frac{3}{4}", "0.75"), (r"\dfrac34", r"\frac{3}{4}"), ("3/4", r"\frac{3}{4}"), ("10,000", "10000"), (r"10{,}000", "10000"), (r"\$18.90", "18.9"), (r"50\%", "50"), (r"90^\circ", "90"),
        (r"12\text{ cm}", "12"), (r"12 \text{ square units}", "12"), ("12 inches", "12"), (r"\text{Thursday}", "Thursday"), ("thursday", r"\text{Thursday}"), (r"\text{(B)}", "B"), (r"x=5", "5"),
        (r"f(x) = x+1", "x+1"), (r"\sqrt{8}", r"2\sqrt{2}"), (r"\sqrt2", r"\sqrt{2}"), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"), ("(x-1)(x+1)", "x^2-1"), (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        (r"1\frac{1}{2}", r"\frac{3}{2}"), (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"), ("(0.5, 2)", r"(\frac{1}{2},2)"), ("3, 5, 7", "7,5,3"), (r"\{3,5\}", "3, 5"),
        (r"x=1 \text{ or } x=-2", "1, -2"), (r"(-\infty,-1)\cup(1,\infty)", r"(-\infty, -1) \cup (1, \infty)"), (r"[2,\infty)", r"[2, \infty)"), (r"2\pi r", r"2 \pi r"), (r"6\pi", r"\pi \cdot 6"),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"), (r"\begin{pmatrix} 0.5 \\ 1 \end{pmatrix}", r"\begin{pmatrix} \frac12 \\ 1 \end{pmatrix}"),
        ("5+2i", "2i+5"), (r"\frac{1}{2}x", r"\frac{x}{2}"), (r"2^{10}", "1024"), (r"\log_2 8", "3"), (r"11\frac{1}{2}\%", "11.5"), ("1 000", "1000"), ("x^2 - 2x + 1", "(1-x)^2"),
        (r"\text{Yes}", "yes"), ("0.5000", "0.5"), (r"\tan 45^\circ", r"\tan 45^\circ"), (r"y = \frac{1}{2}x + 3", r"\frac{x}{2}+3"), (r"-3 \leq x \leq 2", r"-3\le x\le 2"), (r"14.00", "14")]
DIFFERENT = [("0.3", r"\frac13"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("1,2", "1,2,2"), ("12", "21"), (r"\text{odd}", r"\text{even}"), ("x+1", "x+2"), (r"\sqrt{2}", "1.4"), ("-5", "5"),
             (r"\frac{2}{3}", r"\frac{3}{2}"), (r"[0,1)", r"(0,1]"), (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"), ("A", "B"), ("1000", "10000"),
             (r"x^2", "x^3"), ("1,000", "1"), (r"5\pi", "5"), ("(1,2,3)", "(1,2)"), (r"\frac{1}{0}", "0"), ("", "5"), ("north", "south"), (r"2\sqrt{3}", r"3\sqrt{2}")]

def test_equal_answers():
    wrong = [(p, why) for p in SAME for a, b in (p, p[::-1]) if not (r := math_equal(a, b))[0] for why in r[1:]]
    assert not wrong

def test_different_answers():
    wrong = [(p, why) for p in DIFFERENT for a, b in (p, p[::-1]) if (r := math_equal(a, b))[0] for why in r[1:]]
    assert not wrong

def test_no_answer_takes_longer_than_its_limit_and_threads_may_ask():
    import time
    start = time.monotonic()
    assert not math_equal("9^{9^{9^{9}}}+x", "x", seconds=2)[0]
    assert time.monotonic() - start < 30                     # the helper may have to start first
    got = []
    threads = [threading.Thread(target=lambda i=i: got.append(math_equal(rf"\sqrt{{{i * i}}}x", f"{i}x")[0])) for i in range(2, 6)]
    [t.start() for t in threads]; [t.join() for t in threads]
    assert got == [True] * 4

@pytest.mark.parametrize("text, want", [(r"We get $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), ("The answer is $x+1$.", "x+1"), ("Answer: 5", "5"),
                                        (r"Hence \[ x = 7 \]", "7"), ("It is 12", "12"), ("no idea", None), (r"\boxed{a_{1}} then \boxed{b}", "b"), (r"\boxed 5", "5")])
def test_math_answer(text, want): assert tasks.math_answer(text) == want


# --- choices -------------------------------------------------------------------------------------------------------------------
def test_choices_with_numbered_labels():
    texts = ["ice", "steam", "snow", "hail"]
    for said in ("The answer is (2).", "2", "2. steam", "Answer: steam", "\\boxed{2}"): assert tasks.stated_choice(said, list("1234"), texts)[0] == "2", said
    assert tasks.stated_choice("There are 3 states.", list("1234"), texts)[0] is None

@pytest.mark.parametrize("text, want", [("The answer is (D)", "D"), ("the answer is d.", "D"), ("Option C is correct. The answer is C", "C"), ("I would choose B.\n\n**Answer: B**", "B"),
                                        ("A", "A"), ("A.", "A"), ("A plant needs light.", None), ("I am not sure.", None), ("The correct option is: A) sun", "A"), ("$\\boxed{\\text{A}}$", "A"),
                                        ("The answer is (A) and (B)", None), ("The best choice is the moon", "B"), ("Answer: E", None), ("The answer is (B).\n\nQuestion: x\nThe answer is (C)", "B")])
def test_choices(text, want): assert tasks.stated_choice(text, list("ABCD"), ["sun", "moon", "stars", "clouds"])[0] == want

def test_random_text_is_never_correct_by_chance():
    import random
    rng = random.Random(0)
    words = "the plant needs light and water because energy flows through a system of many small parts".split()
    for _ in range(300): assert tasks.stated_choice(" ".join(rng.choices(words, k=12)), list("ABCD"), ["copper", "iron", "zinc", "lead"])[0] is None


# --- code ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("completion", [
    "```python\ndef f(x):\n    return x + 1\n```", "Sure:\n\n```\ndef f(x):\n    return x + 1\n```\nDone.", "[BEGIN]\ndef f(x):\n    return x + 1\n[DONE]\nmore", "def f(x):\n    return x + 1\n\n\nThat adds one.",
    "```python\nprint(1)\n```\n```python\ndef f(x):\n    return x + 1\n```", "f = lambda x: x + 1", "<think>\n```python\ndef f(x): return 0\n```\n</think>\n```py\ndef f(x): return x + 1\n```",
    "```python\ndef f(x):\n    return x + 1", "Here is the code:\nimport math\ndef f(x):\n    return x + 1\nThis is it (x: int).", "def f(x):\r\n    return x + 1\r\n"])
def test_code_is_found(completion): assert tasks.judge_code(tasks.find_code(completion, "f"), "assert f(1) == 2").correct


# --- prompts, files, errors ----------------------------------------------------------------------------------------------------
class Chat:
    "A tokenizer with a chat template, a BOS token that it adds itself, and, if told so, no system role."
    chat_template, bos_token, bos_token_id = "yes", "<s>", 1
    def __init__(self, system=True): self.system = system
    def __call__(self, text): return dict(input_ids=[1, 5])
    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        if not self.system and messages[0]["role"] == "system": raise ValueError("System role not supported")
        return "<s>" + "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"

def test_render():
    task = Task("t", lambda s: [], lambda e: e["q"], lambda c, e: 1, system="Be brief.")
    assert render(task, dict(q="Hi"), None) == "Be brief.\n\nHi"
    assert render(task, dict(q="Hi"), Chat()) == "[system]Be brief.[user]Hi[assistant]"
    assert render(task, dict(q="Hi"), Chat(system=False)) == "[user]Be brief.\n\nHi[assistant]"
    assert render("Hi", None, Chat()) == "[user]Hi[assistant]" and render("Hi") == "Hi" and render(task, dict(q="Hi"), None, system="") == "Hi"

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

def test_own_prompts_and_reward(tmp_path):
    prompts = write(tmp_path / "p.txt", "Tell a story.", "", "Tell another.")
    reward = write(tmp_path / "r.py", "def dog(completion, example):\n    return 'dog' in completion\nx = 3")
    task = from_files(prompts, f"{reward}:dog")
    assert [task.prompt(e) for e in task.examples("train")] == ["Tell a story.", "Tell another."] and task.name == "p"
    v = task.judge("a dog", task.examples("test")[0])
    assert v.correct and v.reward == 1 and task.judge("a cat", {}).reward == -1
    rows = write(tmp_path / "p.jsonl", *[dict(prompt=str(i), answer=i) for i in range(20)])
    task = from_files(rows, lambda c, e: .5)
    assert [len(task.examples(s)) for s in ("train", "validation", "test")] == [16, 2, 2] and task.answer(task.examples("test")[0]) == "9"

@pytest.mark.parametrize("spec, said, kind", [("r.py", "expected file.py:function", ValueError), ("none.py:f", "no file", FileNotFoundError), ("r.py:g", "defines no function 'g'", ValueError),
                                              ("bad.py:f", "fails on import", ValueError)])
def test_reward_errors(tmp_path, monkeypatch, spec, said, kind):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.txt", "x"); write(tmp_path / "r.py", "def f(c, e): return 'high'"); write(tmp_path / "bad.py", "1 / 0")
    with pytest.raises(kind, match=said): from_files("p.txt", spec)

def test_reward_must_be_a_finite_number(tmp_path):
    p = write(tmp_path / "p.txt", "x")
    for value, said in (("high", "must be a number"), (float("nan"), "must be finite"), (None, "must be a number")):
        with pytest.raises(ValueError, match=said): from_files(p, lambda c, e: value).judge("", {})
    with pytest.raises(ValueError, match="no prompts"): from_files(write(tmp_path / "e.txt", ""), lambda c, e: 1)
    with pytest.raises(FileNotFoundError, match="no file"): from_files(tmp_path / "absent.txt", lambda c, e: 1)

def test_import_reads_nothing_and_needs_no_torch():
    code = "import sys, transformer2_nbdev.tasks; print([m for m in ('torch', 'datasets', 'sympy', 'math_verify', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"
