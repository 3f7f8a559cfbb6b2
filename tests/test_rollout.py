"Rollouts against hostile tokenizers, models and callers, and against the real checkpoint stories260k."
import json, math, os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)

from transformer2_nbdev.adapter import SvfConfig
from transformer2_nbdev.fused import fused
from transformer2_nbdev.mixture import mixture
from transformer2_nbdev.rollout import (Recorder, encode, entropy, eos_ids, generate, inner, pad_id, rollout, sample_batch, sampling_config, token_logprobs,
                                        undisturbed, vocab_logprobs)
from transformer2_nbdev.tasks import Task, Verdict

STORIES = Path(os.environ.get("TRANSFORMER2_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "stories260k"
PROMPTS = ["w3 w4 w5 w6 w7 w8", "w3", "w9 w9", "w4 w5 w6 w7 w8 w9 w10 w11 w12 w13"] * 3


def words(pad=None, template=None):
    vocab = {t: i for i, t in enumerate(["<s>", "</s>", "<unk>", "<pad>", *(f"w{i}" for i in range(40))])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    if template: raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=pad)


def llama(scale=4, **kwargs):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=44, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                         bos_token_id=0, eos_token_id=1, pad_token_id=None, **kwargs)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(scale if p.dim() > 1 else 1)
    return model


def gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=44, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(4 if p.dim() > 1 else 1)
    return model


def gap(model, g, **kwargs):
    with torch.no_grad(): return (token_logprobs(model, g.ids, g.mask, g.prompt_len, g.temperature, **kwargs) - g.logprobs).abs().max().item()


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("temperature", [0., .6, 1., 2.])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_recorded_equals_recomputed(make, temperature, batch_size):
    model, tok = make(), words()
    g = generate(model, tok, PROMPTS, 20, temperature, batch_size=batch_size, seed=3, eos=[1, 7, 8, 9, 10, 11])
    if temperature: assert len(set(g.lengths.tolist())) > 2 and 0 < g.finished.float().mean()
    assert gap(model, g) < 1e-4 and gap(model, g, batch_size=4) < 1e-4


@pytest.mark.skipif(not (STORIES / "model.safetensors").exists(), reason=f"the checkpoint stories260k is not at {STORIES}")
@pytest.mark.parametrize("temperature", [0., .7, 1.])
def test_recorded_equals_recomputed_on_a_real_checkpoint(temperature):
    model, tok = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32), AutoTokenizer.from_pretrained(STORIES)
    stop = eos_ids(model, tok) + tok("x.", add_special_tokens=False)["input_ids"][-1:]
    prompts = ["Once upon a time", "The dog", "Lily and Tom went to the park and they saw a big red", "One day"] * 6
    g = generate(model, tok, prompts, 60, temperature, batch_size=10, seed=0, eos=stop)
    assert eos_ids(model, tok) == [1, 2] and len(set(g.lengths.tolist())) >= 3 and g.finished.any()
    assert gap(model, g) < 1e-4 and gap(model, g, batch_size=7) < 1e-4


def test_truncation_changes_the_draw_but_not_the_record():
    model, tok = llama(), words()
    g = generate(model, tok, PROMPTS * 4, 20, 1.3, top_p=.6, top_k=7, seed=0)
    logp = vocab_logprobs(model, g.ids, g.mask, g.prompt_len, 1.3)
    rank = (logp > logp.gather(-1, g.ids[:, g.prompt_len:, None])).sum(-1)[g.completion_mask == 1]
    assert rank.max() < 7 and gap(model, g) < 1e-4
    free = generate(model, tok, PROMPTS * 4, 20, 1.3, seed=0)
    logp = vocab_logprobs(model, free.ids, free.mask, free.prompt_len, 1.3)
    assert (logp > logp.gather(-1, free.ids[:, free.prompt_len:, None])).sum(-1).max() >= 7


def test_frequencies_follow_the_policy():
    "4,000 draws of one token against softmax(logits / temperature); chi-squared below its 99.9% point."
    model, tok = llama(scale=3), words()
    g = generate(model, tok, ["w3 w4"] * 4000, 1, 1.5, batch_size=4000, seed=0)
    p = vocab_logprobs(model, g.ids[:1], g.mask[:1], g.prompt_len, 1.5)[0, 0].exp().double()
    counts = torch.bincount(g.ids[:, -1], minlength=44).double()
    common = p * 4000 > 5
    observed, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, p * 4000))
    assert common.sum() > 10 and (counts > 0).sum() > 30
    assert ((observed - expected) ** 2 / expected.clamp(min=1)).sum() < len(expected) + 4 * math.sqrt(2 * len(expected))


def test_defaults_of_library_and_checkpoint_do_not_leak():
    model, tok = llama(scale=1), words()
    plain = generate(model, tok, PROMPTS * 10, 10, seed=0)
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, top_p=.1, min_p=.9, repetition_penalty=9., temperature=.01, suppress_tokens=list(range(20)),
                                               no_repeat_ngram_size=1, min_new_tokens=9, max_length=3, num_beams=1, eos_token_id=1)
    loud = generate(model, tok, PROMPTS * 10, 10, seed=0)
    assert torch.equal(plain.ids, loud.ids) and model.generation_config.top_k == 1
    assert torch.equal(generate(model, tok, PROMPTS, 5, 0.).ids, generate(llama(scale=1), tok, PROMPTS, 5, 0.).ids)


def test_the_whole_vocabulary_is_sampled():
    "transformers would keep the 50 likeliest tokens unless told otherwise; here 200 are nearly equally likely."
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=200, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, bos_token_id=0, eos_token_id=1)).eval()
    drawn = generate(model, words(), ["w3"] * 3000, 1, batch_size=3000, seed=0).ids[:, -1].unique()
    assert len(drawn) > 190
    assert len(generate(model, words(), ["w3"] * 3000, 1, top_k=50, batch_size=3000, seed=0).ids[:, -1].unique()) == 50


def test_everything_is_put_back_after_an_exception_and_an_interrupt():
    model, tok = get_peft_model(llama(attention_dropout=.5), LoraConfig(target_modules=["q_proj"], lora_dropout=.5)), words()
    model.train(); inner(model).lm_head.eval()
    modes, own, state = [m.training for m in model.modules()], inner(model).generation_config, torch.random.get_rng_state()
    for error in (RuntimeError, KeyboardInterrupt):
        def fail(*args, **kwargs): raise error
        handle = inner(model).lm_head.register_forward_hook(fail)
        with pytest.raises(error): generate(model, tok, PROMPTS, 5, seed=0)
        handle.remove()
        assert [m.training for m in model.modules()] == modes and inner(model).generation_config is own
        assert torch.equal(torch.random.get_rng_state(), state) and torch.is_grad_enabled()


def test_without_a_seed_the_global_generator_goes_on():
    model, tok = llama(), words()
    torch.manual_seed(4); a, b = (generate(model, tok, PROMPTS, 8).texts for _ in range(2))
    torch.manual_seed(4); c = generate(model, tok, PROMPTS, 8).texts
    assert a == c != b


def test_results_do_not_depend_on_batching_when_greedy():
    for model in (llama(), gpt2()):
        runs = [generate(model, words(), PROMPTS, 12, 0., batch_size=b, sort=s) for b, s in ((64, True), (5, True), (5, False), (1, False))]
        for r in runs[1:]:
            assert r.texts == runs[0].texts and r.prompts == PROMPTS
            assert torch.equal(r.ids, runs[0].ids) and torch.equal(r.mask, runs[0].mask) and torch.equal(r.finished, runs[0].finished)
            assert torch.allclose(r.logprobs, runs[0].logprobs, atol=1e-4)


@pytest.mark.parametrize("pad", [None, "</s>", "<unk>", "<pad>"])
def test_padding_token_is_of_no_consequence(pad):
    model = llama()
    g = generate(model, words(pad), PROMPTS, 15, seed=1)
    assert pad_id(model, words(pad)) == {None: 1, "</s>": 1, "<unk>": 2, "<pad>": 3}[pad]
    ref = generate(model, words("<pad>"), PROMPTS, 15, seed=1)
    assert torch.equal(g.completion_mask, ref.completion_mask) and torch.allclose(g.logprobs, ref.logprobs, atol=1e-5)
    assert torch.equal(g.ids[g.mask == 1], ref.ids[ref.mask == 1]) and (g.ids[g.mask == 0] == pad_id(model, words(pad))).all()


def test_a_pad_token_without_an_embedding_is_not_used():
    tok = words(); tok.add_special_tokens(dict(pad_token="<new>"))
    assert tok.pad_token_id == 44 and pad_id(llama(), tok) == 1
    assert len(generate(llama(), tok, PROMPTS, 3, seed=0)) == 12


def test_eos_of_all_sources_and_of_none():
    model, tok = llama(), words()
    model.generation_config.eos_token_id = [5, 6]
    assert eos_ids(model, tok) == [1, 5, 6]
    model.generation_config.eos_token_id, tok.eos_token = None, None
    assert eos_ids(model, tok) == []
    g = generate(model, tok, PROMPTS, 7, seed=0)
    assert g.completion_mask.all() and not g.finished.any() and gap(model, g) < 1e-4


def test_only_sampled_places_count():
    g = generate(llama(), words(), PROMPTS * 5, 25, seed=2, eos=[1, 7, 8, 9])
    P = g.prompt_len
    for ids, kept, done in zip(g.ids[:, P:].tolist(), g.completion_mask.tolist(), g.finished.tolist()):
        n = sum(kept)
        assert kept == [1] * n + [0] * (len(kept) - n) and not set(ids[:n - 1]) & {1, 7, 8, 9} and (ids[n - 1] in {1, 7, 8, 9}) == done
        assert done or n == 25
    assert (g.logprobs[g.completion_mask == 0] == 0).all() and g.ids.shape[1] - P == g.lengths.max()


def test_tokenizers_that_append_an_eos_and_prepend_a_bos():
    tok = words(template="<s> $A </s>")
    assert encode(tok, ["w3 w4"], [1]) == [[0, 7, 8]] and encode(tok, ["w3"], []) == [[0, 7, 1]]
    assert encode(words(), ["w3 </s>"], [1]) == [[7, 1]]                     # written by the caller: stays


@pytest.mark.parametrize("kwargs,says", [
    (dict(prompts=[]), "no prompts"), (dict(prompts=["w3", ""]), "prompt 1 is empty"), (dict(prompts=[[]]), "prompt 0 is empty"), (dict(prompts="w3"), r"write \[prompt\]"),
    (dict(prompts=["w3 " * 60]), "context holds 64"), (dict(max_new_tokens=0), "max_new_tokens must be at least 1"), (dict(batch_size=0), "batch_size"),
    (dict(temperature=-.1), "temperature"), (dict(top_p=1.1), "top_p"), (dict(top_k=-1), "top_k")])
def test_bad_input_is_refused_in_one_line(kwargs, says):
    model = llama(max_position_embeddings=64)
    with pytest.raises(ValueError, match=says) as e: generate(model, words(), **dict(prompts=PROMPTS, max_new_tokens=8) | kwargs)
    assert "\n" not in str(e.value)


def test_no_step_keeps_more_than_one_row_of_logits():
    r = Recorder(1.)
    for t in range(1, 30): r(torch.zeros(8, t).long(), torch.randn(8, 1000))
    assert r.last.shape == (8, 1000) and all(x.shape == (8,) for x in r.logps) and len(r.logps) == 28


def test_logits_are_computed_for_the_completion_only():
    model, tok, seen = llama(), words(), []
    g = generate(model, tok, PROMPTS, 6, seed=0)
    handle = model.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    token_logprobs(model, g.ids, g.mask, g.prompt_len); handle.remove()
    assert seen == [g.logprobs.shape[1] + 1] and seen[0] < g.ids.shape[1]


def test_peft_models_base_and_adapter_and_dropout():
    model, tok = get_peft_model(llama(attention_dropout=.3), SvfConfig(target_modules="all-linear")), words()
    base = generate(model, tok, PROMPTS, 12, seed=0)
    assert torch.equal(base.ids, generate(llama(), tok, PROMPTS, 12, seed=0).ids)          # z = 1 is the base
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "svf_d" in n: p.normal_(0, .3)
    model.train()
    g = generate(model, tok, PROMPTS, 12, seed=0)
    model.eval()
    assert not torch.equal(g.ids, base.ids) and gap(model, g) < 1e-4
    with fused(model), torch.no_grad(): assert gap(model, g) < 1e-4
    with model.disable_adapter(): assert gap(model, base) < 1e-4 and gap(model, g) > 1e-3
    token_logprobs(model, g.ids, g.mask, g.prompt_len, batch_size=5).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(); token_logprobs(model, g.ids, g.mask, g.prompt_len).sum().backward()
    assert grads and all(torch.allclose(p.grad, grads[n], rtol=1e-3, atol=1e-3) for n, p in model.named_parameters() if p.grad is not None)


def test_a_mixture_for_each_prompt():
    model, tok = get_peft_model(llama(), SvfConfig(target_modules="all-linear"), adapter_name="a"), words()
    model.add_adapter("b", SvfConfig(target_modules="all-linear"))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "svf_d" in n: p.normal_(0, .4)
    rows = [[1., 0.] if i % 2 else [0., 1.] for i in range(len(PROMPTS))]
    with mixture(model, rows, ["a", "b"]):
        g = generate(model, tok, PROMPTS, 10, 0.)
        assert gap(model, g) < 1e-4
    for k, name in enumerate("ab"):
        model.set_adapter(name)
        alone = generate(model, tok, PROMPTS, 10, 0.)
        assert all(t == u for t, u, r in zip(g.texts, alone.texts, rows) if r[k])


def test_bfloat16_runs_and_records_float32():
    model = llama().bfloat16()
    g = generate(model, words(), PROMPTS, 10, seed=0)
    assert g.logprobs.dtype == torch.float32 and gap(model, g) < .3


def test_entropy_and_vocabulary_agree():
    model, tok = llama(), words()
    g = generate(model, tok, PROMPTS, 9, seed=0)
    with torch.no_grad():
        logps, h = token_logprobs(model, g.ids, g.mask, g.prompt_len, 1.4, batch_size=5, with_entropy=True)
        full = vocab_logprobs(model, g.ids, g.mask, g.prompt_len, 1.4)
    on = g.completion_mask == 1
    assert torch.allclose(torch.distributions.Categorical(logits=full).entropy()[on], h[on], atol=1e-4) and (h[~on] == 0).all()
    assert torch.allclose(full.exp().sum(-1), torch.ones(()), atol=1e-5)
    assert torch.allclose(entropy(torch.zeros(4, 44).log_softmax(-1)), torch.tensor(math.log(44)))
    assert entropy(torch.tensor([0., -math.inf])) == 0


def task(**kwargs):
    given = dict(verify=lambda c, e: Verdict(1. if "w9" in c else -1., "w9" in c, c.split()[:1], e["q"], "looked")) | kwargs
    return Task("t", lambda split: [dict(q="w3 w4"), dict(q="w5")], lambda e: e["q"], max_new_tokens=9, **given)


def test_rollout_groups_samples_and_writes_items():
    r = rollout(llama(), words(), task(), task().examples("train"), samples=6, seed=0)
    assert len(r) == 12 and r.rewards.shape == (12,) and r.samples == 6 and r.prompts == ["w3 w4"] * 6 + ["w5"] * 6
    assert all(v.reward == x == (1 if "w9" in t else -1) for v, x, t in zip(r.verdicts, r.rewards.tolist(), r.texts))
    items = json.loads(json.dumps(r.to_items()))
    assert [i["sample"] for i in items] == [*range(6), *range(6)] and all(isinstance(i["parsed"], str) for i in items)
    part = r[r.rewards < 0]
    assert len(part) == int((r.rewards < 0).sum()) == len(part.verdicts) and (part.rewards < 0).all() and part.mask.any(0).all()
    assert r.lengths.max() <= 9


@pytest.mark.parametrize("reward", [lambda c, e: 1 / 0, lambda c, e: float("nan"), lambda c, e: "much", lambda c, e: {}["x"]])
def test_a_broken_reward_is_named(reward):
    with pytest.raises(ValueError, match="task 't'") as e: rollout(llama(), words(), task(verify=None, reward=reward), task().examples("train"), seed=0)
    assert "\n" not in str(e.value)
    nan = task(verify=lambda c, e: Verdict(math.inf, True))
    with pytest.raises(ValueError, match="task 't'.*inf"): rollout(llama(), words(), nan, nan.examples("train"), seed=0)


def test_chat_template_is_applied_once():
    tok = words(template="<s> $A")
    tok.chat_template = "<s>{% for m in messages %} w10 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w11{% endif %}"
    r = rollout(llama(), tok, task(), [dict(q="w3")], seed=0)
    assert r.ids[0, :r.prompt_len].tolist() == [0, 14, 7, 15]


def test_sampling_inside_undisturbed_by_hand():
    model = llama()
    with undisturbed(model): part = sample_batch(model, [[7], [8, 9]], sampling_config(0., max_new_tokens=3, eos_token_id=None, pad_token_id=0))
    ids = torch.tensor([[7]])
    for t in range(3):
        with torch.no_grad(): logp = model(ids).logits[0, -1].log_softmax(-1)
        assert part["tokens"][0, t] == logp.argmax() and math.isclose(part["logprobs"][0, t], logp.max(), abs_tol=1e-4)
        ids = torch.cat([ids, logp.argmax()[None, None]], 1)
