"""Few-shot search against rivals that search nothing, in the lab: `python benchmarks/rivals.py`.

Two bases, three sets of experts each. On base A set 0 is the one that ships; the others are trained
here by the same settings with other seeds. Seed s means expert set s *and* draw s of ten shots, so
a spread over seeds holds both. Answered greedily: the first 501 test questions of the three unseen
tasks and of code+math, which needs two skills (base A), of math-hard and code+math (base B).

    no shots    base, each expert, `told` (the expert of the task's own skill), all experts at
                0.2, 0.4 ... 1
    no search   on ten shots: the best expert; the best expert and strength; the best even strength;
                as many random mixtures as the search below has looked at; one shot in the prompt,
                and as many as the context holds (base model)
    search      delta weights, per vector; on math-hard and code+math of base A also per layer; both
                until the distribution has settled or ten generations brought nothing better (40 at
                most)
    training    z, IA3 and LoRA r16 on the gold answers of the ten shots, 100 steps as in the
                paper's Table 10; math-hard and code+math. The rate is chosen on another task,
                logic+math (150 validation questions, two draws of shots, base A)
    official    the official search with all its settings (50 generations, weights for every
                matrix), code+math of base A

Settings, seeds, rates and stopping rules were fixed before a test question was answered. The record
benchmarks/results/rivals.json holds which questions each row got right, so any two can be paired.
Every finished piece is a small file in the work folder; interrupted, the script goes on from there.
`--part NAME` makes one part, `--part write` the record of what is there.
"""
import argparse, json
from dataclasses import replace
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, get_peft_model

from pieces import Work, about, pack
from transformer2_nbdev import lab
from transformer2_nbdev.adapt import fixed, load_experts
from transformer2_nbdev.adapter import SvfConfig, resolve_targets
from transformer2_nbdev.evaluate import evaluate, write_atomic
from transformer2_nbdev.fewshot import (OFFICIAL, BestOf, FewShot, Shots, Strength, draw_shots, evens,
                                        in_context, random_mixtures)
from transformer2_nbdev.reinforce import ReinforceConfig, sft, train_expert
from transformer2_nbdev.svf import is_target

EXPERTS, SEEDS, N = ["math", "code", "logic"], (0, 1, 2), 501
WIDE = ("math-hard", "code+math")                      # the tasks of base B, and of what costs more
TASKS = dict(A=(*lab.UNSEEN, "code+math"), B=WIDE)
SEARCH = dict(population=32, generations=40, tol=.01, patience=10)
TRAIN = dict(batch_size=192, rollout_batch=96, lr=1e-2, kl=.1, steps=30, val_every=5, val_limit=300,
             patience=4, advantage="batch")            # those of the shipped experts
TUNE, DRAWS = "logic+math", (100, 101)
RATES = {"z": (3e-3, 1e-2, 3e-2), "IA3": (3e-3, 1e-2, 3e-2), "LoRA r16": (1e-3, 3e-3, 1e-2)}
BETWEEN = " <eos> <bos> "


def ia3(names):
    return IA3Config(target_modules=names, feedforward_modules=[n for n in names if is_target(n, "mlp")])

def lora16(names):
    return LoraConfig(target_modules=names, task_type="CAUSAL_LM", r=16, lora_alpha=32)

MADE = {"z": lambda names: SvfConfig(target_modules=names), "IA3": ia3,
        "LoRA r16": lora16}


def trained(base, seed, skill):
    "One expert in the work folder, and how well it did"
    folder = WORK.folder / "experts" / f"{base}-{seed}" / skill
    def make():
        torch.manual_seed(seed)
        model, tok, tasks = lab.load(base)
        model = get_peft_model(model, SvfConfig())
        h = train_expert(model, tok, tasks[skill], ReinforceConfig(seed=seed, **TRAIN), progress=False)
        model.save_pretrained(folder)
        return dict(before=h.metrics[0]["val_accuracy"], after=h.result["acc"], kept_step=h.best_step)
    return str(folder), WORK.do(f"expert_{base}_{seed}_{skill}", make)


def expert_set(base, seed):
    "{skill: folder}"
    if (base, seed) == ("A", 0): return {e: lab.experts("A")[e] for e in EXPERTS}
    return {e: trained(base, seed, e)[0] for e in EXPERTS}


def answered(case, strategy=None, task=None):
    "Right answers to the first N test questions"
    r = evaluate(case["model"], case["tok"], task or case["task"], strategy, limit=N, batch_size=167,
                 progress=False)
    return dict(correct=r.correct, n=r.n, right=pack(r.items))


def row(case, s, **kw):
    round4 = lambda w: [round4(x) for x in w] if isinstance(w, list) else round(w, 4)
    return dict(weights=round4(s.weights.tolist()), **kw) | answered(case, s)


def no_shots(case):
    alone = {"base": fixed([0.] * 3, EXPERTS)} | {f"{e} expert": fixed({e: 1.}) for e in EXPERTS}
    even = {f"even {s:.1f}": fixed([s] * 3, EXPERTS) for s in (.2, .4, .6, .8, 1.)}
    out = {k: answered(case, s) for k, s in (alone | even).items()}
    skill = lab.KINDS[case["name"]].label
    return out | ({"told": out[f"{skill} expert"]} if skill else {})


def searched(case, **settings):
    f = FewShot(*shown(case), EXPERTS, seed=case["seed"], **settings)
    history = f.found.history
    return row(case, f, score=f.found.score.tolist(), why=f.found.why, generations=len(history),
               candidates=sum(len(h["population"]) for h in history))


def shown(case): return case["model"], case["tok"], case["task"], case["shots"]


def no_search(case, looked_at):
    "The best of a list"
    lists = dict(even=evens(3), random=random_mixtures(3, looked_at, seed=case["seed"]))
    rows = dict(single=Strength(*shown(case), EXPERTS, scales=[1.]), scaled=Strength(*shown(case), EXPERTS))
    rows |= {k: BestOf(*shown(case), tried, EXPERTS) for k, tried in lists.items()}
    return {k: row(case, s) for k, s in rows.items()}


def prompted(case, k=None):
    "Shots in the prompt: k, or as many as the context holds"
    task, shots = case["task"], case["shots"].shots
    longest = max(len(case["tok"](task.prompt(e)).input_ids) for e in task.examples("test")[:N])
    room = case["model"].config.max_position_embeddings - task.max_new_tokens - longest
    def size(n): # tokens that n shots put in front
        long, short = (t.prompt(shots[0]) for t in (in_context(task, shots[:n], BETWEEN), task))
        return len(case["tok"](long).input_ids) - len(case["tok"](short).input_ids)
    k = k or max(n for n in range(1, len(shots) + 1) if size(n) <= room)
    return dict(shots=k) | answered(case, fixed([0.] * 3, EXPERTS), in_context(task, shots[:k], BETWEEN))


def fine_tuned(base, method, shots, lr, seed, task):
    "An adapter trained on the gold answers of the shots; the last step is kept"
    torch.manual_seed(seed)
    model, tok, _ = lab.load(base)
    names, later = sorted(resolve_targets(SvfConfig(), model)), iter(range(10 ** 6))
    model = get_peft_model(model, MADE[method](names))
    config = ReinforceConfig(steps=100, batch_size=len(shots), rollout_batch=len(shots), lr=lr, val_every=0,
                             val_samples=1, val_temperature=0., seed=seed)
    few = replace(task, examples=lambda split: shots)
    sft(model, tok, few, config, eval_fn=lambda m, t: next(later), progress=False)
    return dict(model=model.eval(), tok=tok)


def rates(make=True):
    "{method: its rate, and the accuracy of each on another task}"
    pieces = [WORK.folder / f"rate_{m}_{lr:g}_{d}.json" for m in RATES for lr in RATES[m] for d in DRAWS]
    if not make and not all(p.is_file() for p in pieces): return {}
    task, out = lab.load("A")[2][TUNE], {}
    def accuracy(method, lr, draw):
        made = fine_tuned("A", method, draw_shots(task, 10, draw), lr, draw, task)
        return evaluate(made["model"], made["tok"], task, split="validation", limit=150, batch_size=150,
                        progress=False).correct
    for m, grid in RATES.items():
        tried = {lr: [WORK.do(f"rate_{m}_{lr:g}_{d}", lambda: accuracy(m, lr, d)) for d in DRAWS]
                 for lr in grid}
        out[m] = dict(lr=max(grid, key=lambda lr: sum(tried[lr])), n=150, draws=DRAWS,
                      right={f"{lr:g}": v for lr, v in tried.items()})
    return out


def official(case):
    own = Shots(case["model"], case["tok"], case["task"], case["shots"].shots, tie="own", batch_size=1024)
    return searched(dict(case, shots=own), **OFFICIAL)


def plan(case, lrs):
    "{row or group of rows: how to make it}"
    some, layers = case["name"] in WIDE, dict(SEARCH, per_layer=True)
    steps = {"no shots": no_shots, "delta, per vector": lambda c: searched(c, **SEARCH)}
    if some and case["base"] == "A": steps["delta, per layer"] = lambda c: searched(c, **layers)
    steps |= {"1 in the prompt": lambda c: prompted(c, 1), "in the prompt": prompted}
    def on_shots(m):
        def make(c):
            made = fine_tuned(c["base"], m, c["shots"].shots, lrs()[m]["lr"], c["seed"], c["task"])
            return dict(lr=lrs()[m]["lr"]) | answered(c | made)
        return make
    if some: steps |= {f"{m} on the shots": on_shots(m) for m in MADE}
    if (case["base"], case["name"]) == ("A", "code+math"): steps["official"] = official
    return steps


def cell(base, seed, name, make=True, late=False):
    "All rows of one base, seed and task; `late`: with those that cost most"
    key, rows, found = f"{base}_{seed}_{name}", {}, []
    def case():
        if not found:
            model, tok, tasks = lab.load(base)
            found.append(dict(base=base, seed=seed, name=name, task=tasks[name], tok=tok,
                              model=load_experts(model, expert_set(base, seed)).eval()))
            found[0]["shots"] = Shots(*shown(found[0] | dict(shots=draw_shots(tasks[name], 10, seed))),
                                      batch_size=1024)
        return found[0]
    def put(what, how):
        if not make and not (WORK.folder / f"{key}_{what}.json").is_file(): return
        out = WORK.do(f"{key}_{what}", lambda: how(case()))
        rows.update(out if what in ("no shots", "no search") else {what: out})
    for what, how in plan(dict(base=base, name=name), rates).items():
        if what != "official" or late: put(what, how)
        if what == "delta, per vector" and what in rows:
            put("no search", lambda c: no_search(c, rows["delta, per vector"]["candidates"]))
    return rows


def record():
    sets = {f"{b}/{s}": {e: json.loads(f.read_text()) for e in EXPERTS
                         if (f := WORK.folder / f"expert_{b}_{s}_{e}.json").is_file()}
            for b in TASKS for s in SEEDS}
    rows = {f"{b}/{t}": {s: r for s in SEEDS if (r := cell(b, s, t, make=False, late=True))}
            for b in TASKS for t in TASKS[b]}
    return dict(command="python benchmarks/rivals.py", experts=EXPERTS, seeds=SEEDS, n=N, search=SEARCH,
                train=TRAIN, rates=rates(make=False), sets=sets) | about() | dict(rows=rows)


def part(name):
    if name == "rates": rates()
    elif name == "official":
        for s in SEEDS: cell("A", s, "code+math", late=True)
    elif name.startswith("experts "):
        for s in SEEDS: expert_set(name[-1], s)
    else:
        for t in TASKS[name[0]]: cell(name[0], int(name[1:]), t)


PARTS = ("experts A", "experts B", "rates", *(f"{b}{s}" for b in TASKS for s in SEEDS), "official")

if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--work", default="runs/rivals", help="folder for finished pieces")
    parse.add_argument("--part", choices=[*PARTS, "write"], help="only this; without it: everything")
    parse.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rivals.json")
    a = parse.parse_args()
    WORK = Work(a.work)
    torch.set_num_threads(1)
    for p in [a.part] if a.part else PARTS:
        if p != "write": part(p)
    if a.part in (None, "write"): write_atomic(a.out, json.dumps(record()) + "\n")
