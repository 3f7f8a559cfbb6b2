"""What each departure of the official code changes in the lab: `python benchmarks/paper_departures.py`.

On lab base A, the expert of `math`. The reference is `ReinforceConfig.paper()` at the lab's scale: 20 steps of 64 rollouts and a rate chosen for it;
every other field is the paper's. Greedy answers, kept question by question so that any two can be paired: to the first 501 questions of a test split in the
verdicts, to all 1,002 elsewhere.

    tune    every variant at three rates, twice apart, on the 223 validation prompts, seeds 0 and 1; while the best is the lowest or the highest rate,
            one more beyond it, five at most. The rate is the one with most right answers; of equals the lowest
    verdict the variant at its own rate, seeds 2 to 6, on the test questions of math (what it learns) and code (what it forgets)
    control the paper's loop at the rate that was chosen for `no KL`, seeds 2, 3 and 4: is it the KL term or the rate? Asked after the verdicts were seen

and with what needs no rate of its own, seeds 0, 1 and 2:

    mixer   the official mixer (raw p) and ours (effective z) with one expert and with two, of `math` and `code`, which learned much: 30 steps of 128 rollouts
            with batch advantages, 2e-2 on p
    dose    the official mixer on experts that have learned less: 0.1 + c (p - 0.1)
    bf16    U, S and V kept in bfloat16
    start   the code's starting point, before any training
    other   "other" answered by the expert loaded last, or by the base, for two ways to classify and two orders of the prompts
    leak    a classifier trained on its test prompts, and one trained on others

Variants, rates, seeds and the rule that chooses were fixed before any test question was asked. The last step of a run is kept: training is compared, not
selection. Rates are for z; where p is learned they are doubled, which moves sigmoid(p) by as much. Interrupted, it goes on from the record written so far; two
processes may share one record. More verdict seeds later: `--seeds 2 3 4 5 6 7 8`.
"""
import argparse, fcntl, json, platform, random, time
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import peft, torch, transformers
from peft import get_peft_model

from pieces import RECORDS
from transformer2_nbdev import lab
from transformer2_nbdev.adapt import fixed, load_experts
from transformer2_nbdev.adapter import SvfConfig, svf_layers
from transformer2_nbdev.paper import export_official, load_official
from transformer2_nbdev.classifier import Classifier
from transformer2_nbdev.evaluate import evaluate, mcnemar, pack, unpack, write_atomic
from transformer2_nbdev.prompt import Dispatch
from transformer2_nbdev.reinforce import ReinforceConfig, train_expert
from transformer2_nbdev.svf import compose

SEEDS = (0, 1, 2)                                                              # of all but the verdicts and their tuning
TUNE_SEEDS, VERDICT_SEEDS = (0, 1), (2, 3, 4, 5, 6)
SCALE = dict(steps=20, batch_size=64, val_every=0, val_limit=1)                # all that differs from ReinforceConfig.paper(), beside lr and seed
RATES, MOST = (1e-2, 2e-2, 4e-2), 5                                            # for z; how many rates are tried at most
SIGMOID = dict(parametrization="sigmoid", preserve_nuclear_norm=True)
MLP = dict(target_modules="mlp")
BACKWARD = dict(kl_of="base", kl_path=False)                                   # the code differentiates the divergence along the answer, not its choice
VARIANTS = {                                                                   # name: (fields of SvfConfig, fields of ReinforceConfig)
    "paper":             ({}, {}),
    "MLP only":          (MLP, {}),
    "attention only":    (dict(target_modules="attention"), {}),
    "sigmoid":           (SIGMOID, {}),
    "sigmoid, MLP only": (SIGMOID | MLP, {}),
    "greedy":            ({}, dict(temperature=0.)),
    "no cosine":         ({}, dict(schedule="constant")),
    "no KL":             ({}, dict(kl=0.)),
    "reversed KL":       ({}, BACKWARD),
    "code":              (SIGMOID | MLP | dict(init_std=1e-2), dict(temperature=0., schedule="constant", kl=0.) | BACKWARD),
    "code, raw mixer":   (SIGMOID | MLP | dict(init_std=1e-2), dict(temperature=0., schedule="constant", kl=0.) | BACKWARD),
    "batch advantage":   ({}, dict(advantage="batch")),                        # an option of the code, off by default: no departure
    "4 samples":         ({}, dict(samples=4))}                                # of 16 prompts instead of one of 64: no departure either
MIXED = dict(steps=30, batch_size=128, rollout_batch=128, lr=2e-2, schedule="cosine", kl=0.1, advantage="batch")
LEAK = MIXED | dict(steps=10, batch_size=64, lr=1e-2)
SKILLS = ("math", "code", "logic")
ASKED = dict(ask=lambda p: f"{p} which skill ?", say=lambda label: f"\\boxed{{ {label} }}", other="other", max_new_tokens=4)
N_TEST = 501
PARTS = ("tune", "verdict", "control", "mixer", "dose", "bf16", "start", "other", "leak")


def against(base: list, right: list) -> dict:
    "What is kept of an evaluation: who was right, and the paired comparison"
    gained, lost = (sum(x and not y for x, y in zip(*two)) for two in ((right, base), (base, right)))
    return dict(correct=sum(right), n=len(right), gained=gained, lost=lost, p=float(f"{mcnemar(gained, lost):.3g}"), right=pack(right))

def score(model, task, strategy=None, split="test", limit=None) -> list:
    return [i["correct"] for i in evaluate(model, TOK, task, strategy, split=split, limit=limit, batch_size=334, progress=False).items]

def half(model, task, strategy=None) -> list: return score(model, task, strategy, limit=N_TEST)

def train(svf: dict, task, **kw): # kw: fields of ReinforceConfig, the seed among them
    "(model with the last step's expert, metrics)"
    torch.manual_seed(kw["seed"])
    model, steps = get_peft_model(lab.load("A")[0], SvfConfig(**svf)), iter(range(10 ** 6))
    config = ReinforceConfig(**dict(val_every=0, val_limit=1) | kw)
    history = train_expert(model, TOK, task, config, eval_fn=lambda model, tok: next(steps), progress=False)
    return model.eval(), history.metrics[1:]


def reference(**kw) -> dict: # fields of ReinforceConfig
    "The paper's loop at the lab's scale"
    return asdict(ReinforceConfig.paper(**SCALE | kw))

def grid(name) -> list:
    "The first three rates of a variant: doubled for p, and a twentieth for the mixer that multiplies what was learned by twenty"
    factor = 2 if VARIANTS[name][0].get("parametrization") else 1
    return [r * factor / (20 if "mixer" in name else 1) for r in RATES]

def surface(done, name) -> dict: # {rate: right answers on validation, seed by seed}, of the rates that are done
    "What the tuning of a variant has found so far"
    found = {}
    for k, v in done.items():
        if k.startswith(f"tune/{name}/"): found.setdefault(float(k.split("/")[2]), {})[int(k.split("/")[3])] = v["correct"]
    return {r: [c[s] for s in TUNE_SEEDS] for r, c in sorted(found.items()) if set(c) >= set(TUNE_SEEDS)}

def best_rate(found: dict) -> float: return max(found, key=lambda r: (sum(found[r]), -r))

def wanted(done, name) -> list: # rates still to try
    "The first three, then one beyond the best while that is at an end"
    found = surface(done, name)
    if first := [r for r in grid(name) if float(f"{r:g}") not in found]: return first
    best, low, high = best_rate(found), min(found), max(found)
    if len(found) == MOST or low < best < high: return []
    return [low / 2 if best == low else high * 2]

def tuned(done, name) -> float: return best_rate(surface(done, name))

def run(done, name, rate, seed):
    "(model, metrics): a variant trained; with the raw mixer, the weights which that makes of it"
    svf, kw = VARIANTS[name]
    model, metrics = train(svf, TASKS["math"], **reference(lr=rate, seed=seed) | kw)
    return (raw_mixer(model, dict(default=1.)) if "mixer" in name else model), metrics

def tune(done, name, rate, seed) -> dict:
    model, metrics = run(done, name, rate, seed)
    right = score(model, TASKS["math"], split="validation")
    return dict(correct=sum(right), n=len(right), reward=round(metrics[-1]["reward"], 4), kl=round(metrics[-1]["kl"], 4))

def verdict(done, name, seed, rate=None) -> dict: # rate: None takes the one chosen
    rate = rate or tuned(done, name)
    model, metrics = run(done, name, rate, seed)
    return dict(lr=rate, reward=[round(m["reward"], 4) for m in metrics], kl=round(metrics[-1]["kl"], 4),
                tasks={t: against(base_of(done, t, N_TEST), half(model, TASKS[t])) for t in ("math", "code")})

def base_scores(done) -> dict:
    model = lab.load("A")[0]
    return {t: dict(correct=sum(r), n=len(r), right=pack(r)) for t in (*SKILLS, "copy", "cls") for r in [score(model, TASKS[t])]}

def base_of(done, task, n=1002) -> list: return unpack(done["base"][task]["right"])[:n]

def start(done, std, seed) -> dict:
    torch.manual_seed(seed)
    model = get_peft_model(lab.load("A")[0], SvfConfig(target_modules="mlp", init_std=std, **SIGMOID)).eval()
    return against(base_of(done, "math"), score(model, TASKS["math"]))


def raw_mixer(model, alphas: dict):
    "The lab's base with the weights that the official mixer composes: sum a p in the place of sigmoid(p), then the nuclear norm restored"
    bare = lab.load("A")[0]
    for name, layer in svf_layers(model).items():
        raw = sum(a * layer.svf_d[e].detach() for e, a in alphas.items())
        weight, S = bare.get_submodule(name).weight, layer.svf_S
        weight.data = compose(weight.data, raw * S.sum() / (S * raw).sum(), layer.svf_Q)
    return bare

def expert(task, seed) -> Path:
    "An expert of the sigmoid on the MLP that has learned much, in the official format"
    folder = WORK / f"{task}-{seed}"
    if not folder.is_dir(): export_official(train(SIGMOID | MLP, TASKS[task], seed=seed, **MIXED)[0], folder)
    return folder

def mixer(done, seed) -> dict:
    "Two experts through the official files, mixed in both ways"
    model = load_official(expert("math", seed), lab.load("A")[0], "math")
    model = load_official(expert("code", seed), model, "code").eval()
    out = {}
    for weights in ((1., 0.), (0., 1.), (.5, .5)):
        alphas = dict(zip(("math", "code"), weights))
        bare = raw_mixer(model, alphas)
        for t in ("math", "code"):
            ours, theirs = score(model, TASKS[t], fixed(alphas, form="sum")), score(bare, TASKS[t])
            out[f"{weights[0]:g} math + {weights[1]:g} code, {t}"] = dict(ours=against(base_of(done, t), ours), theirs=against(ours, theirs))
    if seed == SEEDS[0]: # enough to mix them again
        out["experts"] = {e: {n: [float(f"{x:.4g}") for x in l.svf_d[e].tolist()] for n, l in svf_layers(model).items()} for e in ("math", "code")}
    return out


@torch.no_grad()
def dose(done, seed) -> dict:
    "The math expert at a share c of what it has learned, alone in each mixer"
    model, out = load_official(expert("math", seed), lab.load("A")[0], "math").eval(), {}
    learned = {n: l.svf_d["math"] - 0.1 for n, l in svf_layers(model).items()}
    for c in (.05, .1, .2, .5):
        for n, l in svf_layers(model).items(): l.svf_d["math"].copy_(0.1 + c * learned[n])
        ours, theirs = score(model, TASKS["math"]), score(raw_mixer(model, dict(math=1.)), TASKS["math"])
        out[f"{c:g}"] = dict(ours=against(base_of(done, "math"), ours), theirs=against(ours, theirs))
    return out | dict(rms=round(torch.cat(list(learned.values())).square().mean().sqrt().item(), 4))


def stream(order: list, labels: list, sticky: bool) -> list: # who answers each prompt, in the order of the prompts
    "Follow a stream of prompts; `sticky`: `other` keeps whatever is loaded"
    who, on = [None] * len(labels), None
    for i in order:
        if labels[i] in SKILLS: on = labels[i]
        who[i] = labels[i] if labels[i] in SKILLS else on if sticky else None
    return who

def other(done) -> dict:
    "Every prompt answered by everyone once; a stream is then a matter of looking up"
    folders, kinds = lab.experts("A"), (*SKILLS, "copy")
    model = load_experts(lab.load("A")[0], {s: folders[s] for s in (*SKILLS, "cls")}).eval()
    right = {s: [r for t in kinds for r in score(model, TASKS[t], fixed({s: 1.}))] for s in SKILLS} | {None: [r for t in kinds for r in base_of(done, t)]}
    prompts = [TASKS[t].prompt(e) for t in kinds for e in TASKS[t].examples("test")]
    n, out = len(prompts) // 4, {"copy": {s: against(base_of(done, "copy"), r[-1002:]) for s, r in right.items() if s}}
    for how, kind in dict(prompt=Dispatch, classifier=Classifier).items():
        said = kind(model, TOK, {s: s for s in SKILLS}, **ASKED).classify(prompts)
        orders = {"task by task": list(range(4 * n))} | {f"shuffled, seed {s}": random.Random(s).sample(range(4 * n), 4 * n) for s in SEEDS}
        out[how] = dict(other={t: sum(s not in SKILLS for s in said[i * n:][:n]) for i, t in enumerate(kinds)}, n=n)
        for order, rows in orders.items():
            a, b = ([right[w][i] for i, w in enumerate(stream(rows, said, sticky))] for sticky in (False, True))
            out[how][order] = {t: against(a[i * n:][:n], b[i * n:][:n]) for i, t in enumerate(kinds)}
    return out


def leak(done, n, split, seed) -> dict:
    "A classifier trained on n prompts of one split (all of it: None), tested on all test prompts and on those it has seen"
    examples = list(TASKS["cls"].examples(split))
    rows = random.Random(seed).sample(range(len(examples)), n) if n else range(len(examples))
    task = replace(TASKS["cls"], examples=lambda s: [examples[i] for i in rows] if s == "train" else TASKS["cls"].examples(s))
    model, _ = train({}, task, seed=seed, **LEAK)
    return against(base_of(done, "cls"), score(model, TASKS["cls"])) | dict(seen=list(rows) if n and split == "test" else None)


def half_factors(W, s=None): # s: sigmoid(p), (r,); None: 1
    "W' as the official code composes it: factors and products in bfloat16"
    U, S, Vh = (x.bfloat16() for x in torch.linalg.svd(W.double(), full_matrices=False))
    scaled = S if s is None else S * s.bfloat16()
    return ((U * scaled) @ Vh * (S.sum() / scaled.sum())).float()

@torch.no_grad()
def bf16(done) -> dict:
    "The base rebuilt from bfloat16 factors, and the three experts composed from them"
    model, errors = lab.load("A")[0], []
    for name, m in model.named_modules():
        if isinstance(m, torch.nn.Linear) and ".mlp." in name:
            W = half_factors(m.weight); errors.append(((W - m.weight).norm() / m.weight.norm()).item()); m.weight.data = W
    out = dict(error=[round(e, 6) for e in errors], base={t: against(base_of(done, t), score(model, TASKS[t])) for t in SKILLS}, expert={})
    for seed in SEEDS:
        one, bare = load_official(expert("math", seed), lab.load("A")[0]).eval(), lab.load("A")[0]
        exact = score(one, TASKS["math"])
        for name, layer in svf_layers(one).items():
            m = bare.get_submodule(name)
            m.weight.data = half_factors(m.weight, layer.svf_d["default"].sigmoid())
        out["expert"][str(seed)] = against(exact, score(bare, TASKS["math"]))
    return out


def pieces(done, parts, names, seeds) -> dict: # {name: function of what is done}
    "What can be done now, what others need first"
    todo = dict(base=base_scores)
    for v in names:
        todo |= {f"tune/{v}/{r:g}/{s}": (lambda d, v=v, r=r, s=s: tune(d, v, r, s)) for r in wanted(done, v) for s in TUNE_SEEDS}
        if not wanted(done, v): todo |= {f"verdict/{v}/{s}": (lambda d, v=v, s=s: verdict(d, v, s)) for s in seeds}
    if not wanted(done, "no KL"): todo |= {f"control/{s}": (lambda d, s=s: verdict(d, "paper", s, tuned(d, "no KL"))) for s in VERDICT_SEEDS[:3]}
    todo |= {f"{kind.__name__}/{s}": (lambda d, kind=kind, s=s: kind(d, s)) for kind in (mixer, dose) for s in SEEDS} | dict(bf16=bf16)
    todo |= {f"start/{std:g}/{s}": (lambda d, std=std, s=s: start(d, std, s)) for std in (1e-3, 1e-2) for s in SEEDS}
    todo |= dict(other=other)
    todo |= {f"leak/{n or 'all'}/{split}/{s}": (lambda d, n=n, split=split, s=s: leak(d, n, split, s)) for n in (16, None) for split in ("train", "test") for s in SEEDS}
    return {k: f for k, f in todo.items() if k not in done and (k == "base" or k.split("/")[0] in parts)}

@contextmanager
def shared(path: Path):
    "The record as it is now, for one process at a time; written back afterwards"
    WORK.mkdir(parents=True, exist_ok=True)
    with open(WORK / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = json.loads(path.read_text()) if path.is_file() else dict(seconds=0, pieces={})
        yield record
        write_atomic(path, json.dumps(record) + "\n")

def describe(record) -> None:
    "What was done, beside the results"
    done, config = record["pieces"], ReinforceConfig.paper()
    scale = {f.name: getattr(config, f.name) for f in fields(config) if f.name in SCALE}
    record |= dict(command="python benchmarks/paper_departures.py", base="A", reference=reference(lr=RATES[0]), paper_scale=scale,
                   seeds=dict(tune=TUNE_SEEDS, rest=SEEDS), variants={k: dict(svf=s, reinforce=r) for k, (s, r) in VARIANTS.items()},
                   surface={v: {f"{r:g}": c for r, c in surface(done, v).items()} for v in VARIANTS}, n_validation=223, n_test=N_TEST,
                   processor=platform.processor() or platform.machine(), threads=1,
                   versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__))

def main(a):
    torch.set_num_threads(1)
    began = time.perf_counter()
    while time.perf_counter() - began < a.minutes * 60:
        with shared(a.out) as record: done = record["pieces"]
        if not (todo := pieces(done, a.parts, a.variants, a.seeds)): break
        name, start = next(iter(todo)), time.process_time()
        made = todo[name](done)
        took = time.process_time() - start
        with shared(a.out) as record:
            record["pieces"][name] = made
            record["seconds"] = round(record["seconds"] + took)
            describe(record)
        print(f"{time.strftime('%H:%M:%S')} {name} {took:.0f} s {json.dumps(made)[:160]}", flush=True)


if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parse.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parse.add_argument("--seeds", type=int, nargs="+", default=list(VERDICT_SEEDS), help="of the verdicts")
    parse.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so long")
    parse.add_argument("--work", type=Path, default=Path("runs/paper-departures"), help="folder for the experts, in the official format")
    parse.add_argument("--out", type=Path, default=RECORDS / "paper-departures.json")
    a = parse.parse_args()
    WORK, (_, TOK, TASKS) = a.work, lab.load("A")
    main(a)
