"""The main job on a real checkpoint: an expert that tells stories about dogs, trained by the command line on a 260K-parameter Llama that others trained."""
import json, os, subprocess, sys

import pytest
import torch
from typer.testing import CliRunner

from transformer2_nbdev import shipped
from transformer2_nbdev.cli import app
from transformer2_nbdev.evaluate import wilson

FRESH = '''
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel
import transformer2_nbdev.adapter
from transformer2_nbdev.rollout import generate
torch.set_num_threads(1)
model, tok = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))
share = lambda m: sum("dog" in t.lower() for t in generate(m, tok, ["Once upon a time"] * 192, max_new_tokens=48, batch_size=96, seed=1).texts)
before, after = share(model), share(PeftModel.from_pretrained(model, sys.argv[2]).eval())
print(json.dumps([before, after]))
'''


@pytest.mark.timeout(1800)
def test_stories_with_dogs(tmp_path, root):
    folder = shipped("stories260k")
    (tmp_path / "reward.py").write_text('def dog(text, example): return 1. if "dog" in text.lower() else -1.\n')
    (tmp_path / "prompts.txt").write_text("Once upon a time\n")
    disk = (folder / "model.safetensors").read_bytes()
    torch.set_num_threads(1)
    r = CliRunner().invoke(app, ["train", "--model", str(folder), "--reward", f"{tmp_path}/reward.py:dog", "--prompts", f"{tmp_path}/prompts.txt", "--out", str(tmp_path / "dog"),
                                 "--steps", "25", "--batch-size", "64", "--lr", "2e-2", "--max-new-tokens", "48"])
    assert r.exit_code == 0, r.stderr
    result = json.loads((tmp_path / "dog" / "result.json").read_text())
    lines = [json.loads(l) for l in (tmp_path / "dog" / "metrics.jsonl").read_text().splitlines()]
    assert result["training"]["parameters"] == 1920 and max(m["gap"] for m in lines[1:]) < 1e-4
    out = subprocess.run([sys.executable, "-c", FRESH, folder, tmp_path / "dog"], capture_output=True, text=True, cwd=root, env=os.environ | dict(PYTHONPATH=str(root)))
    assert out.returncode == 0, out.stderr
    base, expert = json.loads(out.stdout.splitlines()[-1])
    print(f"stories with a dog, of 192, fresh process, seed 1: base {base}, expert {expert} {wilson(expert, 192)}; training {result['run']['seconds']:.0f} s")
    assert base < .2 * 192 and wilson(expert, 192)[0] > .8
    assert (folder / "model.safetensors").read_bytes() == disk
