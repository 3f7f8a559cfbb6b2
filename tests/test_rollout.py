"Rollouts against hostile tokenizers, models and callers, and against the real checkpoint stories260k."
import json, math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)

from transformer2_nbdev import shipped
from transformer2_nbdev.adapter import SvfConfig
from transformer2_nbdev.fused import fused
from transformer2_nbdev.mixture import mixture
from transformer2_nbdev import rollout as rooms
from transformer2_nbdev.rollout import (Recorder, encode, entropy, eos_ids, forked_rng, generate, hidden, inner, kl_per_token, pad_id, pad_left, places, rollout,
                                        sample_batch, sample_steps, sample_whole, sampling_config, token_logprobs, undisturbed, until_eos, vocab_logprobs)
from transformer2_nbdev.tasks import Task, Verdict

STORIES = shipped("stories260k")
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


def gpt2(n_positions=64):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=44, n_embd=32, n_layer=2, n_head=4, n_positions=n_positions, bos_token_id=0, eos_token_id=1)).eval()
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


# ---- two loops: rows that leave, prompts read once, beginnings shared

def loops(model, rows, n=12, eos=(1, 7, 8, 9, 10, 11), **how):
    "Tokens and log-probabilities up to the EOS, by our loop and by the library's, from one seed."
    config, out = sampling_config(max_new_tokens=n, eos_token_id=list(eos) or None, pad_token_id=0, **how), []
    for sample in (sample_steps, sample_whole):
        with undisturbed(model), forked_rng(3, torch.device("cpu")): tokens, logps = sample(model, *pad_left(rows, 0), config)
        kept = until_eos(tokens, list(eos))
        out.append((tokens * kept, logps * kept))
    return out


def small(cls, config, **kw):
    torch.manual_seed(0)
    sizes = dict(vocab_size=44, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
                 pad_token_id=None)
    model = cls(config(**sizes | kw)).eval()
    with torch.no_grad():
        for n, p in model.named_parameters(): p.mul_(3 if p.dim() > 1 else 1)
    return model


def architectures():
    import transformers as t
    yield "llama", llama
    yield "gpt2", lambda: gpt2(128)
    yield "gemma2", lambda: small(t.Gemma2ForCausalLM, t.Gemma2Config, head_dim=8, final_logit_softcapping=4., sliding_window=8)
    yield "gemma2, wide window", lambda: small(t.Gemma2ForCausalLM, t.Gemma2Config, head_dim=8, final_logit_softcapping=4., sliding_window=500)
    yield "mistral", lambda: small(t.MistralForCausalLM, t.MistralConfig, sliding_window=9)
    yield "cohere", lambda: small(t.CohereForCausalLM, t.CohereConfig, logit_scale=.3)
    yield "granite", lambda: small(t.GraniteForCausalLM, t.GraniteConfig, logits_scaling=2.5)
    yield "qwen2, tied", lambda: small(t.Qwen2ForCausalLM, t.Qwen2Config, tie_word_embeddings=True)
    yield "phi, biased head", lambda: small(t.PhiForCausalLM, t.PhiConfig, num_key_value_heads=4)
    yield "neox", lambda: small(t.GPTNeoXForCausalLM, t.GPTNeoXConfig)


ARCHS = dict(architectures())
TURN = [3 + i % 40 for i in range(60)]
RAGGED = [[7], [8, 9], [9, 10, 11, 12, 13, 14, 15], [9, 10, 11], [20, 21], [22] * 5]


@pytest.mark.parametrize("rows", [RAGGED, RAGGED * 4, [TURN + r for r in RAGGED], [TURN + r for r in RAGGED] * 3], ids=["all different", "repeated", "shared turn", "both"])
@pytest.mark.parametrize("name", ARCHS)
def test_our_loop_draws_the_librarys_tokens(name, rows):
    model = ARCHS[name]()
    for how in (dict(temperature=1.), dict(temperature=0.), dict(temperature=.7, top_p=.8, top_k=9)):
        (tokens, logps), (theirs, their_logps) = loops(model, rows, **how)
        w = min(tokens.shape[1], theirs.shape[1])
        assert torch.equal(tokens[:, :w], theirs[:, :w]) and not tokens[:, w:].any() and not theirs[:, w:].any()
        assert torch.allclose(logps[:, :w], their_logps[:, :w], atol=1e-4)


def test_rows_leave_and_prompts_are_read_once(monkeypatch):
    model, seen = llama(), []
    handle = model.model.register_forward_pre_hook(lambda m, a, kw: seen.append(tuple(kw["input_ids"].shape)), with_kwargs=True)
    loops(model, [TURN + r for r in RAGGED] * 4, 20)
    handle.remove()
    ours = seen[:next(i for i, s in enumerate(seen) if s == (24, 67))]           # the library reads the rectangle
    assert ours[:2] == [(1, 60), (6, 7)] and ours[2][0] <= 24 and ours[-1][0] < 12 and all(s[1] == 1 for s in ours[2:])


@pytest.mark.parametrize("name", ["state space", "prompt tuning", "mixture"])
def test_what_cannot_be_stepped_goes_through_the_library(name, monkeypatch):
    monkeypatch.setattr(rooms, "sample_steps", None)                             # calling it would fail
    if name == "state space":
        from transformers import MambaConfig, MambaForCausalLM
        torch.manual_seed(0)
        model = MambaForCausalLM(MambaConfig(vocab_size=44, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
        assert generate(model, words(), ["w3 w4"] * 3, 4, seed=0).completion_mask.any()
    if name == "prompt tuning":
        from peft import PromptTuningConfig
        model = get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
        assert not rooms.can_step(model)
    if name == "mixture":
        model = spread(llama())
        with mixture(model, [[1.], [0.]]): assert not rooms.can_step(model) and generate(model, words(), ["w3", "w4"], 4, 0.)
        assert rooms.can_step(model)
        with mixture(model, [.5]): assert rooms.can_step(model)                  # one mixture for all rows


# ---- log-probabilities in pieces

def spread(model, **kw):
    "The model with an SVF adapter that has left z = 1."
    model = get_peft_model(model, SvfConfig(**dict(target_modules="all-linear") | kw)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad: p.normal_(0, .3)
    return model


def numbers(model, ids, mask, P, piece, temperature=1., of="policy", around=None):
    "The three numbers and the gradient of a loss in them, with tables cut into pieces of `piece` logits."
    from contextlib import nullcontext
    from transformer2_nbdev.reinforce import reference
    old, rooms.PIECE = rooms.PIECE, piece
    model.zero_grad()
    try:
        with around(model) if around else nullcontext():
            with reference(model): ref = hidden(model, ids, mask, P, temperature)
            now = hidden(model, ids, mask, P, temperature)
            taken, h, kl = places(now, ref, of)
            w = torch.linspace(-1, 1, taken.numel()).view_as(taken)
            (w * taken + .3 * kl).sum().backward()
    finally: rooms.PIECE = old
    return (taken.detach(), h, kl.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])), now.lean


def close(a, b):
    for x, y in zip(a, b): assert (x - y).abs().max() <= 1e-5 * max(1, y.abs().max()), (x - y).abs().max()


def ragged(n=7, P=9, T=30):
    g = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(2, 44, (n, P + T), generator=g), torch.ones(n, P + T).long()
    for i in range(n): mask[i, :i], mask[i, P + T - 3 * i:] = 0, 0
    return ids, mask, P


@pytest.mark.parametrize("name", ARCHS)
@pytest.mark.parametrize("of,temperature", [("policy", 1.), ("base", .7)])
def test_pieces_give_the_plain_forms_numbers_and_gradient(name, of, temperature):
    model = spread(ARCHS[name]())
    (a, lean), (b, whole) = (numbers(model, *ragged(), piece, temperature, of) for piece in (44 * 64, 10 ** 9))
    assert lean and not whole and b[3].abs().max() > 0
    close(a, b)


@pytest.mark.parametrize("kw", [dict(target_modules=["lm_head", "q_proj"]), dict(target_modules=["q_proj"], modules_to_save=["lm_head"])], ids=["SVF on the head", "head saved"])
def test_a_head_that_is_trained_takes_the_plain_way(kw):
    model = spread(llama(), **kw)
    (a, lean), (b, _) = (numbers(model, *ragged(), piece) for piece in (44 * 64, 10 ** 9))
    assert not lean
    close(a, b)
    model = get_peft_model(llama(), LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False)).eval()
    assert not numbers(model, *ragged(), 44 * 64)[1]


def test_pieces_within_fused_under_checkpointing_and_a_mixture():
    (a, lean), (b, _) = (numbers(spread(llama()), *ragged(), piece, around=around) for piece, around in ((44 * 64, fused), (10 ** 9, None)))
    assert lean
    close(a, b)
    model = spread(llama()); model.train(); inner(model).gradient_checkpointing_enable(dict(use_reentrant=False))
    c, lean = numbers(model, *ragged(), 44 * 64)
    assert lean
    close(c, b)
    model = get_peft_model(llama(), SvfConfig(target_modules="all-linear"), adapter_name="a").eval()
    model.add_adapter("b", SvfConfig(target_modules="all-linear"))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "svf_d" in n: p.normal_(0, .4)
    weights = torch.linspace(0, 1, 14).view(7, 2).requires_grad_()
    def slope(piece):
        old, rooms.PIECE = rooms.PIECE, piece
        with mixture(model, weights, ["a", "b"]): loss = token_logprobs(model, *ragged()).sum()
        rooms.PIECE = old
        return loss, torch.autograd.grad(loss, weights)[0]
    close(slope(44 * 64), slope(10 ** 9))


def test_a_model_that_treats_its_logits_in_its_own_way_is_noticed(monkeypatch):
    class Odd(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.sin()
            return out
    odd = Odd(llama().config); odd.load_state_dict(llama().state_dict()); odd.eval().requires_grad_(False)
    ids, mask, P = ragged()
    monkeypatch.setattr(rooms, "PIECE", 44 * 64)
    with torch.no_grad():
        assert not hidden(odd, ids, mask, P).lean and odd in rooms.ODD
        logp = vocab_logprobs(odd, ids, mask, P)
        assert torch.equal(token_logprobs(odd, ids, mask, P), logp.gather(-1, ids[:, P:, None])[..., 0].masked_fill(mask[:, P:] == 0, 0))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2, wide window"])
def test_a_shared_beginning_changes_no_number_and_no_gradient(name, monkeypatch):
    model, calls = spread(ARCHS[name]()), []
    ids, mask = pad_left([TURN + r for r in RAGGED], 0)
    ids, mask = torch.cat([ids, torch.randint(2, 44, (6, 5))], 1), torch.cat([mask, torch.ones(6, 5).long()], 1)
    shared = numbers(model, ids, mask, 67, 10 ** 9)[0]
    assert rooms.to_share(model, ids, mask, 67) == 60
    monkeypatch.setattr(rooms, "to_share", lambda *args: calls.append(1) or 0)
    close(shared, numbers(model, ids, mask, 67, 10 ** 9)[0])
    assert len(calls) == 2


def test_pieces_hold_no_table_of_the_vocabulary():
    "The largest tensor that exists inside is a piece."
    from torch.utils._python_dispatch import TorchDispatchMode
    class Largest(TorchDispatchMode):
        most = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **kwargs or {})
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if torch.is_tensor(x) and x.shape[-1:] == (44,): Largest.most = max(Largest.most, x.numel())
            return out
    model = spread(llama())
    with Largest(): numbers(model, *ragged(), 44 * 64)
    assert 0 < Largest.most <= 44 * 64 < 7 * 30 * 44


def test_a_head_that_is_spread_over_processes_takes_the_plain_way():
    model = llama().requires_grad_(False)
    assert rooms.plain_head(model) is model.lm_head
    model.lm_head.weight.device_mesh = "as a DTensor has"
    assert rooms.plain_head(model) is None
