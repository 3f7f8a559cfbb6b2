"""Rooms 09 to 11 beyond what their readers see: same tokens as each expert alone, every generation option, every bad input."""
import json, threading

import pytest, torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TextIteratorStreamer

from transformer2_nbdev.adapt import Answer, TwoPass, bar, check_experts, complete, fixed, load_experts, one_hot, oracle, show_weights, weight_rows
from transformer2_nbdev.adapter import SvfConfig, svf_layers
from transformer2_nbdev.mixture import mixture
from transformer2_nbdev.classifier import Classifier
from transformer2_nbdev.prompt import GUIDES, Dispatch, box, confusion, label_scores, pad_right, question, read_label, show_confusion
from transformer2_nbdev.rollout import generate

CHARS = [chr(i) for i in range(32, 127)] + ["\n"]
EXPERTS = ["math", "code", "logic"]
PROMPTS = ["2+2=", "what comes after the letter q?", "f", "sort [3,1]", "is a before b, and b before c?", "17"]


def tokenizer(pad=True):
    vocab = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", *CHARS])}
    t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    t.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **dict(pad_token="<pad>") if pad else {})


def llama(seed=0, **kw):
    torch.manual_seed(seed)
    cfg = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
               max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3)
    return LlamaForCausalLM(LlamaConfig(**cfg | kw)).eval()


def experts(names=EXPERTS, by=0.3, seed=0):
    model, g = get_peft_model(llama(seed), SvfConfig(), adapter_name=names[0]), torch.Generator().manual_seed(seed)
    for n in names[1:]: model.add_adapter(n, SvfConfig())
    for l in svf_layers(model).values():
        for n in names: l.svf_d[n].data += by * torch.randn(l.svf_d[n].shape, generator=g)
    return model.eval()


TOK, GREEDY = tokenizer(), dict(max_new_tokens=12, do_sample=False)


def alone(model, prompt, expert, tok=TOK, **kw):
    "The plain way: one prompt, one active adapter"
    ids = tok([prompt], return_tensors="pt")["input_ids"]
    if expert is None:
        with model.disable_adapter(): out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY | kw)
    else:
        model.set_adapter(expert)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY | kw)
    return [tok.decode(o[ids.shape[1]:], skip_special_tokens=True) for o in out]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_prompt_is_answered_by_its_own_expert(batch_size):
    model, who = experts(), [*EXPERTS, None, "code", "math"]
    answers = TwoPass(model, TOK, oracle(dict(zip(PROMPTS, who)), EXPERTS), batch_size=batch_size)(PROMPTS, **GREEDY)
    want = [alone(model, p, w)[0] for p, w in zip(PROMPTS, who)]
    assert [a.text for a in answers] == want
    assert len({tuple(alone(model, PROMPTS[0], e)) for e in [*EXPERTS, None]}) == 4  # the experts do differ
    assert answers[1].weights == dict(math=0, code=1, logic=0) and sum(answers[3].weights.values()) == 0


def test_zero_row_is_the_base_bit_for_bit():
    model, base = experts(), llama()
    ids = torch.randint(4, 99, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), mixture(model, one_hot([None, "math", None], EXPERTS), EXPERTS): y = model(ids).logits
    with torch.no_grad(): y0 = base(ids).logits
    assert torch.equal(y[[0, 2]], y0[[0, 2]]) and not torch.allclose(y[1], y0[1])


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_beams=4, num_return_sequences=2), dict(use_cache=False), dict(repetition_penalty=1.3)])
def test_generate_options(options):
    model, who = experts(), [*EXPERTS, None, "code", "math"]
    answers = TwoPass(model, TOK, oracle(dict(zip(PROMPTS, who)), EXPERTS))(PROMPTS, **GREEDY, **options)
    assert [a.texts for a in answers] == [alone(model, p, w, **options) for p, w in zip(PROMPTS, who)]
    assert all(len(a.texts) == options.get("num_return_sequences", 1) and a.text == a.texts[0] for a in answers)


def test_sampling_follows_the_seed():
    two = TwoPass(experts(), TOK, fixed(dict(math=.5, code=.5)))
    kw = dict(max_new_tokens=8, do_sample=True, temperature=2., num_return_sequences=3)
    draw = lambda s: (torch.manual_seed(s), [a.texts for a in two(PROMPTS, **kw)])[1]
    assert draw(0) == draw(0) != draw(1)


def test_streaming():
    model = experts()
    two, streamer = TwoPass(model, TOK, fixed(dict(logic=1.))), TextIteratorStreamer(TOK, skip_prompt=True, skip_special_tokens=True)
    got = {}
    thread = threading.Thread(target=lambda: got.update(a=two("17", streamer=streamer, **GREEDY)))
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == got["a"].text == alone(model, "17", "logic")[0]
    with pytest.raises(ValueError, match="one prompt, not 2"): two(["1", "2"], streamer=streamer)


def test_single_empty_and_mode():
    model = experts().train()
    two = TwoPass(model, TOK, fixed(dict(math=1.)))
    one = two("17", **GREEDY)
    assert isinstance(one, Answer) and one.text == two(["17"], **GREEDY)[0].text and model.training
    assert list(two([])) == [] and two([]).seconds == dict(first=0., second=0.)
    answers = two(PROMPTS, **GREEDY)
    assert answers.seconds["second"] > answers.seconds["first"] > 0


def test_per_layer_weights_and_forms():
    model = experts()
    per_layer = TwoPass(model, TOK, fixed(torch.tensor([[1., 0, 0], [0, 0, 1.]]), EXPERTS))
    a = per_layer("17", **GREEDY)
    assert a.weights == dict(math=[1, 0], code=[0, 0], logic=[0, 1])
    for form in ("delta", "sum"):  # one-hot rows mean the same in both forms; zeros do not
        assert TwoPass(model, TOK, fixed(dict(math=1.), form=form))("17", **GREEDY).text == alone(model, "17", "math")[0]


def test_a_tokenizer_without_pad_token_and_a_system_message():
    model, bare = experts(), tokenizer(pad=False)
    two = TwoPass(model, bare, fixed(dict(code=1.)), system="Be brief.")
    want = [alone(model, f"Be brief.\n\n{p}", "code", bare)[0] for p in PROMPTS]
    assert [a.text for a in two(PROMPTS, **GREEDY)] == want


def test_chat_template_is_used():
    chat = tokenizer()
    chat.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
    model = experts()
    assert TwoPass(model, chat, fixed(dict(code=1.)))("17", **GREEDY).text == alone(model, "[user]17[assistant]", "code")[0]


def test_save_and_load_experts(tmp_path):
    model = experts()
    model.save_pretrained(tmp_path)
    again = load_experts(llama(), {n: tmp_path / n for n in EXPERTS[1:]} | {"arith": tmp_path / "math"})
    assert check_experts(again) == ["code", "logic", "arith"]
    assert not any(p.requires_grad for p in again.parameters())
    assert TwoPass(again, TOK, fixed(dict(arith=1.)))("17", **GREEDY).text == alone(model, "17", "math")[0]


def test_bad_experts(tmp_path):
    with pytest.raises(ValueError, match="no experts"): check_experts(llama())
    with pytest.raises(ValueError, match="no experts"): load_experts(llama(), {})
    with pytest.raises(ValueError, match="cannot be named 'base'"): load_experts(llama(), dict(base=tmp_path))
    with pytest.raises(ValueError, match="cannot be named"): check_experts(experts(["math", "Other"]))
    with pytest.raises(FileNotFoundError, match="'math': no adapter_config.json"): load_experts(llama(), dict(math=tmp_path))
    with pytest.raises(ValueError, match="no expert named 'art'"): check_experts(experts(), ["math", "art"])
    lora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]), adapter_name="math")
    with pytest.raises(ValueError, match="only SVF"): check_experts(lora, ["math"])
    with pytest.raises(ValueError, match="no experts"): check_experts(lora)
    sick = experts()
    next(iter(svf_layers(sick).values())).svf_d["code"].data[0] = float("nan")
    with pytest.raises(ValueError, match="'code' holds NaN"): TwoPass(sick, TOK, fixed(dict(math=1., code=0.)))
    TwoPass(sick, TOK, fixed(dict(math=1.)))


def test_experts_of_different_bases(tmp_path):
    experts(["math"]).save_pretrained(tmp_path / "a")
    experts(["code"], seed=1).save_pretrained(tmp_path / "b")
    both = dict(math=tmp_path / "a/math", code=tmp_path / "b/code")
    with pytest.raises(ValueError, match="'math' and 'code' were trained on different bases"): load_experts(llama(), both)
    one = load_experts(llama(), dict(math=both["math"]))
    with pytest.raises(ValueError, match="different bases"): load_experts(one, dict(code=both["code"]))
    assert list(one.peft_config) == ["math"]
    with pytest.warns(UserWarning, match="other weights"): PeftModel.load_adapter(one, str(both["code"]), "code")
    with pytest.raises(ValueError, match="different bases"): check_experts(one)


@pytest.mark.parametrize("weights, match", [([1.], "K=3"), (torch.zeros(4, 3), "for 2 prompts"), ([float("nan"), 0, 0], "NaN"), (torch.zeros(2, 1, 1, 3), "shape"), (torch.tensor(1.), "shape")])
def test_bad_weights(weights, match):
    two = TwoPass(experts(), TOK, lambda prompts: weights)
    with pytest.raises(ValueError, match=match): two(["1", "2"], **GREEDY)


def test_bad_labels():
    with pytest.raises(ValueError, match="no expert named 'art'"): one_hot(["math", "art"], EXPERTS)
    assert one_hot([], EXPERTS).shape == (0, 3) and weight_rows([1, 0, 0], 5, EXPERTS).shape == (5, 3)
    with pytest.raises(ValueError, match="is empty"): TwoPass(experts(), TOK, fixed(dict(math=1.)))(["1", ""], **GREEDY)


def test_bar_and_pictures():
    pytest.importorskip("matplotlib").use("agg")
    assert bar(dict(a=1., bb=0.), 4).split("\n") == ["a  ████ 1.00", "bb      0.00"]
    assert "-0.50" in bar(dict(a=-.5)) and bar(dict(a=[1., 0.]), 4).startswith("a ██ ")
    ax = show_weights([Answer("p", "t", dict(a=.2, b=[1., 2.]))])
    assert ax.images[0].get_array().tolist() == [[pytest.approx(.2), 1.5]]


# Room 10

@pytest.mark.parametrize("text, label", [
    (r"\boxed{math}", "math"), (r"It is code. \boxed{ Code }", "code"), (r"\boxed{\text{reasoning}}", "reasoning"), (r"\boxed{code} no, \boxed{math}", "math"),
    (r"\boxed{maths}", None), (r"\boxed{code or math}", None), ("math", None), ("", None), (r"\boxed{}", None), (r"\boxed{math", None), (r"\boxed{others}", "others")])
def test_read_label(text, label): assert read_label(text, list(GUIDES)) == label


def test_question_names_every_label_and_keeps_the_prompt():
    q = question("Say {this} exactly: \\boxed{7}")
    assert all(l in q for l in GUIDES) and "Say {this} exactly: \\boxed{7}" in q


def test_pad_right(): assert [t.tolist() for t in pad_right([[5], [6, 7]], 0)] == [[[5, 0], [6, 7]], [[1, 0], [1, 1]]]


def test_scores_are_log_probabilities():
    model, answers = llama(), ["a", "bcd", "zz"]
    got = label_scores(model, TOK, PROMPTS, answers, batch_size=4)
    for i, p in enumerate(PROMPTS):
        for j, a in enumerate(answers):
            ids = torch.tensor([TOK(p + a)["input_ids"]])
            logp = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[-len(a):].sum()
            assert abs(got[i, j] - logp) < 1e-3


def dispatch(model, replies, **kw):
    "A dispatch whose model is made to say `replies`, in turn"
    d, replies = Dispatch(model, TOK, dict(code="code", math="math", reasoning="logic"), **kw), iter(replies)
    d.read = lambda text, labels: read_label(next(replies), labels)
    return d


def test_dispatch_rows():
    d = dispatch(experts(), [r"\boxed{math}", r"\boxed{others}", "no idea", r"\boxed{reasoning}"])
    assert d(PROMPTS[:4]).tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]] and d.experts == ["code", "math", "logic"]
    assert d.said == ["math", "others", None, "reasoning"] and len(d.last) == 4


def test_what_is_other_is_answered_by_the_base():
    model = experts()
    model.set_adapter("code")  # loaded last, as in the official code: it must not answer
    answers = TwoPass(model, TOK, dispatch(model, ["", r"\boxed{others}"]))(PROMPTS[:2], **GREEDY)
    assert [a.text for a in answers] == [alone(model, p, None)[0] for p in PROMPTS[:2]]
    assert all(a.first is not None for a in answers)


def test_the_question_is_asked_of_the_base_or_of_the_classifier():
    model = experts([*EXPERTS, "cls"])
    labels, ask = dict(code="code", math="math"), lambda p: f"{p} kind?"
    for active, d in ((None, Dispatch(model, TOK, labels, ask=ask, max_new_tokens=12)), ("cls", Classifier(model, TOK, labels, ask=ask, max_new_tokens=12))):
        d(PROMPTS)
        assert d.last == [alone(model, ask(p), active)[0] for p in PROMPTS] and d.experts == ["code", "math"]


@pytest.mark.parametrize("expert", [None, "cls"])
def test_scoring_picks_the_likeliest(expert):
    model = experts([*EXPERTS, "cls"])
    labels = dict(code="code", math="math", reasoning="logic")
    d = Classifier(model, TOK, labels, method="score") if expert else Dispatch(model, TOK, labels, method="score")
    rows = d(PROMPTS)
    with mixture(model, [1. if expert else 0.], ["cls"]): want = label_scores(model, TOK, [question(p) for p in PROMPTS], [box(l) for l in d.labels])
    assert d.said == [list(d.labels)[i] for i in want.argmax(-1)]
    torch.testing.assert_close(d.scores.exp().sum(1), torch.ones(len(PROMPTS)))
    assert all(r.sum() == (s != "others") for r, s in zip(rows, d.said))


def test_classifier_from_a_folder_and_its_errors(tmp_path):
    labels = dict(code="code", math="math")
    experts([*EXPERTS, "cls"]).save_pretrained(tmp_path)
    model = load_experts(llama(), {n: tmp_path / n for n in EXPERTS})
    c = Classifier(model, TOK, labels, folder=tmp_path / "cls", max_new_tokens=4)
    assert c(PROMPTS).shape == (6, 2) and "cls" in model.peft_config
    with pytest.raises(ValueError, match="no expert named 'nobody'"): Classifier(model, TOK, labels, expert="nobody")
    with pytest.raises(ValueError, match="cannot answer as well"): Classifier(model, TOK, labels, expert="math")
    with pytest.raises(ValueError, match="generate"): Dispatch(model, TOK, labels, method="guess")
    with pytest.raises(ValueError, match="no experts"): Dispatch(model, TOK, dict(others=None))


def test_confusion():
    pytest.importorskip("matplotlib").use("agg")
    c = confusion(["m", "m", "c", "m"], ["math", None, "code", "math"], ["math", "code"])
    assert c.rows == ["m", "c"] and c.cols == ["math", "code", "none"] and c.counts.tolist() == [[2, 0, 1], [0, 1, 0]]
    assert confusion(["m"], [None], ["math", "others"], none="others").counts.tolist() == [[0, 1]]
    assert show_confusion(c).texts[0].get_text() == "0.67"
    with pytest.raises(ValueError): confusion(["m"], [], ["math"])
