"""lr="auto" against fixed rates: `python benchmarks/auto_lr.py --work FOLDER --tasks math dog`.

    math, code   lab base A, 667k parameters: 20 steps of 128 answers
    dog          stories260k, "the story mentions a dog": 20 steps of 64 stories of 48 tokens
    dispatch     SmolLM2-135M-Instruct, "which teacher should answer: math, code or science?": three
                 example turns as messages (room 20's real.dispatch), 16 steps of 48 answers

The same command and the same defaults everywhere but for `lr`, the number of steps and the size of
a batch. The z of the last step is what is measured, so that nothing is chosen on a validation. On
test questions: greedy accuracy (lab, dispatch); mean reward and divergence from the base (nats a
token and an answer, exact at every place) of one sampled answer each. Rates and seeds were written
down before the first run. Finished runs are files in FOLDER, a run of the real model goes on from
its last step, and an interrupted benchmark (`timeout -s INT 300 python ...`) goes on from there.
The record is transformer2_nbdev/data/records/auto-lr.json. --chat names the real model's folder and
--device where it runs (an hour a run on one core of a CPU; each row says which device it was).
"""
import argparse, json, os, statistics
from functools import cache
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pieces import RECORDS, Work, about, nats_an_answer
from transformer2_nbdev import lab, real
from transformer2_nbdev.adapter import SvfConfig
from transformer2_nbdev.evaluate import evaluate, pack, write_atomic
from transformer2_nbdev.reinforce import Diverged, ReinforceConfig, train_expert
from transformer2_nbdev.rollout import rollout
from transformer2_nbdev.tasks import Task

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TRANSFORMER2_DATA") or ROOT.parent / "shared" / "data")
RATES = dict(math=("auto", 3e-3, 1e-2, 3e-2), code=("auto", 3e-3, 1e-2, 3e-2),
             dog=("auto", 3e-3, 1e-2, 3e-2), dispatch=("auto", 3e-4, 2e-3, 1e-2))
SETTINGS = dict(math=dict(steps=20, batch_size=128, rollout_batch=128),
                code=dict(steps=20, batch_size=128, rollout_batch=128),
                dog=dict(steps=20, batch_size=64),
                dispatch=dict(steps=16, batch_size=48, rollout_batch=24))
SIZES = dict(math=501, code=501, dog=192, dispatch=48)       # test questions that are sampled
CHAT = dict(model=None, cache=None, device="cpu")            # from the command line


def dog(text, example): return 1. if "dog" in text.lower() else -1.

def story(split): return [dict(prompt="Once upon a time")] * (192 if split == "test" else 1)

DOG = Task("dog", story, lambda e: e["prompt"], dog, max_new_tokens=48)

DISPATCH = real.dispatch("dispatch", str(DATA))


@cache
def base(task):
    "(model, tokenizer, task)"
    if task in ("math", "code"): return *lab.load("A")[:2], lab.load("A")[2][task]
    folder, task = (DATA / "stories260k", DOG) if task == "dog" else (CHAT["model"], DISPATCH)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    device = "cpu" if task is DOG else CHAT["device"]
    return model.to(device), AutoTokenizer.from_pretrained(folder), task


def measured(model, tok, task, n):
    "What the model does on test questions"
    r = rollout(model, tok, task, task.examples("test")[:n], seed=1, batch_size=48)
    nats = nats_an_answer(model, r, 48)
    row = dict(n=len(r), reward=r.rewards.mean().item(), right=int((r.rewards > 0).sum()),
               nats=statistics.mean(nats), nats_a_token=sum(nats) / int(r.lengths.sum()))
    if task.name == "dog": return row
    greedy = evaluate(model, tok, task, limit=501, batch_size=48, progress=False)
    return row | dict(greedy=greedy.correct, greedy_n=greedy.n, bits=pack(greedy.items))


def adapted(name, seed):
    "A fresh SVF adapter on the task's base"
    model, tok, task = base(name)
    torch.manual_seed(seed)
    cache_dir = CHAT["cache"] if name == "dispatch" else None
    config = SvfConfig(target_modules="all-linear", cache_dir=cache_dir)
    return get_peft_model(model, config), tok, task


def device_of(model):
    "Its name, for the record"
    return torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"


def untrained(name):
    model, tok, task = adapted(name, 0)
    row = dict(task=name, lr=None, device=device_of(model))
    row |= measured(model, tok, task, SIZES[name])
    model.unload()
    return row


def one(name, seed, lr, folder):
    "Train at this rate; what the last z does on test questions"
    model, tok, task = adapted(name, seed)
    steps = iter(range(10 ** 6))
    config = ReinforceConfig(**SETTINGS[name], val_every=0, val_limit=8, seed=seed, lr=lr)
    row = dict(task=name, seed=seed, lr=lr, device=device_of(model))
    resume = folder is not None and (folder / "state.pt").is_file()
    try: h = train_expert(model, tok, task, config, folder, resume, lambda *_: next(steps), False)
    except Diverged as e:
        model.unload()
        return row | dict(diverged=str(e)[:80])
    column = lambda k: [float(f"{x:.3g}") for x in h.column(k)[1]]
    row |= dict(seconds=round(sum(h.column("seconds")[1]), 1), lr_used=column("lr"),
                step_kl=column("step_kl"), rewards=column("reward"), kl=column("kl"))
    row |= measured(model, tok, task, SIZES[name])
    model.unload()
    return row


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--work", required=True)
    p.add_argument("--tasks", nargs="+", default=list(RATES), choices=list(RATES))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--rates", nargs="+", help="only these")
    p.add_argument("--chat", help="folder of SmolLM2-135M-Instruct, for dispatch")
    p.add_argument("--cache", help="folder for its decompositions")
    p.add_argument("--device", default="cpu", help="where it runs")
    p.add_argument("--out", default=str(RECORDS / "auto-lr.json"))
    a = p.parse_args()
    torch.set_num_threads(1)
    CHAT.update(model=a.chat, cache=a.cache, device=a.device)
    work = Work(a.work)
    for name in a.tasks:
        work.do(f"{name}-base", lambda: untrained(name))
        for seed in a.seeds:
            for lr in RATES[name]:
                if a.rates and str(lr) not in a.rates: continue
                run = work.folder / f"run-{lr}-{seed}" if name == "dispatch" else None
                work.do(f"{name}-{lr}-{seed}", lambda: one(name, seed, lr, run))
    rows = [json.loads(f.read_text()) for f in sorted(work.folder.glob("*.json"))]
    command = "python benchmarks/auto_lr.py --work FOLDER"
    record = about() | dict(command=command, settings=SETTINGS, rates=RATES, rows=rows)
    write_atomic(Path(a.out), json.dumps(record, indent=1) + "\n")


if __name__ == "__main__": main()
