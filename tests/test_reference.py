"""The reference documents what it names: every parameter has a word, every example runs in a process of its own, and nothing is left out."""
import os, re, subprocess, sys

import pytest
from api import about, entry, fill, names
from conftest import ROOT
from reader import internals, rooms

TEXT = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
EXAMPLES = {part.split("%%")[0]: found[1] for part in re.split(r"^%%(?=[\w.]+%%$)", TEXT, flags=re.M)[1:]
            if (found := re.search(r"^```python\n(.*?)^```$", part, re.M | re.S))}
DESIGN = """svd.decompose svd.cached_decompose svf.scale svf.compose svf.n_params adapter.SvfConfig fused.fused mixture.mixture paper.load_official
    tasks.Task tasks.get_task rollout.generate rollout.rollout evaluate.evaluate evaluate.paired reinforce.train_expert reinforce.ReinforceConfig
    adapt.TwoPass prompt.Dispatch fewshot.cem fewshot.FewShot transfer.transfer lab.load""".split()


def test_about_forty_names_each_with_an_example():
    assert 38 <= len(names()) <= 50 and len(set(names())) == len(names())
    assert set(names()) == set(EXAMPLES), set(names()) ^ set(EXAMPLES)
    assert set(DESIGN) <= set(names())
    assert TEXT.count("*Raises*") == len(names())


@pytest.mark.parametrize("name", names())
def test_every_parameter_has_a_word(name):
    e = entry(name)
    silent = [p.name for p in e.params if not about(p)]
    assert e.doc and not silent, f"{name}: say beside {silent} what they are"
    assert e.params or name == "tasks.task_names"


def test_nothing_is_left_out():
    everything = {f"{r.module}.{e.name}" for r in rooms() for e in r.exports}
    listed = internals(rooms())
    for name in everything - set(names()): assert f"`{name.split('.')[1]}" in listed, name
    table = lambda module: listed.split(f"## `{module}`")[-1].split("\n## ")[0]
    for module, name in (n.split(".") for n in names()): assert not re.search(rf"^\| \[?`{name}[(`]", table(module), re.M), f"{name} is listed twice"
    assert "%%" not in fill(TEXT)


RUN = """
import sys, traceback
from pathlib import Path
failed = []
for file in sorted(Path("examples").iterdir()):
    try: exec(compile(file.read_text(), file.name, "exec"), {"__name__": "__main__"})
    except Exception: failed.append(file.name); traceback.print_exc()
sys.exit(f"failed: {failed}" if failed else 0)
"""


def test_every_example_runs(tmp_path):
    "Each in a namespace of its own, in an empty folder; one process, since importing torch is most of the work."
    (tmp_path / "examples").mkdir()
    for name, code in EXAMPLES.items(): (tmp_path / "examples" / f"{name}.py").write_text(code, encoding="utf-8")
    env = os.environ | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", MPLBACKEND="agg", OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    done = subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-5000:]
    assert os.listdir(tmp_path) == ["examples"], "an example leaves something behind"
