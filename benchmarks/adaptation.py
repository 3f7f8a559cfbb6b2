"""Three ways to adapt, measured in the lab: `python benchmarks/adaptation.py --work FOLDER`.

Base A with its shipped experts of math, code and logic answers 1,002 test questions of each unseen task and of code+math, greedily, as

    base, each expert, and `told` (the expert of the task's own skill)
    prompt and classifier dispatch, each by writing a label and by comparing labels; their labels on trained and unseen tasks are counted too
    for each of three draws of ten shots: the best single expert and the best scaled single expert on those shots, every variant of the few-shot
    search, and the variant that two-fold cross-validation on the shots prefers (`select` with k=2)
    for 3, 5 and 20 shots: the search over delta weights, and the two single experts

Settings of the search, shot seeds and the list of variants were fixed before any test question was answered. The record
transformer2_nbdev/data/records/adaptation.json holds which questions each row got right, so any two rows can be paired.
"""
import argparse, json, time
from pathlib import Path

import torch

from pieces import RECORDS, Work, about
from transformer2_nbdev import lab
from transformer2_nbdev.adapt import fixed, load_experts
from transformer2_nbdev.classifier import Classifier
from transformer2_nbdev.evaluate import evaluate, pack, write_atomic
from transformer2_nbdev.fewshot import FewShot, Shots, Strength, best_first, draw_shots, folds, held_back, variants
from transformer2_nbdev.prompt import Dispatch, confusion

EXPERTS = ["math", "code", "logic"]
TASKS = (*lab.UNSEEN, "code+math")
SEARCH = dict(generations=10, patience=4, population=32)
AMONG = variants() | {"delta, per vector, up to 2": dict(bounds=(0., 2.))}
WORDING = dict(ask=lambda p: f"{p} which skill ?", say=lambda label: f"\\boxed{{ {label} }}", other="other", max_new_tokens=4, batch_size=256)


def answered(name, strategy):
    "Right answers of a strategy on a task's whole test split"
    r = evaluate(MODEL, TOK, WORLD[name], strategy, batch_size=334, progress=False)
    return dict(correct=r.correct, n=r.n, right=pack(r.items))


def dispatchers():
    return {f"{kind}{how}": cls(MODEL, TOK, {e: e for e in EXPERTS}, method=method, **WORDING)
            for kind, cls in (("prompt", Dispatch), ("classifier", Classifier)) for how, method in (("", "generate"), (", compared", "score"))}


def labels(name):
    "How often each dispatcher gives each label to a task's test prompts"
    prompts = [e["prompt"] for e in WORLD[name].examples("test")]
    counts = {}
    for k, d in dispatchers().items():
        c = confusion([name] * len(prompts), d.classify(prompts), list(lab.LABELS))
        counts[k] = dict(zip(c.cols, map(int, c.counts[0])))
    return dict(n=len(prompts), counts=counts)


def whole(work, name):
    "What needs no shots"
    rows = {"base": fixed([0.] * 3, EXPERTS)} | {f"{e} expert": fixed({e: 1.}) for e in EXPERTS} | dispatchers()
    out = {k: work.do(f"{name}_{k}", lambda: answered(name, s)) for k, s in rows.items()}
    skill = lab.KINDS[name].label
    return out | ({"told": out[f"{skill} expert"]} if skill else {})


def row(name, strategy, **kw):
    return dict(weights=[[round(x, 6) for x in w] if isinstance(w, list) else round(w, 6) for w in strategy.weights.tolist()], **kw) | answered(name, strategy)


def singles(name, shots):
    "The best expert on the shots, as it is and scaled"
    return {"single": row(name, Strength(MODEL, TOK, WORLD[name], shots, EXPERTS, scales=[1.])), "scaled": row(name, Strength(MODEL, TOK, WORLD[name], shots, EXPERTS))}


def searched(name, shots, seed, kw):
    "One variant: fitted on all shots"
    f = FewShot(MODEL, TOK, WORLD[name], shots, EXPERTS, seed=seed, **SEARCH | kw)
    return row(name, f, shot_score=[round(x, 4) for x in f.found.score.tolist()], generations=len(f.found.history))


def ten(work, name, seed):
    "All variants on one draw of ten shots, and the one that cross-validation prefers"
    shots, key = Shots(MODEL, TOK, WORLD[name], draw_shots(WORLD[name], 10, seed), batch_size=1024), f"{name}_10_{seed}"
    out = work.do(f"{key}_singles", lambda: singles(name, shots))
    fits = {v: work.do(f"{key}_{v}", lambda: searched(name, shots, seed, kw)) for v, kw in AMONG.items()}
    hands = folds(10, 2, seed)
    held = {v: work.do(f"{key}_{v}_held", lambda: held_back(MODEL, TOK, WORLD[name], shots, hands, experts=EXPERTS, seed=seed, **SEARCH | kw).tolist()) for v, kw in AMONG.items()}
    chosen = list(AMONG)[best_first(torch.tensor(list(held.values())))[0]]
    return dict(shots=10, seed=seed, rows=out | {v: f | dict(held_back=[round(x, 4) for x in held[v]]) for v, f in fits.items()}, chosen=chosen)


def fewer_or_more(work, name, n, seed):
    "The plain search and the single experts on another number of shots"
    def make():
        shots = Shots(MODEL, TOK, WORLD[name], draw_shots(WORLD[name], n, seed), batch_size=1024)
        return singles(name, shots) | {"delta, per vector": searched(name, shots, seed, AMONG["delta, per vector"])}
    return dict(shots=n, seed=seed, rows=work.do(f"{name}_{n}_{seed}", make))


def main(a):
    began, work = time.perf_counter(), Work(a.work)
    record = dict(command="python benchmarks/adaptation.py", base="A", experts=EXPERTS, search=SEARCH, seeds=a.seeds, variants=list(AMONG), tasks={}, labels={})
    for name in TASKS: record["tasks"][name] = dict(whole=whole(work, name), shots=[])
    for name in (*lab.TRAINED, *TASKS): record["labels"][name] = work.do(f"labels_{name}", lambda: labels(name))
    for seed in a.seeds:
        for name in TASKS: record["tasks"][name]["shots"].append(ten(work, name, seed))
    for seed in a.seeds:
        for n in (3, 5, 20):
            for name in TASKS: record["tasks"][name]["shots"].append(fewer_or_more(work, name, n, seed))
    record |= dict(seconds=round(time.perf_counter() - began)) | about()
    write_atomic(a.out, json.dumps(record) + "\n")


if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--work", default="runs/adaptation", help="folder for finished pieces")
    parse.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="draws of shots")
    parse.add_argument("--out", type=Path, default=RECORDS / "adaptation.json")
    a = parse.parse_args()
    torch.set_num_threads(1)
    MODEL, TOK, WORLD = lab.load("A")
    MODEL = load_experts(MODEL, {e: lab.experts("A")[e] for e in (*EXPERTS, "cls")})
    main(a)
