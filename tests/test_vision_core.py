"""Pictures in prompts, from a task to the gradient: that they reach the model, stay with their rows, and change nothing else."""
import json, math
from dataclasses import replace

import pytest, torch
from peft import LoraConfig, PeftModel, get_peft_model
from vision_toy import COLOURS, ask, colours, llava, picture, tokenizer


from transformer2_nbdev.adapter import SvfConfig, svf_layers
from transformer2_nbdev.evaluate import evaluate
from transformer2_nbdev.fused import fused
from transformer2_nbdev.mixture import mixture
from transformer2_nbdev.reinforce import ReinforceConfig, sft, train_expert
from transformer2_nbdev.rollout import encode, generate, hidden, rollout, token_logprobs
from transformer2_nbdev.tasks import Pictured, Task, from_files, named, render


@pytest.fixture(scope="module")
def toy(): return llava()


def expert(model, **kwargs):
    "An SVF model whose z are not 1"
    m = get_peft_model(model, SvfConfig(**kwargs))
    with torch.no_grad():
        for n, p in m.named_parameters():
            if p.requires_grad: p.normal_(0, .3, generator=torch.Generator().manual_seed(len(n)))
    return m


MIXED = lambda: [ask("Which colour is it?", picture("red")), ask("Say a word."), ask("Two: which? And a longer one?", picture("blue"), picture("white")),
                 ask("Which?", picture("blue", (50, 20))), ask("Two: which? And a longer one?", picture("white"), picture("blue"))]


def test_recorded_and_recomputed_logprobs_agree(toy):
    model, processor = toy
    texts = [render(p, None, processor) for p in MIXED()]
    for kw in (dict(temperature=1., seed=0), dict(temperature=0.), dict(temperature=1.3, seed=1, batch_size=2)):
        g = generate(model, processor, texts, 12, **kw)
        with torch.no_grad():
            for size in (None, 1, 2): assert (token_logprobs(model, g.ids, g.mask, g.prompt_len, g.temperature, size, seen=g.seen) - g.logprobs).abs().max() < 1e-4
            rows = [4, 1, 2]
            some = g[rows]
            assert (token_logprobs(model, some.ids, some.mask, some.prompt_len, g.temperature, seen=some.seen) - some.logprobs).abs().max() < 1e-4
            if kw["temperature"] == 0: continue
            blind = [s and {k: torch.zeros_like(v) for k, v in s.items()} for s in g.seen]
            moved = (token_logprobs(model, g.ids, g.mask, g.prompt_len, g.temperature, seen=blind) - g.logprobs).abs().amax(1)
            assert moved[1] < 1e-4 and moved[[0, 2, 3, 4]].min() > 1e-2, moved


def test_a_batch_gives_each_row_what_it_has_alone(toy):
    model, processor = toy
    texts = [render(p, None, processor) for p in MIXED()]
    g = generate(model, processor, texts, 10, temperature=0, batch_size=5)
    for i, t in enumerate(texts):
        alone = generate(model, processor, [t], 10, temperature=0)
        assert alone.texts == [g.texts[i]] and (alone.logprobs[0] - g.logprobs[i, :alone.logprobs.shape[1]]).abs().max() < 1e-4
    assert g.logprobs[2].sum() != g.logprobs[4].sum()      # the same words, the pictures exchanged


def test_without_pictures_a_processor_is_its_tokenizer(toy):
    model, processor = toy
    prompts = ["Say a word.", ask("Which colour is it?")]
    a, b = ([render(p, None, t, "Be kind.") for p in prompts] for t in (processor, processor.tokenizer))
    assert a == b and not any(isinstance(t, Pictured) for t in a) and encode(processor, a) == encode(processor.tokenizer, b)
    g, h = (generate(model, t, x, 10, seed=0) for t, x in ((processor, a), (processor.tokenizer, b)))
    assert torch.equal(g.ids, h.ids) and torch.equal(g.logprobs, h.logprobs) and g.texts == h.texts


def test_a_path_is_the_picture(toy, tmp_path):
    model, processor = toy
    picture("red").save(tmp_path / "red.png")
    for key, x in dict(image=tmp_path / "red.png", path=str(tmp_path / "red.png"), url=str(tmp_path / "red.png")).items():
        prompt = [dict(role="user", content=[{"type": "image", key: x}, dict(type="text", text="Which colour is it?")])]
        row = encode(processor, [render(prompt, None, processor)])[0]
        other = encode(processor, [render(ask("Which colour is it?", picture("red")), None, processor)])[0]
        assert row == other and torch.equal(row.seen["pixel_values"], other.seen["pixel_values"])
        assert named(prompt) == named(ask("Which colour is it?", picture("red"))) != named(ask("Which colour is it?", picture("blue")))


def test_rollout_and_evaluate(toy, tmp_path):
    model, processor = toy
    task = colours()
    r = rollout(model, processor, task, task.examples("train")[:4], samples=3, seed=0)
    assert len(r.seen) == 12 and r.seen[0] is r.seen[2] and r.seen[0]["pixel_values"].shape == (1, 3, 32, 32)
    items = json.loads(json.dumps(r.to_items()))
    assert len({i["pictures"][0] for i in items}) == 4 and items[0]["pictures"] == items[2]["pictures"] and type(r.to_items()[0]["prompt"]) is str
    whole = evaluate(model, processor, task, batch_size=5, out=tmp_path / "e", progress=False)
    assert whole.n == 12 and len({i["id"] for i in whole.items}) == 4 and evaluate(model, processor, task, batch_size=5, out=tmp_path / "e", progress=False).items == whole.items
    by_one = evaluate(model, processor, task, batch_size=1, progress=False)
    assert [i["completion"] for i in by_one.items] == [i["completion"] for i in whole.items]


SHORT = dict(steps=2, batch_size=8, rollout_batch=4, val_limit=4, lr=1e-2, seed=0)


def test_training_sees(tmp_path):
    model, processor = llava()
    m = get_peft_model(model, SvfConfig())
    h = train_expert(m, processor, colours(), ReinforceConfig(**SHORT), out=tmp_path / "run", progress=False)
    assert all(x["gap"] < 1e-3 for x in h.metrics[1:]) and all(x["grad_norm"] > 0 for x in h.metrics[1:])
    again = PeftModel.from_pretrained(llava()[0], tmp_path / "run")
    texts = [render(p, None, processor) for p in MIXED()]
    a, b = (generate(x, processor, texts, 8, temperature=0) for x in (m, again))
    assert a.texts == b.texts and torch.equal(a.logprobs, b.logprobs)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card and "AutoProcessor" in card and "sha256" not in card
