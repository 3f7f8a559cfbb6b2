"""How to learn: `python benchmarks/reinforce.py --work FOLDER --parts lambda kl auto`.

    lambda  the weight of the KL term from 0 to 10, over seeds, on lab base A: the honest reward of
            skill math (30 steps of 128 prompts, lr 1e-2), and the reward of room 09 that can be
            gamed (12 steps of 64, lr 4e-2)
    kl      with and without the path in the KL's gradient (ObjectiveConfig.kl_path), over lambda
            and seeds: lab base A, skill math, 30 steps of 128 prompts at lr 1e-2, and stories260k,
            "the story mentions a dog" (48 tokens an answer)
    auto    lr="auto" against fixed rates, lab A (math, code) and stories260k: the same defaults

The z of the last step is what is measured, so that nothing is chosen on a validation. On test
questions: greedy accuracy; mean reward and divergence from the base (nats an answer, exact at
every place) of one sampled answer each. Finished runs are files in FOLDER, and an interrupted
benchmark goes on from there. `--only TASK` makes one task's runs of `lambda` and writes no record.
The record is transformer2_nbdev/data/records/reinforce.json; so far it holds `lambda` alone.
"""
import argparse, json, os, statistics, time
from functools import cache
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pieces import RECORDS, Work, about, nats_an_answer
from transformer2_nbdev import lab
from transformer2_nbdev.adapter import SvfConfig
from transformer2_nbdev.evaluate import evaluate, write_atomic
from transformer2_nbdev.reinforce import Diverged, ReinforceConfig, train_expert
from transformer2_nbdev.rollout import rollout
from transformer2_nbdev.tasks import Task

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TRANSFORMER2_DATA") or ROOT.parent / "shared" / "data")
LAMBDAS, RATES = (.1, .3, 1., 3.), ("auto", 3e-3, 1e-2, 3e-2)
WEIGHTS = (0., .03, .1, .3, 1., 3., 10.)                          # of part `lambda`
LAB = dict(steps=30, batch_size=128, rollout_batch=128)
GAMED = dict(steps=12, batch_size=64)
STORIES = dict(steps=20, batch_size=64)
SIZES = dict(math=1002, code=1002, generous=501, dog=192)         # test questions


def dog(text, example): return 1. if "dog" in text.lower() else -1.

def story(split): return [dict(prompt="Once upon a time")] * (192 if split == "test" else 1)

DOG = Task("dog", story, lambda e: e["prompt"], dog, max_new_tokens=48)


def generous(text, e):
    "A bonus for every unit above the right total (room 09)"
    last = text.split()[-1:] or ["none"]
    if not last[0].isdigit(): return -1.
    return max(-1., min(1., (int(last[0]) - int(e["gold"])) / 4))


@cache
def base(task):
    "(model, tokenizer, task, settings)"
    if task == "generous":
        model, tok, tasks = lab.load("A")
        sums = tasks["math"]
        return model, tok, Task(task, sums.examples, sums.prompt, generous, max_new_tokens=6), GAMED
    if task != "dog": return *lab.load("A")[:2], lab.load("A")[2][task], LAB
    folder = DATA / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder), DOG, STORIES


def sampled(model, tok, task, n):
    "Mean reward, and nats between policy and base, of one sampled answer a question"
    r = rollout(model, tok, task, task.examples("test")[:n], seed=1, batch_size=192)
    honest = lab.load("A")[2]["math"] if task.name == "generous" else task
    verdicts = [honest.judge(t, e) for t, e in zip(r.texts, r.examples)]
    nats = nats_an_answer(model, r, 96)
    return dict(reward=r.rewards.mean().item(), right=sum(v.correct for v in verdicts), n=len(r),
                nats=statistics.mean(nats), tokens=r.lengths.float().mean().item())


def one(name, seed, **kw):
    "Train with these settings; what the last z does on test questions"
    model, tok, task, settings = base(name)
    torch.manual_seed(seed)
    model = get_peft_model(model, SvfConfig(target_modules="all-linear"))
    steps = iter(range(10 ** 6))
    config = ReinforceConfig(**settings | dict(val_every=0, val_limit=8, seed=seed) | kw)
    try: h = train_expert(model, tok, task, config, eval_fn=lambda *_: next(steps), progress=False)
    except Diverged as e:
        model.unload()
        return dict(kw, task=name, seed=seed, diverged=str(e)[:80])
    row = dict(kw, task=name, seed=seed, seconds=round(h.result["run"]["seconds"], 1),
               lr_used=[float(f"{x:.3g}") for x in h.column("lr")[1]],
               step_kl=[float(f"{x:.2g}") for x in h.column("step_kl")[1]],
               rewards=[round(x, 3) for x in h.column("reward")[1]])
    row |= sampled(model, tok, task, SIZES[name]) | dict(greedy=greedy(model, tok, name))
    model.unload()
    return row


def greedy(model, tok, name):
    "Right answers of 501 in each skill of the lab"
    tasks = lab.load("A")[2] if name != "dog" else {}
    return {s: evaluate(model, tok, tasks[s], limit=501, batch_size=251, progress=False).correct
            for s in ("math", "code", "logic") if s in tasks}


def untouched(name):
    "What the base does on the same questions"
    model, tok, task, _ = base(name)
    model = get_peft_model(model, SvfConfig(target_modules="all-linear"))
    row = dict(task=name, base=True) | sampled(model, tok, task, SIZES[name])
    row |= dict(greedy=greedy(model, tok, name))
    model.unload()
    return row


def part_kl(work, seeds):
    rows = []
    for seed in seeds:
        for task in ("dog", "math"):
            for lam in LAMBDAS:
                for path in (True, False):
                    kw = dict(kl=lam, kl_path=path, lr=2e-2 if task == "dog" else 1e-2)
                    key = f"kl-{task}-{lam:g}-{path}-{seed}"
                    rows.append(work.do(key, lambda: one(task, seed, **kw)))
            kw = dict(kl=0., kl_path=True, lr=2e-2 if task == "dog" else 1e-2)
            rows.append(work.do(f"kl-{task}-0-True-{seed}", lambda: one(task, seed, **kw)))
    return rows


def part_auto(work, seeds):
    return [work.do(f"auto-{task}-{lr}-{seed}", lambda: one(task, seed, lr=lr))
            for seed in seeds for task in ("dog", "math", "code") for lr in RATES]


def part_lambda(work, seeds, only=None, finished=False):
    rates = dict(math=1e-2, generous=4e-2)
    bases = [] if only else [work.do(f"lambda-base-{t}", lambda: untouched(t)) for t in rates]
    todo = {f"lambda-{task}-{lam:g}-{seed}": (task, seed, lam)
            for task in rates if only in (None, task) for seed in seeds for lam in WEIGHTS}
    return bases + [work.do(key, lambda: one(task, seed, kl=lam, lr=rates[task]))
                    for key, (task, seed, lam) in todo.items()
                    if not finished or (work.folder / f"{key}.json").is_file()]


PARTS = {"lambda": part_lambda} | dict(kl=part_kl, auto=part_auto)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--work", required=True)
    p.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    p.add_argument("--only", choices=("math", "generous"))
    p.add_argument("--finished", action="store_true", help="`lambda`: record what there is")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--out", default=str(RECORDS / "reinforce.json"))
    a = p.parse_args()
    torch.set_num_threads(1)
    out, work = Path(a.out), Work(a.work)
    if a.only: return part_lambda(work, a.seeds, a.only)
    for part in a.parts:
        began = time.perf_counter()
        kw = dict(finished=True) if a.finished and part == "lambda" else {}
        rows = PARTS[part](work, a.seeds, **kw)
        record = json.loads(out.read_text()) if out.is_file() else {}
        record |= {part: dict(about(), command=f"python benchmarks/reinforce.py --parts {part}",
                              seeds=sorted({r["seed"] for r in rows if "seed" in r}), rows=rows)}
        lines = {k: "[\n   " + ",\n   ".join(map(json.dumps, v.pop("rows"))) + "\n  ]"
                 for k, v in record.items()}
        body = [f' {json.dumps(k)}: {json.dumps(v)[:-1]},\n  "rows": {lines[k]}}}'
                for k, v in record.items()]
        write_atomic(out, "{\n" + ",\n".join(body) + "\n}\n")
        print(part, f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__": main()
