"""Rooms 09 to 11 beyond what their readers see: same tokens as each expert alone, every generation option, every bad input."""
import threading

import pytest, torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (GenerationConfig, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast, TextIteratorStreamer)

from transformer2_nbdev.adapt import (Answer, TwoPass, bar, check_experts, check_names, complete,
                                      fixed, how_to_generate, load_experts, one_hot, told,
                                      show_weights, weight_rows)
from transformer2_nbdev.adapter import SvfConfig, check_name, name_fault, safe_name, svf_layers
from transformer2_nbdev.mixture import mixture
from transformer2_nbdev.classifier import Classifier
from transformer2_nbdev.fewshot import FewShot
from transformer2_nbdev.prompt import GUIDES, Dispatch, box, confusion, label_scores, pad_right, question, read_label, show_confusion
from transformer2_nbdev.rollout import generate, inner
from transformer2_nbdev.tasks import Task

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
    answers = TwoPass(model, TOK, told(dict(zip(PROMPTS, who)), EXPERTS), batch_size=batch_size)(PROMPTS, **GREEDY)
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
    answers = TwoPass(model, TOK, told(dict(zip(PROMPTS, who)), EXPERTS))(PROMPTS, **GREEDY, **options)
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


# Names: what is refused is refused everywhere and in one line, what is accepted works everywhere

GOOD_NAMES = ["math", "math-v1_2", "Math 2", "7", "0", "数学", "é", "default", "svf_z", "svf_d", "mlp",
              "q_proj", "model", "weight", "copies", "modules_to_save", "a:b", "'", "{}", "n" * 200, "lora", "-a",
              "🙂"]
BAD_NAMES = ["math-v1.2", ".", "..", "a=b", "", " ", " a", "a ", "a/b", "/a", "a\\b", "a\nb", "a\0b",
             "\ufeffa", "a\u00a0b", "__base__", "svf", "svf_", "s", "_", "f_", "copy", "type", "train",
             "keys", "items", "values", "training", "_keys", "__init__", "n" * 201, "é" * 101, 7, None]
TASK = Task("t", lambda split: [], lambda e: e["prompt"], lambda text, e: 1., answer=lambda e: "b",
            max_new_tokens=3)


def texts(model, name, **more):
    two = TwoPass(model, TOK, fixed({name: 1.} | more))
    return [a.text for a in two(PROMPTS[:2], **GREEDY)]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_good_name_works_wherever_experts_are_named(tmp_path, name):
    check_name(name); check_names([name])
    assert safe_name(name) == name
    model, again = experts([name, "second"]), f"{name[:100]} again"
    want = texts(model, name, second=0.)
    assert want == [alone(model, p, name)[0] for p in PROMPTS[:2]]
    assert want != [alone(model, p, None)[0] for p in PROMPTS[:2]]
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    assert (folder / "adapter_model.safetensors").is_file()
    model = load_experts(llama(), {"second": tmp_path / "second", name: folder})
    assert texts(model, name) == want
    model.add_weighted_adapter([name, "second"], [1., 0.], "sum of two")
    model.add_weighted_adapter(["sum of two"], [1.], again)
    assert alone(model, PROMPTS[0], again)[0] == want[0]
    few = FewShot(model, TOK, TASK, [dict(prompt="a")], experts=[name], generations=1, population=4)
    assert few.experts == [name] and TwoPass(model, TOK, few).limit == 3
    if name == "{}": return                     # a name, but no label: braces cannot stand in a box
    assert Dispatch(model, TOK, {name: name}, max_new_tokens=4)(["2+2="]).shape == (1, 1)


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_a_bad_name_is_refused_in_one_line_wherever_experts_are_named(tmp_path, name):
    model = experts(["math", "code"])
    model.save_pretrained(tmp_path)
    folder = tmp_path / "math"
    ways = {
        "rule":     lambda: check_name(name),
        "folders":  lambda: load_experts(llama(), {name: folder}),
        "first":    lambda: get_peft_model(llama(), SvfConfig(), adapter_name=name),
        "second":   lambda: model.add_adapter(name, SvfConfig()),
        "peft":     lambda: model.load_adapter(str(folder), adapter_name=name),
        "sum":      lambda: model.add_weighted_adapter(["math"], [1.], name),
        "two pass": lambda: TwoPass(model, TOK, fixed({name: 1.})),
        "dispatch": lambda: Dispatch(model, TOK, dict(math=name)),
        "few-shot": lambda: FewShot(model, TOK, None, [], experts=[name]),
    }
    if not isinstance(name, str): ways = {k: ways[k] for k in ("rule", "folders")} # PEFT: TypeError
    for way, go in ways.items():
        with pytest.raises(ValueError, match="cannot be named") as e: go()
        assert "\n" not in str(e.value), way
    assert list(model.peft_config) == ["math", "code"], "nothing is left of the refused adapter"
    if isinstance(name, str): assert not name_fault(safe_name(name))


@pytest.mark.parametrize("name", ["base", "Base", "OTHER", "others", "other"])
def test_words_for_the_base_are_adapters_but_no_experts(tmp_path, name):
    assert not name_fault(name)                 # PEFT's own tests and users call adapters "other"
    refused = pytest.raises(ValueError, match="means the base model")
    with refused: check_names([name])
    with refused: load_experts(llama(), {name: tmp_path})
    with refused: TwoPass(experts([name]), TOK, fixed({name: 1.}))


def test_a_name_that_is_taken_is_not_overwritten(tmp_path):
    model = experts()
    model.save_pretrained(tmp_path)
    before, code = (alone(model, PROMPTS[0], n) for n in ("math", "code"))
    with pytest.raises(ValueError, match="'math' is on the model already"):
        load_experts(model, dict(math=tmp_path / "code"))
    assert alone(model, PROMPTS[0], "math") == before != code
    model.delete_adapter("math")
    assert alone(load_experts(model, dict(math=tmp_path / "code")), PROMPTS[0], "math") == code


BAD_LABELS = [{"Math": "math", "math": "code"}, {"a}b": "math"}, {"{": "math"}, {" math": "math"},
              {"": "math"}, {7: "math"}, {"a\\b{": "math"}, {"Others": "math"}]
GOOD_LABELS = [{"Math": "math", "code": "math"}, {"two words": "math"}, {"v1.2": "math"},
               {"数学": "math"}, {"100%": "math"}, {"a-b_c": "math"}]


@pytest.mark.parametrize("labels", BAD_LABELS, ids=repr)
def test_labels_that_cannot_be_read_back_are_refused(labels):
    with pytest.raises(ValueError, match="cannot be read back"): Dispatch(experts(), TOK, labels)
    Dispatch(experts(), TOK, labels, read=lambda text, labels: None)  # another reader, another rule


@pytest.mark.parametrize("labels", GOOD_LABELS, ids=repr)
def test_labels_that_can_be_read_back_are_taken(labels):
    assert Dispatch(experts(), TOK, labels).experts == ["math"]


# Defaults of the second pass: greedy and long enough, whatever the checkpoint says

LOUD = dict(do_sample=True, temperature=5., top_p=.9, top_k=7, repetition_penalty=3., num_beams=2,
            max_new_tokens=3, max_length=30, no_repeat_ngram_size=1)


def test_the_checkpoints_own_sampling_is_not_inherited():
    model = experts()
    two = TwoPass(model, TOK, fixed(dict(code=1.)))
    want = [a.text for a in two(PROMPTS, **GREEDY)]
    long = alone(model, PROMPTS[0], "code", max_new_tokens=256)[0]
    inner(model).generation_config = GenerationConfig(eos_token_id=[2], pad_token_id=0, **LOUD)
    assert [a.text for a in two(PROMPTS, max_new_tokens=12)] == want
    assert two(PROMPTS[0]).text == long and len(long) > 20, "greedy, and not cut at 20 tokens"
    theirs = inner(model).generation_config
    assert theirs.temperature == 5. and theirs.eos_token_id == [2], "the model has its own back"
    own = GenerationConfig(max_new_tokens=12)
    assert [a.text for a in two(PROMPTS, generation_config=own)] == want
    assert own.eos_token_id is None, "a config passed in is taken as it stands, and not written to"


def test_an_eos_that_only_the_checkpoint_names_still_ends_an_answer():
    model = experts()
    two = TwoPass(model, TOK, fixed(dict(code=1.)))
    letter = TOK.convert_tokens_to_ids(two(PROMPTS[0], max_new_tokens=12).text[4])
    inner(model).generation_config = GenerationConfig(eos_token_id=[2, letter])
    for kw in ({}, dict(generation_config=GenerationConfig(max_new_tokens=12))):
        assert len(two(PROMPTS[0], **kw).text) <= 5


PLAIN = dict(do_sample=False, max_new_tokens=256)
SAMPLED = dict(do_sample=True, top_k=0, max_new_tokens=256)
ASKED = [({}, PLAIN), (dict(temperature=0), PLAIN), (dict(temperature=None), PLAIN),
         (dict(top_p=1., top_k=0, min_p=0), PLAIN), (dict(do_sample=True, temperature=0), PLAIN),
         (dict(temperature=.5), SAMPLED | dict(temperature=.5)), (dict(do_sample=True), SAMPLED),
         (dict(top_p=.9), SAMPLED | dict(top_p=.9)), (dict(top_k=3), SAMPLED | dict(top_k=3)),
         (dict(do_sample=False, temperature=.5), PLAIN | dict(temperature=.5)),
         (dict(max_length=40), dict(do_sample=False, max_length=40)),
         (dict(max_new_tokens=1, num_beams=3), PLAIN | dict(max_new_tokens=1, num_beams=3))]


@pytest.mark.parametrize("given, want", ASKED, ids=repr)
def test_what_is_asked_of_generate(given, want): assert how_to_generate(given, 256) == want


def test_how_long_an_answer_may_be():
    model, strategy = experts(), fixed(dict(math=1.))
    assert TwoPass(model, TOK, strategy).limit == 256
    assert TwoPass(model, TOK, strategy, max_new_tokens=9).limit == 9
    strategy.answer_tokens = 30
    assert TwoPass(model, TOK, strategy).limit == 30
    assert TwoPass(model, TOK, strategy, max_new_tokens=9).limit == 9
    model.base_model.model.config.max_position_embeddings = 40
    short = TwoPass(model, TOK, fixed(dict(math=1.)))
    assert 1 <= len(short("x" * 35).text) <= 5, "less where the context holds less"
    with pytest.raises(ValueError, match="the context holds 40"): short("x" * 35, max_new_tokens=9)
    with pytest.raises(ValueError, match="the context holds 40"): short("x" * 41)


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
