"""PEFT's own custom-model tests, with SVF rows beside LoRA's: all pass, and SVF skips nothing that LoRA does not.

The tests come from PEFT's source distribution on the package index (they are not in the wheel, and are not copied here). Where the index
cannot be reached the test is skipped and says so.
"""
import os, re, subprocess, sys, tarfile
import xml.etree.ElementTree as ET
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

ROWS = [("Vanilla MLP 1", "MLP", dict(target_modules="lin0")), ("Vanilla MLP 2", "MLP", dict(target_modules=["lin0"])),
        ("Vanilla MLP 3", "MLP", dict(target_modules=["lin1"])), ("Vanilla MLP 4", "MLP", dict(target_modules=["lin0", "lin1"])),
        ("Vanilla MLP 5", "MLP", dict(target_modules=["lin0"], modules_to_save=["lin1"])),
        ("Embedding + transformers Conv1D 1", "EmbConv1D", dict(target_modules=["conv1d"]))]

INIT = """ # the tests import each other relatively, and their helpers name diffusers, which no custom-model test uses
import sys, types
if "diffusers" not in sys.modules:
    try: import diffusers
    except ImportError: sys.modules["diffusers"] = types.SimpleNamespace(StableDiffusionPipeline=object, __spec__=None)
"""
PATCH = """
import sys; sys.path.insert(0, {root!r})
from transformer2_nbdev.adapter import SvfConfig
_ROWS = {rows!r}
TEST_CASES = [(f"{{n}} {{t}}", m, c, k) for t, c in (("LoRA", LoraConfig), ("SVF", SvfConfig)) for n, m, k in _ROWS]
"""


def sdist(folder: Path) -> Path:
    "PEFT's source tree, of the version that is installed"
    name = f"peft-{version('peft')}"
    cmd = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder), name.replace("peft-", "peft==")]
    if subprocess.run(cmd, capture_output=True, timeout=120).returncode: pytest.skip("PEFT's source distribution cannot be downloaded here")
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as t: t.extractall(folder, filter="data")
    return folder / name / "tests"


def outcomes(xml: Path) -> dict[str, Counter]:
    "{'LoRA': Counter(passed=…), 'SVF': …}, and the names of what failed or was skipped"
    found = {"LoRA": {}, "SVF": {}}
    for case in ET.parse(xml).getroot().iter("testcase"):
        method = next((m for m in found if f" {m}" in case.get("name")), None)
        if method is None: continue
        state = "failed" if case.find("failure") is not None or case.find("error") is not None else "skipped" if case.find("skipped") is not None else "passed"
        found[method][re.sub(rf" {method}|-\w+Config-config_kwargs\d+", "", case.get("name"))] = state
    return found


def test_custom_models(tmp_path):
    tests = sdist(tmp_path)
    (tests / "__init__.py").write_text(INIT)
    file = tests / "test_custom_models.py"
    text = file.read_text()
    mark = "\nALL_PEFT_CONFIG_CLASSES = "
    gate = "(LoraConfig, BOFTConfig)"  # tests of the `bias` option name the methods that have one; SVF has it too
    assert text.count(mark) == 1 and gate in text, "PEFT's test file has changed: find the end of its TEST_CASES anew"
    text = text.replace(gate, "(LoraConfig, BOFTConfig, SvfConfig)")
    file.write_text(text.replace(mark, PATCH.format(root=str(Path(__file__).parents[1]), rows=ROWS) + mark))
    xml = tmp_path / "out.xml"
    cmd = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-o", "addopts=", "-k", "SVF or LoRA", f"{file}::TestPeftCustomModel", f"--junitxml={xml}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(cmd, cwd=tests, capture_output=True, text=True, env=env, timeout=580)
    found = outcomes(xml)
    print({m: Counter(r.values()) for m, r in found.items()})
    assert len(found["SVF"]) > 200 and found["SVF"].keys() == found["LoRA"].keys(), out.stdout[-2000:]
    bad = {n: s for n, s in found["SVF"].items() if s != "passed" and found["LoRA"].get(n) == "passed"}
    assert not bad, "\n".join(f"{s}: {n}" for n, s in bad.items())
