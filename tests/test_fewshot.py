"""What a reader of room 13 need not see: analytic optima in higher dimensions, every variant against a model built for it, and bad input."""
from collections import Counter

import pytest, torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from transformer2_nbdev.adapter import SvfConfig, svf_layers
from transformer2_nbdev.mixture import mixture
from transformer2_nbdev.fewshot import (OFFICIAL, OFFICIAL_SEARCH, BestOf, FewShot, Marks, Shots, Strength,
                                        alphas, best_first, cem, corners, curve, draw_shots, evens,
                                        few_shot_scores, folds, in_context, mark, n_blocks,
                                        random_mixtures, select, strengths, variants)
from transformer2_nbdev.rollout import generate, token_logprobs
from transformer2_nbdev.tasks import Task

EXPERTS, QUICK = ["red", "green"], dict(generations=3, population=8)


@pytest.fixture(scope="module")
def tok():
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    m = LlamaForCausalLM(LlamaConfig(vocab_size=29, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                     bos_token_id=0, eos_token_id=1, pad_token_id=None)).eval()
    with torch.no_grad():
        for p in m.parameters(): p.mul_(1 if p.dim() < 2 else 3)
    m = get_peft_model(m, SvfConfig(), adapter_name="red")
    m.add_adapter("green", SvfConfig())
    g = torch.Generator().manual_seed(0)
    for l in svf_layers(m).values():
        for n in EXPERTS: l.svf_d[n].data += .4 * torch.randn(l.svf_d[n].shape, generator=g)
    return m


@pytest.fixture(scope="module")
def task(model, tok):
    "Prompts of unequal length; half of the answers are a mixture's own, half are random"
    g = torch.Generator().manual_seed(1)
    word = lambda n: " ".join(chr(97 + i) for i in torch.randint(26, (n,), generator=g).tolist())
    prompts = list(dict.fromkeys(word(2 + i % 4) for i in range(40)))
    with mixture(model, [.8, .3], EXPERTS): said = generate(model, tok, prompts, 4, temperature=0).texts
    rows = [dict(prompt=p, answer=t.strip() if i % 2 and t.strip() else word(3)) for i, (p, t) in enumerate(zip(prompts, said))]
    return Task("mixed", lambda split: rows[:20] if split == "train" else rows[20:], lambda e: e["prompt"],
                lambda c, e: 1. if c.split()[:1] == e["answer"].split()[:1] else -1., lambda e: e["answer"], max_new_tokens=4)


@pytest.mark.parametrize("seed", range(5))
def test_cem_finds_an_analytic_optimum(seed):
    "A concave quadratic with unequal axes: its maximum inside the box is known, and clipped coordinates are independent"
    g = torch.Generator().manual_seed(seed)
    top, steep = torch.rand(6, generator=g), 1 + 9 * torch.rand(6, generator=g)
    f = cem(lambda x: -(steep * (x - top) ** 2).sum(1), 6, population=64, generations=100, seed=seed)
    assert (f.best - top).abs().max() < .03 and f.score.item() > -.01
    far = lambda x: -(steep * (x - (top + 1)) ** 2).sum(1)         # its maximum inside the box is the corner (1, ..., 1)
    centre, corner = far(torch.tensor([[.5] * 6, [1.] * 6])).tolist()
    assert (cem(far, 6, population=64, generations=100, seed=seed).score.item() - centre) / (corner - centre) > .97


def test_cem_is_deterministic_and_leaves_the_global_generator_alone():
    torch.manual_seed(3); before = torch.get_rng_state()
    a, b = (cem(lambda x: -x.square().sum(1), 4, generations=5, seed=7) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x["population"], y["population"]) for x, y in zip(a.history, b.history)) and torch.equal(a.best, b.best)


def test_cem_keeps_the_best_ever_and_stops():
    noisy = iter(range(10 ** 6))
    f = cem(lambda x: torch.full((len(x),), -float(next(noisy))), 2, patience=3)   # every generation is worse than the one before
    assert f.why == "no better candidate in 3 generations" and len(f.history) == 4 and f.score.item() == 0
    assert cem(lambda x: x.sum(1), 2, generations=2).why == "2 generations"
    start = torch.tensor([[.123, .456]])
    g = cem(lambda x: -(x - start).abs().sum(1), 2, start=start, generations=1)
    assert torch.equal(g.best, start[0]) and len(g.history[0]["population"]) == 33


def test_best_first_is_lexicographic():
    g = torch.Generator().manual_seed(0)
    s = torch.stack([torch.randint(4, (60,), generator=g).float(), torch.randint(3, (60,), generator=g).float(), torch.rand(60, generator=g)], 1)
    assert best_first(s).tolist() == sorted(range(60), key=lambda i: s[i].tolist(), reverse=True)


@pytest.mark.parametrize("bad, text", [(dict(dim=0), "dim=0"), (dict(elite=0), "elite=0"), (dict(generations=0), "generations=0"),
                                       (dict(smoothing=1), "smoothing=1"), (dict(population=3), "population=3"),
                                       (dict(bounds=(1, 1)), "bounds"), (dict(spread=0), "spread=0"),
                                       (dict(rank_by=0), "rank_by=0"), (dict(first="last"), "first=last")])
def test_bad_settings(bad, text):
    with pytest.raises(ValueError, match=text): cem(lambda x: x.sum(1), **dict(dim=2) | bad)


@pytest.mark.parametrize("form", ["delta", "sum"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_marks_equal_those_of_one_candidate_and_one_shot_at_a_time(model, tok, task, form, per_layer):
    shots = Shots(model, tok, task, task.examples("train")[:6], batch_size=11)
    W = torch.rand((5, 2, 2) if per_layer else (5, 2), generator=torch.Generator().manual_seed(4))
    m = mark(shots, W, EXPERTS, form)
    for i, a in enumerate(W):
        with mixture(model, a[None] if per_layer else a, EXPERTS, form):
            for j, e in enumerate(shots.shots):
                said = generate(model, tok, [e["prompt"]], 4, temperature=0).texts[0]
                assert m.correct[i, j].item() == (task.reward(said, e) > 0)
                ids = torch.tensor([shots.prompts[j] + tok(e["answer"])["input_ids"] + [1]])
                with torch.no_grad(): lp = token_logprobs(model, ids, torch.ones_like(ids), len(shots.prompts[j]))
                assert abs(m.logp[i, j].item() - lp.mean().item()) < 1e-3
    assert 0 < m.correct.float().mean() < 1                        # the comparison saw both kinds


def test_rows_that_would_write_the_answer_do_not_write(model, tok, task, monkeypatch):
    import transformer2_nbdev.fewshot as room
    prompts = [e["prompt"] for e in task.examples("test")]
    with mixture(model, [.8, .3], EXPERTS): g = generate(model, tok, prompts, 4, temperature=0)
    exs = [dict(prompt=p, answer=t) for p, t, end in zip(prompts, g.texts, g.finished.tolist()) if t.strip()][:6]
    lengths = [len(tok(e["answer"])["input_ids"]) for e in exs]
    asked = []
    monkeypatch.setattr(room, "generate", lambda m, t, p, *a, **k: asked.append(len(p)) or generate(m, t, p, *a, **k))
    shots = Shots(model, tok, task, exs)
    m = mark(shots, torch.tensor([[.8, .3]]), EXPERTS)
    ended = sum(n < 4 for n in lengths)                            # four tokens and no end: the end cannot be checked, so those rows write
    assert m.correct.all() and sum(asked) == len(exs) - ended


def test_own_ties_need_no_answers(model, tok, task):
    bare = Task("bare", task.examples, task.prompt, task.reward, None, max_new_tokens=4)
    with pytest.raises(ValueError, match="no `answer`"): Shots(model, tok, bare, task.examples("train")[:3])
    f = FewShot(model, tok, bare, task.examples("train")[:4], tie="own", **QUICK)
    assert f.weights.shape == (2,) and f.found.score[1] < 0


def test_own_likelihood_counts_right_answers_only():
    m = Marks(torch.tensor([[True, True, False], [False, False, False]]), torch.tensor([[-1., -2., -50.], [-1., -1., -1.]]))
    assert few_shot_scores(m, "own").tolist() == [[pytest.approx(2 / 3), -1.5], [0., -float("inf")]]


@pytest.mark.parametrize("name", list(variants()))
def test_every_variant_is_a_strategy(model, tok, task, name):
    f = FewShot(model, tok, task, draw_shots(task, 4), **QUICK, **variants()[name])
    w = f(["a", "b", "c"])
    assert w.shape == ((3, 2, 2) if "layer" in name else (3, 2)) and f.form == name.split(",")[0]
    if "normalised" in name: torch.testing.assert_close(w.sum(-1), torch.ones(w.shape[:-1]))
    else: assert 0 <= w.min() and w.max() <= 1
    with mixture(model, w, f.experts, f.form): generate(model, tok, ["a", "b", "c"], 2, temperature=0)


def test_warm_start_never_loses_to_base_or_single_expert_on_the_shots(model, tok, task):
    shots = Shots(model, tok, task, draw_shots(task, 8))
    singles = few_shot_scores(mark(shots, corners((2,), "delta"), EXPERTS))
    f = FewShot(model, tok, task, shots, **QUICK)
    assert f.found.score.tolist() >= singles[best_first(singles)[0]].tolist()
    per_layer = FewShot(model, tok, task, shots, per_layer=True, **QUICK)
    assert per_layer.found.score.tolist() >= singles[best_first(singles)[0]].tolist()


def test_few_shot_is_deterministic(model, tok, task):
    a, b = (FewShot(model, tok, task, draw_shots(task, 5), seed=2, **QUICK) for _ in range(2))
    assert torch.equal(a.weights, b.weights) and torch.equal(a.found.score, b.found.score)


def test_strength_tries_every_expert_at_every_scale(model, tok, task):
    s = Strength(model, tok, task, draw_shots(task, 5), scales=[0., .5, 2.])
    assert s.tried.tolist() == [[0, 0], [.5, 0], [2, 0], [0, 0], [0, .5], [0, 2]]
    assert s(["a", "b"]).shape == (2, 2) and s.scores[best_first(s.scores)[0]].tolist() == max(s.scores.tolist())


def test_select_never_sees_the_shots_it_validates_on(model, tok, task, monkeypatch):
    import transformer2_nbdev.fewshot as room
    seen, real = [], room.mark
    def spy(shots, w, experts, form="delta", only=None): seen.append((len(w), tuple(only) if only is not None else None)); return real(shots, w, experts, form, only)
    monkeypatch.setattr(room, "mark", spy)
    chosen = select(model, tok, task, draw_shots(task, 6), among={"one": dict(form="delta"), "two": dict(form="sum")}, k=3, **QUICK)
    hands = folds(6, 3)
    for hand, fold in zip(hands * 2, [seen[i:i + 4] for i in range(0, 24, 4)]):      # three generations, then the verdict
        assert fold[-1] == (1, tuple(hand)) and all(set(o).isdisjoint(hand) and len(o) == 4 for _, o in fold[:-1])
    assert chosen.variant in ("one", "two") and chosen.only is None and set(chosen.validation) == {"one", "two"}


def test_the_answers_of_judged_texts_are_remembered(model, tok, task):
    calls = Counter()
    counting = Task("counting", task.examples, task.prompt, lambda c, e: calls.update([(c, e["prompt"])]) or -1., task.answer, max_new_tokens=4)
    shots = Shots(model, tok, counting, task.examples("train")[:4])
    mark(shots, torch.rand(20, 2), EXPERTS)
    assert calls and max(calls.values()) == 1


def test_curve_uses_nested_shots(task):
    got = []
    points = curve(lambda shots, seed: got.append((seed, [e["prompt"] for e in shots])) or len(shots), lambda s: s / 10, task, counts=(2, 5), seeds=(0, 1))
    assert points == {2: [.2, .2], 5: [.5, .5]}
    for s in (0, 1):
        two, five = [p for seed, p in got if seed == s]
        assert five[:2] == two


def test_bad_input(model, tok, task):
    shots = task.examples("train")[:3]
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=29, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="no experts"): FewShot(plain, tok, task, shots)
    with pytest.raises(ValueError, match="no expert named 'blue'"): FewShot(model, tok, task, shots, experts=["red", "blue"])
    with pytest.raises(ValueError, match="no shots"): FewShot(model, tok, task, [])
    with pytest.raises(ValueError, match="shot 0 has no answer"): FewShot(model, tok, task, [dict(prompt="a", answer="")])
    with pytest.raises(ValueError, match="take='middle'"): FewShot(model, tok, task, shots, take="middle")
    with pytest.raises(ValueError, match="tie='none'"): FewShot(model, tok, task, shots, tie="none")
    with pytest.raises(ValueError, match="too few shots"): select(model, tok, task, shots, k=5)
    assert n_blocks(model) == 2 and alphas(torch.ones(4), (2, 2), True).tolist() == [[.5, .5], [.5, .5]]


def as_described(accuracy, likelihood, experts, matrices, generations, seed, population=32, elites=6):
    """The official search, written from room 13's table alone: one candidate after the other.

    Every weight starts at one over the number of experts, with half of the range [0, 1] as the spread. The
    first candidate is the best one so far. Elites are the six of the highest accuracy; among equals those that
    came first (the original leaves that to numpy's argpartition). Their mean and their sample standard deviation
    are the next distribution, unsmoothed. The best of a generation is, among the most accurate, the likeliest.
    """
    noise, trace = torch.Generator().manual_seed(seed), []
    centre, width = [1 / experts] * (experts * matrices), [.5] * (experts * matrices)
    best = centre
    for _ in range(generations):
        z = torch.randn(population, len(centre), generator=noise).tolist()
        people = [[min(max(c + w * x, 0.), 1.) for c, w, x in zip(centre, width, row)] for row in z]
        people[0] = best
        right = [accuracy(p) for p in people]
        chosen = sorted(range(population), key=lambda i: -right[i])[:elites]
        best = max((p for p, r in zip(people, right) if r == max(right)), key=likelihood)
        trace.append((people, chosen, best))
        columns = list(zip(*[people[i] for i in chosen]))
        centre = [sum(c) / elites for c in columns]
        width = [(sum((x - m) ** 2 for x in c) / (elites - 1)) ** .5 for c, m in zip(columns, centre)]
    return trace


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("steps", [4, 1000])               # many ties, and hardly any
def test_official_search_equals_its_description(seed, steps):
    def accuracy(p): return round(steps * (1 - sum(abs(x - .7) for x in p) / len(p))) / steps
    def likelihood(p): return -sum((x - .2) ** 2 for x in p)   # disagrees with the accuracy on purpose
    def both(x): return torch.tensor([[accuracy(p), likelihood(p)] for p in x.double().tolist()])
    experts, matrices, generations = 3, 2, 6
    f = cem(both, experts * matrices, **OFFICIAL_SEARCH | dict(mean=1 / experts, generations=generations, seed=seed))
    trace = as_described(accuracy, likelihood, experts, matrices, generations, seed)
    for h, (people, chosen, best) in zip(f.history, trace, strict=True):
        torch.testing.assert_close(h["population"], torch.tensor(people), rtol=0, atol=1e-4)
        assert h["elites"].tolist() == chosen
    torch.testing.assert_close(f.best, torch.tensor(trace[-1][2]), rtol=0, atol=1e-4)
    assert f.why == "6 generations"


def test_official_elites_ignore_the_likelihood_and_ours_do_not():
    flat = lambda x: torch.stack([torch.ones(len(x)), x[:, 0]], 1)
    theirs = cem(flat, 2, **OFFICIAL_SEARCH | dict(generations=3))
    assert all(h["elites"].tolist() == list(range(6)) for h in theirs.history)
    assert theirs.best[0] == max(h["population"][:, 0].max() for h in theirs.history)
    assert cem(flat, 2, generations=15).mean[0] > .9 > theirs.mean[0]


def test_official_few_shot_weighs_every_matrix(model, tok, task):
    f = FewShot(model, tok, task, draw_shots(task, 4), **OFFICIAL | dict(generations=2))
    assert f.shape == (len(svf_layers(model)), 2) and f.form == "sum" and f.shots.tie == "own"
    assert f.found.history[0]["population"][0].tolist() == [.5] * f.found.best.numel()
    assert len(f.found.history[0]["population"]) == 32       # no warm start
    w = f(["a", "b"])
    with mixture(model, w, EXPERTS, "sum"): generate(model, tok, ["a", "b"], 2, temperature=0)
    with pytest.raises(ValueError, match="per_layer='head'"): FewShot(model, tok, task, draw_shots(task, 4), per_layer="head")


def test_best_of_a_list_takes_the_best_and_of_equals_the_first(model, tok, task):
    shots = Shots(model, tok, task, draw_shots(task, 6))
    tried = torch.cat([evens(2, [.3, .3]), strengths(2, [.5, 1.]), random_mixtures(2, 5, seed=3)])
    b = BestOf(model, tok, task, shots, tried, EXPERTS)
    k = best_first(b.scores)[0]
    assert torch.equal(b.weights, tried[k]) and b.scores[k].tolist() == max(b.scores.tolist())
    twice = BestOf(model, tok, task, shots, tried[k].expand(3, 2), EXPERTS)
    assert torch.equal(twice.weights, tried[k]) and best_first(twice.scores).tolist() == [0, 1, 2]
    layers = BestOf(model, tok, task, shots, tried[:4, None].expand(4, 2, 2), EXPERTS)
    assert layers(["a", "b"]).shape == (2, 2, 2) and torch.allclose(layers.scores, b.scores[:4], atol=1e-4)
    assert tried[:2].tolist() == [[torch.tensor(.3).item()] * 2] * 2 and random_mixtures(3, 9, (1., 2.)).min() >= 1


def test_in_context_changes_prompts_alone(model, tok, task):
    shots = draw_shots(task, 2)
    shown, e = in_context(task, shots, between=" . ", after=" = "), task.examples("test")[0]
    front = "".join(f"{s['prompt']} = {s['answer']} . " for s in shots)
    assert shown.prompt(e) == front + task.prompt(e) and shown.examples("test") == task.examples("test")
    assert shown.judge(e["answer"], e).correct == task.judge(e["answer"], e).correct and shown.name == task.name
    with pytest.raises(ValueError, match="shot 0 has no answer"): in_context(task, [dict(prompt="a", answer="")])
