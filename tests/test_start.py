"""Start here is what its first lines promise: short, for Colab as it is, and it runs on a chat model from the first cell to the last.

nbdev_test runs the same notebook on the lab's base; what is kept in it was run on the real model.
"""
import ast, json, os, re, subprocess, sys

from conftest import ROOT
from reader import RE_BADGE, directives, rooms, start
from test_tutorials import stand_in                     # noqa: F401  a fixture

NOTEBOOK = json.loads((ROOT / "nbs" / "start.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(c["source"]) for c in NOTEBOOK if c["cell_type"] == "code"]
PROSE = "\n".join("".join(c["source"]) for c in NOTEBOOK if c["cell_type"] == "markdown")


def test_it_is_short_and_what_colab_opens():
    assert RE_BADGE.search(PROSE)[1] == start().colab
    assert 16 <= len(CODE) <= 24 and max(len(s.splitlines()) for s in CODE) <= 20
    assert CODE[0].startswith("try: import transformer2_nbdev\nexcept ImportError:\n    %pip")
    for source in CODE[1:]: assert ast.parse(source) and not directives(source), "a directive means nothing on Colab"
    assert sum("assert " in s for s in CODE) >= .4 * len(CODE)


def test_it_ends_with_links_into_the_parts():
    firsts = {r.part.name: r.path.name for r in reversed(rooms())}      # the first room of each part
    last = "".join(NOTEBOOK[-1]["source"])
    missing = [part for part, file in firsts.items() if f"]({file})" not in last]
    assert not missing and "tutorials/" in last


def test_what_it_shows_came_from_a_chat_model():
    said = json.dumps([c.get("outputs", []) for c in NOTEBOOK if c["cell_type"] == "code"])
    assert "the tiny model answers" not in said and "capitals: " in said and said.count("image/png") >= 3
    assert not re.search(r"/(tmp|work|home|root)/", said), "a path of the machine that ran it"


def test_it_runs_on_a_chat_model(stand_in, tmp_path):                                      # noqa: F811
    "The whole of it with two steps of training, on a stand-in that has a chat template and knows no capitals."
    code = "\n\n".join(CODE[1:]).replace("STEPS, BATCH, TOKENS = 8, 32, 12", "STEPS, BATCH, TOKENS = 2, 4, 4").replace("TESTED = 120", "TESTED = 9")
    assert "= 2, 4, 4" in code and "TESTED = 9" in code
    (tmp_path / "run.py").write_text(code, encoding="utf-8")
    env = os.environ | dict(TRANSFORMER2_CHAT=str(stand_in), HF_HUB_OFFLINE="1", MPLBACKEND="agg", OMP_NUM_THREADS="1", TQDM_DISABLE="1", PYTHONPATH=str(ROOT))
    env.pop("IN_TEST", None)
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "capitals: " in done.stdout and (tmp_path / "capitals-expert" / "adapter_model.safetensors").is_file()
