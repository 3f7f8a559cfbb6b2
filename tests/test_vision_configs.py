"""Families of models that see, from their own configs: what SVF adapts by default, how much that is, and a training step on each.
Weights are random and small; the classes, the processors and the shapes they hand over are transformers' own."""
import pytest, torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from vision_toy import FAMILIES, ask, colours, picture

from transformer2_nbdev.adapter import SvfConfig, svf_layers
from transformer2_nbdev.reinforce import ReinforceConfig, train_expert
from transformer2_nbdev.rollout import generate, hidden, positions, token_logprobs
from transformer2_nbdev.svf import n_params
from transformer2_nbdev.tasks import render

BUILT = {}


@pytest.fixture(params=list(FAMILIES))
def family(request, tmp_path_factory):
    "(name, folder, processor): the model is written once and read for every test"
    name = request.param
    if name not in BUILT:
        model, processor = FAMILIES[name]()
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        BUILT[name] = folder, processor
    return name, *BUILT[name]


def read(folder): return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def questions(): return [ask("Which?", picture("red")), ask("Say a word."), ask("Two: which? And a longer one?", picture("blue"), picture("white", (60, 20))),
                         ask("Which?", picture("blue", (20, 60))), ask("Two: which? And a longer one?", picture("white"), picture("blue", (60, 20)))]


def test_the_batch_and_the_gap(family):
    name, folder, processor = family
    model = read(folder)
    texts = [render(p, None, processor) for p in questions()]
    g = generate(model, processor, texts, 8, seed=0)
    recomputed = lambda g, **kw: token_logprobs(model, g.ids, g.mask, g.prompt_len, **kw)
    with torch.no_grad():
        assert (recomputed(g, seen=g.seen) - g.logprobs).abs().max() < 1e-4
        for rows in ([4, 1], [2], [1], [3, 0, 4]):      # micro-batches, one of them without a picture
            some = g[rows]
            assert (recomputed(some, seen=some.seen) - some.logprobs).abs().max() < 1e-4
        darker = [s and {k: v * .5 if k == "pixel_values" else v for k, v in s.items()} for s in g.seen]
        off = (recomputed(g, seen=darker) - g.logprobs).abs().amax(1)
        assert off[1] < 1e-4 and off[[0, 2, 3, 4]].min() > 1e-3, off
    together = generate(model, processor, texts, 8, temperature=0)
    for i, t in enumerate(texts): assert generate(model, processor, [t], 8, temperature=0).texts == [together.texts[i]]


def linears(model, part):
    head = model.get_output_embeddings()
    return {n for n, m in part.named_modules() if isinstance(m, nn.Linear) and m is not head}


def test_the_default_is_the_language_model_alone(family):
    name, folder, _ = family
    model = read(folder)
    decoder = model.get_decoder()
    inside = next(n for n, m in model.named_modules() if m is decoder)
    wanted = {f"{inside}.{n}" for n in linears(model, decoder)}
    assert len(wanted) == 14 and linears(model, model) > wanted       # two blocks of seven, and something is left out
    made = get_peft_model(model, SvfConfig())
    assert set(svf_layers(made)) == wanted
    with torch.device("meta"): meta = AutoModelForImageTextToText.from_config(model.config)
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert trained == n_params(meta.get_decoder()) < n_params(meta)
    one = get_peft_model(read(folder), SvfConfig(layers_to_transform=[1]))
    assert set(svf_layers(one)) == {n for n in wanted if n.startswith(f"{inside}.layers.1.")} and len(svf_layers(one)) == 7


def test_one_step_and_a_reloaded_expert(family, tmp_path):
    name, folder, processor = family
    made = get_peft_model(read(folder), SvfConfig(layers_to_transform=[1]))
    frozen = {n: p.clone() for n, p in made.named_parameters() if not p.requires_grad}
    def prompt(e): return ask("Which?", *[[e["image"]], [], [e["image"], picture("green", (48, 20))]][e["i"] % 3])
    config = ReinforceConfig(steps=1, batch_size=6, micro_batch=2, lr=3e-2, val_limit=2, val_samples=1, max_new_tokens=6, fused=True)
    h = train_expert(made, processor, colours(6, prompt), config, out=tmp_path / "run", progress=False)
    assert h.metrics[1]["gap"] < 1e-3 and h.metrics[1]["grad_norm"] > 0
    assert all(torch.equal(p, frozen[n]) for n, p in made.named_parameters() if n in frozen)
    last = PeftModel.from_pretrained(read(folder), tmp_path / "run" / "last")
    again = PeftModel.from_pretrained(read(folder), tmp_path / "run" / "last", is_trainable=True)
    g = generate(last, processor, [render(p, None, processor) for p in questions()], 8, seed=0)
    with torch.no_grad():
        logits = [hidden(m, g.ids, g.mask, g.prompt_len, 1., g.seen).states for m in (last, again, read(folder))]
    assert torch.equal(logits[0], logits[1]) and (logits[0] - logits[2]).abs().max() > 1e-4


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "qwen"])      # Qwen's reads films as well, with torchvision
def test_the_processor_is_read_back_from_its_folder(name, tmp_path):
    _, processor = FAMILIES[name]()
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    for p in questions():
        a, b = (render(p, None, x) for x in (processor, again))
        assert a == b and getattr(a, "pictures", 0) == getattr(b, "pictures", 0)
