"""The paper's tables as data, the official code's files, and the three recipes on a tiny model of each architecture."""
import itertools, json, math, re
from pathlib import Path

import pytest, torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from transformer2_nbdev import paper, record
from transformer2_nbdev.adapter import SvfConfig, svf_layers, zs
from transformer2_nbdev.evaluate import hierarchical
from transformer2_nbdev.paper import export_official, load_official
from transformer2_nbdev.reinforce import ReinforceConfig

FAMILIES = ("llama", "mistral", "qwen2")


def tiny(family="llama", seed=0, **kw):
    "A two-block model of a family; k and v are narrower than q."
    torch.manual_seed(seed)
    small = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small | kw)).eval()


def their_file(model, folder, kind, spread=0.3):
    "Write what the official code would, from the description of its formats alone; return {weight name: p}."
    g = torch.Generator().manual_seed(3)
    ps = {k: (0.1 + spread * torch.randn(min(W.shape), generator=g)).bfloat16() for k, W in model.state_dict().items() if "mlp" in k and W.dim() == 2}
    keys = ps if kind == "learnable_params.pt" else [f"learnable_params_module_list.{i}" for i in range(len(ps))]
    torch.save({k: torch.nn.Parameter(p) if kind == "learnable_params.pt" else p for k, p in zip(keys, ps.values())}, folder / kind)
    return ps


def composed(W, p):
    "U diag(S s) Vh times the sum of S over the sum of S s, in float64."
    (U, S, Vh), s = torch.linalg.svd(W.double(), full_matrices=False), p.double().sigmoid()
    return (U * (S * s)) @ Vh * (S.sum() / (S * s).sum())


@pytest.mark.parametrize("kind", ["policy_params.pt", "learnable_params.pt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_official_weights(family, kind, tmp_path):
    base = tiny(family)
    ps = their_file(base, tmp_path, kind)
    merged = load_official(tmp_path / kind, tiny(family)).merge_and_unload().state_dict()
    for k, W in base.state_dict().items():
        if k in ps: torch.testing.assert_close(merged[k].double(), composed(W, ps[k]), rtol=1e-4, atol=1e-6)
        else: assert torch.equal(merged[k], W)


def test_official_conv1d(tmp_path):
    "GPT-2 keeps its weights transposed; the official code decomposes what is stored, and so must the result."
    torch.manual_seed(0)
    make = lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()
    base = make(); ps = their_file(base, tmp_path, "policy_params.pt")
    other = make(); other.load_state_dict(base.state_dict())
    merged = load_official(tmp_path, other).merge_and_unload().state_dict()
    for k, p in ps.items(): torch.testing.assert_close(merged[k].double(), composed(base.state_dict()[k], p), rtol=1e-4, atol=1e-6)


def test_official_round_trip(tmp_path):
    ps = their_file(tiny(), tmp_path, "policy_params.pt")
    files = export_official(load_official(tmp_path, tiny()), tmp_path / "out")
    assert [f.name for f in files] == ["policy_params.pt", "learnable_params.pt"]
    before, after = (torch.load(f / "policy_params.pt", weights_only=True) for f in (tmp_path, tmp_path / "out"))
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) and after[k].dtype == torch.bfloat16 for k in before)
    named = torch.load(files[1], weights_only=True)
    assert list(named) == list(ps) and all(torch.equal(named[k], ps[k]) for k in ps)


def test_official_is_an_ordinary_adapter(tmp_path):
    their_file(tiny(), tmp_path, "policy_params.pt")
    model = load_official(tmp_path, tiny())
    model.save_pretrained(tmp_path / "peft")
    again = PeftModel.from_pretrained(tiny(), tmp_path / "peft")
    assert all(torch.equal(z, zs(again)[n]) for n, z in zs(model).items())


def test_official_leaves_the_model_alone_when_it_refuses(tmp_path):
    torch.save({"learnable_params_module_list.0": torch.zeros(32)}, tmp_path / "policy_params.pt")
    model = tiny()
    with pytest.raises(ValueError, match="holds 1 vectors, this model has 6"): load_official(tmp_path, model)
    assert not svf_layers(model) if hasattr(model, "peft_config") else type(model).__name__ == "LlamaForCausalLM"


def test_official_runs_no_code(tmp_path, capsys):
    class Bomb:
        def __reduce__(self): return print, ("boom",)
    torch.save({"learnable_params_module_list.0": Bomb()}, tmp_path / "policy_params.pt")
    with pytest.raises(ValueError, match="a pickle can run code"): load_official(tmp_path, tiny())
    assert "boom" not in capsys.readouterr().out


def test_tables_state_their_source():
    tables = paper.tables()
    assert len(tables) == 11
    for t in tables.values():
        assert "2501.06252" in t.source and t.title and t.unit and len(t.levels) == 3 and str(t)
        leaves = [v for x in t.scores.values() for y in x.values() for v in y.values()]
        assert leaves and all(isinstance(v, (int, float)) for v in leaves)


def test_the_same_number_is_the_same_everywhere():
    "Scores that several tables repeat agree with one another."
    seen = {}
    for name in ("finetuned", "unseen", "ablation", "transfer", "methods"):
        for model, rows in paper.table(name).scores.items():
            for task, row in rows.items():
                if "base" in row: assert seen.setdefault((model, task), row["base"]) == row["base"], (name, model, task)
    llama = "Llama3-8B-Instruct"
    for method in ("LoRA", "SVF"):
        for task, row in paper.table("finetuned").scores[llama].items(): assert paper.table("methods").scores[llama][task][method] == row[method]


@pytest.mark.parametrize("k,n", [(0, 5), (5, 5), (1, 3), (97, 154)])
def test_recover(k, n): assert paper.recover(round(100 * k / n, 2), n) == k


def test_holm_is_never_looser_than_bonferroni_nor_stricter_than_nothing():
    ps = torch.rand(200, 6, generator=torch.Generator().manual_seed(0)).pow(3).tolist()
    for p in ps:
        stands = paper.holm(p)
        assert all(s for s, x in zip(stands, p) if x <= .05 / 6) and not any(s for s, x in zip(stands, p) if x > .05)


def test_compare_reads_runs(tmp_path, capsys):
    (tmp_path / "result.json").write_text(json.dumps(dict(correct=30, n=40)))
    (ours, theirs), = paper.compare({"add": {"base": (20, 40), "SVF": tmp_path}}, match={"add": "GSM8K"})
    assert math.isclose(ours.diff, .25) and theirs.task == "GSM8K" and "add" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama3-8b", "mistral-7b", "llama3-70b", "llava-next-8b"])
def test_recipe_on_the_real_shapes(name):
    r = paper.recipe(name)
    model = get_peft_model(paper.skeleton(r), SvfConfig(**r["svf"]))
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == r["n_params"]


def test_the_recipe_for_vision(tmp_path):
    "Llama3-LLaVA-Next-8B: its real shapes, half of the language model's layers, and nothing of what sees"
    r = paper.recipe("llava-next-8b")
    model = get_peft_model(paper.skeleton(r), SvfConfig(**r["svf"]))
    total = sum(p.numel() for p in model.parameters()) - r["n_params"]
    assert abs(total - 8.36e9) < 2e7 and abs(sum(p.numel() for p in model.base_model.model.model.vision_tower.parameters()) - 303.5e6) < 1e6
    layers = svf_layers(model)
    assert len(layers) == 3 * 16 and all(n.startswith("model.language_model.layers.") and ".mlp." in n for n in layers)
    assert {int(n.split(".")[3]) for n in layers} == set(range(0, 32, 2)) and r["n_params"] == 393_216 // 2
    assert r["reinforce"] | dict(reward=0) == paper.recipe("llama3-8b")["reinforce"] | dict(reward=0)
    from transformer2_nbdev.verifiers import judge_vqa
    assert judge_vqa("a cat", ["a dog"] * 10).reward == -.1 and judge_vqa("a dog", ["a dog"] * 10).reward == 1 and r["tasks"] == ["textvqa"]
    lora = get_peft_model(paper.skeleton(r), LoraConfig(**r["lora"]))
    assert sum(p.numel() for p in lora.parameters() if p.requires_grad) == 6_815_744     # the paper's count for Llama3-8B's q and v


def test_the_vision_recipe_trains_saves_and_loads_in_small(tmp_path):
    from vision_toy import ask, colours, llava_next, picture
    from transformer2_nbdev.reinforce import ReinforceConfig, train_expert
    from transformer2_nbdev.rollout import generate
    from transformer2_nbdev.tasks import render
    r, (model, processor) = paper.recipe("llava-next-8b"), llava_next()
    torch.manual_seed(1)
    made = get_peft_model(model, SvfConfig(**r["svf"] | dict(layers_to_transform=[0])))
    before, later = {n: z.clone() for n, z in zs(made).items()}, itertools.count()
    config = ReinforceConfig(**r["reinforce"] | dict(steps=2, batch_size=8, val_every=1, val_limit=4, val_samples=1))
    train_expert(made, processor, colours(size=(40, 20)), config, out=tmp_path / "run", eval_fn=lambda *_: next(later), progress=False)
    after = zs(made)
    assert len(after) == 3 and any(not torch.equal(z, before[n]) for n, z in after.items())
    again = PeftModel.from_pretrained(llava_next()[0], tmp_path / "run")
    text = [render(ask("Which?", picture("red", (40, 20))), None, processor)]
    a, b = (generate(m, processor, text, 6, temperature=0).logprobs for m in (made, again))
    assert all(torch.equal(z, zs(again)[n]) for n, z in after.items()) and torch.equal(a, b)


@pytest.mark.parametrize("name", ["llama3-8b", "mistral-7b", "llama3-70b"])
def test_recipe_end_to_end(name, tmp_path):
    "The recipe's own settings train, save and load on its architecture with small widths."
    from transformer2_nbdev import lab
    from transformer2_nbdev.reinforce import ReinforceConfig, train_expert
    r, tokenizer, task = paper.recipe(name), lab.tokenizer(), lab.tasks()["math"]
    arch = r["architecture"] | dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                                    pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    def base():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**arch)).eval()
    svf = r["svf"] | ({"layers_to_transform": [0, 2]} if "layers_to_transform" in r["svf"] else {})
    torch.manual_seed(1)
    model = get_peft_model(base(), SvfConfig(**svf))
    before = {n: z.clone() for n, z in zs(model).items()}
    config = ReinforceConfig(**r["reinforce"] | dict(steps=2, batch_size=16, val_every=1, val_limit=8))
    later = itertools.count()  # an untrained model has no best step: keep the last
    train_expert(model, tokenizer, task, config, out=tmp_path / "run", eval_fn=lambda model, tokenizer: next(later), progress=False)
    after = zs(model)
    assert len(after) == 3 * (2 if "layers_to_transform" in svf else 4)
    assert all(torch.isfinite(z).all() for z in after.values())
    assert any(not torch.equal(z, before[n]) for n, z in after.items())
    model.save_pretrained(tmp_path / "expert")
    again = PeftModel.from_pretrained(base(), tmp_path / "expert")
    assert all(torch.equal(z, zs(again)[n]) for n, z in after.items())


# The lab's record and what room 23 says of it

ROOT = Path(__file__).resolve().parents[1]
SCALE = {"steps", "batch_size", "lr", "val_every", "val_limit"}


def test_changed_fields():
    "The published loop and the code's differ in five fields; a reward baseline is not among them."
    differ = paper.changed(ReinforceConfig.paper(), ReinforceConfig.official())
    assert differ == dict(temperature=(1., 0.), kl=(.1, 0.), kl_of=("policy", "base"), kl_path=(True, False), schedule=("cosine", "constant"))
    assert ReinforceConfig.paper().advantage == ReinforceConfig.official().advantage == "none"
    assert paper.changed(SvfConfig(), SvfConfig(rank=3)) == dict(rank=(None, 3))
    with pytest.raises(TypeError, match="a SvfConfig with a ReinforceConfig"): paper.changed(SvfConfig(), ReinforceConfig())


@pytest.fixture(scope="module")
def lab_record(): return record("paper-departures")


@pytest.fixture(scope="module")
def room():
    cells = json.loads((ROOT / "nbs" / "23_paper.ipynb").read_text(encoding="utf-8"))["cells"]
    said = {c["id"]: "".join(c["source"]) for c in cells}
    printed = {c["id"]: "".join("".join(o.get("text", "")) for o in c.get("outputs", [])) for c in cells}
    return said, printed


def verdict_runs(record):
    "{variant: {seed: piece}}, of the variants that have any"
    runs = {}
    for k, v in record["pieces"].items():
        if k.startswith("verdict/"): runs.setdefault(k.split("/")[1], {})[int(k.split("/")[2])] = v
    return runs


def verdicts(record):
    "{(task, variant): (difference in points, word)}, with Holm's correction over them all"
    runs = verdict_runs(record)
    seeds = sorted(set.intersection(*(set(r) for r in runs.values())))
    found = {}
    for task in ("math", "code"):
        rows = {n: [[c == "1" for c in f"{int(r[s]['tasks'][task]['right'], 16):b}"[1:]] for s in seeds] for n, r in runs.items()}
        found |= {(task, n): d for n, d in hierarchical(rows, "paper").items()}
    stands = paper.holm([d.p for d in found.values()])
    word = lambda d, ok: "no difference found" if not ok else "gains" if d.diff > 0 else "loses"
    return {k: (100 * d.diff, word(d, ok)) for (k, d), ok in zip(found.items(), stands)}


def test_lab_reference_is_the_papers_loop(lab_record):
    reference = ReinforceConfig(**lab_record["reference"])
    assert set(paper.changed(ReinforceConfig.paper(), reference)) == SCALE
    for name, v in lab_record["variants"].items():
        differ = paper.changed(reference, ReinforceConfig(**lab_record["reference"] | v["reinforce"]))
        assert set(differ) == set(v["reinforce"]) and not set(differ) & (SCALE | {"seed"}), name
    official = paper.changed(reference, ReinforceConfig(**lab_record["reference"] | lab_record["variants"]["code"]["reinforce"]))
    assert official == paper.changed(ReinforceConfig.paper(), ReinforceConfig.official())


def test_every_variant_is_tuned_on_other_seeds(lab_record):
    runs, tuning = verdict_runs(lab_record), set(lab_record["seeds"]["tune"])
    assert set(runs) == set(lab_record["variants"]) and len(tuning) >= 2
    for name, seeds in runs.items():
        found = {float(r): sum(c) for r, c in lab_record["surface"][name].items() if len(c) == len(tuning)}
        best = max(found, key=lambda r: (found[r], -r))
        assert len(found) >= 3 and len(seeds) >= 2 and not tuning & set(seeds), name
        assert len(found) == 5 or min(found) < best < max(found), f"{name}: the best of {found} is at an end"
        assert {r["lr"] for r in seeds.values()} == {best}, name
        assert all(sum(c == "1" for c in f"{int(t['right'], 16):b}"[1:]) == t["correct"] for r in seeds.values() for t in r["tasks"].values())


def test_room_prints_the_differences(room):
    "What the room shows as the difference of two loops is what the configs say."
    said, printed = room
    for field, (a, b) in paper.changed(ReinforceConfig.paper(), ReinforceConfig.official()).items():
        assert re.search(rf"^{field} +the paper {a!r} +the code {b!r}$", printed["c1a9e002"], re.M), field
    assert {l.split()[0] for l in printed["75b6e859"].splitlines()} == SCALE


def test_room_states_the_verdicts_of_the_record(room, lab_record):
    "Each row of the table in prose, and each printed line, has the word and the figure that the record gives."
    said, printed = room
    rows = {r[0]: r[1:] for r in ([x.strip() for x in l.strip("|").split("|")] for l in said["0954b174"].splitlines() if l.startswith("|"))}
    lines = printed["56e9d69c"]
    for (task, name), (points, word) in verdicts(lab_record).items():
        line = next(l for l in lines.split(f"\n{task}: ")[1].splitlines() if l.startswith(f"{name:18}"))
        assert line.endswith(word) and f"{points:+.1f} (" in line, (task, line)
        cell = rows[name][("math", "code").index(task)].replace("−", "-")
        assert cell == f"{word}, {points:+.1f}", (task, name, cell)
