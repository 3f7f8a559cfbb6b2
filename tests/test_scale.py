"""Experts that leave: as a LoRA, exact where it can be, and as one model folder, whole or not
at all; and what training needs, told before anything is loaded."""
import json, os, re, subprocess, sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file
from torch import nn
from transformers import (AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel,
                          LlamaConfig, LlamaForCausalLM, Qwen2Config,
                          Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

from transformer2_nbdev.adapter import SvfConfig, knobs, svf_layers, zs
from transformer2_nbdev.scale import (at_rank, base_tensors, change_of, kl_at, left_out,
                                      save_merged, to_lora)

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2,
             initializer_range=.3, max_position_embeddings=64)


def llama(**kw): return LlamaForCausalLM(LlamaConfig(**SMALL | kw))
# biases on q, k and v
def qwen2(**kw): return Qwen2ForCausalLM(Qwen2Config(**SMALL | kw))
# norms inside the attention
def qwen3(**kw): return Qwen3ForCausalLM(Qwen3Config(**SMALL | dict(head_dim=6) | kw))
def gpt2(**kw):
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=4, n_positions=64,
                                      initializer_range=.3, **kw))


MAKERS = dict(llama=llama, tied=lambda: llama(tie_word_embeddings=True),
              biased=lambda: llama(attention_bias=True, mlp_bias=True),
              qwen2=qwen2, qwen3=qwen3, gpt2=gpt2)
IDS = torch.arange(1, 25).view(2, 12)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1); torch.manual_seed(0); yield
    torch.set_num_threads(before)


def base_of(kind, folder=None, dtype=torch.float32):
    "The same base every time, from a seed; saved where a folder is given"
    torch.manual_seed(1)
    model = MAKERS[kind]().to(dtype).eval()
    for n, p in model.named_parameters():
        if n.endswith("bias"): nn.init.normal_(p, std=.2)
    if folder: model.save_pretrained(folder)
    return model


def expert_of(base, **kw):
    torch.manual_seed(2)
    return get_peft_model(base, SvfConfig(**dict(target_modules="all-linear", init_weights=False,
                                                 task_type="CAUSAL_LM") | kw)).eval()


@torch.no_grad()
def logits(model): return model(IDS).logits.double()


def off(a, b): return float((a - b).abs().max() / b.abs().max())


# --- as a LoRA

@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("rank", [3, None])
def test_a_lora_folder_gives_the_same_logits(kind, rank, tmp_path):
    expert = expert_of(base_of(kind), rank=rank)
    lora = to_lora(expert)
    lora.save(tmp_path / "x")
    served = PeftModel.from_pretrained(base_of(kind), tmp_path / "x").eval()
    assert off(logits(served), logits(expert)) < 1e-5 < off(logits(base_of(kind)), logits(expert))
    assert lora.relative == 0 and lora.config.r == (rank
                                                    or max(l.svf_Q.shape[0]
                                                           for l in svf_layers(expert).values()))
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"adapter_config.json",
                                                            "adapter_model.safetensors"}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_product_is_the_change_to_1e_5_on_both_sides(kind):
    expert = expert_of(base_of(kind), rank=5)
    tensors, sides = to_lora(expert).tensors, set()
    for n, l in svf_layers(expert).items():
        A, B = (tensors[f"base_model.model.{n}.lora_{x}.weight"] for x in "AB")
        want = l.get_delta_weight("default")
        want = want.T if kind == "gpt2" else want
        assert A.shape == (5, want.shape[1]) and B.shape == (want.shape[0], 5)
        assert (B @ A - want).norm() < 1e-5 * want.norm()
        sides.add(l.side)
    assert sides == {"left", "right"}


def test_gains_that_multiply_every_z_are_exported_too():
    expert = expert_of(base_of("llama"), parametrization="sigmoid", preserve_nuclear_norm=True)
    served = get_peft_model(base_of("llama"), to_lora(expert).config).eval()
    missing = served.load_state_dict({k.replace("_A.", "_A.default.").replace("_B.",
        "_B.default."): v for k, v in to_lora(expert).tensors.items()}, strict=False)
    assert not missing.unexpected_keys and off(logits(served), logits(expert)) < 1e-5


def test_a_base_in_half_precision(tmp_path):
    base = base_of("llama", dtype=torch.bfloat16)
    expert = expert_of(base, rank=4)
    lora = to_lora(expert)
    assert {t.dtype for t in lora.tensors.values()} == {torch.bfloat16} and {t.dtype
        for t in to_lora(expert, dtype=torch.float32).tensors.values()} == {torch.float32}
    for n, l in svf_layers(expert).items():
        A, B = (lora.tensors[f"base_model.model.{n}.lora_{x}.weight"].float() for x in "AB")
        d, Q, W = knobs(l, "default").detach() - 1, l.svf_Q.float()[:,
            :4], l.get_base_layer().weight.float()
        want = (Q * d) @ (Q.T @ W) if l.side == "left" else ((W @ Q) * d) @ Q.T
        assert (B @ A - want).norm() < .01 * want.norm()
    lora.save(tmp_path / "x")
    served = PeftModel.from_pretrained(base_of("llama", dtype=torch.bfloat16), tmp_path
                                       / "x").eval()
    # what bfloat16 itself is worth here
    noise = off(logits(base.float()), logits(base_of("llama", dtype=torch.bfloat16)))
    assert off(logits(served), logits(expert)) < max(4 * noise, .05)


def test_a_quantised_base_exports_what_it_computed_with(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    def net():
        torch.manual_seed(3)
        m = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False))
        kind = dict(bias=False, compute_dtype=torch.float32, quant_type="nf4")
        q = nn.Sequential(*[bnb.nn.Linear4bit(l.in_features, l.out_features, **kind) for l in m])
        for a, b in zip(q, m):
            a.weight = bnb.nn.Params4bit(b.weight.data, requires_grad=False, quant_type="nf4")
            a.support_avx512bf16_for_cpu = False     # or bitsandbytes computes in bfloat16
        return q.to("cpu")
    x, expert = torch.randn(5, 64), get_peft_model(net(), SvfConfig(target_modules=["0", "1"],
        rank=6, init_weights=False)).eval()
    to_lora(expert).save(tmp_path / "x")
    served = PeftModel.from_pretrained(net(), tmp_path / "x").eval()
    assert off(served(x), expert(x)) < 1e-4 < off(net()(x), expert(x))
    with pytest.raises(ValueError, match="quantised"): save_merged(expert, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_names_and_fields_that_vllm_and_llama_cpp_read(tmp_path):
    """vLLM: parse_fine_tuned_lora_name in lora/utils.py, and lora/peft_helper.py; llama.cpp:
    get_base_tensor_name, llama_adapter_lora_weight::get_scale"""
    expert = expert_of(base_of("qwen3"), rank=4)
    lora = to_lora(expert)
    lora.save(tmp_path / "x", base="somewhere/base")
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    stored = load_file(tmp_path / "x" / "adapter_model.safetensors")
    linears = {n for n, m in base_of("qwen3").named_modules() if isinstance(m, nn.Linear)}
    modules = {re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", k)[1] for k in stored}
    assert modules == linears - {"lm_head"} and len(stored) == 2 * len(modules)
    assert {"r", "lora_alpha", "target_modules"} <= set(config) and config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "somewhere/base"
    assert not config["modules_to_save"] and config["bias"] == "none"
    assert not config["use_dora"] and not config["use_rslora"]
    for k, t in stored.items():                     # one rank and scale 1, whoever computes it
        rank = t.shape[1 if "lora_B" in k else 0]
        assert config["lora_alpha"] / config["r"] == config["lora_alpha"] / rank == 1
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert {m.rsplit(".", 1)[-1] for m in modules} == set(config["target_modules"])


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "mlp",
                                     r".*layers\.1\.self_attn\.[qk]_proj",
                                     ["model.layers.0.mlp.up_proj"]])
def test_the_config_names_the_adapted_modules_and_no_others(targets, tmp_path):
    expert = expert_of(base_of("llama"), target_modules=targets, rank=2)
    to_lora(expert).save(tmp_path / "x")
    served = PeftModel.from_pretrained(base_of("llama"), tmp_path / "x").eval()
    named = {n.split("base_model.model.")[1] for n, m in served.named_modules()
             if hasattr(m, "lora_A")}
    assert named == set(svf_layers(expert)) and off(logits(served), logits(expert)) < 1e-5


def test_matrices_that_did_not_move_stay_out(tmp_path):
    expert = expert_of(base_of("llama"), rank=3)
    for n, l in svf_layers(expert).items():
        if "up_proj" in n:
            with torch.no_grad(): l.svf_d["default"].zero_()
    lora = to_lora(expert)
    assert not any("up_proj" in k for k in lora.tensors) and not any("up_proj" in t
        for t in lora.config.target_modules)
    lora.save(tmp_path / "x")
    assert off(logits(PeftModel.from_pretrained(base_of("llama"), tmp_path / "x").eval()),
               logits(expert)) < 1e-5


def test_one_expert_of_several_and_one_that_is_merged():
    expert = expert_of(base_of("llama"), rank=3)
    expert.add_adapter("other", SvfConfig(target_modules="all-linear", rank=2, init_weights=False))
    a, b = to_lora(expert), to_lora(expert, "other")
    assert (a.config.r, b.config.r) == (3, 2)
    expert.merge_adapter(["default"])
    again = to_lora(expert)                           # read from the unmerged base
    expert.unmerge_adapter()
    assert all(torch.equal(t, again.tensors[k]) for k, t in a.tensors.items())
    with pytest.raises(ValueError, match="no adapter named 'third': loaded are default, other"):
        to_lora(expert, "third")
    with pytest.raises(ValueError, match="rank=0"): to_lora(expert, rank=0)
    with pytest.raises(ValueError, match="no adapter on this model"): to_lora(base_of("llama"))


def test_trained_biases_and_modules_go_along(tmp_path):
    expert = expert_of(base_of("biased"), rank=3, bias="svf_only", modules_to_save=["norm"])
    with torch.no_grad():
        for n, p in expert.named_parameters():
            if p.requires_grad and ("bias" in n or "norm" in n): p.add_(.1 * torch.randn_like(p))
    to_lora(expert).save(tmp_path / "x")
    served = PeftModel.from_pretrained(base_of("biased"), tmp_path / "x").eval()
    assert off(logits(served), logits(expert)) < 1e-5
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["bias"] == "lora_only" and config["modules_to_save"] == ["norm"]


def test_a_mixture_of_experts_with_rank_k_is_a_lora_of_rank_k():
    expert = expert_of(base_of("llama"), rank=3)
    for e in ("b", "c"):
        expert.add_adapter(e, SvfConfig(target_modules="all-linear", rank=3, init_weights=False))
    expert.add_weighted_adapter(["default", "b", "c"], [.5, .3, .4], "mix")
    assert to_lora(expert, "mix").config.r == 3


# --- the best of each rank

def test_what_is_left_out_is_what_a_decomposition_finds():
    expert = expert_of(base_of("llama"))
    lora = to_lora(expert, rank=6)
    for n, l in svf_layers(expert).items():
        W = l.get_delta_weight("default").double()
        A, B = (lora.tensors[f"base_model.model.{n}.lora_{x}.weight"].double() for x in "AB")
        best = torch.linalg.svdvals(W)[6:].norm()
        assert abs(float((W - B @ A).norm() - best)) < 1e-5 * W.norm() and abs(lora.left[n].error
            - float(best)) < 1e-5 * W.norm()
        assert abs(lora.left[n].norm - float(W.norm())) < 1e-5 * W.norm() and lora.left[n].kept == 6
    assert .05 < lora.relative < .95


def test_the_expert_can_play_its_own_lora():
    expert = expert_of(base_of("llama"))
    plain, whole = logits(base_of("llama")), logits(expert)
    for rank in (0, 1, 7, 99):
        with at_rank(expert, rank): played = logits(expert)
        if rank == 0: assert off(played, plain) < 1e-6
        else:
            served = get_peft_model(base_of("llama"),
                                    (lora := to_lora(expert, rank=rank)).config).eval()
            served.load_state_dict({k.replace("_A.", "_A.default.").replace("_B.", "_B.default."): v
                                    for k, v in lora.tensors.items()}, strict=False)
            assert off(played, logits(served)) < 1e-5
    assert off(logits(expert), whole) == 0            # and is itself again, also after an error
    with pytest.raises(ZeroDivisionError):
        with at_rank(expert, 1): 1 / 0
    assert off(logits(expert), whole) == 0


class Letters:
    "A tokenizer: one id a letter"
    eos_token_id = pad_token_id = None
    def __call__(self, text, **kw): return dict(input_ids=[1 + ord(c) % 39 for c in text])


def test_kl_on_prompts_against_the_sum_written_out():
    expert, prompts = expert_of(base_of("llama")), ["abc", "abcdefgh", "zzz"]
    got = kl_at(expert, Letters(), prompts, [0, 2, 24], batch_size=2)
    def logp(text):
        with torch.no_grad():
            return expert(torch.tensor([Letters()(text)["input_ids"]])).logits[0,
                :-1].double().log_softmax(-1)
    for rank in (0, 2):
        p = [logp(t) for t in prompts]
        with at_rank(expert, rank): q = [logp(t) for t in prompts]
        want = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(p, q)) / sum(len(a) for a in p)
        assert abs(got[rank] - want) < 1e-4 * want
    assert got[0] > got[2] > got[24] >= -1e-7 and abs(got[24]) < 1e-6


def test_faster_than_peft_and_as_exact():
    import time
    net = get_peft_model(nn.Sequential(nn.Linear(1024, 2736, bias=False)),
                         SvfConfig(target_modules=["0"], rank=16, init_weights=False))
    def clock(f): t = time.process_time(); f(); return time.process_time() - t
    assert clock(lambda: convert_to_lora(net, 16)) > 20 * min(clock(lambda: to_lora(net))
                                                              for _ in range(3))


# --- as one model

@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("keep", [True, False])
def test_a_merged_folder_is_an_ordinary_model(kind, keep, tmp_path):
    expert = expert_of(base_of(kind))
    expert.get_base_model().generation_config.max_new_tokens = 17
    want, before = logits(expert), {n: t.clone() for n, t in base_tensors(expert).items()}
    save_merged(expert, tmp_path / "x", keep=keep, max_shard_size="10KB")
    assert (tmp_path / "x" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 2
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "x").eval()
    assert off(logits(alone), want) < 1e-5 and type(alone) is type(base_of(kind))
    assert alone.generation_config.max_new_tokens == 17
    names = set(base_of(kind).state_dict())
    assert set(alone.state_dict()) == names
    if keep:
        assert set(before) == names and all(torch.equal(t, base_tensors(expert)[n]) for n,
                                            t in before.items()) and off(logits(expert), want) == 0


def test_any_mergeable_method_can_be_merged(tmp_path):
    torch.manual_seed(4)
    expert = get_peft_model(base_of("llama"), LoraConfig(target_modules=["q_proj"],
                                                         init_lora_weights=False)).eval()
    want = logits(expert)
    save_merged(expert, tmp_path / "x")
    assert off(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "x").eval()), want) < 1e-5


def test_modules_trained_in_full_are_merged_too(tmp_path):
    expert = expert_of(base_of("biased"), bias="svf_only", modules_to_save=["norm", "lm_head"])
    with torch.no_grad():
        for n, p in expert.named_parameters():
            if p.requires_grad and ("bias" in n or "modules_to_save" in n):
                p.add_(.1 * torch.randn_like(p))
    save_merged(expert, tmp_path / "x")
    assert off(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "x").eval()),
               logits(expert)) < 1e-5


class Full:
    def __init__(self, error): self.error = error
    def save_pretrained(self, folder):
        assert (folder / "config.json").is_file()      # the model was written before it
        raise self.error


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written(error, tmp_path):
    expert = expert_of(base_of("llama"))
    want, before = logits(expert), {n: t.clone() for n, t in base_tensors(expert).items()}
    with pytest.raises(type(error)): save_merged(expert, tmp_path / "x", Full(error))
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(t, base_tensors(expert)[n]) for n,
               t in before.items()) and off(logits(expert), want) == 0


def test_a_broken_expert_is_not_merged(tmp_path):
    expert = expert_of(base_of("llama"))
    list(svf_layers(expert).values())[-1].svf_d["default"].data[0] = torch.nan
    before = {n: t.clone() for n, t in base_tensors(expert).items()}
    with pytest.raises(ValueError, match="NaN"): save_merged(expert, tmp_path / "x")
    assert not list(tmp_path.iterdir()) and all(torch.equal(t, base_tensors(expert)[n]) for n,
                                                t in before.items())


def test_folders_in_use_are_left_alone(tmp_path):
    expert = expert_of(base_of("llama"), rank=2)
    (tmp_path / "mine").mkdir(); (tmp_path / "mine" / "note").write_text("mine")
    (tmp_path / "file").write_text("x"); (tmp_path / "empty").mkdir()
    for there in ("mine", "file"):
        with pytest.raises(ValueError, match="there already"):
            to_lora(expert).save(tmp_path / there)
        with pytest.raises(ValueError, match="there already"): save_merged(expert, tmp_path / there)
    assert os.listdir(tmp_path / "mine") == ["note"]
    to_lora(expert).save(tmp_path / "empty")
    assert (tmp_path / "empty" / "adapter_config.json").is_file()
    expert.merge_adapter()
    with pytest.raises(ValueError, match="merged already"): save_merged(expert, tmp_path / "y")


# --- TRL

def streamed(model):
    "What TRL's walk sends to vLLM, copied as it passes"
    generation = pytest.importorskip("trl.generation.vllm_generation")
    walker = object.__new__(generation.VLLMGeneration)
    walker.model, walker.accelerator = model, None
    walker._dist = generation.DistributedBackend(Plain())
    return {n: t.clone() for n, t in walker._iter_named_params()}


class Plain:
    "An accelerator without plugins"
    class state: deepspeed_plugin = fsdp_plugin = None


@pytest.mark.parametrize("kind", MAKERS)
def test_trls_walk_streams_the_base_with_w_prime_in_place_of_w(kind):
    expert = expert_of(base_of(kind))
    before = {n: t.clone() for n, t in base_tensors(expert).items()}
    sent, plain = streamed(expert), base_of(kind)
    # exactly the base's names
    assert set(sent) == {n for n, _ in plain.named_parameters()}
    plain.load_state_dict(sent, strict=False)
    # against the additive form
    assert off(logits(plain), logits(expert)) < 1e-5
    # the base is back, bit for bit
    assert all(torch.equal(t, before[n]) for n, t in base_tensors(expert).items())
    expert.merge_adapter()
    assert off(logits(plain), logits(expert)) == 0
    expert.unmerge_adapter()


def test_trls_walk_on_weights_of_a_natural_size():
    def base(): torch.manual_seed(5); return llama(initializer_range=.02).eval()
    expert, plain = expert_of(base()), base()
    plain.load_state_dict(streamed(expert), strict=False)
    assert float((logits(plain) - logits(expert)).abs().max()) < 2e-7


def test_the_trl_example_runs_and_leaves_an_expert(tmp_path):
    pytest.importorskip("trl")
    import importlib.util
    spec = importlib.util.spec_from_file_location("grpo_svf", ROOT / "examples" / "grpo_svf.py")
    example = importlib.util.module_from_spec(spec); spec.loader.exec_module(example)
    words = ("--model lab:A --task lab:math --steps 2 --lr 1e-2 --group 8 --batch 32 "
             f"--accumulate 1 --new 8 --limit 64 --out {tmp_path / 'x'}").split()
    trainer = example.train(example.options(words))
    assert len([m for m in trainer.state.log_history if "reward" in m]) == 2
    expert = PeftModel.from_pretrained(__import__("transformer2_nbdev.lab").lab.load("A")[0],
                                       tmp_path / "x")
    assert expert.peft_config["default"].peft_type == "SVF" and any(bool((z != 1).any())
                                                                    for z in zs(expert).values())


# --- the GPU stages, on tiny shapes

def gpu():
    import importlib.util
    spec = importlib.util.spec_from_file_location("gpu_stages", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    return module


def record(stages, words, out):
    "A stage's record, from the file"
    stages.main(stages.options([*words.split(), "--tiny", "--device", "cpu", "--out", str(out)]))
    return json.loads(out.read_text())


def test_the_stage_that_decomposes(tmp_path):
    r = record(gpu(), "decompose", tmp_path / "r.json")
    assert r["device"] and r["tiny"] and sum(s["times"] for s in r["shapes"].values()) == 14
    assert all(s["float64"] > 0 and s["float32_differs"] < 1e-2 for s in r["shapes"].values())


@pytest.mark.parametrize("checkpointing", ["", " --checkpointing"])
def test_the_stage_that_steps(tmp_path, checkpointing):
    r = record(gpu(), "step" + checkpointing, tmp_path / "r.json")
    assert set(r["rows"]) == {"additive", "fused", "lora", "official"} and all(x["seconds"] > 0
        for x in r["rows"].values())
    learned = {k: x["learned"] for k, x in r["rows"].items()}
    assert learned["additive"] == learned["fused"] == learned["official"] == 2 * 3 * 32
    assert learned["lora"] == 2 * 3 * 16 * 96
    assert all(r["rows"][k]["foretold"] > 0 for k in ("additive", "fused", "lora"))


def test_the_stage_that_steps_in_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    r = record(gpu(), "step --bits 4", tmp_path / "r.json")
    assert set(r["rows"]) == {"additive", "lora"} and all(x["seconds"] > 0
                                                          for x in r["rows"].values())


def test_the_stage_that_learns_goes_on_where_it_stopped(tmp_path):
    stages, words = gpu(), f"learn --model lab:A --work {tmp_path / 'work'}"
    first = record(stages, words + " --minutes 0", tmp_path / "a.json")
    assert first["left_to_do"] == 4 and not first["rows"]
    second = record(stages, words, tmp_path / "b.json")
    assert second["left_to_do"] == 0
    assert [x["method"] for x in second["rows"]] == ["base", "svf", "lora", "labels"]
    for row in second["rows"]:
        x, = row["asked"]
        assert x["n"] == 16 and x["low"] <= x["diff"] <= x["high"]
        assert x["correct"] - x["before"] == round(16 * x["diff"])
    assert (tmp_path / "work" / "experts" / "lab-math-svf-0" / "adapter_config.json").is_file()
    assert record(stages, words + " --minutes 0", tmp_path / "c.json")["rows"] == second["rows"]


def test_runs_beside_each_other_are_the_same_runs(tmp_path):
    "Two processes find what one finds"
    words = ["benchmarks/gpu.py", "learn", "--model", "lab:A", "--tiny", "--device", "cpu"]
    for jobs in ("1", "2"):
        where = tmp_path / jobs
        r = subprocess.run([sys.executable, *words, "--jobs", jobs, "--work", where, "--out",
                            where / "r.json"], cwd=ROOT, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr[-2000:]
    one, two = (json.loads((tmp_path / j / "r.json").read_text()) for j in "12")
    for r in (*one["rows"], *two["rows"]): r.get("curve", {}).pop("seconds", None)
    assert one["rows"] == two["rows"] and one["left_to_do"] == 0


def test_a_run_that_fails_is_said_and_left_to_do(capsys):
    from concurrent.futures import Future
    well, ill = Future(), Future()
    well.set_result(dict(task="t")), ill.set_exception(RuntimeError("CUDA out of memory"))
    assert gpu().finished(("t", "svf", 0), well) == dict(task="t") and capsys.readouterr().out == ""
    assert gpu().finished(("t", "lora", 1), ill) is None
    assert capsys.readouterr().out == "t lora 1 failed: RuntimeError: CUDA out of memory\n"


# --- the plan

def test_the_tally_counts_memory_once_and_as_long_as_it_is_held():
    from transformer2_nbdev.scale import Tally
    for device in ("cpu", "meta"):
        with Tally() as tally:
            a = torch.ones(1000, device=device)
            b = a.view(10, 100)                       # the same memory
            assert tally.now == 4000
            c = a * 2
            assert tally.now == 8000
            del c
            assert tally.now == 4000 and tally.peak == 8000
            del a
            assert tally.now == 4000                  # the view still holds it
            del b
            assert tally.now == 0


def deeper(kind, layers):
    "The config of a small model with more blocks"
    config = base_of(kind).config.to_dict() | {"n_layer" if kind == "gpt2"
                                               else "num_hidden_layers": layers}
    config.pop("layer_types", None)
    return AutoConfig.for_model(**config)


@pytest.mark.parametrize("method", ["additive", "fused", "lora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_small_rehearsals_foretell_large_ones(kind, method):
    from transformer2_nbdev.scale import Setup, foretell, rehearse
    config, s = deeper(kind, 5), Setup(method=method, prompt=8, new=8, dtype=torch.float32)
    told, seen = foretell(config, s)(6), rehearse(config, 6, s)
    assert abs(max(m.peak for m in told.values()) / max(m.peak for m in seen.values()) - 1) < .05
    for k in seen: assert abs(told[k].flops - seen[k].flops) <= .01 * seen[k].flops


def test_a_plan_adds_up_and_grows_with_the_card():
    from transformer2_nbdev.scale import Setup, plan
    plans = [plan("qwen3-4b", f"{gb}GB", Setup(target_modules="mlp")) for gb in (12, 16, 24, 80)]
    assert all(a.micro_batch <= b.micro_batch for a, b in zip(plans, plans[1:])) and plans[-1].fits
    assert all(p.peak <= p.memory for p in plans if p.fits)
    one = plan("qwen3-4b", "80GB", Setup(target_modules="mlp"), batch_size=1)
    assert abs(sum(one.parts.values()) / one.peak - 1) < 1e-3
    assert abs(one.parts["weights"] / (2 * 4_022_468_096) - 1) < .001
    assert one.parts["Q"] == pytest.approx(36 * 3 * (2560 ** 2 * 2 + 2560 * 4))
    with pytest.raises(ValueError, match="choose 16, 8 or 4"): plan("qwen3-4b", "16GB", bits=3)
    with pytest.raises(ValueError, match="use additive"):
        plan("qwen3-4b", "16GB", Setup(method="fused"), 4)


def test_four_bits_save_what_they_save():
    from transformer2_nbdev.scale import Setup, plan
    s = Setup(target_modules="mlp")
    wide, packed = plan("llama3-8b", "80GB", s, batch_size=1), plan("llama3-8b", "80GB", s, 4,
                                                                    batch_size=1)
    # weights of the linear layers, less the head
    inside = 6_979_321_856
    assert wide.parts["weights"] - packed.parts["weights"] == pytest.approx(inside * (2 - .5625))
    assert packed.peak < 15e9                           # an 8B expert inside a card of 16 GB


# --- from a terminal

def call(*args):
    from typer.testing import CliRunner
    from transformer2_nbdev.cli import app
    return CliRunner().invoke(app, [str(a) for a in args])


def parsed(line):
    "What the command line's own parser makes of a line that a plan printed"
    import shlex
    from typer.main import get_command
    from transformer2_nbdev.cli import app
    words = shlex.split(line)
    assert words[:2] == ["transformer2", "train"]
    return get_command(app).commands["train"].make_context("train", words[2:]).params


WAYS = [(m, b, c) for m in ("additive", "fused", "lora") for b in (16, 8, 4) for c in (False, True)
        if not (m == "fused" and b < 16)]


@pytest.mark.parametrize("method, bits, checkpointing", WAYS)
def test_the_command_of_every_plan_is_one_that_the_parser_reads(method, bits, checkpointing):
    from transformer2_nbdev.cli import DTYPES, PACKED
    from transformer2_nbdev.reinforce import ReinforceConfig, check_config
    from transformer2_nbdev.scale import Setup, command_of, plan
    s = Setup(method, prompt=8, new=12, target_modules="mlp", rank=4, kl=.2, dtype=torch.float32,
              checkpointing=checkpointing)
    p = plan("lab:A", "12GB", s, bits, batch_size=6)
    got = parsed(command_of(p, "lab:math"))
    want = dict(model="lab:A", task="lab:math", target_modules="mlp", rank=4, kl=.2, batch_size=6,
                micro_batch=p.micro_batch, rollout_batch=p.rollout_batch, max_new_tokens=12,
                checkpointing=checkpointing, method="lora" if method == "lora" else "svf")
    assert p.fits and {k: got[k] for k in want} == want
    assert got["dtype"] in DTYPES and (got["dtype"] in PACKED) == (bits < 16)
    if method != "lora": assert got["fused"] is (method == "fused")
    check_config(ReinforceConfig(**{k: got[k] for k in ReinforceConfig.__dataclass_fields__}))


def test_the_plan_command_compares_and_ends_with_the_fastest():
    r = call("plan", "--model", "qwen3-4b", "--gpu", "24GB", "--target-modules", "mlp",
             "--prompt-tokens", 64, "--new-tokens", 64)
    assert r.exit_code == 0, r.output
    for w in ("weights", "activations", "log-probabilities", "cache", "additive, 4 bit", "fused",
              "seconds a step", "4.02 billion parameters", "276,480 learned"):
        assert w in r.stdout, w
    got = parsed(r.stdout.strip().splitlines()[-1])
    assert got["model"] == "Qwen/Qwen3-4B" and got["task"] == "TASK" and got["fused"] is True


def trained(out, *more):
    "A few steps on a folder of the lab's base; the d of the expert"
    from safetensors.torch import load_file
    base = ROOT / "transformer2_nbdev" / "data" / "lab" / "A"
    words = ("--task lab:math --device cpu --steps 4 --batch-size 64 --val-every 0 --lr .02 "
             "--rank 8 --fused false --kl 0").split()
    r = call("train", "--model", base, *words, "--out", out, *more)
    assert r.exit_code == 0, r.output
    found = load_file(out / "adapter_model.safetensors")
    assert any(bool((d != 0).any()) for d in found.values())
    return found


def test_checkpointing_recomputes_blocks_and_changes_nothing_else(tmp_path, monkeypatch):
    import transformers.modeling_utils as modeling
    real, calls = modeling.checkpoint, []
    monkeypatch.setattr(modeling, "checkpoint", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    plain = trained(tmp_path / "a")
    assert not calls
    again = trained(tmp_path / "b", "--checkpointing")
    assert calls and all(torch.allclose(t, again[k], atol=1e-6) for k, t in plain.items())


def test_a_packed_base_is_trained_and_its_expert_leaves_as_a_lora(tmp_path):
    pytest.importorskip("bitsandbytes")
    trained(tmp_path / "x", "--dtype", "nf4")
    words = ["--expert", tmp_path / "x", "--dtype", "nf4", "--device", "cpu", "--out"]
    r = call("export", *words, tmp_path / "lora", "--to", "lora")
    assert r.exit_code == 0 and "rank 8" in r.stdout and "exact" in r.stdout, r.output
    r = call("export", *words, tmp_path / "merged", "--to", "merged")
    assert r.exit_code == 2 and "quantised" in r.stderr and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("args, says", [(["--model", "./nowhere"], "no config.json"),
                                        (["--model", "lab:A", "--gpu", "huge"], "give a size"),
                                        (["--model", "lab:A", "--bits", 5],
                                         "choose 16, 8 or 4"), (["--model", "lab:A", "--method",
                                                                 "ia3"], "choose additive"),
                                        (["--model", "lab:A", "--method", "fused", "--bits", 4],
                                         "use additive")])
def test_what_cannot_be_planned_is_said_in_one_line(args, says):
    r = call("plan", *args)
    assert r.exit_code == 2 and says in r.stderr and len(r.stderr.strip().splitlines()) == 1


def test_a_plan_that_fits_nowhere_says_what_to_try():
    r = call("plan", "--model", "llama3-70b", "--gpu", "16GB", "--method", "additive")
    assert r.exit_code == 0 and "nothing fits" in r.stdout


def test_the_export_command_writes_both_forms(tmp_path):
    import transformer2_nbdev.lab as lab
    math = lab.experts("A")["math"]
    r = call("export", "--expert", math, "--model", "lab:A", "--to", "lora", "--rank", 8, "--out",
             tmp_path / "lora")
    assert r.exit_code == 0 and "rank 8" in r.stdout and "left out" in r.stdout
    assert json.loads((tmp_path / "lora"
                       / "adapter_config.json").read_text())["base_model_name_or_path"] == "lab:A"
    r = call("export", "--expert", math, "--model", "lab:A", "--to", "merged", "--out", tmp_path
             / "merged")
    assert r.exit_code == 0, r.output
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        want = PeftModel.from_pretrained(lab.load("A")[0], math).eval()(ids).logits
        assert off(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits,
                   want) < 1e-5
    again = call("export", "--expert", math, "--model", "lab:A", "--to", "lora", "--out", tmp_path
                 / "lora")
    assert again.exit_code == 2 and "there already" in again.stderr


def wrong_exports(folder):
    "Name -> (arguments, what the one line says)"
    import transformer2_nbdev.lab as lab
    math = str(lab.experts("A")["math"])
    plain = get_peft_model(lab.load("A")[0], LoraConfig(target_modules=["q_proj"]))
    plain.save_pretrained(folder / "lora")
    fresh = get_peft_model(lab.load("A")[0], SvfConfig(target_modules="mlp"))
    fresh.save_pretrained(folder / "fresh")
    nameless = folder / "nameless"
    nameless.mkdir()
    config = json.loads((Path(math)
                         / "adapter_config.json").read_text()) | dict(base_model_name_or_path=None)
    (nameless / "adapter_config.json").write_text(json.dumps(config))
    return dict(form=([math, "--to", "gguf"], "choose lora or merged"),
                nowhere=([folder / "nothing", "--to", "lora"], "nothing"),
                empty=([folder, "--to", "lora"], "no base model"),
                nameless=([nameless, "--to", "lora"], "no base model"),
                zero=([math, "--to", "lora", "--rank", 0], "give a positive number"),
                other=([folder / "lora", "--to", "lora"], "not SVF"),
                unmoved=([folder / "fresh", "--to", "lora"], "changes nothing"),
                base=([math, "--to", "lora", "--model", "lab:Z"], "Z"),
                prompts=([math, "--to", "lora", "--prompts", folder / "none.txt"], "none.txt"))


def test_every_fault_of_an_export_is_one_line_and_leaves_nothing(tmp_path):
    faults = wrong_exports(tmp_path)
    before = sorted(p for p in tmp_path.rglob("*"))
    for name, ((expert, *rest), says) in faults.items():
        model = [] if "--model" in rest or name in ("empty", "nameless") else ["--model", "lab:A"]
        r = call("export", "--expert", expert, *rest, *model, "--out", tmp_path / "out")
        assert r.exit_code == 2 and says in r.stderr, (name, r.output)
        assert len(r.stderr.strip().splitlines()) == 1, (name, r.stderr)
        assert sorted(p for p in tmp_path.rglob("*")) == before, name


def test_a_lora_above_what_servers_take_is_refused(monkeypatch, tmp_path):
    import transformer2_nbdev.scale as scale
    monkeypatch.setattr(scale, "MAX_RANK", 4)
    with pytest.raises(ValueError, match="give --rank, or --to merged"):
        scale.export_expert(expert_of(base_of("llama")), None, "lora", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert "exact" in scale.export_expert(expert_of(base_of("llama"), rank=3), None, "lora",
                                          tmp_path / "x")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(),
                    reason="needs Linux's /proc to reset a peak")
def test_a_measured_peak_is_within_fifteen_percent():
    import subprocess, sys
    r = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "plan.py"), "--quick"],
                       capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert r.returncode == 0, r.stderr[-1500:]
    ratios = [float(x) for x in re.findall(r"ratio ([\d.]+)", r.stdout)]
    assert len(ratios) == 4 and all(abs(x - 1) < .15 for x in ratios), r.stdout
