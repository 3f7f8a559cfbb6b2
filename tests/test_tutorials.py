"""The tutorials run from the first cell to the last: on a tiny stand-in for the model, on the published data, in an empty folder."""
import ast, json, os, re, subprocess, sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat_toy
from reader import ROOT, RE_BADGE, directives, tutorials

DATA = Path(os.environ.get("TRANSFORMER2_DATA", ROOT.parent / "shared" / "data"))
NEEDED = ("gsm8k/train.jsonl", "mbpp/mbpp.jsonl", "arc/ARC-Easy-train.jsonl")
LIMIT = dict(STEPS=6, BATCH=16, TOKENS=4, TESTED=40, SHOTS=3, GENERATIONS=2, RANK=4)
LEARNS = dict(STEPS=15, BATCH=24, TESTED=60)      # enough for the stand-in to learn something


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    "A chat model of 50 thousand parameters that answers every question with a small number"
    folder = chat_toy.chat(tmp_path_factory.mktemp("stand-in"), max_position_embeddings=4096)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tok, g = AutoTokenizer.from_pretrained(folder), torch.Generator().manual_seed(0)
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        number = torch.randint(1, 10, (16,), generator=g).tolist()
        rows = [tok(f"<|im_start|>assistant\n{n}<|im_end|>")["input_ids"] for n in number]
        ids = torch.tensor(rows)
        opt.zero_grad()
        model(ids, labels=ids).loss.backward()
        opt.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    "The published files, of GSM8K only the rows whose answer is a digit, which the stand-in can say"
    if missing := [n for n in NEEDED if not (DATA / n).exists()]:
        pytest.skip(f"not here: {', '.join(missing)} below {DATA}")
    folder = tmp_path_factory.mktemp("data")
    for d in DATA.iterdir():
        if d.is_dir() and d.name != "gsm8k": (folder / d.name).symlink_to(d)
    (folder / "gsm8k").mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        rows = (DATA / "gsm8k" / name).read_text(encoding="utf-8").splitlines()
        digit = [r for r in rows if re.search(r"#### [1-9]$", json.loads(r)["answer"])]
        (folder / "gsm8k" / name).write_text("\n".join(digit) + "\n", encoding="utf-8")
    return folder


def cells(path: Path) -> list:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def script(path: Path, **values) -> str:
    "The code of a notebook, with the values of its variables at the top replaced"
    source = ["".join(c["source"]) for c in cells(path) if c["cell_type"] == "code"]
    head, = (i for i, s in enumerate(source) if s.startswith("MODEL ="))
    for name, value in values.items():
        if re.search(rf"\b{name}\b", source[head]): source[head] += f"\n{name} = {value!r}"
    return re.sub(r"^(\s*)%pip .*$", r"\1raise", "\n\n".join(source), flags=re.M)


def run(path: Path, cwd: Path, **values):
    (cwd / "run.py").write_text(script(path, **LIMIT | values))
    env = os.environ | dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", MPLBACKEND="agg",
                            OMP_NUM_THREADS="1", TQDM_DISABLE="1", PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "run.py"], cwd=cwd, env=env, capture_output=True,
                          text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("lesson", tutorials(), ids=lambda t: t.path.stem)
def test_a_tutorial_runs_to_its_end(lesson, stand_in, data, tmp_path):
    more = LEARNS if lesson.path.stem == "1_train" else {}
    said = run(lesson.path, tmp_path, MODEL=str(stand_in), DATA=str(data), **more)
    ends = dict(train="kept in gsm8k-expert/", adapt="search", serve="the base is untouched")
    assert ends[lesson.path.stem[2:]] in said, said


@pytest.mark.parametrize("lesson", tutorials(), ids=lambda t: t.path.stem)
def test_a_tutorial_is_what_colab_opens(lesson):
    prose = "\n".join("".join(c["source"]) for c in cells(lesson.path)
                      if c["cell_type"] == "markdown")
    assert RE_BADGE.search(prose)[1] == lesson.colab
    code = ["".join(c["source"]) for c in cells(lesson.path) if c["cell_type"] == "code"]
    assert code[0].startswith("try: import transformer2_nbdev\nexcept ImportError:\n    %pip")
    for source in code[1:]:
        ast.parse(source)
        assert not directives(source), "a directive means nothing on Colab"
        assert "nbdev " not in source and max(map(len, source.splitlines())) <= 100
        assert len(source.splitlines()) <= 30
    assert "an estimate: not measured yet" in prose


def test_an_expert_that_learned_nothing_is_noticed(stand_in, data, tmp_path):
    "The assertion on the saved expert can fail"
    lesson = next(t for t in tutorials() if t.path.stem == "1_train")
    text = script(lesson.path, **LIMIT | dict(MODEL=str(stand_in), DATA=str(data), STEPS=1))
    assert text.count("    return result.acc") == 1
    text = text.replace("    return result.acc", "    return -len(curve)")    # the first is best
    (tmp_path / "run.py").write_text(text)
    env = os.environ | dict(HF_HUB_OFFLINE="1", MPLBACKEND="agg", OMP_NUM_THREADS="1",
                            TQDM_DISABLE="1", PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, env=env, capture_output=True,
                          text=True, timeout=500)
    assert done.returncode == 1 and "the expert is the base" in done.stderr, done.stderr[-3000:]
