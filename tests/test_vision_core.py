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


# Micro-batches, mixtures, fused, resume ---------------------------------------------------------------------------------------------------------------

def mixed_task(n=12):
    "One, none and two pictures, of several sizes, by turns"
    def prompt(e):
        shown = [[e["image"]], [], [e["image"], picture("green", (48, 20))]][e["i"] % 3]
        return ask(f"Which colour is it, after {e['i']} others?"[:14 + e["i"]], *shown)
    return colours(n, prompt)


def gradients(**kwargs):
    model, processor = llava()
    m = expert(model)
    c = ReinforceConfig(**SHORT | dict(steps=1, batch_size=12, rollout_batch=12, lr=1e-9, max_grad_norm=None) | kwargs)
    with torch.no_grad(): before = {n: p.clone() for n, p in m.named_parameters() if p.requires_grad}
    from transformer2_nbdev import reinforce
    run = reinforce.begin(m, processor, mixed_task(), c, None)
    metrics = reinforce.policy_step(run)
    return metrics, {n: p.grad.clone() for n, p in run.params.items()}


def test_micro_batches_and_the_fused_step_give_the_same_gradient():
    whole, g = gradients(fused=False)
    assert whole["gap"] < 1e-3 and sum(x.norm() for x in g.values()) > 1e-3
    for kw in (dict(fused=False, micro_batch=1), dict(fused=False, micro_batch=5), dict(fused=True), dict(fused=True, micro_batch=5)):
        m, h = gradients(**kw)
        assert m["reward"] == whole["reward"] and m["gap"] < 1e-3
        for n in g: assert torch.allclose(g[n], h[n], rtol=2e-3, atol=2e-5 * max(x.abs().max() for x in g.values())), (kw, n)


def two_experts():
    model, processor = llava()
    m = expert(model)
    m.add_adapter("b", SvfConfig())
    with torch.no_grad():
        for n, p in m.named_parameters():
            if ".b" in n and "svf" in n: p.normal_(0, .3)
    return m.requires_grad_(False), processor


def test_every_row_has_its_own_mixture():
    m, processor = two_experts()
    weights = torch.tensor([[1., 0.], [0., 1.], [.5, .5], [0., 0.], [1., -1.]])
    texts = [render(p, None, processor) for p in MIXED()]
    with mixture(m, weights): g = generate(m, processor, texts, 10, seed=0)
    with mixture(m, weights), torch.no_grad(): again = token_logprobs(m, g.ids, g.mask, g.prompt_len, seen=g.seen)
    assert (again - g.logprobs).abs().max() < 1e-4
    for i, w in enumerate(weights):
        one = g[[i]]
        with mixture(m, w), torch.no_grad(): alone = token_logprobs(m, one.ids, one.mask, one.prompt_len, seen=one.seen)
        assert (alone - one.logprobs).abs().max() < 1e-4
        with mixture(m, weights[(i + 1) % 5]), torch.no_grad(): other = token_logprobs(m, one.ids, one.mask, one.prompt_len, seen=one.seen)
        assert (other - one.logprobs).abs().max() > 1e-3


def test_a_mixture_for_each_row_is_refused_where_pictures_are_adapted():
    model, processor = llava()
    m = get_peft_model(model, SvfConfig(target_modules="vision"), adapter_name="a")
    texts = [render(p, None, processor) for p in MIXED()[:2]]
    with mixture(m, [[1.], [.5]]), pytest.raises(ValueError, match="sees pictures, and does not know which row") as e: generate(m, processor, texts, 4)
    assert "\n" not in str(e.value)
    with mixture(m, [1.]): generate(m, processor, texts, 4)         # one mixture for all: no rows to confuse
    with mixture(m, [[1.], [.5]]): generate(m, processor, [texts[1]] * 2, 4)


def test_a_run_resumes_as_if_nothing_had_happened(tmp_path):
    c = dict(SHORT, steps=3, batch_size=6, rollout_batch=6, micro_batch=4, kl=.1, lr="auto")
    def run(out, steps, resume=False):
        model, processor = llava()
        m = get_peft_model(model, SvfConfig())
        h = train_expert(m, processor, mixed_task(), ReinforceConfig(**c | dict(steps=3)), out=out, resume=resume, progress=False, eval_fn=stop(steps))
        return h, {n: p.detach().clone() for n, p in m.named_parameters() if p.requires_grad}
    calls = []
    def stop(at):
        calls.clear()
        def fn(*_):
            calls.append(1)
            if at and len(calls) == at + 1: raise RuntimeError("pulled the plug")
            return 0.
        return fn
    c["val_every"] = 1
    whole, z = run(tmp_path / "a", None)
    with pytest.raises(RuntimeError): run(tmp_path / "b", 2)
    again, y = run(tmp_path / "b", None, resume=True)
    strip = lambda h: [{k: v for k, v in m.items() if k != "seconds"} for m in h.metrics]
    assert strip(whole) == strip(again) and all(torch.equal(z[n], y[n]) for n in z)


def test_next_token_loss_sees():
    model, processor = llava()
    m = get_peft_model(model, SvfConfig())
    h = sft(m, processor, mixed_task(), ReinforceConfig(steps=4, batch_size=12, lr=2e-2, val_every=0, val_limit=4, micro_batch=5), progress=False)
    nll = h.column("nll")[1]
    assert nll[-1] < nll[0]
    from transformer2_nbdev import reinforce
    run = reinforce.begin(m, processor, mixed_task(), ReinforceConfig(batch_size=4), None)
    ids, mask, P, seen = reinforce.gold_batch(run, run.train[:6])
    alone = []
    for e in run.train[:6]:
        i, k, p, s = reinforce.gold_batch(run, [e])
        alone.append(token_logprobs(m, i, k, p, seen=s).sum())
    assert torch.allclose(token_logprobs(m, ids, mask, P, seen=seen).sum(1), torch.stack(alone), atol=1e-4)


def test_the_chunked_head_sees(toy, monkeypatch):
    from transformer2_nbdev import rollout as room
    model, processor = toy
    texts = [render(p, None, processor) for p in MIXED()]
    g = generate(model, processor, texts, 12, seed=0)
    args = g.ids, g.mask, g.prompt_len, 1., None, False, g.seen
    with torch.no_grad(): plain = token_logprobs(model, *args)
    monkeypatch.setattr(room, "PIECE", 512)
    with torch.no_grad():
        assert hidden(model, g.ids, g.mask, g.prompt_len, 1., g.seen).lean
        assert torch.allclose(token_logprobs(model, *args), plain, atol=1e-5)


def test_a_placeholder_that_is_sampled_ends_the_answer(toy):
    model, processor = toy
    blank = model.config.image_token_id
    head, was = model.lm_head, model.lm_head.weight.detach().clone()
    try:
        with torch.no_grad(): head.weight[blank] = head.weight.mean(0) + 4 * head.weight.std()    # often, not always
        g = generate(model, processor, [render(p, None, processor) for p in MIXED() * 6], 12, seed=0)
        said = (g.ids[:, g.prompt_len:] == blank) & (g.completion_mask == 1)
        assert said.any() and not said.all(1).any() and g.finished[said.any(1)].all() and (said.sum(1) <= 1).all()
        assert (g.lengths[said.any(1)] - 1 == said[said.any(1)].long().argmax(1)).all()
        with torch.no_grad(): assert (token_logprobs(model, g.ids, g.mask, g.prompt_len, seen=g.seen) - g.logprobs).abs().max() < 1e-4
    finally:
        with torch.no_grad(): head.weight.copy_(was)


# Adaptation ---------------------------------------------------------------------------------------------------------------------------------------------

def test_two_passes_see():
    from transformer2_nbdev.adapt import TwoPass, told
    m, processor = two_experts()
    prompts = MIXED()
    say = lambda p: "default" if len(p[0]["content"]) == 2 else "b"
    tp = TwoPass(m, processor, told(say, ["default", "b"]), batch_size=3, max_new_tokens=10)
    answers = tp.generate(prompts)
    for p, a in zip(prompts, answers):
        with mixture(m, [1., 0.] if say(p) == "default" else [0., 1.], ["default", "b"]): g = generate(m, processor, [render(p, None, processor)], 10, temperature=0)
        assert a.text == g.texts[0] and a.prompt is p
    assert tp(prompts[2]).text == answers[2].text
    several = tp.generate(prompts[:3], do_sample=True, num_return_sequences=3)
    assert [len(a.texts) for a in several] == [3, 3, 3]


@pytest.mark.parametrize("method", ["generate", "score"])
def test_dispatch_shows_the_pictures_again(method, monkeypatch):
    from transformer2_nbdev import prompt as room
    m, processor = two_experts()
    d = room.Dispatch(m, processor, dict(red="default", blue="b"), method, max_new_tokens=6)
    asked = []
    real = room.METHODS[method]
    monkeypatch.setitem(room.METHODS, method, lambda d, texts: asked.append(texts) or real(d, texts))
    assert d(MIXED()).shape == (5, 2)
    assert [len(getattr(t, "pictures", [])) for t in asked[0]] == [1, 0, 2, 1, 2] and "Say only which kind it is" in asked[0][0]
    if method == "score":
        scores = d.scores
        d([MIXED()[2]])
        assert torch.allclose(d.scores, scores[2:3], atol=1e-4) and not torch.allclose(scores[2], scores[4], atol=1e-4)


def test_few_shot_sees():
    from transformer2_nbdev import fewshot
    m, processor = two_experts()
    task = mixed_task()
    shots = fewshot.Shots(m, processor, task, task.examples("train")[:5])
    weights = torch.tensor([[1., 0.], [0., 1.], [0., 0.]])
    marks = fewshot.mark(shots, weights, ["default", "b"])
    for i, w in enumerate(weights):
        for j in range(5):
            one = fewshot.mark(shots, w[None], ["default", "b"], only=[j])
            assert torch.allclose(one.logp[0, 0], marks.logp[i, j], atol=1e-4) and one.correct[0, 0] == marks.correct[i, j]


# What is wrong, in one line ------------------------------------------------------------------------------------------------------------------------------

def refused(kind, match, fn):
    with pytest.raises(kind, match=match) as e: fn()
    assert "\n" not in str(e.value) and len(str(e.value)) < 250, e.value


def test_what_is_no_picture_is_said_in_one_line(toy, tmp_path):
    model, processor = toy
    render_one = lambda x, key="image": render([dict(role="user", content=[{"type": "image", key: x}])], None, processor)
    for url in ("https://a.org/cat.jpg", "http://a.org/cat.jpg", "data:image/png;base64,AAAA"):
        for key in ("image", "url", "path"): refused(ValueError, "nothing is downloaded: save the picture and give its path", lambda: render_one(url, key))
    refused(FileNotFoundError, r"no picture .*cat\.jpg", lambda: render_one(str(tmp_path / "cat.jpg")))
    refused(FileNotFoundError, "no picture", lambda: render_one(tmp_path))
    (tmp_path / "notes.jpg").write_text("no picture")
    refused(ValueError, r"notes\.jpg is no picture", lambda: render_one(tmp_path / "notes.jpg"))
    (tmp_path / "empty.png").write_bytes(b"")
    refused(ValueError, r"empty\.png is no picture", lambda: render_one(tmp_path / "empty.png"))
    picture("red", (400, 400)).effect_spread(90).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    refused(ValueError, r"prompt 0: the picture .*cut\.png is damaged", lambda: encode(processor, [render_one(tmp_path / "cut.png")]))
    refused(ValueError, "a picture is a PIL image or a path, not Tensor", lambda: render_one(torch.zeros(3, 8, 8)))
    refused(ValueError, "an image part without a picture", lambda: render_one(None))
    refused(ValueError, "a part of type 'video'", lambda: render([dict(role="user", content=[dict(type="video", video="x.mp4")])], None, processor))
    refused(ValueError, "a tokenizer reads text alone", lambda: render(MIXED()[0], None, processor.tokenizer))
    refused(ValueError, "a tokenizer reads text alone", lambda: encode(processor.tokenizer, [render(MIXED()[0], None, processor)]))


def test_a_model_that_reads_text_alone_is_not_shown_pictures(toy, tmp_path):
    from chat_toy import chat
    from transformers import AutoModelForCausalLM
    _, processor = toy
    model = AutoModelForCausalLM.from_pretrained(chat(tmp_path / "m", vocab_size=400), dtype=torch.float32)
    for fn in (lambda m: rollout(m, processor, colours(), colours().examples("train")[:2]),
               lambda m: train_expert(get_peft_model(m, SvfConfig()), processor, colours(), ReinforceConfig(**SHORT), progress=False)):
        refused(ValueError, "the prompts hold pictures, and LlamaForCausalLM reads text alone", lambda: fn(model))


def test_a_template_that_shows_no_placeholder_is_said_in_one_line(toy):
    _, processor = toy
    text = Pictured("<|im_start|>Which?", [picture("red")])
    refused(ValueError, "prompt 0: LlavaProcessor cannot read it", lambda: encode(processor, [text]))


def test_a_file_of_prompts_names_pictures_beside_it(toy, tmp_path, monkeypatch):
    model, processor = toy
    (tmp_path / "data" / "img").mkdir(parents=True)
    for c in COLOURS: picture(c).save(tmp_path / "data" / "img" / f"{c}.png")
    line = lambda c, key="image": json.dumps(dict(prompt=[dict(role="user", content=[{"type": "image", key: f"img/{c}.png"}, dict(type="text", text="Which?")])], answer=c))
    (tmp_path / "data" / "p.jsonl").write_text("\n".join([*map(line, COLOURS), line("red", "path"), line("red", "url")]))
    monkeypatch.chdir(tmp_path)
    task = from_files("data/p.jsonl", lambda c, e: 1.)
    r = rollout(model, processor, task, task.examples("train"), max_new_tokens=3)
    assert len({i["pictures"][0] for i in r.to_items()}) == 4
    (tmp_path / "data" / "p.jsonl").write_text(line("red") + "\n" + line("pink"))
    refused(FileNotFoundError, r"p\.jsonl, row 2, message 1: no picture data/img/pink\.png", lambda: from_files("data/p.jsonl", lambda c, e: 1.))
