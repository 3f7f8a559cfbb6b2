"""Models that are quantised, offloaded, or held by several processes learn the same z as one plain process.

Run as a program this file trains in turn what it is told to; the tests start it by `accelerate launch`.
"""
import argparse, importlib.util, json, os, subprocess, sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import reinforce_toy as toy
from transformer2_nbdev.adapter import SvfConfig, base_tags, svf_layers, weight_of, zs
from transformer2_nbdev.fused import can_fuse
from transformer2_nbdev.reinforce import ReinforceConfig, sft, train_expert

BITS = {"4-bit": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        "8-bit": dict(load_in_8bit=True)}
SPLIT = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu",
         "model.norm": "cpu", "lm_head": "cpu"}
SETTINGS = dict(steps=3, batch_size=32, rollout_batch=16, lr=3e-2, val_every=2, val_samples=1)
# three chunks of 16, 16 and 8 for two processes, in micro-batches of 6: the first has 5 passes to make, the second 3. Gradients are then added up
# in another order, and where one is nearly 0 Adam makes a step of its rounding error: shorter steps, so that 1e-5 is a fair demand
UNEVEN = SETTINGS | dict(batch_size=40, micro_batch=6, lr=3e-3)
needs_bits = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install bitsandbytes")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    toy.base().save_pretrained(path := tmp_path_factory.mktemp("base"))
    return path


def load(folder, kind):
    "The toy base as one loads it"
    kw = dict(dtype=torch.float32)
    if kind in BITS: kw |= dict(quantization_config=BitsAndBytesConfig(**BITS[kind]), device_map="cpu")
    if kind == "offloaded": kw |= dict(device_map=SPLIT, offload_folder=str(Path(folder) / "away"))
    return LlamaForCausalLM.from_pretrained(folder, **kw).eval()


def wrapped(folder, kind):
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear")
    model = get_peft_model(load(folder, kind), lora if kind == "lora" else SvfConfig(target_modules="all-linear"))
    return nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model


def train(model, kind, out, **kw):
    if isinstance(model, (str, Path)): model = wrapped(model, kind)
    learn = sft if kind.startswith("sft") else train_expert
    config = ReinforceConfig(**(UNEVEN if kind.endswith("uneven") else SETTINGS) | kw)
    return learn(model, toy.tokenizer(), toy.DOG, config, out, progress=False)


def launch(folder, out, *kinds, options=()):
    "Two processes that meet through gloo; (exit status, what they said)"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", "--main_process_port", "0", *options, __file__, str(folder), str(out), *kinds]
    env = os.environ | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    r = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    return r.returncode, r.stdout + r.stderr


def last(out): return load_file(Path(out) / "last" / "adapter_model.safetensors")


def same(a, b, to=1e-5):
    assert a.keys() == b.keys() and any(v.abs().max() > 1e-3 for v in a.values()), "something was learned"
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=to, atol=to)


def compare(folder, out, kinds, **kw):
    for kind in kinds:
        one = out / "one" / kind
        h = train(folder, "plain" if kind == "ddp" else kind, one, **kw)
        same(last(out / kind), last(one))
        theirs = json.loads((out / kind / "result.json").read_text())
        assert theirs["run"]["processes"] == 2 and h.result["run"]["processes"] == 1
        rewards = [json.loads(l).get("reward") for l in open(out / kind / "metrics.jsonl")]
        assert rewards == [m.get("reward") for m in h.metrics]


# One process -----------------------------------------------------------------------------------------------------------------------------------------------

@needs_bits
def test_4_bit_learns_what_the_dequantised_base_learns(folder, tmp_path):
    train(folder, "4-bit", tmp_path / "4-bit")
    small, base = wrapped(folder, "4-bit"), load(folder, "plain")
    for n, l in svf_layers(small).items(): base.get_submodule(n).weight.data = weight_of(l).detach().clone()
    torch.manual_seed(1)
    dense = get_peft_model(base, SvfConfig(target_modules="all-linear"))
    train_expert(dense, toy.tokenizer(), toy.DOG, ReinforceConfig(**SETTINGS), tmp_path / "dense", progress=False)
    same(last(tmp_path / "4-bit"), last(tmp_path / "dense"), to=1e-4)
    assert not can_fuse(small)


@needs_bits
def test_8_bit_learns_and_its_log_probabilities_are_as_exact_as_its_activations(folder, tmp_path):
    h = train(folder, "8-bit", tmp_path / "8-bit")
    assert all(torch.isfinite(v).all() for v in last(tmp_path / "8-bit").values())
    assert 1e-4 < max(h.column("gap")[1]) < .2      # it rounds activations, row by row: sampling and training do not agree to the bit
    assert not can_fuse(wrapped(folder, "8-bit"))


def test_offloaded_to_disk_learns_what_the_plain_base_learns(folder, tmp_path):
    model = wrapped(folder, "offloaded")
    assert any(l.get_base_layer().weight.is_meta for l in svf_layers(model).values()), "a part of it is on the disk"
    assert not any(l.svf_d["default"].is_meta or l.svf_Q.is_meta for l in svf_layers(model).values())
    train_expert(model, toy.tokenizer(), toy.DOG, ReinforceConfig(**SETTINGS), tmp_path / "away", progress=False)
    train(folder, "plain", tmp_path / "plain", fused=False)         # what is offloaded cannot be written to: "auto" has chosen the additive form
    same(last(tmp_path / "away"), last(tmp_path / "plain"))
    plain = wrapped(folder, "plain")
    assert base_tags(model, "default") == base_tags(plain, "default"), "the record of the base is that of the real weights"
    hooks = [l.get_base_layer()._hf_hook for n, l in svf_layers(model).items() if ".0." in n]
    assert hooks and all(hasattr(h.weights_map, "dataset") for h in hooks), "and what was fetched is on the disk alone again"


def test_an_expert_is_loaded_onto_an_offloaded_base(folder, tmp_path):
    train(folder, "plain", tmp_path / "plain")
    expert, ids = tmp_path / "plain" / "last", torch.tensor([[1, 5, 6, 7]])
    here = PeftModel.from_pretrained(load(folder, "plain"), expert)
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj is offloaded and cannot be read here.*get_peft_model"):
        PeftModel.from_pretrained(load(folder, "offloaded"), expert, offload_folder=str(tmp_path / "x"))
    away = get_peft_model(load(folder, "offloaded"), SvfConfig.from_pretrained(expert))   # the remedy that it names
    away.load_adapter(expert, "expert")
    away.set_adapter("expert")
    for n, z in zs(here).items(): assert torch.equal(z, zs(away, "expert")[n])
    with torch.no_grad(): torch.testing.assert_close(away(ids).logits, here(ids).logits)


# Two processes ---------------------------------------------------------------------------------------------------------------------------------------------

def test_two_processes_by_accelerate_launch(folder, tmp_path):
    kinds = ["plain", "ddp", "offloaded", *(BITS if importlib.util.find_spec("bitsandbytes") else [])]
    rc, said = launch(folder, tmp_path, *kinds, options=["--multi_gpu"])
    assert rc == 0, said[-3000:]
    compare(folder, tmp_path, kinds)


FSDP = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_cpu_ram_efficient_loading", "false"]

def test_two_processes_that_share_the_weights(folder, tmp_path):
    kinds = ["plain", "lora", "sft", "uneven", "sft uneven"]
    rc, said = launch(folder, tmp_path, *kinds, options=FSDP)
    assert rc == 0, said[-3000:]
    assert said.count("weights are spread") == 2 * len(kinds), "every block's weights are divided, what is trained is not"
    compare(folder, tmp_path, kinds, fused=False)   # nobody holds a whole weight to write W' into: "auto" has chosen the additive form
    back = PeftModel.from_pretrained(load(folder, "plain"), tmp_path / "plain" / "last")
    assert back.peft_config["default"].base_digests == base_tags(back, "default"), "the record is of the whole weights"


@needs_bits
def test_what_cannot_be_shared_is_said_in_one_line(folder, tmp_path):
    rc, said = launch(folder, tmp_path, "4-bit", options=FSDP)
    assert rc and said.count("ValueError: weights that are quantised or placed by device_map are not spread over processes") == 2


def test_bases_that_differ_are_refused(folder, tmp_path):
    rc, said = launch(folder, tmp_path, "differs", options=["--multi_gpu"])
    assert rc and said.count("ValueError: the processes hold different base weights: load the checkpoint in all of them") == 2


def divided(model):
    "How the weights lie under FSDP"
    kinds = {n.split(".")[-1] in ("default", "weight") and ("svf_" in n or "lora_" in n, hasattr(p, "full_tensor")) for n, p in model.named_parameters()
             if "layers" in n and "norm" not in n}
    return kinds == {(True, False), (False, True)}


def program():
    p = argparse.ArgumentParser()
    p.add_argument("folder"); p.add_argument("out"); p.add_argument("kinds", nargs="+")
    a = p.parse_args()
    torch.set_num_threads(1)
    from transformer2_nbdev.reinforce import join_world
    join_world()
    for kind in a.kinds:
        if kind == "differs":
            model = wrapped(a.folder, "plain")
            if torch.distributed.get_rank(): next(model.parameters()).data += 1
            train_expert(model, toy.tokenizer(), toy.DOG, ReinforceConfig(**SETTINGS), progress=False)
        model = wrapped(a.folder, kind)
        train(model, kind, Path(a.out) / kind)
        if divided(model): print("weights are spread", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__": program()


@needs_bits
@pytest.mark.parametrize("packed_before", [False, True])
def test_a_4_bit_weight_keeps_the_form_that_a_gradient_can_read(packed_before):
    "bitsandbytes repacks weights on CPUs with AVX512-BF16 at the first inference pass; not under an adapter"
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 128, bias=False))
    q = bnb.nn.Linear4bit(128, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    q.weight = bnb.nn.Params4bit(net[0].weight.data.clone(), requires_grad=False, quant_type="nf4")
    net[0] = q.to("cpu")
    W = dequantize_4bit(q.weight.data, q.weight.quant_state).clone()
    x = torch.randn(4, 128)
    if packed_before:
        net.eval()(x)
        if not getattr(q.weight.quant_state, "packing_format_for_cpu", False):
            pytest.skip("this CPU has no AVX512-BF16, so that bitsandbytes packs nothing")
    m = get_peft_model(net, SvfConfig(target_modules=["0"], init_weights=False)).eval()
    for _ in range(2): y = m(x)
    layer, = svf_layers(m).values()
    now = weight_of(layer)                   # packing has rounded the scales to bfloat16 for good
    assert torch.allclose(now, W, atol=4e-4 if packed_before else 1e-6)
    with m.disable_adapter(): assert torch.allclose(m(x), x @ now.T, atol=1e-4)
    y.square().sum().backward()
    assert layer.svf_d["default"].grad.abs().max() > 0
