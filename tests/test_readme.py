"""What the README shows is true where a reader tries it: every Python block runs pasted alone into a fresh process, in an empty folder."""
import os, re, subprocess, sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$(?:\n\n```\n(.*?)^```$)?", README, re.M | re.S)    # code, and the output under it


def test_there_is_something_to_paste():
    assert len(BLOCKS) >= 4 and sum(bool(out) for _, out in BLOCKS) >= 3


@pytest.mark.parametrize("code, out", BLOCKS, ids=[b[0].strip().splitlines()[-1][:30] for b in BLOCKS])
def test_a_block_runs_when_pasted_and_prints_what_it_says(code, out, tmp_path):
    (tmp_path / "pasted.py").write_text(code, encoding="utf-8")
    env = os.environ | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", MPLBACKEND="agg", OMP_NUM_THREADS="1", TQDM_DISABLE="1",
                            TRANSFORMERS_VERBOSITY="error")
    done = subprocess.run([sys.executable, "pasted.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == out.strip()
    assert os.listdir(tmp_path) == ["pasted.py"], "it leaves nothing behind where it runs"


def test_the_citations_name_this_version(settings):
    assert f"version = {{{settings['version']}}}" in README and settings["git_url"].lower() in README.lower()
    cff = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    for text in ("2501.06252", "Sun", "Cetin", "Tang"): assert text in README and text in cff
