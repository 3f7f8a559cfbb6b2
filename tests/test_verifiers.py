"Verifiers: what they read from a completion, what they take for equal, and what they refuse."
import threading
from fractions import Fraction
import pytest
from transformer2_nbdev import verifiers
from transformer2_nbdev.verifiers import math_equal

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
    x, how = verifiers.final_number(text)
    assert (None if x is None else x) == (None if want is None else Fraction(str(want))), (x, how)

def test_a_long_answer_is_read_quickly():
    import time
    start = time.monotonic()
    for text in ("1" * 20000, "1," * 10000, "\\boxed{" * 5000, "#### " * 5000, "the answer is " * 3000, "{" * 20000, "$" * 20000, " " * 20000 + "5", "-" * 20000, "a\n" * 10000):
        verifiers.final_number(text), verifiers.math_answer(text)
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
def test_math_answer(text, want): assert verifiers.math_answer(text) == want


# --- choices -------------------------------------------------------------------------------------------------------------------
def test_choices_with_numbered_labels():
    texts = ["ice", "steam", "snow", "hail"]
    for said in ("The answer is (2).", "2", "2. steam", "Answer: steam", "\\boxed{2}"): assert verifiers.stated_choice(said, list("1234"), texts)[0] == "2", said
    assert verifiers.stated_choice("There are 3 states.", list("1234"), texts)[0] is None

@pytest.mark.parametrize("text, want", [("The answer is (D)", "D"), ("the answer is d.", "D"), ("Option C is correct. The answer is C", "C"), ("I would choose B.\n\n**Answer: B**", "B"),
                                        ("A", "A"), ("A.", "A"), ("A plant needs light.", None), ("I am not sure.", None), ("The correct option is: A) sun", "A"), ("$\\boxed{\\text{A}}$", "A"),
                                        ("The answer is (A) and (B)", None), ("The best choice is the moon", "B"), ("Answer: E", None), ("The answer is (B).\n\nQuestion: x\nThe answer is (C)", "B")])
def test_choices(text, want): assert verifiers.stated_choice(text, list("ABCD"), ["sun", "moon", "stars", "clouds"])[0] == want

def test_random_text_is_never_correct_by_chance():
    import random
    rng = random.Random(0)
    words = "the plant needs light and water because energy flows through a system of many small parts".split()
    for _ in range(300): assert verifiers.stated_choice(" ".join(rng.choices(words, k=12)), list("ABCD"), ["copper", "iron", "zinc", "lead"])[0] is None


# --- code ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("completion", [
    "```python\ndef f(x):\n    return x + 1\n```", "Sure:\n\n```\ndef f(x):\n    return x + 1\n```\nDone.", "[BEGIN]\ndef f(x):\n    return x + 1\n[DONE]\nmore", "def f(x):\n    return x + 1\n\n\nThat adds one.",
    "```python\nprint(1)\n```\n```python\ndef f(x):\n    return x + 1\n```", "f = lambda x: x + 1", "<think>\n```python\ndef f(x): return 0\n```\n</think>\n```py\ndef f(x): return x + 1\n```",
    "```python\ndef f(x):\n    return x + 1", "Here is the code:\nimport math\ndef f(x):\n    return x + 1\nThis is it (x: int).", "def f(x):\r\n    return x + 1\r\n"])
def test_code_is_found(completion): assert verifiers.judge_code(verifiers.find_code(completion, "f"), "assert f(1) == 2").correct


