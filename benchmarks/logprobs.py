"""Log-probabilities in one table and in pieces: `python benchmarks/logprobs.py`.

A step's loss (room 09's `policy_loss`, KL to the base, entropies) and its gradient, for a policy
with SVF on all matrices. `table` forms the logits of all places at once; `pieces` is what the
library does. Every measurement is a process of its own: peak bytes are the growth of its resident
memory over what it had before the loss (VmHWM), seconds are processor seconds of one thread, the
shorter of two runs. Words and places vary one at a time, so that it can be seen what grows with
what. One more size has SmolLM2's width and vocabulary and four of its thirty layers (random
weights), where a transformer's own work is in the picture as well. The record is
transformer2_nbdev/data/records/logprobs.json.
"""
import argparse, json, multiprocessing, tempfile, time
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pieces import RECORDS, about
from transformer2_nbdev import rollout
from transformer2_nbdev.adapter import SvfConfig
from transformer2_nbdev.evaluate import write_atomic
from transformer2_nbdev.reinforce import policy_loss
from transformer2_nbdev.rollout import Rollouts

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(hidden=256, layers=1, rows=8, prompt=8)
SIZES = [SMALL | dict(words=w, tokens=t)
         for w, t in ((32_768, 64), (131_072, 64), (131_072, 256))]
SMOLLM = dict(words=49_152, hidden=576, layers=4, rows=8, prompt=64, tokens=64)


def status(key): # bytes
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
    return int(line.split()[1]) * 1024


def policy(size):
    torch.manual_seed(0)
    H = size["hidden"]
    config = LlamaConfig(vocab_size=size["words"], hidden_size=H, intermediate_size=H * 8 // 3,
                         num_hidden_layers=size["layers"], num_attention_heads=H // 64,
                         tie_word_embeddings=True)
    model = get_peft_model(LlamaForCausalLM(config), SvfConfig(target_modules="all-linear")).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.normal_(0, .2)
    return model


def answers(size):
    B, P, T = (size[k] for k in ("rows", "prompt", "tokens"))
    ids = torch.randint(0, size["words"], (B, P + T))
    return Rollouts([""] * B, [""] * B, ids, torch.ones_like(ids), torch.ones(B, T).long(),
                    torch.zeros(B, T), P, torch.ones(B))


def measure(size, form, file):
    "Peak bytes, seconds, and the gradient, into a file"
    torch.set_num_threads(1)
    model, r, seconds = policy(size), answers(size), []
    with torch.no_grad(): model(r.ids[:1, :4])                          # buffers that stay
    A, before = torch.linspace(-1, 1, size["rows"]), status("VmRSS")
    if form == "table": rollout.PIECE = 10 ** 15
    Path("/proc/self/clear_refs").write_text("5")                       # forget the peak so far
    for i in range(2):
        model.zero_grad()
        began = time.process_time()
        loss, sums = policy_loss(model, r, A)
        loss.sum().backward()
        seconds.append(time.process_time() - began)
        if i == 0: peak = status("VmHWM") - before
    g = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    table = 4 * size["rows"] * size["tokens"] * size["words"]
    row = dict(size, form=form, bytes=peak, table=table, tables=round(peak / table, 3),
               seconds=round(min(seconds), 2), kl=sums["kl"])
    torch.save((row, g), file)


def apart(size, form, folder):
    "Measure in a process of its own"
    file = Path(folder) / f"{form}.pt"
    process = multiprocessing.get_context("fork").Process(target=measure, args=(size, form, file))
    process.start()
    process.join()
    if process.exitcode: raise RuntimeError(f"{form} of {size} ended with {process.exitcode}")
    return torch.load(file)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--out", default=str(RECORDS / "logprobs.json"))
    a = p.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in (*SIZES, SMOLLM):
        with tempfile.TemporaryDirectory() as folder:
            (table, g), (pieces, h) = (apart(size, form, folder) for form in ("table", "pieces"))
        off = float((g - h).norm() / g.norm())
        for row in (table, pieces):
            rows.append(row | dict(off=off))
            print({k: row[k] for k in ("words", "tokens", "hidden", "form", "tables", "seconds")},
                  f"{row['bytes'] / 2**20:.0f} MB, gradients differ by {off:.0e}", flush=True)
        record = about() | dict(command="python benchmarks/logprobs.py", rows=rows)
        write_atomic(Path(a.out), json.dumps(record, indent=1) + "\n")


if __name__ == "__main__": main()
