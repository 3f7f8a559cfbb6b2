"""What a reader of room 02 need not see: precisions, compilers, other people's trainers, old and hostile files, who imports what first."""
import copy, json, os, pickle, subprocess, sys, warnings
from pathlib import Path

import pytest, torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from svf_toy import IDS, cosine, grads, llama, turned
from transformer2_nbdev.adapter import SvfConfig, shared_weights, svf_layers, zs
from transformer2_nbdev.fused import can_fuse, fused
from transformer2_nbdev.mixture import mixture

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    full = turned(get_peft_model(llama(), SvfConfig()))
    low = turned(get_peft_model(llama().to(dtype), SvfConfig()))
    base = llama().to(dtype)
    assert all(p.dtype == torch.float32 for p in low.parameters() if p.requires_grad)
    with low.disable_adapter(): assert torch.equal(low(IDS).logits, base(IDS).logits)
    assert cosine(low(IDS).logits, full(IDS).logits) > 0.999
    assert cosine(grads(low), grads(full)) > 0.99


def test_autocast():
    m = turned(get_peft_model(llama(), SvfConfig()))
    exact = grads(m)
    auto = lambda: torch.autocast("cpu", torch.bfloat16)
    with auto(): assert cosine(m(IDS).logits, m(IDS).logits) > 0.999
    assert cosine(grads(m, auto()), exact) > 0.99


def test_compile():
    m = turned(get_peft_model(llama(), SvfConfig()))
    y = m(IDS).logits
    torch.testing.assert_close(torch.compile(m, backend="aot_eager")(IDS).logits, y, rtol=1e-4, atol=1e-5)


def test_a_layer_compiles_in_one_graph():
    m = turned(get_peft_model(llama(), SvfConfig()))
    layer = next(iter(svf_layers(m).values()))
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
    y = torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(y, layer(x))


def test_low_cpu_mem_usage(tmp_path):
    m = turned(get_peft_model(llama(), SvfConfig()))
    m.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    assert torch.equal(again(IDS).logits, m(IDS).logits)


def test_wrapping_a_model_without_weights():
    with torch.device("meta"): empty = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=50))
    m = get_peft_model(empty, SvfConfig(), low_cpu_mem_usage=True)
    assert all(l.svf_Q.is_meta for l in svf_layers(m).values()) and sum(len(z) for z in zs(m).values()) == 2 * (4 + 3) * 64


def test_modules_to_save_and_bias(tmp_path):
    m = turned(get_peft_model(llama(), SvfConfig(modules_to_save=["lm_head"])))
    assert any("lm_head" in n for n, p in m.named_parameters() if p.requires_grad)
    m.get_base_model().lm_head.modules_to_save["default"].weight.data += 1
    m.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path)(IDS).logits, m(IDS).logits)


def test_one_config_object_for_two_models(tmp_path):
    config = SvfConfig(target_modules="mlp")
    a = get_peft_model(llama(0), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(llama(1), config)
    a.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(llama(0), tmp_path)
    assert not [w for w in seen if "other weights" in str(w.message)]
    with pytest.warns(UserWarning, match="model.layers.0.mlp"): PeftModel.from_pretrained(llama(1), tmp_path)


def test_refused_adapter_leaves_the_model_alone(tmp_path):
    get_peft_model(llama(), SvfConfig()).save_pretrained(tmp_path)
    other = llama(intermediate_size=64)
    with pytest.raises(ValueError, match="32x48"): PeftModel.from_pretrained(other, tmp_path)
    assert not svf_layers(other)
    shallow = llama(num_hidden_layers=1)
    with pytest.raises(ValueError, match="model.layers.1.*lacks"): PeftModel.from_pretrained(shallow, tmp_path)


def test_a_pickle_is_never_executed(tmp_path):
    class Bomb:
        def __reduce__(self): return (Path.touch, (tmp_path / "exploded",))
    get_peft_model(llama(), SvfConfig()).save_pretrained(tmp_path / "e")
    (tmp_path / "e/adapter_model.safetensors").unlink()
    (tmp_path / "e/adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(Exception): PeftModel.from_pretrained(llama(), tmp_path / "e")
    assert not (tmp_path / "exploded").exists()


def test_model_card(tmp_path):
    get_peft_model(llama(), SvfConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card and "text-generation" in card


def test_merge_of_two_and_convert_to_plain_model():
    m = turned(get_peft_model(llama(), SvfConfig()))
    m.add_adapter("b", SvfConfig(target_modules="mlp", rank=5)); m.set_adapter("b")
    for l in svf_layers(m).values():
        if "b" in l.svf_d: l.svf_d["b"].data += 0.3
    m.base_model.set_adapter(["default", "b"])
    y = m(IDS).logits
    m.merge_adapter(["default"]); m.merge_adapter(["b"])
    torch.testing.assert_close(m(IDS).logits, y, rtol=1e-4, atol=1e-5)
    m.unmerge_adapter()
    base = llama()
    assert all(torch.equal(l.get_base_layer().weight, base.get_submodule(n).weight) for n, l in svf_layers(m).items())


@pytest.mark.parametrize("eight", [False, True], ids=["nf4", "int8"])
def test_quantised_merge_and_back(eight):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    lin = nn.Linear(64, 128)
    if eight:
        q = bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False, threshold=0.0)
        q.weight = bnb.nn.Int8Params(lin.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        q = bnb.nn.Linear4bit(64, 128, compute_dtype=torch.float32, quant_type="nf4")
        q.weight = bnb.nn.Params4bit(lin.weight.data.clone(), requires_grad=False, quant_type="nf4")
    q.bias = nn.Parameter(lin.bias.data.clone())
    root = nn.Sequential(q.to("cpu"))
    x = torch.randn(5, 64)
    y0 = root(x)
    m = get_peft_model(root, SvfConfig(target_modules=["0"]))
    assert torch.equal(m(x), y0)
    layer = next(iter(svf_layers(m).values()))
    layer.svf_d["default"].data += 0.3 * torch.randn(64)
    y1 = m(x)
    from transformer2_nbdev.svf import compose
    from transformer2_nbdev.adapter import weight_of
    W = compose(weight_of(layer).float(), 1 + layer.svf_d["default"].detach(), layer.svf_Q.float())
    torch.testing.assert_close(y1, x @ W.T + q.bias, rtol=2e-2, atol=2e-2)
    y1.sum().backward(); assert layer.svf_d["default"].grad.abs().sum() > 0
    with pytest.warns(UserWarning, match="relative error of") as said: m.merge_adapter()
    error = ((layer.get_base_weight().float() - W).norm() / W.norm()).item()
    text = next(str(w.message) for w in said if "relative error" in str(w.message))
    assert f"{error:.1%}" in text and (.002 if eight else .05) < error < (.03 if eight else .12)
    assert cosine(m(x), y1) > 0.98; m.unmerge_adapter()
    assert not layer.merge_error
    with m.disable_adapter(): assert torch.equal(m(x), y0)
    torch.testing.assert_close(m(x), y1)


def test_grpo_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = {f"w{i}": i for i in range(64)}
    tok = Tokenizer(models.WordLevel(words, unk_token="w3")); tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="w0", eos_token="w2", bos_token="w1", unk_token="w3", padding_side="left")
    args = trl.GRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=6, max_steps=2, report_to=[],
                          learning_rate=1e-2, use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", beta=0.1)
    trainer = trl.GRPOTrainer(llama(), reward_funcs=lambda completions, **_: [float(i) for i, _ in enumerate(completions)], args=args, processing_class=tok,
                              train_dataset=Dataset.from_dict({"prompt": ["w5 w6 w7"] * 8}), peft_config=SvfConfig(target_modules="all-linear"))
    trainer.train()
    moved = [z for z in zs(trainer.model).values() if (z - 1).abs().max() > 1e-4]
    assert len(moved) == 14 and len(trainer.state.log_history) >= 2


# What is stored is d = z - 1 -------------------------------------------------------------------------------------------------------------------------------

def test_weight_decay_pulls_to_the_base():
    "AdamW's decay of 0.1 and no gradient: an expert fades toward the base, and the base stays the base (stored as z, 1 went to .78 in 500 steps)"
    m = turned(get_peft_model(llama(), SvfConfig()))
    m.add_adapter("fresh", SvfConfig())
    params = [p for n, p in m.named_parameters() if "svf_d" in n]
    start = {n: (z - 1).norm() for n, z in zs(m).items()}
    adam = torch.optim.AdamW(params, lr=5e-3, weight_decay=.1)
    for p in params: p.grad = torch.zeros_like(p)
    for _ in range(500): adam.step()
    assert all((z - 1).norm() < .79 * start[n] for n, z in zs(m).items())
    assert all(torch.equal(z, torch.ones_like(z)) for z in zs(m, "fresh").values())
    m.set_adapter("fresh")
    assert torch.equal(m(IDS).logits, llama()(IDS).logits)


def test_sixteen_bits_can_say_a_small_change():
    "lr 1e-3 in bfloat16: stored as z, not one in a hundred moved in 50 steps"
    m = get_peft_model(llama().bfloat16(), SvfConfig(), autocast_adapter_dtype=False)
    for l in svf_layers(m).values(): l.svf_d["default"].data = l.svf_d["default"].data.bfloat16()
    adam = torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(50):
        m(IDS, labels=IDS).loss.backward()
        adam.step(); adam.zero_grad()
    d = torch.cat([l.svf_d["default"].detach().flatten() for l in svf_layers(m).values()])
    assert d.dtype == torch.bfloat16 and (d != 0).float().mean() > .99 and d.abs().max() > 1e-2


def as_written_before(folder):
    "Rewrite a saved expert as earlier versions wrote it: z itself, under another name"
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    config = json.loads((folder / "adapter_config.json").read_text())
    linear = config["parametrization"] == "linear"
    save_file({k.replace("svf_d", "svf_z"): 1 + v if linear and k.endswith("svf_d") else v for k, v in state.items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kw", [dict(), dict(rank=5), dict(parametrization="sigmoid", preserve_nuclear_norm=True), dict(preserve_nuclear_norm=True),
                                dict(modules_to_save=["lm_head"])], ids=str)
def test_experts_written_as_z_still_load(tmp_path, kw):
    m = turned(get_peft_model(llama(), SvfConfig(**kw)))
    for l in svf_layers(m).values():  # z a float32 number, as the old file had it
        if not kw.get("parametrization"): l.svf_d["default"].data = (1 + l.svf_d["default"].data) - 1
    m.save_pretrained(tmp_path)
    assert any(k.endswith("svf_d") for k in load_file(tmp_path / "adapter_model.safetensors"))
    as_written_before(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    for n, z in zs(m).items(): assert torch.equal(zs(again)[n], z)
    assert torch.equal(again(IDS).logits, m(IDS).logits)
    over = get_peft_model(llama(), SvfConfig(**kw))
    over.load_adapter(tmp_path, "default")  # onto an adapter that is there already, as a Trainer that resumes does
    over.load_adapter(tmp_path, "second")
    for name in ("default", "second"):
        over.set_adapter(name)
        assert torch.equal(over(IDS).logits, m(IDS).logits)
    over.save_pretrained(tmp_path / "new")
    assert not any("svf_z" in k for k in load_file(tmp_path / "new/adapter_model.safetensors"))


def test_shipped_experts_hold_d(root):
    for file in (root / "transformer2_nbdev/data/lab").rglob("adapter_model.safetensors"):
        state = load_file(file)
        assert state and all(k.endswith(".svf_d") and v.abs().max() < .5 and v.dtype == torch.float32 for k, v in state.items())


# Which layers --------------------------------------------------------------------------------------------------------------------------------------------

def without_weights(family, depth=2):
    "A model that sees, with two blocks on either side, on the meta device"
    config = AutoConfig.for_model(family)
    for part in (config.text_config, config.vision_config):
        for key in ("num_hidden_layers", "depth", "num_global_layers"):
            if hasattr(part, key): setattr(part, key, depth)
    if family == "mllama": config.text_config.cross_attention_layers = [1]
    if family.startswith("qwen3_vl"): config.vision_config.deepstack_visual_indexes = [0]
    for name in ("layer_types", "text_config.layer_types"):
        if getattr(config.text_config, "layer_types", None): config.text_config.layer_types = config.text_config.layer_types[:depth]
    with torch.device("meta"): return AutoModelForImageTextToText.from_config(config)


SEEING = {"gemma3": "vision_tower", "llava": "vision_tower", "llava_next": "vision_tower", "qwen2_vl": "visual", "qwen2_5_vl": "visual", "qwen3_vl": "visual",
          "idefics3": "vision_model", "smolvlm": "vision_model", "paligemma": "vision_tower", "mllama": "vision_model", "internvl": "vision_tower", "mistral3": "vision_tower"}


@pytest.mark.parametrize("family", SEEING)
def test_models_that_see(family):
    def wrapped(**kw): return set(zs(get_peft_model(without_weights(family), SvfConfig(**kw), low_cpu_mem_usage=True)))
    linear = {n for n, m in without_weights(family).named_modules() if isinstance(m, nn.Linear)}
    tower = {n for n in linear if f".{SEEING[family]}." in n}
    language = {n for n in linear if n.startswith(("model.language_model.", "model.text_model."))}
    assert tower and language and not tower & language
    assert wrapped() == language
    assert wrapped(layers_to_transform=[1]) == {n for n in language if ".layers.1." in n}
    mlp, attention = wrapped(target_modules="mlp"), wrapped(target_modules="attention")
    assert mlp and attention and mlp | attention == language and not mlp & attention
    assert wrapped(target_modules="vision") == tower
    assert wrapped(target_modules="all-linear") == linear - {"lm_head"} >= language | tower
    assert wrapped(target_modules="all-linear", layers_to_transform=0) == {n for n in language if ".layers.0." in n}


def test_a_model_that_sees_saves_and_loads(tmp_path):
    config = AutoConfig.for_model("llava", text_config=llama().config, vision_config=dict(model_type="clip_vision_model", hidden_size=16, intermediate_size=24, projection_dim=16,
                                  num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4), image_token_index=63, vision_feature_layer=-1)
    def make(): torch.manual_seed(0); return AutoModelForImageTextToText.from_config(config).eval()
    for kw in (dict(layers_to_transform=[1]), dict(target_modules="vision")):
        m = turned(get_peft_model(make(), SvfConfig(**kw)))
        m.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(make(), tmp_path)
        assert all(torch.equal(z, zs(again)[n]) for n, z in zs(m).items()) and set(zs(m)) == set(zs(again))
    whole = get_peft_model(make(), SvfConfig(target_modules="all-linear"), adapter_name="a")
    with pytest.raises(ValueError, match="expected 28 adapted"), mixture(whole, torch.ones(1, 4, 1)): pass  # the projector lies in no block
    both = get_peft_model(make(), SvfConfig(target_modules="all-linear", exclude_modules=".*projector.*"), adapter_name="a")
    with mixture(both, torch.ones(1, 4, 1)): pass  # two blocks of the tower and two of the language model
    with pytest.raises(ValueError, match="expected"), mixture(both, torch.ones(1, 2, 1)): pass


def few_experts(family):
    config = AutoConfig.for_model(family, num_hidden_layers=2)
    with torch.device("meta"): return AutoModelForCausalLM.from_config(config)


def warned(fn):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fn()
    return [str(w.message) for w in seen if "experts" in str(w.message)]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "olmoe"])
def test_stacks_of_experts_are_said(family):
    wrap = lambda **kw: get_peft_model(few_experts(family), SvfConfig(**kw), low_cpu_mem_usage=True)
    model = few_experts(family)
    inside = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 3)
    linear = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    for kw in (dict(), dict(target_modules="all-linear")):
        said = warned(lambda: wrap(**kw))
        assert len(said) == 1 and f"{inside / (inside + linear):.0%}" in said[0] and "model.layers.0.mlp.experts.gate_up_proj" in said[0]
    assert not warned(lambda: wrap(target_modules="attention")) and not warned(lambda: wrap(target_modules=["q_proj"]))
    if family == "qwen2_moe": assert len(warned(lambda: wrap(target_modules="mlp"))) == 1  # its shared experts are layers
    else:
        with pytest.raises(ValueError, match="stacks of experts"): wrap(target_modules="mlp")


def test_models_without_stacks_say_nothing(tmp_path):
    assert not warned(lambda: get_peft_model(llama(), SvfConfig()))
    with torch.device("meta"): jamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("jamba", num_hidden_layers=1, expert_layer_offset=5, expert_layer_period=6))
    assert any(p.dim() == 3 for p in jamba.parameters())  # a convolution, and no expert
    assert not warned(lambda: get_peft_model(jamba, SvfConfig(target_modules="all-linear"), low_cpu_mem_usage=True))


# Merging and wrapping ----------------------------------------------------------------------------------------------------------------------------------

class Twice(nn.Module):
    "Two layers of one shape and, between them, one of four kinds of sharing"
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        if how == "parameter": self.b.weight = self.a.weight
        if how == "module": self.b = self.a
        if how == "storage": self.b.weight = nn.Parameter(self.a.weight.data)  # the same numbers, but a parameter of its own

    def forward(self, x): return self.b(self.a(x).tanh())


@pytest.mark.parametrize("how", ["parameter", "module", "storage", "nothing"])
@pytest.mark.parametrize("targets", [["a"], ["a", "b"]], ids=["one", "both"])
def test_a_weight_that_two_modules_hold(how, targets):
    m = turned(get_peft_model(Twice(how), SvfConfig(target_modules=targets)))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    m(x).square().sum().backward()
    exact = {n: p.grad.clone() for n, p in m.named_parameters() if p.requires_grad}
    y = m(x).detach()
    if how in ("parameter", "module"):
        with pytest.raises(ValueError, match="b holds the same weight"), fused(m): pass
        with pytest.raises(ValueError, match="cannot merge into a: b holds the same weight"): m.merge_adapter()
        with pytest.raises(ValueError, match="holds the same weight"): m.merge_and_unload()
        assert not can_fuse(m) and shared_weights(m)["a"] == "b"
        m.unload()
        return
    assert can_fuse(m) and not shared_weights(m)
    m.zero_grad()
    with fused(m): m(x).square().sum().backward()
    for n, p in m.named_parameters():
        if p.requires_grad: torch.testing.assert_close(p.grad, exact[n], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(m.merge_and_unload()(x), y, rtol=1e-4, atol=1e-5)


def test_a_block_used_twice_is_one_module():
    "Sharing a whole block is no sharing of a weight between modules: W' is meant in both places"
    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
            self.blocks = nn.ModuleList([block, block])

        def forward(self, x):
            for b in self.blocks: x = b(x)
            return x
    m = turned(get_peft_model(Looped(), SvfConfig(target_modules=["blocks.0.0"])))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    m(x).square().sum().backward()
    exact = m.base_model.model.blocks[0][0].svf_d["default"].grad.clone()
    m.zero_grad()
    with fused(m): m(x).square().sum().backward()
    torch.testing.assert_close(m.base_model.model.blocks[0][0].svf_d["default"].grad, exact, rtol=1e-4, atol=1e-5)


def test_compiled_models():
    with pytest.raises(ValueError, match="wrap it first"): get_peft_model(torch.compile(llama()), SvfConfig())
    inside = llama()
    inside.model.layers[0] = torch.compile(inside.model.layers[0])
    with pytest.raises(ValueError, match="wrap it first"): get_peft_model(inside, SvfConfig())
    in_place = llama()
    in_place.compile(backend="eager")  # compiles the call and changes no name
    m = get_peft_model(in_place, SvfConfig())
    assert not any("_orig_mod" in n for n in m.state_dict())


def test_an_expert_saved_from_a_compiled_wrapped_model(tmp_path):
    m = turned(get_peft_model(llama(), SvfConfig()))
    c = torch.compile(m, backend="eager")
    c.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path)(IDS).logits, m(IDS).logits)


@pytest.mark.parametrize("kw", [dict(do_sample=True, num_return_sequences=3), dict(num_beams=2), dict(num_beams=4, num_return_sequences=2), dict()], ids=str)
def test_modules_to_save_sample_by_sample(kw):
    "PEFT hands every sample its own copy of a module; generate repeats samples, and the names with them"
    m = turned(get_peft_model(llama(), SvfConfig(modules_to_save=["lm_head"]), "a"), name="a")
    m.add_adapter("b", SvfConfig(modules_to_save=["lm_head"]))
    m.base_model.model.lm_head.modules_to_save["b"].weight.data.neg_()
    m.eval()
    kw = dict(max_new_tokens=5, pad_token_id=0) | kw
    torch.manual_seed(0)
    mixed = m.generate(input_ids=IDS[:2], attention_mask=torch.ones_like(IDS[:2]), adapter_names=["a", "b"], **kw)
    n = kw.get("num_return_sequences", 1)
    assert len(mixed) == 2 * n
    if kw.get("do_sample"): return
    for i, name in enumerate("ab"):
        m.set_adapter(name)
        alone = m.generate(input_ids=IDS[i:i + 1], attention_mask=torch.ones_like(IDS[:1]), **kw)
        width = min(alone.shape[1], mixed.shape[1])
        assert torch.equal(mixed[i * n:(i + 1) * n, :width], alone[:, :width])


def test_the_basis_is_no_buffer_and_follows():
    m = get_peft_model(llama(), SvfConfig())
    assert not any("svf" in n for n, _ in m.named_buffers()) and not any("svf_Q" in n for n in m.state_dict())
    layer = next(iter(svf_layers(m).values()))
    twin = next(iter(svf_layers(copy.deepcopy(m)).values()))
    assert torch.equal(twin.svf_Q, layer.svf_Q) and twin.svf_Q is not layer.svf_Q
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again.svf_Q, layer.svf_Q)
    m.to(torch.bfloat16); assert layer.svf_Q.dtype == layer.svf_S.dtype == torch.bfloat16
    m.float(); assert layer.svf_Q.dtype == torch.float32
    m.to("meta"); assert layer.svf_Q.is_meta and layer.svf_S.is_meta


def _ddp(rank, folder, world):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29578", RANK=str(rank), WORLD_SIZE=str(world))
    dist = torch.distributed
    dist.init_process_group("gloo", rank=rank, world_size=world)
    sent, broadcast = [], dist._broadcast_coalesced
    def counting(group, tensors, *args):
        sent.append(sum(t.numel() * t.element_size() for t in tensors))
        return broadcast(group, tensors, *args)
    dist._broadcast_coalesced = counting
    class Holder(nn.Module):
        def __init__(self, inner): super().__init__(); self.inner = inner
        def forward(self, **kw): return self.inner(**kw)
    report = {}
    for name, wrap in dict(plain=lambda m: m, holder=Holder).items():
        m = turned(get_peft_model(llama(), SvfConfig()))
        inner = m.get_base_model()
        inner.register_buffer("a_real_buffer", torch.zeros(10))
        ddp = nn.parallel.DistributedDataParallel(wrap(m))
        sent.clear()
        part = IDS[:2].chunk(world)[rank]
        ddp(input_ids=part, labels=part).loss.backward()
        report[name] = (sum(sent), {n: p.grad for n, p in m.named_parameters() if p.requires_grad})
        report["Q"] = sum(l.svf_Q.numel() * 4 for l in svf_layers(m).values())
    torch.save(report, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ddp_does_not_send_the_basis_around(tmp_path):
    torch.multiprocessing.spawn(_ddp, (str(tmp_path), 2), nprocs=2)
    a, b = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    m = turned(get_peft_model(llama(), SvfConfig()))
    m(IDS[:2], labels=IDS[:2]).loss.backward()
    for name in ("plain", "holder"):
        assert 40 <= a[name][0] < 1000 < a["Q"]  # the real buffer and rotary frequencies, and no Q
        for n, p in m.named_parameters():
            if p.requires_grad:
                assert torch.equal(a[name][1][n], b[name][1][n]) and (a[name][1][n] - p.grad).norm() / p.grad.norm() < 1e-5


# Registration ----------------------------------------------------------------------------------------------------------------------------------------------

def fresh(code, *args):
    "Run code in a process of its own, from another folder; what it printed"
    out = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd="/", capture_output=True, text=True, timeout=500,
                         env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"})
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("imports", ["import transformer2_nbdev; from peft import PeftModel", "from peft import PeftModel; import transformer2_nbdev",
                                     "import transformer2_nbdev.tasks; from peft import PeftModel", "from transformer2_nbdev.mixture import mixture; from peft import PeftModel"])
def test_the_package_alone_registers(tmp_path, imports):
    m = turned(get_peft_model(llama(), SvfConfig()))
    m.save_pretrained(tmp_path / "e")
    torch.save(m(IDS).logits, tmp_path / "y.pt")
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(SvfConfig(rank=3)))
    code = imports + """
import pickle, sys, torch
from transformers import LlamaForCausalLM
from svf_toy import IDS, llama
model = PeftModel.from_pretrained(llama(), sys.argv[1] + "/e")
assert torch.equal(model(IDS).logits, torch.load(sys.argv[1] + "/y.pt"))
assert pickle.load(open(sys.argv[1] + "/config.pkl", "rb")).rank == 3
print(type(model.peft_config["default"]).__name__)
"""
    assert fresh(code, tmp_path) == "SvfConfig"


def test_a_pickled_config_needs_no_import(tmp_path):
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(SvfConfig(rank=3, target_modules="mlp")))
    assert fresh("import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).rank)", tmp_path / "config.pkl") == "3"


def test_importing_the_package_costs_little():
    "Alone it loads neither torch nor PEFT; beside PEFT it adds less than 0.2 s (best of three fresh processes)"
    code = """
import sys, time
t0 = time.perf_counter(); {first}
t1 = time.perf_counter(); {second}
t2 = time.perf_counter()
assert "SVF" in __import__("peft").mapping.PEFT_TYPE_TO_TUNER_MAPPING
print(t1 - t0, t2 - t1)
"""
    light = "import sys, transformer2_nbdev; print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    assert fresh(light) == "[]"
    after = min(float(fresh(code.format(first="import peft", second="import transformer2_nbdev")).split()[1]) for _ in range(3))
    before = min(float(fresh(code.format(first="import transformer2_nbdev", second="import peft")).split()[0]) for _ in range(3))
    print(f"import transformer2_nbdev: {before:.3f} s alone, {after:.3f} s after peft")
    assert after < .2 and before < .2


def test_the_hook_finds_nothing_itself():
    code = """
import importlib.util, sys, transformer2_nbdev
assert importlib.util.find_spec("peft") is not None and "peft" not in sys.modules  # transformers asks like this
assert importlib.util.find_spec("no_such_module_at_all") is None
assert sum(type(f).__name__ == "_WithPeft" for f in sys.meta_path) == 1
import importlib; importlib.reload(transformer2_nbdev)
assert sum(type(f).__name__ == "_WithPeft" for f in sys.meta_path) == 1
import peft; assert "SVF" in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
print("fine")
"""
    assert fresh(code) == "fine"
