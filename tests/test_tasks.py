"Tasks: prompts for any tokenizer, files of one's own, and names that installed packages declare."
import importlib, json, pickle, shutil, subprocess, sys
from pathlib import Path
import pytest
from PIL import Image
from transformer2_nbdev import tasks
from transformer2_nbdev.tasks import Task, from_files, get_task, render, task_names

ROOT = Path(__file__).resolve().parent.parent


# --- prompts and files ----------------------------------------------------------------------------------------------------
class Chat:
    "A tokenizer with a chat template, a BOS token that it adds itself, and, if told so, no system role."
    chat_template, bos_token, bos_token_id = "yes", "<s>", 1
    def __init__(self, system=True): self.system = system
    def __call__(self, text): return dict(input_ids=[1, 5])
    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        if not self.system and messages[0]["role"] == "system": raise ValueError("System role not supported")
        return "<s>" + "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"

def test_render():
    task = Task("t", lambda s: [], lambda e: e["q"], lambda c, e: 1, system="Be brief.")
    assert render(task, dict(q="Hi"), None) == "Be brief.\n\nHi"
    assert render(task, dict(q="Hi"), Chat()) == "[system]Be brief.[user]Hi[assistant]"
    assert render(task, dict(q="Hi"), Chat(system=False)) == "[user]Be brief.\n\nHi[assistant]"
    assert render("Hi", None, Chat()) == "[user]Hi[assistant]" and render("Hi") == "Hi" and render(task, dict(q="Hi"), None, system="") == "Hi"

def write(path, *rows): path.parent.mkdir(parents=True, exist_ok=True); path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)); return path

def test_own_prompts_and_reward(tmp_path):
    prompts = write(tmp_path / "p.txt", "Tell a story.", "", "Tell another.")
    reward = write(tmp_path / "r.py", "def dog(completion, example):\n    return 'dog' in completion\nx = 3")
    task = from_files(prompts, f"{reward}:dog")
    assert [task.prompt(e) for e in task.examples("train")] == ["Tell a story.", "Tell another."] and task.name == "p"
    v = task.judge("a dog", task.examples("test")[0])
    assert v.correct and v.reward == 1 and task.judge("a cat", {}).reward == -1
    rows = write(tmp_path / "p.jsonl", *[dict(prompt=str(i), answer=i) for i in range(20)])
    task = from_files(rows, lambda c, e: .5)
    assert [len(task.examples(s)) for s in ("train", "validation", "test")] == [16, 2, 2] and task.answer(task.examples("test")[0]) == "9"

@pytest.mark.parametrize("spec, said, kind", [("r.py", "expected file.py:function", ValueError), ("none.py:f", "no file", FileNotFoundError), ("r.py:g", "defines no function 'g'", ValueError),
                                              ("bad.py:f", "fails on import", ValueError)])
def test_reward_errors(tmp_path, monkeypatch, spec, said, kind):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.txt", "x"); write(tmp_path / "r.py", "def f(c, e): return 'high'"); write(tmp_path / "bad.py", "1 / 0")
    with pytest.raises(kind, match=said): from_files("p.txt", spec)

def test_reward_must_be_a_finite_number(tmp_path):
    p = write(tmp_path / "p.txt", "x")
    for value, said in (("high", "must be a number"), (float("nan"), "must be finite"), (None, "must be a number")):
        with pytest.raises(ValueError, match=said): from_files(p, lambda c, e: value).judge("", {})
    with pytest.raises(ValueError, match="no prompts"): from_files(write(tmp_path / "e.txt", ""), lambda c, e: 1)
    with pytest.raises(FileNotFoundError, match="no file"): from_files(tmp_path / "absent.txt", lambda c, e: 1)

@pytest.mark.parametrize("module", ("tasks", "verifiers", "benchmarks"))
def test_import_reads_nothing_and_needs_no_torch(module):
    code = (f"import sys, transformer2_nbdev.{module}; print([m for m in ('torch', 'datasets', 'sympy', 'math_verify', "
            "'transformers') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"


# --- names -------------------------------------------------------------------------------------------------------------------
PLUG = """
from transformer2_nbdev.tasks import Task
def make(name, data_dir): return Task(name, lambda s: [dict(q=1)], lambda e: "q", lambda c, e: 1)
def none(name, data_dir): return None
def raises(name, data_dir): return 1 / 0
def refuses(name, data_dir): raise FileNotFoundError("no such\\nfile")
"""

@pytest.fixture
def site(tmp_path, monkeypatch):
    "A folder on Python's path, and what pip does there: a module and its metadata."
    monkeypatch.syspath_prepend(tmp_path)
    def install(package, entry_points, source=PLUG, name="METADATA", group=tasks.GROUP):
        (tmp_path / f"{package.replace('-', '_')}.py").write_text(source)
        info = tmp_path / f"{package.replace('-', '_')}-1.dist-info"; info.mkdir()
        (info / name).write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry_points}\n")
        importlib.invalidate_caches()
    yield install
    for m in ("plug_a", "plug_b", "broken_a", "broken_b"): sys.modules.pop(m, None)

def test_every_task_of_ours_is_declared_and_every_declared_one_can_be_made():
    from transformer2_nbdev import benchmarks, lab, real, vision
    ours = {p.name: p.value for points in tasks._installed()[0].values() for p, q in points if q == "transformer2_nbdev"}
    assert {n for n, v in ours.items() if v == "transformer2_nbdev.benchmarks:benchmark"} == set(benchmarks.BENCHMARKS)
    assert {n for n, v in ours.items() if v == "transformer2_nbdev.lab:task"} == {f"lab.{n.replace('+', '-')}" for n in lab.KINDS}
    assert {n for n, v in ours.items() if v.startswith("transformer2_nbdev.real:")} == set(real.TASKS)
    seen = {n: v for n, v in ours.items() if v.startswith("transformer2_nbdev.vision:")}
    assert {n.removeprefix("lab.").removeprefix("vision-") for n in seen} == set(vision.TASKS)
    assert len(ours) == len(benchmarks.BENCHMARKS) + len(lab.KINDS) + len(real.TASKS) + len(seen)
    for n in ours: assert isinstance(get_task(n), Task)

@pytest.mark.parametrize("name, want", [("arc_easy", "arc_easy"), ("arc-easy", "arc_easy"), ("ARC Easy", "arc_easy"), ("lab:math", "math"), ("lab.math", "math"),
                                        ("lab:code+math", "code+math"), ("lab.code-math", "code+math"), ("lab:cls-hard", "cls-hard")])
def test_names_are_compared_without_case_and_punctuation(name, want): assert get_task(name).name == want

def test_an_unknown_name_lists_the_known_ones_without_importing_them(site):
    site("plug-a", "riddle = plug_a:make")
    for name in ("gsm9k", "lab:chess", "", ":"):
        with pytest.raises(ValueError, match="unknown task") as e: get_task(name)
        said = str(e.value)
        assert "\n" not in said and all(n in said for n in ("gsm8k", "lab.math", "riddle", "arc_easy")) and "missing" not in said
    assert "riddle" in task_names() and "plug_a" not in sys.modules
    assert get_task("riddle").name == "riddle" and "plug_a" in sys.modules

def test_a_broken_package_is_named_in_one_line_and_others_work(site):
    site("plug-a", "a = plug_a:make\nb = plug_a:none\nc = plug_a:raises\nd = plug_a:absent\ne = nothing such\nf = plug_a:refuses")
    site("broken-a", "g = broken_a:make", source="raise RuntimeError('two\\nlines')")
    said = dict(b="package plug-a (plug_a:none) made a NoneType", c="ZeroDivisionError", d="AttributeError", e="package plug-a (nothing such) fails",
                g="package broken-a (broken_a:make) fails: RuntimeError: two")
    for name, part in said.items():
        with pytest.raises(ValueError) as e: get_task(name)
        assert part in str(e.value) and f"task {name!r}" in str(e.value) and "\n" not in str(e.value), name
    with pytest.raises(FileNotFoundError): get_task("f")                 # a maker's own words about its files
    assert get_task("a").name == "a" and get_task("gsm8k").name == "gsm8k"

def test_metadata_that_cannot_be_read_is_left_out_and_named(site):
    site("broken-a", "a line without an equals sign")
    site("broken-b", "h = broken_b:make", name="NOTHING")
    site("plug-a", "a = plug_a:make")
    assert get_task("a").name == "a" and get_task("gsm8k").name == "gsm8k"
    with pytest.raises(ValueError, match="unknown task 'h'") as e: get_task("h")
    assert "broken_a-1.dist-info is unreadable" in str(e.value) and "\n" not in str(e.value)

def test_two_packages_that_claim_one_name(site):
    site("plug-a", "riddle = plug_a:make\ngsm8k = plug_a:make")
    site("plug-b", "Riddle = plug_b:make\nown = plug_b:make")
    for name in ("riddle", "gsm8k"):
        with pytest.raises(ValueError, match="is claimed by") as e: get_task(name)
        assert "plug-a (plug_a:make)" in str(e.value) and "\n" not in str(e.value)
    assert get_task("own").name == "own" and get_task("math").name == "math"

def test_the_same_package_twice_on_the_path_is_no_quarrel(site, tmp_path, monkeypatch):
    site("plug-a", "riddle = plug_a:make")
    import shutil
    shutil.copytree(tmp_path, tmp_path / "again"); monkeypatch.syspath_prepend(tmp_path / "again"); importlib.invalidate_caches()
    assert get_task("riddle").name == "riddle"

def test_registering_in_this_process_goes_first(site, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", {})
    site("plug-a", "riddle = plug_a:make")
    mine = Task("mine", lambda s: [dict(q=1)], lambda e: "mine", lambda c, e: -1)
    tasks.register("Riddle", lambda name, data_dir: mine)
    assert get_task("riddle").name == "mine" and "Riddle" in task_names()

def test_other_groups_are_not_looked_at(site):
    site("plug-a", "riddle = plug_a:make", group="somebody.else")
    with pytest.raises(ValueError, match="unknown task 'riddle'"): get_task("riddle")

def test_a_copy_that_is_not_installed_says_so(tmp_path):
    "From a source tree without metadata everything but our names works, and one line says what to do."
    code = ("import sys; from transformer2_nbdev.tasks import *; from transformer2_nbdev.benchmarks import benchmark\n"
            "assert 'transformer2_nbdev' not in {d.metadata['Name'] for d in __import__('importlib').metadata.distributions()}\n"
            "register('x', lambda name, data_dir: benchmark('gsm8k', data_dir)); print(get_task('x').name)\n"
            "try: get_task('gsm8k')\nexcept ValueError as e: print(e)")
    shutil.copytree(ROOT / "transformer2_nbdev", tmp_path / "src/transformer2_nbdev", ignore=shutil.ignore_patterns("data", "__pycache__"))    # no metadata beside it
    r = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(tmp_path / 'src')!r}); import importlib.metadata; " + code],
                       capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]
    first, second = r.stdout.splitlines()
    assert first == "gsm8k" and "unknown task 'gsm8k'; there are x;" in second and "pip install -e ." in second


# --- where the answer stands ---------------------------------------------------------------------------------------------------
SOLVED = "**Problem:** 3 boxes of 4 pens.\n**Solution:** 3 * 4 = 12\n#### 12"
@pytest.mark.parametrize("text, kept", [
    ("Let me restate it.\n" + SOLVED, "#### 12"), ("Sure!\n\n" + SOLVED, "#### 12"), ("Here is the task:\n" + SOLVED, "#### 12"), ("## Restated\n" + SOLVED, None), (SOLVED, "#### 12"),
    (SOLVED + "\n\n**Problem:** Tom has 7 cats.\n#### 7", "#### 12"), ("Let me restate it.\n" + SOLVED + "\n\n**Problem 2:** Tom has 7 cats.\n#### 7", "#### 12"), ("So 18.\n\n**Question:** Tom has 7 cats.", "So 18."),
    ("#### 18\n\n## Problem 2: cats", "#### 18"), ("She has 18 eggs.\n\nQuestion: Tom has 7 cats.\nAnswer: 7", "She has 18 eggs."), ("B\n\nQuestion: x\nAnswer: C", "B"), ("The answer is (B).\n\n**Question:** x", "The answer is (B)."),
    ("The moon reflects light.\n\n**Question:** x", "The moon reflects light."), ("Question: how many?\nAnswer: 18", "Answer: 18")])
def test_a_new_question_is_cut_and_a_restated_one_is_not(text, kept):
    region = tasks.answer_region(text)
    if kept: assert region.endswith(kept), region

@pytest.mark.parametrize("name, data, want", [
    ("p.txt", b"\xef\xbb\xbfTell a story.\r\nAnother.", ["Tell a story.", "Another."]), ("p.jsonl", b'\xef\xbb\xbf{"prompt": "Tell a story."}\n', ["Tell a story."]), ("p.json", b'\xef\xbb\xbf[{"prompt": "x"}]', ["x"]),
    ("q.txt", b"no mark", ["no mark"]), ("r.txt", b"a\xef\xbb\xbfb", ["a\ufeffb"])])
def test_a_byte_order_mark_is_not_part_of_the_first_prompt(tmp_path, name, data, want):
    (tmp_path / name).write_bytes(data)
    assert [r["prompt"] for r in tasks.read_rows(tmp_path / name)] == want

def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "p.txt").write_bytes("Tell a story.".encode("utf-16"))
    with pytest.raises(ValueError, match="p.txt is not UTF-8 text") as e: tasks.read_rows(tmp_path / "p.txt")
    assert "\n" not in str(e.value)


# --- prompts as messages -------------------------------------------------------------------------------------------------------
U, A, S = (lambda role: lambda text: dict(role=role, content=text))("user"), (lambda text: dict(role="assistant", content=text)), (lambda text: dict(role="system", content=text))
SHOTS = [U("2 + 2?"), A("4"), U("3 + 4?")]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LLAMA = "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
TURNS = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
MISTRAL = "{{ bos_token }}" + TURNS + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
GEMMA = "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS + "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}</turn>\n{% endfor %}{{ '<turn>model\n' }}"
SILENT = "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
LAST = "[user] {{ messages[-1].content }}\n[assistant]"

def chat(template):
    "A tokenizer of transformers with that template."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    inner = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1}, unk_token="<unk>")); inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>", chat_template=template)

@pytest.mark.parametrize("template, want, with_system", [
    (None, "2 + 2?\n4\n\n3 + 4?", "Add.\n\n2 + 2?\n4\n\n3 + 4?"),
    (CHATML, "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\n3 + 4?<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n2 + 2?"),
    (LLAMA, "<s><|start|>user<|end|>\n\n2 + 2?<|eot|><|start|>assistant<|end|>\n\n4<|eot|><|start|>user<|end|>\n\n3 + 4?<|eot|><|start|>assistant<|end|>\n\n", "<s><|start|>system<|end|>\n\nAdd.<|eot|><|start|>user"),
    (MISTRAL, "<s>[INST] 2 + 2? [/INST]4</s>[INST] 3 + 4? [/INST]", "<s>[INST] Add.\n\n2 + 2? [/INST]4</s>[INST] 3 + 4? [/INST]"),
    (GEMMA, "<s><turn>user\n2 + 2?</turn>\n<turn>model\n4</turn>\n<turn>user\n3 + 4?</turn>\n<turn>model\n", "<s><turn>user\nAdd.\n\n2 + 2?</turn>\n<turn>model\n4</turn>\n<turn>user\n3 + 4?</turn>\n"),
    (SILENT, "[user] 2 + 2?\n[assistant] 4\n[user] 3 + 4?\n[assistant]", "[user] Add.\n\n2 + 2?\n[assistant] 4\n[user] 3 + 4?\n[assistant]")])
def test_messages_go_through_the_template(template, want, with_system):
    tok = chat(template)
    assert render(SHOTS, None, tok) == want
    assert render(SHOTS, None, tok, system="Add.").startswith(with_system) and render([S("Add."), *SHOTS], None, tok) == render(SHOTS, None, tok, system="Add.")
    assert render([U("Hi")], None, tok) == render("Hi", None, tok) and render([S("Be brief."), U("Hi")], None, tok) == render("Hi", None, tok, system="Be brief.")

def test_which_system_message_wins():
    task = Task("t", lambda s: [], lambda e: e, lambda c, e: 1, system="the task's")
    assert render(task, SHOTS).startswith("the task's\n\n") and render(task, [S("its own"), *SHOTS]).startswith("its own\n\n2")
    assert render(task, [S("its own"), *SHOTS], system="given").startswith("given\n\n2") and render(task, [S("its own"), *SHOTS], system="") == render(SHOTS)

def test_neighbours_of_one_role_become_one_message_where_turns_are_wanted():
    assert render([U("a"), U("b")], None, chat(MISTRAL)) == "<s>[INST] a\n\nb [/INST]" and "user\na<|im_end|>\n<|im_start|>user\nb" in render([U("a"), U("b")], None, chat(CHATML))

def test_a_template_that_loses_turns_is_refused():
    with pytest.raises(ValueError, match="the chat template loses message 1") as e: render(SHOTS, None, chat(LAST))
    assert "\n" not in str(e.value) and render("3 + 4?", None, chat(LAST)) == "[user] 3 + 4?\n[assistant]"

def test_rendering_changes_no_example():
    rows = [S("Add."), *[dict(m) for m in SHOTS]]; before = json.dumps(rows)
    for t in (None, CHATML, MISTRAL, GEMMA, SILENT): render(rows, None, chat(t)), render(rows, None, chat(t), system="x")
    assert json.dumps(rows) == before

PICTURE = Image.new("RGB", (5, 4), "red")

def reader(tokenizer):
    "A processor, as far as rendering is concerned"
    class Reader:
        image_processor, image_token, chat_template = "yes", "<image>", None
        def __init__(self): self.tokenizer = tokenizer
        def apply_chat_template(self, *args, **kwargs): return self.tokenizer.apply_chat_template(*args, **kwargs)
    made = Reader()
    made.chat_template = tokenizer.chat_template
    return made

def test_contents_in_parts():
    parts = [dict(role="user", content=[dict(type="text", text="What"), dict(type="text", text="is this?")])]
    assert render(parts) == "What\nis this?" == tasks.user_text(parts) and render(parts, None, chat(CHATML)) == render("What\nis this?", None, chat(CHATML))
    seen = [dict(role="user", content=[dict(type="image", image=PICTURE), dict(type="text", text="What is this?")])]
    assert tasks.user_text(seen) == "What is this?"
    for tok in (None, chat(CHATML)):
        with pytest.raises(ValueError, match="a tokenizer reads text alone"): render(seen, None, tok)
    sees = "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}{% endfor %}"
    reads, parts_alone = reader(chat(sees)), reader(chat(sees.replace("{{ m.content }}", "")))
    for processor in (reads, parts_alone):
        text = render(seen, None, processor)
        assert text == "[user]<image>What is this?" and text.pictures == [PICTURE] and render(seen, None, processor, system="Look.") == "[system]Look.[user]<image>What is this?"
        assert render("Hi.", None, processor, system="Look.") == "[system]Look.[user]Hi." and type(render("Hi.", None, processor)) is str
        assert render([U("a"), A("b"), U("c")], None, processor) == "[user]a[assistant]b[user]c"
    plain = reader(chat(None))
    assert render([*SHOTS[:2], *seen], None, plain).endswith("<image>What is this?") and render(seen, None, plain) == "<image>What is this?"
    assert tasks.about(seen, "Which kind?")[0]["content"] == [dict(type="image", image=PICTURE), dict(type="text", text="Which kind?")] and tasks.about("Hi.", "Which kind?") == "Which kind?"

def test_a_picture_with_its_text_goes_through_pickle_and_json():
    seen = tasks.Pictured("<image>What?", [PICTURE])
    again = pickle.loads(pickle.dumps(seen))
    assert again == seen and again.pictures[0].tobytes() == PICTURE.tobytes() and json.dumps(seen) == '"<image>What?"'

def test_turned_and_transparent_pictures_become_what_a_person_sees(tmp_path):
    wide = Image.new("RGB", (6, 4), "blue")
    exif = wide.getexif(); exif[0x0112] = 6                      # the camera was held upright
    wide.save(tmp_path / "turned.jpg", exif=exif)
    assert tasks.opened(tmp_path / "turned.jpg").size == (4, 6)
    for mode in ("RGBA", "L", "P", "1", "LA"): assert tasks.opened(Image.new(mode, (3, 2))).mode == "RGB"
    from transformers.image_utils import load_image
    assert tasks.opened(tmp_path / "turned.jpg").tobytes() == load_image(str(tmp_path / "turned.jpg")).tobytes()

@pytest.mark.parametrize("prompt, said", [
    ([], "the prompt is empty"), (5, "the prompt must be text, not int"), (None, "not NoneType"), ({"role": "user"}, "not dict"), ("  ", "the prompt is empty"), (["Hi"], "message 1: expected an object with a role and a content"),
    ([{"role": "user"}], "message 1: expected"), ([dict(role="bot", content="x")], "message 1: role 'bot' is not one of system"), ([dict(role=["user"], content="x")], "message 1: role"), ([U(5)], "message 1: a content is a text"),
    ([U(None)], "message 1: a content"), ([U([])], "message 1: a content"), ([U(["x"])], "message 1: a content"), ([U("a"), S("b"), U("c")], "message 2: a system message stands first"), ([U("a"), A("b")], "its last message is the assistant's"),
    ([S("a")], "none of its messages is the user's"), ([S("a"), A("b")], "none of its messages"), ([U([{"type": "text"}])], "message 1: a content")])
def test_what_is_wrong_with_a_prompt_is_said_in_one_line(tmp_path, prompt, said):
    write(tmp_path / "p.jsonl", dict(prompt=SHOTS), "", dict(prompt=prompt))
    with pytest.raises(ValueError) as e: from_files(tmp_path / "p.jsonl", lambda c, e: 1)
    assert said in str(e.value) and "p.jsonl, row 3" in str(e.value) and "\n" not in str(e.value)

def test_a_file_of_messages_is_a_task(tmp_path):
    task = from_files(write(tmp_path / "p.jsonl", dict(prompt=SHOTS, answer="7"), dict(prompt="1 + 1?", answer="2")), lambda c, e: c == e["answer"])
    first, second = task.examples("test")
    assert task.judge("7", first).correct and task.answer(first) == "7" and render(task, first) == render(SHOTS) and render(task, second) == "1 + 1?"
