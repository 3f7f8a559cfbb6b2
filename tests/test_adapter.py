"""What a reader of room 02 need not see: precisions, compilers, other people's trainers, two processes, hostile files."""
import copy, os, pickle, warnings
from pathlib import Path

import pytest, torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from transformer2_nbdev.adapter import SvfConfig, fused, linear_names, mixture, svf_layers, zs


def llama(seed=0, **kw):
    torch.manual_seed(seed)
    cfg = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
               max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return LlamaForCausalLM(LlamaConfig(**cfg | kw)).eval()


def turned(model, by=0.2, seed=0, name="default"):
    g = torch.Generator().manual_seed(seed)
    for l in svf_layers(model).values(): l.svf_z[name].data += by * torch.randn(l.svf_z[name].shape, generator=g)
    return model


IDS = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))
COS = lambda a, b: torch.nn.functional.cosine_similarity(a.float().flatten(), b.float().flatten(), 0).item()


def grads(model, context=None):
    model.zero_grad()
    if context is None: model(IDS, labels=IDS).loss.backward()
    else:
        with context: model(IDS, labels=IDS).loss.backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    full = turned(get_peft_model(llama(), SvfConfig()))
    low = turned(get_peft_model(llama().to(dtype), SvfConfig()))
    base = llama().to(dtype)
    assert all(p.dtype == torch.float32 for p in low.parameters() if p.requires_grad)
    with low.disable_adapter(): assert torch.equal(low(IDS).logits, base(IDS).logits)
    assert COS(low(IDS).logits, full(IDS).logits) > 0.999
    assert COS(grads(low), grads(full)) > 0.99
    assert COS(grads(low, fused(low)), grads(full)) > 0.99
    with fused(low): pass
    assert all(torch.equal(l.get_base_layer().weight, base.get_submodule(n).weight) for n, l in svf_layers(low).items())


def test_autocast():
    m = turned(get_peft_model(llama(), SvfConfig()))
    exact = grads(m)
    auto = lambda: torch.autocast("cpu", torch.bfloat16)
    with auto(): assert COS(m(IDS).logits, m(IDS).logits) > 0.999
    assert COS(grads(m, auto()), exact) > 0.99
    m.zero_grad()
    with fused(m):
        with auto(): loss = m(IDS, labels=IDS).loss
        loss.backward()  # outside autocast, as in every training loop
    assert COS(torch.cat([p.grad.flatten() for p in m.parameters() if p.requires_grad]), exact) > 0.99


def test_compile():
    m = turned(get_peft_model(llama(), SvfConfig()))
    y = m(IDS).logits
    torch.testing.assert_close(torch.compile(m, backend="aot_eager")(IDS).logits, y, rtol=1e-4, atol=1e-5)


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
    biased = turned(get_peft_model(llama(attention_bias=True), SvfConfig(bias="svf_only")))
    torch.testing.assert_close(grads(biased, fused(biased)), grads(biased), rtol=1e-4, atol=1e-6)


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
        if "b" in l.svf_z: l.svf_z["b"].data += 0.3
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
    layer.svf_z["default"].data += 0.3 * torch.randn(64)
    y1 = m(x)
    from transformer2_nbdev.svf import compose
    from transformer2_nbdev.adapter import weight_of
    W = compose(weight_of(layer).float(), layer.svf_z["default"].detach(), layer.svf_Q.float())
    torch.testing.assert_close(y1, x @ W.T + q.bias, rtol=2e-2, atol=2e-2)
    y1.sum().backward(); assert layer.svf_z["default"].grad.abs().sum() > 0
    m.merge_adapter(); assert COS(m(x), y1) > 0.98; m.unmerge_adapter()
    with m.disable_adapter(): assert torch.equal(m(x), y0)
    torch.testing.assert_close(m(x), y1)


def test_generate_with_per_sample_mixture_matches_single_runs():
    m = turned(get_peft_model(llama(), SvfConfig()))
    m.add_adapter("b", SvfConfig(init_weights=False)); m.eval()
    kw = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    with mixture(m, [[1, 0], [0, 1], [0.5, 0.5]]): mixed = m.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **kw)
    for i, w in enumerate([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]):
        with mixture(m, w): alone = m.generate(input_ids=IDS[i:i + 1], attention_mask=torch.ones_like(IDS[:1]), **kw)
        assert torch.equal(mixed[i], alone[0])


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


def _worker(rank, folder, world):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29577", RANK=str(rank), WORLD_SIZE=str(world))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    m = turned(get_peft_model(llama(), SvfConfig()))
    part = IDS[:2].chunk(world)[rank]
    with fused(m): m(part, labels=part).loss.backward()
    torch.save({n: p.grad for n, p in m.named_parameters() if p.requires_grad}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_fused_in_two_processes(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path), 2), nprocs=2)
    a, b = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    m = turned(get_peft_model(llama(), SvfConfig()))
    m(IDS[:2], labels=IDS[:2]).loss.backward()  # the same two rows in one process: the mean of two halves of equal length
    for n, p in m.named_parameters():
        if p.requires_grad:
            assert torch.equal(a[n], b[n])
            assert (a[n] - p.grad).norm() / p.grad.norm() < 1e-5
