"""What a reader of room 16 need not see: exact splits, starts, gradients, records."""
import sys
from collections import OrderedDict
from pathlib import Path

import pytest, torch
from peft import IA3Config, LNTuningConfig, LoraConfig, TinyLoraConfig, get_peft_model
from torch import nn

from transformer2_nbdev import record, why
from transformer2_nbdev.adapter import SvfConfig
from transformer2_nbdev.baselines import contrast, student_p
from transformer2_nbdev.evaluate import pack, unpack
from transformer2_nbdev.svd import decompose
from transformer2_nbdev.svf import compose

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import baselines, why as benchmark

RECORD, SHARED = map(record, ("why", "baselines"))
SHAPES = [(8, 12), (12, 8), (10, 10)]                                   # left, right, square
KINDS = dict(volume=why.volume(), svf=why.directions(), third=why.third(1), band=why.band(1),
             block=why.block(3), rotated=why.rotated(4))


def matrix(m, n, seed=0): return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def layer(W, bias=False):
    lin = nn.Linear(W.shape[1], W.shape[0], bias=bias)
    lin.weight.data.copy_(W)
    return nn.Sequential(OrderedDict(lin=lin))


def stir(model, scale=.2):
    with torch.no_grad():
        for p in model.parameters():
            g = torch.Generator().manual_seed(1)
            if p.requires_grad: p.add_(scale * torch.randn(p.shape, generator=g))
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_split_against_the_plain_definition(shape):
    W, dW = matrix(*shape), .1 * matrix(*shape, seed=1)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    s = why.split(W, dW)
    size, diagonal = dW.norm(), (U.T @ dW @ Vh.T).diagonal()
    went = torch.linalg.svdvals(W + dW) - S
    assert s.spectral == pytest.approx((diagonal.norm() ** 2 / size ** 2).item(), rel=1e-4)
    assert s.moved == pytest.approx((went.norm() / size).item(), rel=1e-3) and s.moved <= 1
    assert s.norm == pytest.approx((size / W.norm()).item(), rel=1e-5)
    assert s.chance == 1 / max(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_off_the_diagonal_is_rotation_to_first_order(shape):
    "Take the diagonal out of a small change: the singular values move by its square only"
    W, dW = matrix(*shape).double(), matrix(*shape, seed=1).double()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    dW = dW - U @ torch.diag((U.T @ dW @ Vh.T).diagonal()) @ Vh
    moved = [(torch.linalg.svdvals(W + e * dW) - S).norm().item() for e in (1e-3, 1e-4)]
    assert moved[1] < moved[0] / 50                                 # 100 for a pure square


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_starts_at_the_base_and_has_the_gradient_of_its_weight(kind, shape):
    W, x = matrix(*shape), matrix(5, shape[1], seed=2)
    model = why.reparametrise(layer(W), KINDS[kind], ["lin"])
    torch.testing.assert_close(model(x), x @ W.T, rtol=1e-4, atol=1e-4)
    stir(model)
    inner = model.base_model.model.lin.ln_tuning_layers["default"]
    numbers = {k: v.detach().double() for k, v in inner.numbers.items()}
    y = model(x).square().sum()
    y.backward()
    for k, p in inner.numbers.items():                              # against a difference quotient
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            e = 1e-2
            up, down = (F(inner, x, k, numbers[k] + s * e * g).square().sum() for s in (1, -1))
        slope = ((up - down) / (2 * e)).item()
        assert (p.grad * g).sum().item() == pytest.approx(slope, rel=2e-2, abs=1e-2)


def F(inner, x, k, value):
    "The layer's answer with one of its sets of numbers replaced"
    now = {n: value.float() if n == k else p.detach() for n, p in inner.numbers.items()}
    return x @ inner.make(now).T


@pytest.mark.parametrize("shape", SHAPES)
def test_svf_by_numbers_equals_svf_by_adapter(shape):
    W, d = matrix(*shape), .3 * matrix(1, min(shape), seed=4)[0]
    model = why.reparametrise(layer(W), why.directions(), ["lin"])
    inner = model.base_model.model.lin.ln_tuning_layers["default"]
    with torch.no_grad(): inner.numbers["d"].copy_(d)
    same = compose(W, 1 + d, decompose(W).Q)
    torch.testing.assert_close(inner.weight.detach(), same, rtol=1e-4, atol=1e-5)
    assert why.split(W, inner.weight.detach() - W).spectral > .999


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rotation_keeps_the_singular_values(shape):
    W = matrix(*shape)
    model = why.reparametrise(layer(W), why.rotated(4), ["lin"])
    inner = model.base_model.model.lin.ln_tuning_layers["default"]
    with torch.no_grad(): inner.numbers["a"].fill_(.3)
    before, after = torch.linalg.svdvals(W), torch.linalg.svdvals(inner.weight.detach())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert (inner.weight.detach() - W).norm() > .1


def test_the_weight_is_composed_anew_when_a_number_changes():
    model = why.reparametrise(layer(matrix(8, 12)), why.volume(), ["lin"])
    inner = model.base_model.model.lin.ln_tuning_layers["default"]
    with torch.no_grad():
        first = inner.weight
        assert inner.weight is first
        inner.numbers["d"].add_(.5)
        torch.testing.assert_close(inner.weight, 1.5 * matrix(8, 12))
    assert inner.weight.requires_grad


def test_one_number_is_shared_and_a_bias_is_not_trained():
    both = nn.Sequential(OrderedDict(a=nn.Linear(6, 6), b=nn.Linear(6, 6)))
    model = why.reparametrise(both, why.volume(), ["a", "b"], share=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1


def adapted(kind, **kw): return lambda l: get_peft_model(l, kind(target_modules=["lin"], **kw))


@pytest.mark.parametrize("make", [
    lambda l: why.reparametrise(l, why.band(1), ["lin"]), adapted(SvfConfig),
    adapted(LoraConfig, r=2, init_lora_weights=False), adapted(LNTuningConfig),
    adapted(IA3Config, feedforward_modules=["lin"]),
    adapted(TinyLoraConfig, u=3, init_weights="uniform")])
def test_merged_is_the_adapter_in_plain_weights(make):
    W, x = matrix(8, 12), matrix(5, 12, seed=2)
    model = stir(make(layer(W)))
    with torch.no_grad():
        torch.testing.assert_close(why.merged(model, layer(W))(x), model(x), rtol=1e-4, atol=1e-4)
        assert (model(x) - x @ W.T).abs().max() > 1e-3      # the model still carries its adapter


def test_reweight_and_along_agree():
    W, x = matrix(8, 12), matrix(5, 12, seed=2)
    lora = adapted(LoraConfig, r=3, lora_alpha=6, init_lora_weights=False)(layer(W))
    with torch.no_grad(): before = lora(x)
    factors = why.lora_factors(lora)
    probe = why.reparametrise(layer(W), why.along(factors), ["lin"])
    torch.testing.assert_close(probe(x).detach(), before, rtol=1e-4, atol=1e-4)
    d = torch.tensor([.5, -.2, 0.])
    with torch.no_grad():
        probe.base_model.model.lin.ln_tuning_layers["default"].numbers["d"].copy_(d)
        other = why.reweight(lora, lambda name, S: S * (1 + d))
        torch.testing.assert_close(probe(x), other(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("r", [1, 2, 3])
def test_lora_spends_r_squared_numbers_twice(r):
    W = matrix(8, 12)
    e = why.expresses(adapted(LoraConfig, r=r)(layer(W)), W)
    assert (e["numbers"], e["free"], e["rank"]) == (r * 20, r * (20 - r), r)


# --- the records of rooms 15 and 16

RUNS = [r for part in (SHARED["surface"], SHARED["runs"], RECORD["axis"], RECORD["thirds"])
        for r in part if r["val"] is not None]


def test_a_record_counts_what_its_answers_say():
    for r in RUNS:
        assert set(r["correct"]) == set(baselines.TESTED)
        for t, n in r["correct"].items():
            answers = unpack(r["bits"][t])
            assert len(answers) == baselines.LIMIT and sum(answers) == n


def test_the_seeds_that_choose_are_not_those_of_the_verdict():
    assert {r["seed"] for r in SHARED["surface"]} == set(baselines.CHOOSE)
    assert not {r["seed"] for r in SHARED["runs"]} & set(baselines.CHOOSE)


def test_the_chosen_rate_is_the_one_the_rule_gives():
    for loss, rates in SHARED["chosen"].items():
        for m, lr in rates.items():
            runs = [r for r in SHARED["surface"] if (r["method"], r["loss"]) == (m, loss)]
            assert baselines.chosen(runs) == lr
            best = max(val := baselines.validation(runs), key=val.get)
            assert min(val) < best < max(val)                        # no best rate at an end
            verdict = [r for r in SHARED["runs"] if (r["method"], r["loss"]) == (m, loss)]
            assert {r["lr"] for r in verdict} <= {lr}


@pytest.mark.parametrize("runs, lr", [
    ([(.01, .9), (.03, .96), (.1, .95)], .03), ([(.01, .955), (.03, .96), (.1, .95)], .01),
    ([(.01, None), (.03, .8), (.1, .9)], .1)])
def test_the_rule_of_the_rates(runs, lr):
    assert baselines.chosen([dict(lr=x, val=v) for x, v in runs]) == lr


def test_what_svf_cannot_say_is_written_beside_every_run():
    for r in RUNS:
        assert 0 <= r["moved"] <= 1 and 0 <= r["spectral"] <= 1 and r["kl"][0] >= 0
        assert (r["norm"] > 0) == (r["step"] > 0)                       # step 0 is the base
        if r["step"] and r["method"] in ("SVF", "one number", "one a matrix", "SVF rank 4"):
            assert r["spectral"] > .999, r["method"]


def test_the_better_rate_is_the_smallest_that_is_no_worse():
    runs = [dict(seed=0, lr=1, val=.9), dict(seed=0, lr=.1, val=.89), dict(seed=0, lr=.01, val=.8),
            dict(seed=1, lr=3, val=1.)]
    assert benchmark.better(runs)["lr"] == .1


def bits_of(answers):
    return dict(t=pack(answers))


def test_a_contrast_counts_seeds_and_questions():
    g = torch.Generator().manual_seed(0)
    a, b = ((torch.rand(3, 501, generator=g) < p).int().tolist() for p in (.6, .8))
    one, two = ([dict(bits=bits_of(x)) for x in rows] for rows in (a, b))
    d, half, p = contrast(one, two, "t")
    assert d == pytest.approx(100 * (sum(map(sum, b)) - sum(map(sum, a))) / 1503) and p < 1e-3
    back, same, q = contrast(two, one, "t")
    assert (back, same, q) == pytest.approx((-d, half, p))
    assert half > contrast(one[:1], two[:1], "t")[1] * 3 ** -.5
    assert contrast(one, one, "t")[::2] == (0, 1)


@pytest.mark.parametrize("t, df, p", [
    (2.776, 4, .05), (12.706, 1, .05), (1.96, 10 ** 6, .05), (0, 3, 1)])
def test_students_p_against_the_tables(t, df, p):
    assert student_p(t, df) == pytest.approx(p, abs=2e-4)


def test_an_unfinished_run_is_left_out_and_not_started(tmp_path):
    work = baselines.Finished(tmp_path)
    calls = [lambda: baselines.run(work, "SVF", "rewards", .01, 0), lambda: 1]
    assert baselines.gather(calls) == [1] and not list(tmp_path.iterdir())
