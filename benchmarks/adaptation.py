"""Ways to adapt with a few examples, measured in the lab: `python benchmarks/adaptation.py`.

Two bases, three sets of experts each. On base A set 0 is the one that ships; all others are trained
here (REINFORCE, 30 steps of 128 rollouts, the best of six validations kept), seeds 1 and 2 on A and 0,
1 and 2 on B. Seed s means expert set s *and* draw s of ten shots, so that a spread over seeds holds
both. Everything is answered greedily on the first 501 test questions of the three unseen tasks and of
code+math, which needs two skills:

    no shots    base, each expert, `told` (the expert of the task's own skill); on A also prompt and
                classifier dispatch; every expert at 1/3 and at 0.6
    no search   on ten shots: the best expert, the best expert and strength, the best even strength,
                as many random mixtures as the search below has looked at, the shots in the prompt
    search      ours (delta, per vector) until it converges; on A also per layer, the paper's `sum`
                per vector, with weights of sum one, the one of these four that two-fold
                cross-validation prefers, and the official search with all its settings (50
                generations, weights for every matrix; math-hard and code+math only)
    training    z, IA3 and LoRA r16 on the gold answers of the ten shots: 100 steps, as in the paper's
                Table 10; the learning rate is chosen on another task, logic+math (validation
                questions, two draws of shots, base A)
    shots       on A, math-hard and code+math: ours, the best strength and IA3 on 3 and 20 shots

Settings, seeds, rates and stopping rules were fixed before a test question was answered. The record
benchmarks/results/adaptation.json holds which questions each row got right, so any two can be paired.
Every finished piece is a small file in the work folder; interrupted, the script goes on from there.
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
from transformer2_nbdev.classifier import Classifier
from transformer2_nbdev.evaluate import evaluate, write_atomic
from transformer2_nbdev.fewshot import (OFFICIAL, BestOf, FewShot, Shots, Strength, best_first, draw_shots,
                                        evens, folds, held_back, in_context, random_mixtures)
from transformer2_nbdev.prompt import Dispatch
from transformer2_nbdev.reinforce import ReinforceConfig, sft, train_expert
from transformer2_nbdev.svf import is_target

EXPERTS, SEEDS, N = ["math", "code", "logic"], (0, 1, 2), 501
TASKS = (*lab.UNSEEN, "code+math")
SEARCH = dict(population=32, generations=40, tol=.01, patience=10)
QUICK = dict(SEARCH, generations=8)                                   # of the cross-validation
AMONG = {"delta, per vector": {}, "delta, per layer": dict(per_layer=True), "sum, per vector": dict(form="sum"),
         "sum, per vector, normalised": dict(form="sum", normalise=True)}
TRAIN = dict(steps=30, batch_size=128, rollout_batch=128, val_every=5, val_limit=300)
TUNE, GRID, DRAWS = "logic+math", (1e-3, 3e-3, 1e-2, 3e-2), (100, 101)
WORDING = dict(ask=lambda p: f"{p} which skill ?", say=lambda label: f"\\boxed{{ {label} }}",
               other="other", max_new_tokens=4, batch_size=256)
MADE = {                                                              # adapters trained on the shots
    "z":        lambda names: SvfConfig(target_modules=names),
    "IA3":      lambda names: IA3Config(target_modules=names, feedforward_modules=[n for n in names if is_target(n, "mlp")]),
    "LoRA r16": lambda names: LoraConfig(target_modules=names, task_type="CAUSAL_LM", r=16, lora_alpha=32)}
FOLDERS = {}                                                          # {(base, seed): {expert: folder}}


def world(base): return lab.load(base)


def trained(base, seed, skill):
    "One expert, saved in the work folder"
    folder = WORK.folder / "experts" / f"{base}-{seed}" / skill
    def make():
        torch.manual_seed(seed)
        model, tok, tasks = world(base)
        model = get_peft_model(model, SvfConfig())
        h = train_expert(model, tok, tasks[skill], ReinforceConfig(seed=seed, **TRAIN), progress=False)
        model.save_pretrained(folder)
        return dict(val=h.result["acc"], before=h.metrics[0]["val_accuracy"], kept_step=h.best_step)
    return str(folder), WORK.do(f"expert_{base}_{seed}_{skill}", make)


def experts_of(base, seed, record):
    "{skill: folder} of one set"
    if (base, seed) == ("A", 0): return {e: lab.experts("A")[e] for e in EXPERTS}
    made = {e: trained(base, seed, e) for e in EXPERTS}
    record[f"{base}/{seed}"] = {e: facts for e, (_, facts) in made.items()}
    return {e: folder for e, (folder, _) in made.items()}


def answered(case, strategy=None, task=None):
    "Right answers to the first N test questions"
    r = evaluate(case["model"], case["tok"], task or case["task"], strategy, limit=N, batch_size=167, progress=False)
    return dict(correct=r.correct, n=r.n, right=pack(r.items))


def rounded(w): return [[round(x, 4) for x in r] if isinstance(r, list) else round(r, 4) for r in w.tolist()]

def row(case, s, **kw): return dict(weights=rounded(s.weights), **kw) | answered(case, s)


def no_shots(case):
    "Rows that need no examples"
    rows = {"base": fixed([0.] * 3, EXPERTS)} | {f"{e} expert": fixed({e: 1.}) for e in EXPERTS}
    rows |= {"even, 1/3": fixed([1 / 3] * 3, EXPERTS), "even, 0.6": fixed([.6] * 3, EXPERTS)}
    if case["base"] == "A":
        labels = {e: e for e in EXPERTS}
        rows |= {"prompt": Dispatch(case["model"], case["tok"], labels, **WORDING),
                 "classifier": Classifier(case["model"], case["tok"], labels, **WORDING)}
    out = {k: answered(case, s) for k, s in rows.items()}
    skill = lab.KINDS[case["name"]].label
    return out | ({"told": out[f"{skill} expert"]} if skill else {})


def searched(case, kw, **search):
    "One variant of the search, fitted on all shots"
    f = FewShot(case["model"], case["tok"], case["task"], case["shots"], EXPERTS, seed=case["seed"], **SEARCH | kw | search)
    return row(case, f, shot_score=rounded(f.found.score), why=f.found.why, generations=len(f.found.history),
               candidates=sum(len(h["population"]) for h in f.found.history))


def no_search(case, candidates):
    "The best of a list, and the shots in the prompt"
    args = case["model"], case["tok"], case["task"], case["shots"]
    lists = {"even, scaled": evens(3), "random": random_mixtures(3, candidates, seed=case["seed"])}
    rows = {"single": Strength(*args, EXPERTS, scales=[1.]), "scaled": Strength(*args, EXPERTS)}
    rows |= {k: BestOf(*args, tried, EXPERTS) for k, tried in lists.items()}
    shown = in_context(case["task"], case["shots"].shots[:3], between=" <eos> <bos> ")
    return {k: row(case, s) for k, s in rows.items()} | {"3 shots in the prompt": answered(case, fixed([0.] * 3, EXPERTS), shown)}


def fine_tune(base, method, shots, lr, seed, task):
    "An adapter trained on the gold answers of the shots; the last step is kept"
    torch.manual_seed(seed)
    model, tok, _ = world(base)
    names = sorted(resolve_targets(SvfConfig(), model))
    model, steps = get_peft_model(model, MADE[method](names)), iter(range(10 ** 6))
    few = replace(task, examples=lambda split: shots)
    config = ReinforceConfig(steps=100, batch_size=len(shots), rollout_batch=len(shots), lr=lr, val_every=0,
                             val_samples=1, val_temperature=0., seed=seed)
    sft(model, tok, few, config, eval_fn=lambda m, t: next(steps), progress=False)
    return model.eval(), tok


def rates():
    "The learning rate of each method, chosen on another task"
    task, out = world("A")[2][TUNE], {}
    def accuracy(method, lr, seed):
        model, tok = fine_tune("A", method, draw_shots(task, 10, seed), lr, seed, task)
        return round(evaluate(model, tok, task, split="validation", limit=150, batch_size=150, progress=False).acc, 4)
    for m in MADE:
        tried = {lr: [WORK.do(f"rate_{m}_{lr:g}_{s}", lambda: accuracy(m, lr, s)) for s in DRAWS] for lr in GRID}
        out[m] = dict(lr=max(GRID, key=lambda lr: sum(tried[lr])), tried={f"{lr:g}": v for lr, v in tried.items()})
    return out


def trained_on_shots(case, method, lr):
    model, tok = fine_tune(case["base"], method, case["shots"].shots, lr, case["seed"], case["task"])
    return dict(lr=lr) | answered(dict(case, model=model, tok=tok))


def chosen(case):
    "The variant that two-fold cross-validation on the shots prefers"
    hands = folds(len(case["shots"]), 2, case["seed"])
    held = {v: held_back(case["model"], case["tok"], case["task"], case["shots"], hands, experts=EXPERTS,
                         seed=case["seed"], **QUICK | kw).tolist() for v, kw in AMONG.items()}
    return dict(variant=list(AMONG)[best_first(torch.tensor(list(held.values())))[0]], held_back=held)


def ten(case, lrs):
    "All rows of one base, seed and task"
    key = f"{case['base']}_{case['seed']}_{case['name']}"
    do = lambda what, make: WORK.do(f"{key}_{what}", make)
    out = do("no shots", lambda: no_shots(case))
    ours = do("delta, per vector", lambda: searched(case, {}))
    out |= {"delta, per vector": ours} | do("no search", lambda: no_search(case, ours["candidates"]))
    for m in MADE: out[f"{m} on the shots"] = do(m, lambda: trained_on_shots(case, m, lrs[m]["lr"]))
    if case["base"] == "A":
        for v, kw in AMONG.items():
            if v != "delta, per vector": out[v] = do(v, lambda: searched(case, kw))
        pick = do("chosen", lambda: chosen(case))
        out["chosen"] = out[pick["variant"]] | pick
        if case["name"] in ("math-hard", "code+math"): out["official"] = do("official", lambda: official(case))
    return out


def official(case):
    own = Shots(case["model"], case["tok"], case["task"], case["shots"].shots, tie="own", batch_size=1024)
    return searched(dict(case, shots=own), OFFICIAL, patience=None)


def other_counts(case, lrs):
    "Ours, the best strength and IA3 on 3 and 20 shots"
    out = {}
    for n in (3, 20):
        some = dict(case, shots=shots_for(case, n))
        def make(): return {"delta, per vector": searched(some, {}), "scaled": row(some, Strength(*(some[k] for k in ("model", "tok", "task", "shots")), EXPERTS)),
                            "IA3 on the shots": trained_on_shots(some, "IA3", lrs["IA3"]["lr"])}
        out[n] = WORK.do(f"{case['base']}_{case['seed']}_{case['name']}_{n} shots", make)
    return out


def shots_for(case, n): return Shots(case["model"], case["tok"], case["task"], draw_shots(case["task"], n, case["seed"]), batch_size=1024)


def main(a):
    torch.set_num_threads(1)
    sets, rows, counts = {}, {}, {}
    lrs = rates()
    for base in ("A", "B"):
        for seed in SEEDS:
            model, tok, tasks = world(base)
            folders = experts_of(base, seed, sets) | ({"cls": lab.experts("A")["cls"]} if base == "A" else {})
            case = dict(base=base, seed=seed, tok=tok, model=load_experts(model, folders).eval())
            for name in TASKS:
                case |= dict(name=name, task=tasks[name])
                case["shots"] = shots_for(case, 10)
                rows.setdefault(f"{base}/{name}", {})[seed] = ten(case, lrs)
                if base == "A" and name in ("math-hard", "code+math"): counts.setdefault(name, {})[seed] = other_counts(case, lrs)
    facts = dict(command="python benchmarks/adaptation.py", experts=EXPERTS, seeds=SEEDS, n=N, search=SEARCH,
                 among=list(AMONG), train=TRAIN, rates=lrs, sets=sets, cpu_seconds=WORK.cpu_seconds())
    write_atomic(a.out, json.dumps(facts | about() | dict(rows=rows, counts=counts)) + "\n")


if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--work", default="runs/adaptation", help="folder for finished pieces")
    parse.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "adaptation.json")
    a = parse.parse_args()
    WORK = Work(a.work)
    main(a)
