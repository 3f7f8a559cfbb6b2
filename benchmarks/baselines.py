"""SVF and its rivals at one budget: `python benchmarks/baselines.py`.

Methods, loop, rule of choice and intervals are those of room 15 (transformer2_nbdev.baselines).
One loop (reinforce.train_expert or reinforce.sft), one base (lab A), one skill (math), one budget:
30 steps of 64 prompts, the best of four validations (150 prompts; step 0 is one of them) kept.
Fixed before the first test question was answered:

    rates     every method starts from three rates, half a decade apart. Seeds 0 and 1 run at each.
              Where the best mean validation lies at an end of the rates tried, the next half decade
              beyond it is tried too, until it does not.
    choice    the smallest rate whose mean validation lies within one standard error (of 150
              questions) of the best.
    verdict   seeds 2, 3, 4 at the chosen rate, and at no other. The comparisons of methods rest on
              these alone.
    test      greedily, the first 501 test questions each of math, math-hard, code and logic.

Every run also notes how far it went: KL to the base over whole answers to 150 test questions, both
ways; the next-token loss on text of the old skills; and how much of the change of the weights is
spectral (`why.split`). Parts:

    surface   rates x methods x losses on seeds 0 and 1
    verdict   the chosen rates on seeds 2, 3 and 4
    overfit   32 prompts, 60 steps, last step kept: accuracy on those prompts and on the test
    cost      step time and peak memory at width 1,024, every method in a process of its own

A finished run is a small file in --work, and an interrupted benchmark goes on from there;
benchmarks/why.py reads the same files. `--finished` starts no run and records those that are there.
The record is transformer2_nbdev/data/records/baselines.json; what it says under `compose`
(experts added up), `cost` and `before` was measured by an earlier version of this script: its
command, budget and versions stand beside it, under `before`.
"""
import argparse, json, math, random, resource, statistics, subprocess, sys, time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch, transformers

from pieces import RECORDS, Work, about
from transformer2_nbdev import lab, why
from transformer2_nbdev.baselines import (BUDGET, CHOOSE, COMPARED, KL_PROMPTS, LIMIT, LOSSES,
                                          METHODS, RATES, TESTED, VERDICT, ask, chosen, fit, fresh,
                                          validation, world)
from transformer2_nbdev.evaluate import evaluate, pack, write_atomic
from transformer2_nbdev.rollout import rollout

OLD = ("code", "logic", "code-hard", "logic-hard", "copy")


class Missing(Exception):
    "A run that is not finished, where none may be started"


class Finished(Work):
    "The finished pieces alone"
    def do(self, key, make):
        if not (self.folder / f"{key}.json").is_file(): raise Missing(key)
        return super().do(key, make)


def gather(makes):
    "What the calls return, without those whose run is not finished"
    out = []
    for make in makes:
        try: out.append(make())
        except Missing: pass
    return out


@cache
def measured():
    "(old text, {matrix: its SVD}) beside baselines.world(); made once a process"
    tok, _, base, _ = world()
    rng, texts = random.Random(7), []
    for name in OLD:
        for _ in range(100):
            drawn = lab.draw(name, rng, "test")
            texts.append(lab.write(name, drawn, rng.choice(lab.SOURCES), rng))
    rows = list(zip(tok([p for p, _ in texts])["input_ids"],
                    tok([f"{a} <eos>" for _, a in texts], add_special_tokens=False)["input_ids"]))
    linears = {n: m for n, m in base.named_modules() if n.split(".")[-1].endswith("_proj")}
    return rows, {n: why.usv(m.weight.detach()) for n, m in linears.items()}


@torch.no_grad()
def old_loss(model):
    "Nats a word of text in the old skills, flawed as in pretraining"
    rows = measured()[0]
    return lab.answer_loss(model, rows).item() / sum(len(a) for _, a in rows)


@torch.no_grad()
def describe(plain):
    "What a model with plain weights can do, and how far it is from the base"
    tok, tasks, base, answers = world()
    svds = measured()[1]
    scores = ask(plain)
    asked = tasks["math"].examples("test")[:KL_PROMPTS]
    own = rollout(plain, tok, tasks["math"], asked, temperature=1., batch_size=KL_PROMPTS, seed=1)
    before, after = (dict(m.named_modules()) for m in (base, plain))
    sizes, parts = [], []
    for n, factors in svds.items():
        dW = after[n].weight - before[n].weight
        sizes.append(dW.norm().item() ** 2)
        parts.append(why.split(before[n].weight, dW, factors))
    total = sum(sizes)                                      # 0 where the base itself was kept
    share = lambda k: round(sum(s * getattr(p, k) for s, p in zip(sizes, parts)) / (total or 1), 4)
    kl = why.answer_kl(base, plain, answers), why.answer_kl(plain, base, own)
    return dict(correct={n: r.correct for n, r in scores.items()},
                bits={n: pack(r.items) for n, r in scores.items()},
                kl=[round(x, 5) for x in kl],
                old=round(old_loss(plain) - old_loss(base), 5), norm=round(total ** .5, 4),
                spectral=share("spectral"), moved=share("moved"), chance=share("chance"))


def run(work, method, loss, lr, seed, methods=METHODS, modules="all-linear", tag="run", **kw):
    "One finished run: trained, tested, measured"
    def make():
        model = fresh(method, seed, modules, methods)
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        val, step = fit(model, world()[1]["math"], loss, lr, seed, **kw)
        if val is None: return dict(numbers=numbers, val=None)
        plain = why.merged(model, lab.load("A")[0]).eval()
        return dict(numbers=numbers, val=val, step=step) | describe(plain)
    found = work.do(f"{tag}_{loss}_{modules}_{method}_{lr:g}_{seed}", make)
    part = dict(modules=modules) if modules != "all-linear" else {}
    return dict(method=method, loss=loss, lr=lr, seed=seed) | part | found


def surface(work, method, loss, seeds=CHOOSE, methods=METHODS, **kw):
    "Runs at three rates, and beyond an end at which the best one lies"
    i = min(range(len(RATES)), key=lambda j: abs(math.log(RATES[j] / methods[method][1])))
    tried, runs = [i - 1, i, i + 1], []
    while True:
        for j in tried: runs += [run(work, method, loss, RATES[j], s, methods, **kw) for s in seeds]
        val = validation(runs)
        best = max(val, key=val.get)
        low, high = (RATES.index(f(val)) for f in (min, max))
        tried = [high + 1] if best == max(val) else [low - 1] if best == min(val) else []
        if not tried or not 0 <= tried[0] < len(RATES): return runs


def overfit(work, method, loss, lr, n, seed):
    "Accuracy on n training prompts and on the test, after 60 steps on them"
    def make():
        task = world()[1]["math"]
        few = random.Random(seed).sample(list(task.examples("train")), n)
        small = replace(task, examples=lambda s: few if s == "train" else task.examples(s))
        model, length = fresh(method, seed), dict(steps=60, val_every=0, val_limit=10)
        if fit(model, small, loss, lr, seed, last=True, **length)[0] is None:
            return dict(diverged=True)
        plain = why.merged(model, lab.load("A")[0]).eval()
        seen = evaluate(plain, world()[0], small, split="train", batch_size=n, progress=False)
        held = ask(plain, ("math", "math-hard"))
        return dict(train=seen.correct, n=seen.n, **{t: r.correct for t, r in held.items()})
    found = work.do(f"overfit_{loss}_{method}_{n}_{seed}", make)
    return dict(method=method, loss=loss, lr=lr, prompts=n, seed=seed) | found


def child(method):
    "Three steps of Adam at width 1,024 on 1,024 tokens: seconds a step, MB above rest"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=256, hidden_size=1024, intermediate_size=3584,
                                      num_hidden_layers=4, num_attention_heads=16)
    model = METHODS[method][0](transformers.LlamaForCausalLM(config)).train()
    ids = torch.randint(256, (8, 128), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    pages, seconds = int(Path("/proc/self/statm").read_text().split()[1]), []
    Path("/proc/self/clear_refs").write_text("5") # start the peak anew
    for _ in range(3):
        began = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(l.split()[1]) << 10 for l in status if l.startswith("VmHWM"))
    above = (peak - pages * resource.getpagesize()) / 2 ** 20
    print(json.dumps(dict(seconds=min(seconds), peak_mb=above)))


def cost(rounds=3):
    "Every method in a process of its own, in turn; times as ratios to LoRA r16 of the same round"
    seen = {m: [] for m in METHODS}
    for _ in range(rounds):
        for m in METHODS:
            command = [sys.executable, __file__, "--child", m]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            seen[m].append(json.loads(said.splitlines()[-1]))
    def row(m):
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(seen[m], seen["LoRA r16"])]
        low, step, high = (round(f(ratios), 3) for f in (min, statistics.median, max))
        peak = round(statistics.median(r["peak_mb"] for r in seen[m]))
        return dict(step=step, low=low, high=high, peak_mb=peak)
    return {m: row(m) for m in METHODS}


def main(a):
    began, work = time.perf_counter(), (Finished if a.finished else Work)(a.work)
    old = json.loads(a.out.read_text()) if a.out.exists() else {}
    record = dict(command=f"python benchmarks/baselines.py --parts {' '.join(a.parts)}", base="A",
                  skill="math", budget=BUDGET, choose=CHOOSE, verdict=VERDICT, limit=LIMIT,
                  base_scores={}, surface=[], chosen={loss: {} for loss in a.losses}, runs=[])
    if set(a.parts) != {"cost"}:
        base = ask(world()[2])
        score = lambda r: dict(correct=r.correct, n=r.n, bits=pack(r.items))
        record["base_scores"] = {n: score(r) for n, r in base.items()}
    for loss in a.losses:
        for m in COMPARED:
            for runs in gather([lambda: surface(work, m, loss)]):
                record["surface"] += runs
                record["chosen"][loss][m] = chosen(runs)
    rates = record["chosen"]
    if "verdict" in a.parts:
        record["runs"] = gather((lambda m=m, loss=loss, s=s: run(work, m, loss, rates[loss][m], s))
                                for loss in a.losses for s in VERDICT for m in rates[loss])
    if "overfit" in a.parts:
        record["overfit"] = gather(
            (lambda m=m, loss=loss, s=s: overfit(work, m, loss, rates[loss][m], 32, s))
            for loss in a.losses for s in VERDICT for m in rates[loss] if m in ("SVF", "LoRA r16"))
    record["cost"] = work.do("cost", cost) if "cost" in a.parts else old.get("cost")
    record |= {k: old[k] for k in ("compose", "before") if k in old}
    record |= dict(seconds=round(time.perf_counter() - began)) | about()
    write_atomic(a.out, json.dumps(record) + "\n")


if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--work", default="runs/baselines", help="folder for finished pieces")
    parse.add_argument("--parts", nargs="+", default=["surface", "verdict", "overfit"],
                       help="also: cost (on a quiet machine; else the cost on record stays)")
    parse.add_argument("--losses", nargs="+", default=LOSSES, choices=LOSSES)
    parse.add_argument("--finished", action="store_true", help="start no run, record what is there")
    parse.add_argument("--out", type=Path, default=RECORDS / "baselines.json")
    parse.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    a = parse.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    child(a.child) if a.child else main(a)
