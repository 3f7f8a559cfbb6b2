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
                paper's Table 10, at the rates that room 15 found best for answers; math-hard and
                code+math. On base A and set 0 also at 3 and 0.3 times those rates
    official    the official search with all its settings (50 generations, weights for every
                matrix), code+math of base A

Settings, seeds, rates and stopping rules were fixed before a test question was answered. The record
The record, rivals.json, holds which questions each row got right, so any two can be paired.
Every finished piece is a small file in the work folder; interrupted, the script goes on from there.
`--part NAME` makes one part, `--part write` the record of what is there.
"""
import argparse, json
from dataclasses import replace
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, get_peft_model

from pieces import RECORDS, Work, about
from transformer2_nbdev import lab
from transformer2_nbdev.adapt import fixed, load_experts
from transformer2_nbdev.adapter import SvfConfig, resolve_targets
from transformer2_nbdev.evaluate import evaluate, pack, write_atomic
from transformer2_nbdev.fewshot import (OFFICIAL, BestOf, FewShot, Shots, Strength, draw_shots,
                                        evens, in_context, random_mixtures)
from transformer2_nbdev.reinforce import ReinforceConfig, sft, train_expert
from transformer2_nbdev.svf import is_target

EXPERTS, SEEDS, N = ["math", "code", "logic"], (0, 1, 2), 501
WIDE = ("math-hard", "code+math")                      # the tasks of base B, and of what costs more
TASKS = dict(A=(*lab.UNSEEN, "code+math"), B=WIDE)
SEARCH = dict(population=32, generations=40, tol=.01, patience=10)
TRAIN = dict(batch_size=192, rollout_batch=96, lr=1e-2, kl=.1, steps=30, val_every=5, val_limit=300,
             patience=4, advantage="batch")            # those of the shipped experts
RATES = {"z": 1e-2, "IA3": 1e-2, "LoRA r16": 1e-3}      # of room 15, next-token loss
BETWEEN = " <eos> <bos> "


def ia3(names):
    feedforward = [n for n in names if is_target(n, "mlp")]
    return IA3Config(target_modules=names, feedforward_modules=feedforward)

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
        config = ReinforceConfig(seed=seed, **TRAIN)
        h = train_expert(model, tok, tasks[skill], config, progress=False)
        model.save_pretrained(folder)
        before = h.metrics[0]["val_accuracy"]
        return dict(before=before, after=h.result["acc"], kept_step=h.best_step)
    return str(folder), WORK.do(f"expert_{base}_{seed}_{skill}", make)


def expert_set(base, seed):
    "{skill: folder}"
    if (base, seed) == ("A", 0): return {e: lab.experts("A")[e] for e in EXPERTS}
    return {e: trained(base, seed, e)[0] for e in EXPERTS}


def answered(case, strategy=None, task=None):
    "Right answers to the first N test questions"
    r = evaluate(case["model"], case["tok"], task or case["task"], strategy, limit=N,
                 batch_size=167, progress=False)
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


def no_search(case):
    "The best of a list"
    found = WORK.do(f"{case['base']}_{case['seed']}_{case['name']}_delta, per vector", None)
    looked_at = found["candidates"]
    lists = dict(even=evens(3), random=random_mixtures(3, looked_at, seed=case["seed"]))
    rows = dict(single=Strength(*shown(case), EXPERTS, scales=[1.]),
                scaled=Strength(*shown(case), EXPERTS))
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
    with_shots = in_context(task, shots[:k], BETWEEN)
    return dict(shots=k) | answered(case, fixed([0.] * 3, EXPERTS), with_shots)


def fine_tuned(base, method, shots, lr, seed, task):
    "An adapter trained on the gold answers of the shots; the last step is kept"
    torch.manual_seed(seed)
    model, tok, _ = lab.load(base)
    names, later = sorted(resolve_targets(SvfConfig(), model)), iter(range(10 ** 6))
    model = get_peft_model(model, MADE[method](names))
    config = ReinforceConfig(steps=100, batch_size=len(shots), rollout_batch=len(shots), lr=lr,
                             val_every=0, val_samples=1, val_temperature=0., seed=seed)
    few = replace(task, examples=lambda split: shots)
    sft(model, tok, few, config, eval_fn=lambda m, t: next(later), progress=False)
    return dict(model=model.eval(), tok=tok)


def official(case):
    shots = case | dict(shots=case["shots"].shots)
    own = Shots(*shown(shots), tie="own", batch_size=1024)
    return searched(dict(case, shots=own), **OFFICIAL)


def plan(base, name, seed):
    "{stage: {row or group of rows: how to make it}}"
    layers = dict(SEARCH, per_layer=True)
    def on_shots(m, lr):
        def make(c):
            made = fine_tuned(c["base"], m, c["shots"].shots, lr, c["seed"], c["task"])
            return dict(lr=lr) | answered(c | made)
        return make
    core = {"no shots": no_shots, "delta, per vector": lambda c: searched(c, **SEARCH),
            "no search": no_search, "1 in the prompt": lambda c: prompted(c, 1),
            "in the prompt": prompted}
    if name not in WIDE: return dict(more=core)
    stages = dict(core=core, train={f"{m} on the shots": on_shots(m, RATES[m]) for m in MADE})
    if base == "B": return stages
    stages |= dict(layers={"delta, per layer": lambda c: searched(c, **layers)})
    if seed == 0: stages |= dict(rates={f"{m} on the shots, rate x {k}": on_shots(m, RATES[m] * x)
                                        for m in MADE for k, x in {"3": 3, "0.3": .3}.items()})
    if name == "code+math": stages |= dict(official=dict(official=official))
    return stages


def opened(base, seed, name, found=[]):  # noqa: B006  (a cache of one)
    "A model with its experts, a task and its shots; the last one is kept"
    if not found or found[0] != (base, seed, name):
        model, tok, tasks = lab.load(base)
        case = dict(base=base, seed=seed, name=name, task=tasks[name], tok=tok,
                    model=load_experts(model, expert_set(base, seed)).eval())
        shots = draw_shots(tasks[name], 10, seed)
        case["shots"] = Shots(*shown(case | dict(shots=shots)), batch_size=1024)
        found[:] = (base, seed, name), case
    return found[1]


def cell(base, seed, name, stage=None, make=True):
    "The rows of one base, seed and task: those of one stage, or all"
    key, rows = f"{base}_{seed}_{name}", {}
    stages = plan(base, name, seed)
    for steps in stages.values() if stage is None else [stages[stage]] if stage in stages else []:
        for what, how in steps.items():
            if not make and not (WORK.folder / f"{key}_{what}.json").is_file(): continue
            out = WORK.do(f"{key}_{what}", lambda: how(opened(base, seed, name)))
            rows |= out if what in ("no shots", "no search") else {what: out}
    return rows


def record():
    sets = {f"{b}/{s}": {e: json.loads(f.read_text()) for e in EXPERTS
                         if (f := WORK.folder / f"expert_{b}_{s}_{e}.json").is_file()}
            for b in TASKS for s in SEEDS}
    rows = {f"{b}/{t}": {s: r for s in SEEDS if (r := cell(b, s, t, make=False))}
            for b in TASKS for t in TASKS[b]}
    facts = dict(command="python benchmarks/rivals.py", experts=EXPERTS, seeds=SEEDS, n=N,
                 search=SEARCH, train=TRAIN, rates=RATES, sets=sets)
    return facts | about() | dict(rows=rows)


def part(name):
    base, stage = name.split()
    for seed in SEEDS:
        if stage == "experts": expert_set(base, seed)
        else:
            for task in TASKS[base]: cell(base, seed, task, stage)


PARTS = ("A experts", "A core", "A train", "B experts", "B core", "B train", "A layers", "A rates",
         "A official", "A more")

if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--work", default="runs/rivals", help="folder for finished pieces")
    parse.add_argument("--part", choices=[*PARTS, "write"], help="only this")
    out = RECORDS / "rivals.json"
    parse.add_argument("--out", type=Path, default=out)
    a = parse.parse_args()
    WORK = Work(a.work)
    torch.set_num_threads(1)
    for p in [a.part] if a.part else PARTS:
        if p != "write": part(p)
    if a.part in (None, "write"): write_atomic(a.out, json.dumps(record()) + "\n")
