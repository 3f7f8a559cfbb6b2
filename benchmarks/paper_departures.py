"""What each departure of the official code changes in the lab: `python benchmarks/paper_departures.py`.

On lab base A, seeds 0, 1 and 2, greedy answers to whole test splits (1,002 questions), each row kept question by question so that any two can be paired:

    loop    an expert of `math`, 30 steps of 128 rollouts: as the paper describes it (with a reward baseline), and after one change at a time toward
            the code (which numbers are learned and where, greedy rollouts, no baseline, no cosine, no KL term, the reversed KL), then all of them
    start   the code's starting point, before any training
    mixer   the official mixer (raw p) and ours (effective z) with one expert and with two, of `math` and `code`
    dose    the official mixer on experts that have learned less: 0.1 + c (p - 0.1)
    other   "other" answered by the expert loaded last, or by the base, for two ways to classify and two orders of the prompts
    leak    a classifier trained on its test prompts, and one trained on others
    bf16    U, S and V kept in bfloat16

The last step of a run is kept: training is compared, not selection. Learning rates are 1e-2 on z and 2e-2 on p, which moves sigmoid(p) by as much;
the paper's 2e-3 and clipping at 1e-3 move nothing in so few steps. Interrupted, it goes on from the record it has written so far.
"""
import argparse, json, platform, random, time
from dataclasses import replace
from pathlib import Path

import peft, torch, transformers
from peft import get_peft_model

from transformer2_nbdev import lab
from transformer2_nbdev.adapt import fixed, load_experts
from transformer2_nbdev.adapter import SvfConfig, svf_layers
from transformer2_nbdev.paper import export_official, load_official
from transformer2_nbdev.classifier import Classifier
from transformer2_nbdev.evaluate import evaluate, mcnemar, write_atomic
from transformer2_nbdev.prompt import Dispatch
from transformer2_nbdev.reinforce import ReinforceConfig, train_expert
from transformer2_nbdev.svf import compose

SEEDS = (0, 1, 2)
SIGMOID = dict(parametrization="sigmoid", preserve_nuclear_norm=True)
PAPER = dict(steps=30, batch_size=128, rollout_batch=128, lr=1e-2, schedule="cosine", kl=0.1, kl_of="policy", temperature=1., advantage="batch")
CODE = dict(temperature=0., advantage="none", schedule="constant", kl=0., kl_of="base")
VARIANTS = {                                                                  # name: (fields of SvfConfig, fields of ReinforceConfig)
    "paper":             ({}, {}),
    "MLP only":          (dict(target_modules="mlp"), {}),
    "sigmoid":           (SIGMOID, dict(lr=2e-2)),
    "sigmoid, MLP only": (SIGMOID | dict(target_modules="mlp"), dict(lr=2e-2)),
    "greedy":            ({}, dict(temperature=0.)),
    "no baseline":       ({}, dict(advantage="none")),
    "no cosine":         ({}, dict(schedule="constant")),
    "no KL":             ({}, dict(kl=0.)),
    "reversed KL":       ({}, dict(kl_of="base")),
    "code":              (SIGMOID | dict(target_modules="mlp", init_std=1e-2), CODE | dict(lr=2e-2))}
SKILLS = ("math", "code", "logic")
ASKED = dict(ask=lambda p: f"{p} which skill ?", say=lambda label: f"\\boxed{{ {label} }}", other="other", max_new_tokens=4)
PARTS = ("base", "start", "loop", "mixer", "dose", "other", "leak", "bf16")


def bits(right) -> str: return f"{int('1' + ''.join(str(int(r)) for r in right), 2):x}" # a leading 1 keeps the zeros

def unbits(text) -> list: return [c == "1" for c in f"{int(text, 16):b}"[1:]]

def against(base: list, right: list) -> dict:
    "What is kept of an evaluation: who was right, and the paired comparison"
    gained, lost = (sum(x and not y for x, y in zip(*two)) for two in ((right, base), (base, right)))
    return dict(correct=sum(right), n=len(right), gained=gained, lost=lost, p=float(f"{mcnemar(gained, lost):.3g}"), right=bits(right))

def score(model, task, strategy=None, split="test") -> list:
    return [i["correct"] for i in evaluate(model, TOK, task, strategy, split=split, batch_size=334, progress=False).items]

def train(svf: dict, task, seed: int, **kw):
    "(model with the last step's expert, metrics)"
    torch.manual_seed(seed)
    model, steps = get_peft_model(lab.load("A")[0], SvfConfig(**svf)), iter(range(10 ** 6))
    config = ReinforceConfig(**PAPER | dict(val_every=0, val_limit=1, seed=seed) | kw)
    history = train_expert(model, TOK, task, config, eval_fn=lambda model, tok: next(steps), progress=False)
    return model.eval(), history.metrics[1:]


def base_scores(done) -> dict:
    model = lab.load("A")[0]
    return {t: dict(correct=sum(r), n=len(r), right=bits(r)) for t in (*SKILLS, "copy", "cls") for r in [score(model, TASKS[t])]}

def base_of(done, task) -> list: return unbits(done["base"][task]["right"])

def loop(done, name, seed) -> dict:
    svf, kw = VARIANTS[name]
    model, metrics = train(svf, TASKS["math"], seed, **kw)
    if name == "sigmoid, MLP only": export_official(model, WORK / f"math-{seed}")
    return dict(reward=[round(m["reward"], 4) for m in metrics], kl=round(metrics[-1]["kl"], 4),
                tasks={t: against(base_of(done, t), score(model, TASKS[t])) for t in ("math", "code")})

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

def mixer(done, seed) -> dict:
    "Two experts through the official files, mixed in both ways"
    if not (WORK / f"code-{seed}").is_dir():
        export_official(train(SIGMOID | dict(target_modules="mlp"), TASKS["code"], seed, lr=2e-2)[0], WORK / f"code-{seed}")
    model = load_official(WORK / f"math-{seed}", lab.load("A")[0], "math")
    model = load_official(WORK / f"code-{seed}", model, "code").eval()
    out = {}
    for weights in ((1., 0.), (0., 1.), (.5, .5)):
        alphas = dict(zip(("math", "code"), weights))
        bare = raw_mixer(model, alphas)
        for t in ("math", "code"):
            ours, theirs = score(model, TASKS[t], fixed(alphas, form="sum")), score(bare, TASKS[t])
            out[f"{weights[0]:g} math + {weights[1]:g} code, {t}"] = dict(ours=against(base_of(done, t), ours), theirs=against(ours, theirs))
    if seed == 0: # enough to mix them again
        out["experts"] = {e: {n: [float(f"{x:.4g}") for x in l.svf_d[e].tolist()] for n, l in svf_layers(model).items()} for e in ("math", "code")}
    return out


@torch.no_grad()
def dose(done, seed) -> dict:
    "The math expert at a share c of what it has learned, alone in each mixer"
    model, out = load_official(WORK / f"math-{seed}", lab.load("A")[0], "math").eval(), {}
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
    model, _ = train({}, task, seed, steps=10, batch_size=64)
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
    for folder in sorted(WORK.glob("math-*")):
        expert, bare = load_official(folder, lab.load("A")[0]).eval(), lab.load("A")[0]
        exact = score(expert, TASKS["math"])
        for name, layer in svf_layers(expert).items():
            m = bare.get_submodule(name)
            m.weight.data = half_factors(m.weight, layer.svf_d["default"].sigmoid())
        out["expert"][folder.name.split("-")[1]] = against(exact, score(bare, TASKS["math"]))
    return out


def pieces(parts, seeds) -> dict: # {name: function of what is done}
    "Everything to do, what others need first"
    todo = dict(base=base_scores)
    todo |= {f"start/{std:g}/{s}": (lambda d, std=std, s=s: start(d, std, s)) for std in (1e-3, 1e-2) for s in seeds}
    first = "sigmoid, MLP only" # its experts serve the mixer and bf16
    runs = {v: {f"loop/{v}/{s}": (lambda d, v=v, s=s: loop(d, v, s)) for s in seeds} for v in VARIANTS}
    todo |= runs.pop(first)
    todo |= {f"mixer/{s}": (lambda d, s=s: mixer(d, s)) for s in seeds}
    todo |= {f"dose/{s}": (lambda d, s=s: dose(d, s)) for s in seeds}
    todo |= dict(other=other, bf16=bf16)
    todo |= {f"leak/{n or 'all'}/{split}/{s}": (lambda d, n=n, split=split, s=s: leak(d, n, split, s)) for n in (16, None) for split in ("train", "test") for s in seeds}
    for three in runs.values(): todo |= three
    return {k: f for k, f in todo.items() if k == "base" or k.split("/")[0] in parts}

def main(a):
    torch.set_num_threads(1)
    record = json.loads(a.out.read_text()) if a.out.is_file() else dict(seconds=0, pieces={})
    record |= dict(command="python benchmarks/paper_departures.py", base="A", seeds=list(a.seeds), paper=PAPER, variants={k: dict(svf=s, reinforce=r) for k, (s, r) in VARIANTS.items()},
                   processor=platform.processor() or platform.machine(), threads=1,
                   versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__))
    for name, make in pieces(a.parts, a.seeds).items():
        if name in record["pieces"]: continue
        began = time.perf_counter()
        record["pieces"][name] = make(record["pieces"])
        took = time.perf_counter() - began
        record["seconds"] = round(record["seconds"] + took)
        write_atomic(a.out, json.dumps(record) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {name} {took:.0f} s {json.dumps(record['pieces'][name])[:160]}", flush=True)


if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parse.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parse.add_argument("--work", type=Path, default=Path("runs/paper-departures"), help="folder for the experts, in the official format")
    parse.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "paper-departures.json")
    a = parse.parse_args()
    WORK, (_, TOK, TASKS) = a.work, lab.load("A")
    main(a)
