"""What a reader of room 13 need not see: what each way keeps, what a refusal leaves behind, and the record's own consistency."""
import importlib.util, json, sys
from pathlib import Path

import pytest, torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from transformer2_nbdev import lab, shipped
from transformer2_nbdev.adapter import SvfConfig, svf_layers, zs
from transformer2_nbdev.evaluate import bootstrap, mcnemar
from transformer2_nbdev.transfer import HOWS, alike, kinship, transfer

ROOT = Path(__file__).resolve().parent.parent
RECORD = shipped("records/transfer.json")


def llama(seed=0, **kw):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2) | kw)).eval()


def expert(seed=0, **kw):
    m, g = get_peft_model(llama(seed), SvfConfig(**kw)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for l in svf_layers(m).values(): l.svf_d["default"] += .2 + .3 * torch.randn(l.svf_d["default"].shape, generator=g)
    return m.eval()


def test_resampling_to_the_same_width_changes_nothing():
    "which is why the record has no row of it for A-sibling and B"
    s = expert()
    for (n, a), b in zip(zs(transfer("default", s, llama(1), "resampled")).items(), zs(transfer("default", s, llama(1))).values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", HOWS)
def test_what_each_way_keeps(how):
    "order, values, mean or norm of every matrix's d"
    s = expert()
    for n, z in zs(transfer("default", s, llama(1), how, seed=3)).items():
        d, e = zs(s)[n] - 1, z - 1
        if how in ("ordered", "shuffled", "resampled"): torch.testing.assert_close(e.sort().values, d.sort().values)
        if how != "random": torch.testing.assert_close(e.mean(), d.mean(), rtol=1e-3, atol=1e-5)
        if how in ("ordered", "shuffled", "random", "resampled"): torch.testing.assert_close(e.norm(), d.norm())
        if how == "mean": assert e.std() < 1e-6
        if how == "matched": assert e.norm() <= d.norm() * 1.0001                      # a projection


def test_seeds_draw_and_repeat():
    s = expert()
    z = lambda how, seed: torch.cat(list(zs(transfer("default", s, llama(1), how, seed)).values()))
    for how in ("shuffled", "random"):
        assert torch.equal(z(how, 0), z(how, 0)) and not torch.equal(z(how, 0), z(how, 1))


def test_alike_is_the_cosine_of_the_operators():
    "against dense matrices, on a pair that shares something"
    s = expert()
    kin = llama()
    with torch.no_grad():
        for p in kin.parameters(): p.add_(.2 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    t = transfer("default", s, kin)
    def dense(m, centre): return torch.cat([(l.svf_Q @ torch.diag(l.svf_d["default"] - centre * l.svf_d["default"].mean()) @ l.svf_Q.T).flatten() for l in svf_layers(m).values()])
    with torch.no_grad():
        for centre, got in zip((0, 1), alike(s, t)): assert abs(torch.cosine_similarity(dense(s, centre), dense(t, centre), 0) - got) < 1e-3
    assert .1 < alike(s, t)[1] < .999


def test_alike_does_not_depend_on_the_signs_of_the_directions():
    s, t = expert(), transfer("default", expert(), llama())
    before = alike(s, t)
    for l in svf_layers(t).values(): l.svf_Q[:, ::2] *= -1
    assert alike(s, t) == pytest.approx(before, abs=1e-5) and min(before) > .999
    assert all(k > .999 for k, _ in kinship(s, t).values())


def test_a_failed_transfer_leaves_the_target_alone():
    target = expert(1)
    before = {n: p.clone() for n, p in target.named_parameters()}
    with pytest.raises(ValueError, match="already carries"): transfer("default", expert(), target)
    half = {"model.layers.0.mlp.up_proj": "model.layers.0.mlp.up_proj"}
    with pytest.raises(ValueError, match="mapping says nothing"): transfer("default", expert(), target, mapping=half, adapter_name="new")
    assert list(target.peft_config) == ["default"] and all(torch.equal(p, before[n]) for n, p in target.named_parameters())


def test_two_matrices_cannot_go_to_one():
    "both would write the same knobs, and the last one would win in silence"
    s, up = expert(), "model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match=up): transfer("default", s, llama(1), mapping={n: up if n.endswith("up_proj") else n for n in svf_layers(s)})


def test_the_record_is_complete_and_consistent():
    r = json.loads(RECORD.read_text())
    table = lambda name: [dict(zip(r["columns"][name], x)) for x in r[name]]
    for row in table("carry"):
        base = r["bases"][row["target"]][row["task"]]
        assert row["n"] == 1002 and row["correct"] - base == row["gained"] - row["lost"]
        assert row["p"] == pytest.approx(mcnemar(row["gained"], row["lost"]), rel=1e-2)
        assert [row["low"], row["high"]] == pytest.approx(bootstrap(row["gained"], row["lost"], row["n"]), abs=1e-4)
    tasks = {*lab.TRAINED, *lab.UNSEEN, "code+math"}
    for target, how, seeds in (("A-sibling", "ordered", 1), ("B", "ordered", 1), ("B-wide", "resampled", 1), ("A-sibling", "shuffled", 3), ("B", "shuffled", 3)):
        for s in lab.TRAINED:
            for seed in range(seeds):
                assert {x["task"] for x in table("carry") if (x["target"], x["expert"], x["how"], x["seed"]) == (target, s, how, seed)} == tasks, (target, s, how, seed)


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("transfer_script", ROOT / "benchmarks" / "transfer.py")
    spec.loader.exec_module(m := importlib.util.module_from_spec(spec))
    sys.path.remove(str(ROOT / "benchmarks"))
    return m


def test_shuffles_in_pieces_are_the_shuffles_of_the_library(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "DRAWS", 42)
    monkeypatch.setattr(script, "QUESTIONS", {"A-sibling": 12})
    done = script.Work(tmp_path)
    case = script.null_case(done, "math", "A-sibling")
    assert len(case["shuffled"]) == len(case["cosines"]) == 42 and len(list(tmp_path.glob("*.json"))) == 2
    source = script.expert("math")
    for seed in (0, 41):
        model = transfer("math", source, lab.load("A-sibling")[0], "shuffled", seed, adapter_name="math").eval()
        assert alike(source, model, "math", "math")[1] == pytest.approx(case["cosines"][seed], abs=2e-4)
        assert script.evaluate(model, script.TOKENS, lab.tasks()["math"], limit=12, progress=False).correct == case["shuffled"][seed]
    monkeypatch.setattr(script, "null_piece", None)                 # nothing is made twice
    assert script.null_case(done, "math", "A-sibling") == case
    piece = next(tmp_path.glob("*_40.json"))
    piece.write_text(json.dumps(json.loads(piece.read_text()) | dict(base=-1)))
    with pytest.raises(ValueError, match="pieces were made by different code"): script.null_case(done, "math", "A-sibling")


def test_kinship_of_folders(script, tmp_path):
    for name, seed in dict(a=0, b=1).items(): llama(seed).save_pretrained(tmp_path / name)
    llama(0, num_hidden_layers=3).save_pretrained(tmp_path / "deeper")
    llama(0, hidden_size=64, intermediate_size=80).save_pretrained(tmp_path / "other")
    one, two = script.kin_of(tmp_path / "a", tmp_path / "a"), script.kin_of(tmp_path / "a", tmp_path / "b")
    assert min(one["thirds"]) > .999 and one["matrices"] == 14 and max(two["thirds"]) < 2 * two["chance"]
    assert script.kin_of(tmp_path / "deeper", tmp_path / "a")["left_out"] == 7
    with pytest.raises(ValueError, match="no matrix in common"): script.kin_of(tmp_path / "a", tmp_path / "other")
    between = script.kin_of_layers(tmp_path / "deeper")
    assert between["1 apart"]["matrices"] == 14 and between["2 apart"]["matrices"] == 7
    assert max(between["1 apart"]["thirds"]) < 2 * between["1 apart"]["chance"]
    out = tmp_path / "record.json"
    out.write_text(RECORD.read_text())
    a = script.argparse.Namespace(parts=["real"], only=None, out=out, work=tmp_path / "work", data=None, folders=[str(tmp_path / n) for n in "ab"])
    script.alone(a)
    now, before = json.loads(out.read_text()), json.loads(RECORD.read_text())
    assert now["real"]["a and b"] == dict(kinship=two) and {k: v for k, v in now.items() if k != "real"} == {k: v for k, v in before.items() if k != "real"}
