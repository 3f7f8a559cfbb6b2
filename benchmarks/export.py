"""An SVF expert as a LoRA: this package against PEFT's convert_to_lora, on all linear layers.

    python benchmarks/export.py --model FOLDER [--rank 16] [--out export.json]

Seconds are those of the process (not of the clock), so that a machine busy with other work
disturbs little; errors are Frobenius norms relative to W' - W.
"""
import argparse, json, time
from pathlib import Path

import torch
from peft import get_peft_model
from peft.tuners.lora.conversion import convert_to_lora
from transformers import AutoModelForCausalLM

from pieces import about
from transformer2_nbdev.adapter import SvfConfig, svf_layers
from transformer2_nbdev.scale import to_lora


def clock(f):
    began = time.process_time()
    return f(), time.process_time() - began


@torch.no_grad()
def worst(model, tensors):
    "The largest relative error of a matrix"
    found = 0.
    for n, l in svf_layers(model).items():
        A, B = (tensors[f"base_model.model.{n}.lora_{x}.weight"] for x in "AB")
        W = l.get_delta_weight("default")
        found = max(found, float((B @ A - W).norm() / W.norm()))
    return found


def main(a):
    torch.set_num_threads(1); torch.manual_seed(a.seed)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    model = get_peft_model(model, SvfConfig(target_modules="all-linear", rank=a.rank,
                                            init_weights=False, cache_dir=a.cache))
    ours = [clock(lambda: to_lora(model)) for _ in range(3)]
    theirs, slow = clock(lambda: convert_to_lora(model, a.rank)[1])
    fast = sorted(t for _, t in ours)[1]
    return dict(command=f"python benchmarks/export.py --model {Path(a.model).name} --rank {a.rank}",
                matrices=len(svf_layers(model)), rank=a.rank, seed=a.seed, **about(),
                ours=dict(seconds=round(fast, 3),
                          error=worst(model, ours[0][0].tensors)), peft=dict(seconds=round(slow, 2),
                              error=worst(model, theirs)), times=round(slow / fast, 1))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True); p.add_argument("--rank", type=int, default=16)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--cache"); p.add_argument("--out")
    a = p.parse_args(); r = main(a)
    print(json.dumps(r))
    assert r["ours"]["error"] < 1e-5 and r["times"] >= 50
    if a.out: Path(a.out).write_text(json.dumps(r, indent=1) + "\n")
