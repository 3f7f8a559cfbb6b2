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
                                        (r"Hence \[ x = 7 \]", "x = 7"), ("It is 12", "12"), ("no idea", None), (r"\boxed{a_{1}} then \boxed{b}", "b"), (r"\boxed 5", "5")])
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




# --- faults that were found, each with its neighbours on either side ------------------------------------------------------------
judged = lambda said, gold: verifiers.judge_math(said, gold).correct
box = lambda answer: f"\\boxed{{{answer}}}"

PLANE, CIRCLE, LINE = "2x - 9y + 4z - 1 = 0", "(x+2)^2 + (y-6)^2 = 49", "y = 4x - 7"
@pytest.mark.parametrize("said, gold, want", [
    # an equation that is wanted is not satisfied by its right-hand side
    ("0", PLANE, False), ("49", CIRCLE, False), ("1", r"\frac{x^2}{4} + \frac{y^2}{9} = 1", False), ("12", "3x + 4y = 12", False), (r"\frac12", r"\sin x = \frac12", False),
    ("x = 0", PLANE, False), ("2x - 9y + 4z = 0", PLANE, False), ("4x - 18y + 8z = 2", PLANE, True), ("-2x + 9y - 4z + 1 = 0", PLANE, True), (PLANE, PLANE, True),
    (r"(x + 2)^2 + (y - 6)^2 = 7^2", CIRCLE, True), ("x^2 + 4x + y^2 - 12y = 9", CIRCLE, True), ("(x-2)^2 + (y+6)^2 = 49", CIRCLE, False), ("0 = 0", PLANE, False),
    # but a name only introduces a value
    (LINE, "4x - 7", True), ("4x - 7", LINE, True), ("4x - y = 7", LINE, True), ("4x + y = 7", LINE, False), ("f(x) = 4x - 7", LINE, True), ("x = 4y - 7", LINE, False),
    ("60", r"\angle ABC = 60^\circ", True), (r"\frac38", r"P(A) = \frac{3}{8}", True), ("7", "AB = 7", True), ("(3, 8)", "(x, y) = (3, 8)", True), ("(8, 3)", "(x, y) = (3, 8)", False),
    ("A = 3 + 4 = 7", "7", True), ("a + b = 7", "7", True), ("a + b = 8", "7", False), ("x = 5", "y = 5", False), ("x = 5", "x = 5", True), ("X = 5", "x=5", True),
    # a point has an order
    ("8, 3", "(3,8)", False), ("3, 8", "(3,8)", True), ("(8,3)", "(3,8)", False), ("(3,8)", "(3,8)", True), (r"\{8,3\}", "3, 8", True), ("(3,8), (1,2)", "(1,2), (3,8)", True),
    # equations without real solutions are not all alike
    ("x^2 = -1", "x^2 = -2", False), ("x^2 + 1 = 0", "x^2 = -1", True),
    # inequalities and sets
    ("6", r"t \le 6", False), ("t = 6", r"t \le 6", False), ("t <= 6", r"t \le 6", True), (r"6 \ge t", r"t \le 6", True), ("t < 6", r"t \le 6", False), (r"t \le 6", "6", False),
    (r"(-\infty, 6]", r"t \le 6", True), (r"t \le 6", r"(-\infty, 6]", True), (r"(-\infty, 6)", r"t \le 6", False), (r"x \in [2, \infty)", r"[2,\infty)", True), ("1 < x < 2", "(1,2)", True)])
def test_the_gold_answer_decides_what_kind_of_answer_will_do(said, gold, want):
    assert judged(box(said), gold) == want and judged(f"So we have ${said}$.", gold) == want

@pytest.mark.parametrize("text, want", [
    ("she keeps 5/8.", "5/8"), ("she keeps 5/8. ", "5/8"), ("She keeps 5/8, he 3/8.", "3/8"), ("It is 3 1/2.", "7/2"), ("5/8.\nThat is all.", "5/8"), ("(5/8)", "5/8"), ("1/2. So be it", "1/2"),
    ("version 5/8.5", "8.5"), ("it is 24/7", "24/7"), ("She has 8.", "8"), ("5/8.0", "8")])
def test_a_fraction_before_a_full_stop(text, want): assert tuple(verifiers.final_number(text))[0] == Fraction(want)

@pytest.mark.parametrize("text, want", [
    ("#### 42 pens in 6 boxes", 42), ("#### $42 for 6 boxes", 42), ("#### 42, in 6 boxes", 42), ("#### 42 (6 * 7)", 42), ("#### about 42 pens in 6 boxes", 42), ("#### 9*2 = 18", 18), ("#### 9 * 2 = 18 eggs for 2 days", 18),
    ("#### 3 times 6 is 18", 18), ("#### 9 x 2", 2), ("#### 18 - 2", 2), ("#### 3 boxes of 6 is 18", 18), ("#### There are 42 pens", 42), ("#### 2. She makes 18 dollars", 18), ("#### 18 and 20", 20), ("#### 42%", 42),
    (r"\boxed{42 \text{ pens in 6 boxes}}", 42), (r"\boxed{6 \cdot 7 = 42}", 42), ("That is **42 pens in 6 boxes**", 42), ("Answer: 42 pens in 6 boxes", 42), ("In 6 boxes there are 42 pens", 42)])
def test_a_number_that_words_follow(text, want): assert verifiers.final_number(text)[0] == want

@pytest.mark.parametrize("text, want", [("<think>It may be 18", None), ("18 <think>or 20?", 18), ("<think>7</think>18", 18), ("<think>7</think>18<think>20", 18), ("</think>18", 18), ("<thinking>18", None), ("<think>#### 18\n", None),
                                        ("I think 18", 18)])
def test_an_unfinished_thought_is_no_answer(text, want):
    assert verifiers.final_number(text)[0] == want
    assert verifiers.judge_number(text, 18).correct == (want == 18)

@pytest.mark.parametrize("text, want", [
    ("The answer is (D)\n\nA. sun\nB. moon\nC. stars\nD. clouds", "D"), ("A. sun\nB. moon\nC. stars\nD. clouds", None), ("(A) sun\n(B) moon\n(C) stars\n(D) clouds", None), ("The options are:\nA. sun\nB. moon\nC. stars\nD. clouds", None),
    ("A. sun\nB. moon\nC. stars\nD. clouds\n\nC. stars", "C"), ("A. sun\nB. moon\nC. stars\nD. clouds\nI choose B.", "B"), ("D. clouds", "D"), ("D. clouds are white", "D"),
    ("(A)(B)(C)(D)", None), ("A, B, C, D", None), ("A/B", None), ("(A), (B) and (C)", None), ("(A)", "A"), ("(A) sun", "A"), ("The answer is (A), (B)", None),
    ("not (A)", None), ("It is not (A).", None), ("It isn't A", None), ("not A but (B)", "B"), ("It is not the sun.", None), ("It is not the sun but the moon.", "B"), ("(A) is wrong", None), ("(A) is wrong, so (B)", "B"),
    ("We can rule out (A)", None), ("The answer is not (A), it is (C).", "C"), ("It cannot be (D).", None), ("Better (B) than (A)", "B"),
    ("So C is the correct answer.", "C"), ("So (C) is correct.", "C"), ("C is not the correct answer.", None), ("The moon is the correct answer.", "B"), ("C must be the right answer, not D.", "C"), ("Option C is the best choice.", "C"),
    ("I would choose C.", "C"), ("I'd go with (D).", "D"), ("Pick the moon", "B"), ("I would not choose C.", None), ("Option C", "C"), ("A is the answer", "A"), ("A star is the answer", None), ("Choose a letter", None)])
def test_a_choice_must_be_stated(text, want): assert verifiers.stated_choice(text, list("ABCD"), ["sun", "moon", "stars", "clouds"])[0] == want, verifiers.stated_choice(text, list("ABCD"), ["sun", "moon", "stars", "clouds"])

@pytest.mark.parametrize("said, gold, want", [
    (r"\boxed{3} and \boxed{5}", "3, 5", True), (r"\boxed{5}, \boxed{3}", "3, 5", True), (r"First $x = \boxed{3}$. The other is \boxed{5}.", "3, 5", True), (r"$x = \boxed{3}$ or $x = \boxed{5}$", r"\{3, 5\}", True),
    (r"\boxed{3, 5}", "3, 5", True), (r"\boxed{4}? No: \boxed{3, 5}", "3, 5", True), (r"\boxed{1}, \boxed{3} and \boxed{5}", "3, 5", False), (r"\boxed{3}", "3, 5", False), (r"\boxed{5}", "3, 5", False),
    (r"\boxed{3}? No: \boxed{5}", "5", True), (r"\boxed{5}? No: \boxed{3}", "5", False), (r"\boxed{3} and \boxed{5}", "5", True), (r"\boxed{3} and \boxed{5}", "3", False), (r"$x = \boxed{3}$, $y = \boxed{8}$", "(3, 8)", True),
    (r"$x = \boxed{8}$, $y = \boxed{3}$", "(3, 8)", False), ("The solutions are $3$ and $5$.", "3, 5", True), ("Thus $x=3$ or $x=5$.", "3, 5", True), ("We had $a = 3$; now $x = 5$.", "3, 5", False)])
def test_a_list_in_several_boxes(said, gold, want): assert judged(said, gold) == want

@pytest.mark.parametrize("said, gold, want", [("2 1/3", r"\frac{7}{3}", True), ("2 1/3", "7", False), ("21/3", "7", True), ("-2 1/3", r"-\frac{7}{3}", True), (r"2\frac{1}{3}", "2 1/3", True), (r"2 \frac{1}{3}", "7/3", True),
                                              ("1 000", "1000", True), ("10 3/4", "10.75", True), ("2 - 1/3", r"\frac{5}{3}", True), ("2 1/3, 4", r"\frac{7}{3}, 4", True), ("(2 1/3, 0)", r"(\frac73, 0)", True)])
def test_mixed_numbers(said, gold, want): assert judged(box(said), gold) == want

@pytest.mark.parametrize("said, gold, want", [
    (r"\frac{1}{3^{40}}", r"\frac{1}{3^{41}}", False), (r"\frac{1}{3^{40}}", "3^{-40}", True), (r"\frac{1}{2004!}", r"\frac{1}{2006!}", False), ("0", "10^{-8}", False), ("10^{-8}", "0", False), ("0.00000001", "0", False),
    ("0.00000001", "10^{-8}", True), (r"x \cdot 10^{-20}", "0", False), (r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", r"\frac{1}{3 \cdot 2^{2006}}", False), (r"1+\frac1e", r"1-\frac1e", False),
    ("0.333333", r"\frac13", True), ("0.3333", r"\frac13", False), ("0.166667", r"\frac16", True), ("0.083333", r"\frac{1}{12}", True), ("0.000012", r"\frac{1}{81000}", False), ("1.414214", r"\sqrt2", True), ("1.41", r"\sqrt2", False),
    (r"\sin^2 x + \cos^2 x", "1", True), (r"\frac{x^2-1}{x-1}", "x+1", True), (r"\frac{1}{1-x}", r"\frac{-1}{x-1}", True), (r"\infty", r"\infty", True), (r"\infty", r"-\infty", False),
    ("341_6", "341_5", False), ("341_6", "341_6", True), ("341_{6}", "341_6", True), (r"341_{\text{six}}", "341_6", True), ("341", "341_6", True), ("342", "341_6", False), ("1010_2", "10", False), ("a_6", "a_5", False)])
def test_size_and_base(said, gold, want): assert judged(box(said), gold) == want

@pytest.mark.parametrize("said, gold, want", [
    ("the smallest such $k$ is 19.", "19", True), ("the smallest such $k$ is 19.", "k", False), (r"$\frac{60}{m}$ rows. So there are 15 rows.", "15", True), ("so $t <= 6$", "6", False), ("so $t <= 6$", r"t \le 6", True),
    ("so $x = 7$ after 3 steps", "7", True), ("so $x = 7$ after 3 steps", "3", False), ("We need $k^2 > 5$; the least is 3.", "3", True), ("so $a+b = 12$.", "12", True), ("Then $2x+3=7$, so $x=2$.", "2", True),
    ("The answer is 19 because $k$ is odd.", "19", True), ("The answer is $x=3$ or $x=5$.", "3, 5", True), ("Thus the area is $\\pi$.", r"\pi", True), ("In 3 steps we see that it is $C$.", "C", True), ("So we get 5! = 120.", "120", True),
    ("Hence $x^2 - 5x + 6 = 0$.", "0", True), ("Hence $x^2 - 5x + 6 = 0$.", "x^2 - 5x + 6 = 0", True), ("Hence $x^2 - 5x + 7 = 0$.", "x^2 - 5x + 6 = 0", False)])
def test_answers_without_a_box(said, gold, want): assert judged(said, gold) == want

@pytest.mark.parametrize("said, gold, want", [
    ("x=2, y=9", "x=9, y=2", False), ("x=2, y=9", "x=2, y=9", True), ("y=9, x=2", "x=2, y=9", True), ("2, 9", "x=2, y=9", True), ("9, 2", "x=2, y=9", False), ("(2, 9)", "x=2, y=9", True), ("(9, 2)", "x=2, y=9", False),
    ("y=9, x=2", "(2, 9)", True), ("x=9, y=2", "(2, 9)", False), ("x=9, y=2", "2, 9", True), ("x=1, x=-2", "x=-2, x=1", True), ("x=1 \\text{ or } x=-2", "1, -2", True), ("a=2, b=9", "x=2, y=9", False), ("n = 2, 3, 4", "n = 1, 2, 3", False),
    ("5m", "5", False), ("5", "5m", False), ("5m", "5m", True), ("5 m", "5m", True), ("5 m", "5", True), (r"5\text{ m}", "5", True), (r"5\,\mathrm{m}", "5", True), ("5cm", "5", True), ("5t", "5", False), ("5d", "5", False), ("2a+3c", "2a+3", False),
    ("5 gallons", "5", True), ("5 million", "5", False), ("3g", "3", False), ("3 g", "3", True), (r"\text{No}", r"\text{on}", False), ("12:00", "1:00", False), ("12:30", "12:30", True), ("3:2", "6:4", False), (r"\pm 5", "5", False), (r"\pm 5", "5, -5", True)])
def test_names_and_units(said, gold, want): assert judged(box(said), gold) == want

PROMPT = 'from typing import List\n\ndef add(a: int, b: int) -> int:\n    """ The sum.\n    >>> add(1, 2)\n    3\n    """\n'
WHOLE = "def add(a: int, b: int) -> int:\n    return a + b\n"
RIGHT = ["    return a + b\n```\nThis function adds two numbers.\nIt uses `+`.", "    return a + b\n```\n\nUsage:\n```python\nprint(add(1, 2))\n```", "return a + b\n```", WHOLE + "```\nIt adds.", "\n    return a + b\n```\n# note",
         "add = lambda a, b: a + b", "```python\nadd = lambda a, b: a + b\n```", "Sure:\n```python\nadd: object = lambda a, b: a + b\n```", "<think>easy: `return 0`</think>\n    return a + b", "<think>\n```python\ndef add(a, b): return 0\n```\n</think>\n    return a + b",
         "<think>x</think>return a + b", WHOLE + "\nprint(add(int(input()), 2))", f"```python\n{WHOLE}\nn = int(input('n: '))\nm = n + 1\nprint(add(n, m))\n```", f"```python\n{WHOLE}\nif __name__ == '__main__':\n    import sys\n    print(add(*map(int, sys.stdin)))\n```",
         f"```python\n{WHOLE}\ndef main():\n    a = input()\n    print(add(int(a), 1))\n\nmain()\n```", f"```python\nimport sys\n{WHOLE}\nfor line in sys.stdin: print(line)\n```", "if a:\n        return a + b\n    return b", "c = a\n    return c + b",
         "  return a + b", "\treturn a + b", f"{WHOLE}\nprint(add(1, 2))", f"Here it is:\n\n```python\n{WHOLE}```\n\nAnd a test:\n\n```python\nassert add(1, 2) == 3\n```", f"```python\n{PROMPT}    return a + b\n```"]
WRONG = ["    return a - b\n```\nThis function adds two numbers.", "```\nThis function adds two numbers.\n```", "add = lambda a, b: a - b", "<think>return a + b</think>", "<think>    return a + b", "It adds.", "", "    pass\n```\nreturn a + b", "def sub(a, b):\n    return a + b\n```"]

@pytest.mark.parametrize("said", RIGHT)
def test_completions_of_a_function(said):
    program = verifiers.complete_function(PROMPT, said, "add")
    assert verifiers.judge_code(program, "assert add(1, 2) == 3 and add(0, 5) == 5", ("add",)).correct, program

@pytest.mark.parametrize("said", WRONG)
def test_what_completes_no_function(said):
    assert not verifiers.judge_code(verifiers.complete_function(PROMPT, said, "add"), "assert add(1, 2) == 3 and add(0, 5) == 5", ("add",)).correct

@pytest.mark.parametrize("program", ["import sys\nx = sys.maxsize\ndef f(x): return x", "def f(x):\n    return x\n\nprint(f(1))", "def f(stdin):\n    return stdin\nf(1)", "TABLE = [i for i in range(9)]\ndef f(x): return TABLE[x]\nf(1)",
                                     "def input(x): return x\ndef f(x): return input(x)\ny = f(1)", "def f(x): return input\n", "def f(:", "", "class A:\n    def ask(self): return input()\ndef f(x): return x"])
def test_programs_that_do_not_ask_stay_as_they_are(program): assert verifiers._without_input(program) == program

def test_readers_are_quick_on_hostile_texts():
    import time
    bodies = ("the moon is " * 2000, "A" * 20000, "(A) " * 5000, "A. sun\n" * 3000, "not " * 5000, "choose " * 3000, "``` " * 5000, "```\n" * 5000, "x = \n" * 2000, "$" * 9999, "$x$ and " * 2500, "\\boxed{3} and " * 1500, " " * 20000 + "is correct",
              "\n**Problem:** " * 2000, "<think>" * 3000, "\\(x\\) " * 3000, "is " * 7000 + "5", "(" * 20000, "1 1/2 " * 3000, "= " * 9000, "{" * 20000)
    for text in bodies:                                      # processor time: how busy the machine is plays no part
        start = time.process_time()
        verifiers.stated_choice(text, list("ABCD"), ["sun", "moon", "stars", "clouds"]), verifiers.final_number(text), verifiers.math_answer(text, 2)
        verifiers.find_code(text, "f"), verifiers.complete_function(PROMPT, text, "add")
        assert time.process_time() - start < 20, text[:30]

def test_an_option_whose_words_are_another_options_letter():
    "In ARC the options of one question are the formulas C, NO2, O2 and CO: a lone C is the letter."
    assert verifiers.stated_choice("C is right.", list("ABCD"), ["C", "NO_{2}", "O_{2}", "CO"])[0] == "C"
