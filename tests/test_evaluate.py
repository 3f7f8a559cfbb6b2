"Evaluation: published statistics, the same bytes twice (also in another process and after a cut at any place), and refusals."
import json, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model

from test_rollout import llama, words
from transformer2_nbdev import evaluate as ev
from transformer2_nbdev.adapter import SvfConfig
from transformer2_nbdev.evaluate import (bootstrap, evaluate, fingerprint, hierarchical, load, mcnemar,
                                         paired, save, student_t, summarise, wilson)
from transformer2_nbdev.tasks import Task, Verdict


def verdict(c, e): return Verdict(1. if "w9" in c else -1., "w9" in c, c[:9], e["gold"], "looked for w9")
def make(n=23, verify=verdict, name="nines"):
    return Task(name, lambda split: [dict(q=" ".join(f"w{(i * 7 + j) % 40}" for j in range(1 + i % 6)), gold=i) for i in range(n)], lambda e: e["q"], verify=verify, max_new_tokens=6)


ASK = dict(batch_size=5, temperature=1., seed=3, progress=False)
def content(out):
    head = json.loads((out / "result.json").read_text())
    del head["run"]
    return head, (out / "items.jsonl").read_bytes()


# ------------------------------------------------------------------ statistics against what others published

@pytest.mark.parametrize("k,n,low,high", [(81, 263, .2553, .3662), (15, 148, .0624, .1605), (0, 20, 0, .1611), (1, 29, .0061, .1718)])
def test_wilson_as_printed_by_newcombe_1998(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=6e-5)
    mirrored = wilson(n - k, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx(wilson(k, n), abs=1e-12)


def test_wilson_edges_and_refusals():
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1 and wilson(0, 1)[1] < 1
    assert wilson(50, 100, .99)[0] < wilson(50, 100)[0] < wilson(50, 100, .9)[0]
    for k, n in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="wilson needs"): wilson(k, n)


@pytest.mark.parametrize("b,c,p", [(121, 59, 4e-06), (70, 59, .378688), (80, 59, .089452), (30, 60, .00206), (10, 30, .002221), (10, 10, 1.)])
def test_mcnemar_as_in_the_tests_of_statsmodels(b, c, p): assert mcnemar(b, c) == mcnemar(c, b) == pytest.approx(p, abs=1.5e-6)


def test_mcnemar_agresti_1990_and_edges():
    assert mcnemar(86, 150) == pytest.approx(3.716e-05, abs=5e-9)             # as R's binom.test prints it
    assert mcnemar(0, 0) == mcnemar(1, 0) == 1 and mcnemar(10, 0) == 2 / 2**10
    assert 0 < mcnemar(3000, 2000) < 1e-40                                    # large counts do not overflow


@pytest.mark.parametrize("df,t", [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)])
def test_student_t_as_in_fishers_table(df, t): assert student_t(.95, df) == pytest.approx(t, abs=1.1e-3)


def test_bootstrap_is_the_item_bootstrap():
    "The multinomial shortcut against resampling the items one by one."
    d = np.array([1] * 30 + [-1] * 12 + [0] * 158)
    rng = np.random.default_rng(1)
    slow = np.quantile(rng.choice(d, (20_000, len(d))).mean(1), [.025, .975])
    assert bootstrap(30, 12, 200) == pytest.approx(slow, abs=.006)
    assert bootstrap(30, 12, 200, seed=5) == bootstrap(30, 12, 200, seed=5) and bootstrap(30, 12, 200, .8)[0] > slow[0]


def test_bootstrap_interval_covers_the_truth():
    "300 data sets of 400 questions with a true difference of 5 points: the 95% interval holds it in 91 to 99%."
    draws = np.random.default_rng(0).multinomial(400, [.12, .07, .81], 300)
    held = np.mean([lo <= .05 <= hi for lo, hi in (bootstrap(int(g), int(l), 400, resamples=1000) for g, l, _ in draws)])
    assert .91 <= held <= .99


# ------------------------------------------------------------------ evaluation

def test_result_counts_what_the_items_say(tmp_path):
    r = evaluate(llama(), words(), make(), out=tmp_path / "r", **ASK)
    assert r.n == len(r.items) == 23 and r.correct == sum("w9" in i["completion"] for i in r.items) and 0 < r.correct < 23
    assert (r.low, r.high) == wilson(r.correct, 23) and r.acc == r.correct / 23 and [i["gold"] for i in r.items] == list(range(23))
    head = json.loads((tmp_path / "r" / "result.json").read_text())
    assert {"task", "seed", "model", "n", "correct", "interval"} <= set(head) and {"command", "versions", "seconds", "peak_memory_mb"} <= set(head["run"])
    assert load(tmp_path / "r") == r and str(r).startswith("nines: ")
    assert [json.loads(l) for l in (tmp_path / "r" / "items.jsonl").read_text().splitlines()] == r.items


def test_the_same_bytes_twice_and_in_another_process(tmp_path):
    for name in "ab": evaluate(llama(), words(), make(), out=tmp_path / name, **ASK)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}; import test_evaluate as t; t.evaluate(t.llama(), t.words(), t.make(), out={str(tmp_path / 'c')!r}, **t.ASK)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=dict(__import__("os").environ, PYTHONHASHSEED="77"))
    assert content(tmp_path / "c") == content(tmp_path / "a")


def test_resumes_after_a_cut_at_any_place(tmp_path):
    model, tok = llama(), words()
    whole = tmp_path / "whole"
    evaluate(model, tok, make(), out=whole, **ASK)

    def interrupted(text, e, left=[18]):
        left[0] -= 1
        if left[0] < 0: raise KeyboardInterrupt
        return verdict(text, e)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt): evaluate(model, tok, make(verify=interrupted), out=cut, workers=1, **ASK)
    assert [p.name for p in cut.iterdir()] == ["items.partial.jsonl"]
    saved = (cut / "items.partial.jsonl").read_bytes()
    assert saved.count(b"\n") == 1 + 15
    for k, size in enumerate(sorted({0, 1, 40, *np.linspace(60, len(saved), 9).astype(int).tolist()})):
        out = tmp_path / f"cut{k}"; out.mkdir()
        (out / "items.partial.jsonl").write_bytes(saved[:size])
        r = evaluate(model, tok, make(), out=out, **ASK)
        assert content(out) == content(whole) and r.run["resumed"] in (0, 5, 10, 15) and sorted(p.name for p in out.iterdir()) == ["items.jsonl", "result.json"]
    assert r.run["resumed"] == 15


def test_a_finished_evaluation_is_read_and_others_are_refused(tmp_path):
    model, tok, out = llama(), words(), tmp_path / "r"
    r = evaluate(model, tok, make(), out=out, **ASK)
    def never(c, e): raise AssertionError("asked again")
    assert evaluate(model, tok, make(verify=never), out=out, **ASK) == r
    for changed, says in ((dict(seed=4), "seed was 3, now 4"), (dict(limit=9), "questions was 23, now 9"), (dict(temperature=0.), "temperature"), (dict(batch_size=6), "batch_size")):
        with pytest.raises(ValueError, match=says): evaluate(model, tok, make(), out=out, **ASK | changed)
    with torch.no_grad(): model.model.norm.weight[0] += 1e-3
    with pytest.raises(ValueError, match="fingerprint"): evaluate(model, tok, make(), out=out, **ASK)
    assert content(out)[0]["fingerprint"] == r.settings["fingerprint"]
    assert evaluate(model, tok, make(), out=out, overwrite=True, **ASK).settings["fingerprint"] == fingerprint(model)


def test_an_interrupted_evaluation_of_another_model_is_not_continued(tmp_path):
    (tmp_path / "items.partial.jsonl").write_text(json.dumps(dict(task="nines", seed=3, fingerprint="0" * 16)) + "\n")
    with pytest.raises(ValueError, match="another evaluation"): evaluate(llama(), words(), make(), out=tmp_path, **ASK)


def test_greedy_accuracy_does_not_depend_on_the_seed_or_the_batch_size():
    a, b = (evaluate(llama(), words(), make(), progress=False, **kw) for kw in (dict(seed=1, batch_size=5), dict(seed=2, batch_size=64)))
    assert [i["completion"] for i in a.items] == [i["completion"] for i in b.items] and paired(a, b).p == 1


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="no examples in split 'test'"): evaluate(llama(), words(), make(0), progress=False)
    with pytest.raises(FileNotFoundError, match="no result.json"): load(tmp_path)
    r = evaluate(llama(), words(), make(), **ASK)
    save(r, tmp_path / "s")
    (tmp_path / "s" / "items.jsonl").write_text("".join(json.dumps(i) + "\n" for i in r.items[:-1]))
    with pytest.raises(ValueError, match="does not belong"): load(tmp_path / "s")
    with pytest.raises(ValueError, match="3 rows of weights"): evaluate(llama(), words(), make(), strategy=lambda p: [[1.]] * (1 if len(p) == 1 else 3), **ASK)


def test_different_questions_are_not_compared():
    a, b = evaluate(llama(), words(), make(), **ASK), evaluate(llama(), words(), make(20), **ASK)
    with pytest.raises(ValueError, match="23 questions against 20"): paired(a, b)
    with pytest.raises(ValueError, match="different questions at item 0"): paired(a, a.items[::-1])
    regraded = [i | dict(id=ev.item_id(i["prompt"], "x"), gold="x") for i in a.items]
    with pytest.raises(ValueError, match="different gold answers at item 0"): paired(a, regraded)
    assert paired(a, a.items).diff == 0


def test_a_strategy_gives_every_question_its_model():
    model = get_peft_model(llama(), SvfConfig(target_modules="all-linear"), adapter_name="a")
    model.add_adapter("b", SvfConfig(target_modules="all-linear"))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "svf_d" in n: p.normal_(0, .4)
    def by_length(prompts): return [[float(len(p) > 9), float(len(p) <= 9)] for p in prompts]
    by_length.experts = ["b", "a"]
    r = evaluate(model, words(), make(), by_length, batch_size=5, progress=False)
    alone = {}
    for name in "ab": model.set_adapter(name); alone[name] = evaluate(model, words(), make(), batch_size=5, progress=False)
    for i, item in enumerate(r.items):
        assert item["weights"] == by_length([item["prompt"]])[0] and item["completion"] == alone["b" if len(item["prompt"]) > 9 else "a"].items[i]["completion"]
    assert r.digest == alone["a"].digest and r.settings["strategy"]["name"] == "by_length" and alone["a"].settings["fingerprint"] != alone["b"].settings["fingerprint"]
    assert [i["completion"] for i in alone["a"].items] != [i["completion"] for i in alone["b"].items]


def test_fingerprint_sees_weights_adapters_and_types():
    model = llama()
    seen = {fingerprint(model), fingerprint(model.bfloat16())}
    model = get_peft_model(llama(), SvfConfig(target_modules="mlp"))
    seen.add(fingerprint(model))
    with model.disable_adapter(): seen.add(fingerprint(model))
    with torch.no_grad(): next(p for n, p in model.named_parameters() if "svf_d" in n)[0] += 1e-6
    seen.add(fingerprint(model))
    assert len(seen) == 5


def test_summary_of_seeds():
    runs = [evaluate(llama(), words(), make(), **ASK | dict(seed=s)) for s in range(4)]
    s = summarise(runs)
    assert s.mean == pytest.approx(np.mean(s.accs)) and s.sd == pytest.approx(np.std(s.accs, ddof=1)) and s.n == 23
    assert s.high - s.mean == pytest.approx(3.1824 * s.sd / 2, rel=1e-3) or s.high == 1
    with pytest.raises(ValueError, match="same run"): summarise([runs[0], runs[1], runs[0]])
    with pytest.raises(ValueError, match="at least two"): summarise(runs[:1])


def test_partial_credit_is_kept_apart_from_accuracy():
    half = make(verify=lambda c, e: Verdict(-.1, False, None, e["gold"], "", .3))
    r = evaluate(llama(), words(), half, **ASK)
    assert r.acc == 0 and r.score == pytest.approx(.3)


def test_pictures_have_content():
    import matplotlib; matplotlib.use("Agg")
    rs = {s: evaluate(llama(), words(), make(), **ASK | dict(seed=i)) for i, s in enumerate("abc")}
    bars = ev.plot_accuracy(rs)
    assert [p.get_height() for p in bars.patches] == pytest.approx([100 * r.acc for r in rs.values()])
    assert len(ev.plot_paired(rs["a"], {k: rs[k] for k in "bc"}).texts) == 2


# ------------------------------------------------------------------ seeds and questions at once

def test_hierarchical_without_a_spread_of_seeds_is_the_bootstrap_over_questions():
    g = np.random.default_rng(0)
    a, b = g.random(400) < .6, g.random(400) < .7
    gained, lost = int((b & ~a).sum()), int((a & ~b).sum())
    h = hierarchical(dict(a=[a] * 4, b=[b] * 4), "a")["b"]
    assert h.diff == pytest.approx((gained - lost) / 400) and (h.gained, h.lost, h.n) == (4 * gained, 4 * lost, 400)
    assert (h.low, h.high) == pytest.approx(bootstrap(gained, lost, 400), abs=.008)


@pytest.mark.parametrize("S", [3, 40])
def test_hierarchical_without_a_spread_of_questions_has_the_interval_of_the_seeds(S):
    "Every question alike, seeds that are all right or all wrong: mean +- t sd / sqrt(S)"
    right = [s % 2 == 0 for s in range(S)]
    h = hierarchical(dict(a=np.zeros((S, 30)), b=[[r] * 30 for r in right]), "a")["b"]
    half = student_t(.95, S - 1) * np.std(right, ddof=1) / S ** .5
    assert (h.high - h.low) / 2 == pytest.approx(half, rel=.25) and h.low < np.mean(right) < h.high


def test_stretch_is_students_where_seeds_vary_and_one_where_they_do_not():
    z, rng = 1.959964, np.random.default_rng(0)
    alike = np.repeat(rng.integers(-1, 2, (1, 400)), 3, 0).astype(float)
    assert ev.stretch(alike, .95) == pytest.approx(student_t(.95, 399) / z, rel=1e-3)
    assert ev.stretch(np.array([[0.] * 30, [1.] * 30, [1.] * 30]), .95) == pytest.approx(student_t(.95, 2) / z, rel=1e-3)
    assert ev.stretch(np.zeros((3, 30)), .95) == 1


@pytest.mark.parametrize("S, scatter", [(3, 0), (3, .05), (6, .05)])
def test_hierarchical_holds_the_truth_as_often_as_it_says(S, scatter):
    "Nominally 190 of 200; three standard errors below is 180"
    rng, held = np.random.default_rng(7), 0
    for _ in range(200):
        u, gain = rng.random((1, 200)), .1 + rng.normal(0, scatter, (S, 1))
        a, b = np.repeat(u < .55, S, 0), (u < .5) | ((u > .55) & (u < .55 + np.clip(gain, 0, .4)))
        h = hierarchical(dict(a=a, b=b), "a", resamples=300)["b"]
        held += h.low <= .05 <= h.high
    assert held >= 180


def test_hierarchical_p_values():
    g = np.random.default_rng(1)
    a = g.random((3, 500)) < .5
    runs = dict(a=a, same=a, better=a | (g.random((3, 500)) < .3), other=g.permutation(a.T).T)
    h = hierarchical(runs, "a")
    assert h["same"].p == 1 and h["better"].p <= 1e-3 and h["other"].p > .05 and list(h) == ["same", "better", "other"]
    assert hierarchical(runs, "a")["other"] == h["other"] and hierarchical(runs, "a", seed=1)["other"] != h["other"]
