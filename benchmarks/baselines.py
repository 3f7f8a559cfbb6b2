"""SVF and its rivals at one budget: `python benchmarks/baselines.py --work FOLDER`.

One loop (reinforce.train_expert or reinforce.sft), one base (lab A), one skill (math), one budget: 30 steps of 128 prompts, the best of six
validations (300 prompts) kept. For every method, loss and choice of modules the learning rate is tuned first: from a start in the middle of the
grid, walk to the neighbour with the better validation accuracy (tuning seed 100) until no neighbour is better. Then three seeds, tested greedily
on 1,002 questions of the own skill, its unseen cousin, and the two other skills. Parts, in this order:

    main       every method on all linear layers, REINFORCE
    compose    SVF and LoRA r16: experts of math and of code, their sum, and one adapter trained on both
    overfit    SVF and LoRA r16 on 32, 128 and 512 prompts, 60 steps, last step kept: accuracy on those prompts and on the test
    next-token the table of `main` with the next-token loss on gold answers
    modules    SVF and LoRA r16 on attention only and MLP only, both losses
    cost       step time and peak memory at width 1,024, every method in a process of its own

Every finished run is a small file in FOLDER, and an interrupted benchmark goes on from there; the record is benchmarks/results/baselines.json.
"""
import argparse, json, random, resource, statistics, subprocess, sys, tempfile, time
from dataclasses import replace
from pathlib import Path

import torch, transformers
from peft import IA3Config, LNTuningConfig, LoraConfig, TinyLoraConfig, get_peft_model

from pieces import Work, about
from transformer2_nbdev import lab
from transformer2_nbdev.adapter import SvfConfig, resolve_targets
from transformer2_nbdev.evaluate import evaluate, paired, write_atomic
from transformer2_nbdev.reinforce import Diverged, ReinforceConfig, sft, train_expert
from transformer2_nbdev.svf import is_target

GRID = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
BUDGET = dict(steps=30, batch_size=128, rollout_batch=128, val_every=6, val_limit=300)
TESTED = ("math", "math-hard", "code", "logic")
SEEDS = (0, 1, 2)


def lora(names, **kw): return LoraConfig(target_modules=names, task_type="CAUSAL_LM", **kw)

METHODS = {                                       # name: (config from the names of the layers, where the search for its learning rate begins)
    "SVF":            (lambda names: SvfConfig(target_modules=names), 1e-2),
    "SVF rank 32":    (lambda names: SvfConfig(target_modules=names, rank=32), 1e-2),
    "LoRA r1":        (lambda names: lora(names, r=1, lora_alpha=2), 1e-2),
    "LoRA r16":       (lambda names: lora(names, r=16, lora_alpha=32), 3e-3),
    "DoRA r16":       (lambda names: lora(names, r=16, lora_alpha=32, use_dora=True), 3e-3),
    "IA3":            (lambda names: IA3Config(target_modules=names, feedforward_modules=[n for n in names if is_target(n, "mlp")]), 1e-2),
    "TinyLoRA":       (lambda names: TinyLoraConfig(target_modules=names), 1e-2),
    "full":           (lambda names: LNTuningConfig(target_modules=names), 1e-3)} # a trained copy of every linear layer, with PEFT's verbs


def dress(method, modules, seed, model=None):
    "The lab's base with a fresh adapter"
    torch.manual_seed(seed)
    model = model or lab.load("A")[0]
    names = sorted(resolve_targets(SvfConfig(target_modules=modules), model))
    return get_peft_model(model, METHODS[method][0](names))


def size(model):
    "(trained numbers, bytes of the saved adapter)"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        return sum(p.numel() for p in model.parameters() if p.requires_grad), (Path(folder) / "adapter_model.safetensors").stat().st_size


def fit(model, task, loss, lr, seed, last=False, **kw):
    "Train in place; the validation accuracy of the kept step, or None where the run diverged"
    steps = iter(range(10 ** 6))
    run = train_expert if loss == "REINFORCE" else sft
    try: h = run(model, TOK, task, ReinforceConfig(**BUDGET | dict(lr=lr, seed=seed) | kw), eval_fn=(lambda m, t: next(steps)) if last else None, progress=False)
    except Diverged: return None, None
    return h.result["acc"], h.best_step


def test(model, names=TESTED, strategy=None): return {n: evaluate(model, TOK, TASKS[n], strategy, batch_size=334, progress=False) for n in names}


def against(base, results):
    "What is kept of an evaluation: counts, and the paired difference to the base"
    return {n: dict(correct=r.correct, n=r.n, gained=p.gained, lost=p.lost, low=round(p.low, 4), high=round(p.high, 4), p=float(f"{p.p:.3g}"))
            for n, r in results.items() for p in [paired(base[n], r)]}


def tune(work, method, loss, modules):
    "Hill climbing on the grid; {lr: validation accuracy}, and the best"
    seen = {}
    def val(i):
        lr = GRID[i]
        if lr not in seen: seen[lr] = work.do(f"tune_{loss}_{modules}_{method}_{lr:g}", lambda: fit(dress(method, modules, 100), TASKS["math"], loss, lr, 100)[0])
        return -1. if seen[lr] is None else seen[lr]
    i = GRID.index(METHODS[method][1])
    while True:
        near = [j for j in (i - 1, i + 1) if 0 <= j < len(GRID)]
        best = max(near, key=val)
        if val(best) <= val(i): return dict(tried=dict(sorted((f"{k:g}", v) for k, v in seen.items())), lr=GRID[i])
        i = best


def table(work, base, loss, modules, methods):
    "Tuned runs on three seeds"
    rows = []
    for method in methods:
        tuned = work.do(f"tuned_{loss}_{modules}_{method}", lambda: tune(work, method, loss, modules))
        for seed in SEEDS:
            def one():
                model = dress(method, modules, seed)
                val, step = fit(model, TASKS["math"], loss, tuned["lr"], seed)
                if val is None: return dict(diverged=True)
                numbers, bytes_ = size(model)
                return dict(val=val, kept_step=step, parameters=numbers, bytes=bytes_, tasks=against(base, test(model.eval())))
            rows.append(dict(method=method, loss=loss, modules=modules, seed=seed, **tuned) | work.do(f"run_{loss}_{modules}_{method}_{seed}", one))
    return rows


def overfit(work, method, loss, lr, n, seed):
    "Accuracy on the training prompts and on the test, after 60 steps on n prompts"
    def one():
        chosen = random.Random(seed).sample(list(TASKS["math"].examples("train")), n)
        few = replace(TASKS["math"], examples=lambda split: chosen if split == "train" else TASKS["math"].examples(split))
        model = dress(method, "all-linear", seed)
        fit(model, few, loss, lr, seed, last=True, steps=60, val_every=0, val_limit=10)
        train, held = (evaluate(model.eval(), TOK, t, split=s, batch_size=334, progress=False) for t, s in ((few, "train"), (TASKS["math"], "test")))
        return dict(train_correct=train.correct, train_n=train.n, test_correct=held.correct, test_n=held.n)
    return dict(method=method, loss=loss, lr=lr, prompts=n, seed=seed) | work.do(f"overfit_{loss}_{method}_{n}_{seed}", one)


def both():
    "One task made of two: math and code prompts in turn"
    pair = TASKS["math"], TASKS["code"]
    mixed = lambda split: [e for two in zip(*(t.examples(split) for t in pair)) for e in two]
    return replace(pair[0], name="math and code", examples=mixed, max_new_tokens=max(t.max_new_tokens for t in pair), verify=lambda c, e: TASKS[e["kind"]].judge(c, e))


def compose(work, base, method, lr, seed):
    "Two experts, their sum, and one adapter trained on both skills with the budget of both"
    asked = ("math", "code", "code+math", "logic")
    def one():
        model = dress(method, "all-linear", seed)
        fit(model, TASKS["math"], "REINFORCE", lr, seed)
        names = sorted(resolve_targets(SvfConfig(target_modules="all-linear"), lab.load("A")[0]))
        torch.manual_seed(seed + 1)
        model.add_adapter("code", METHODS[method][0](names)); model.set_adapter("code")
        fit(model, TASKS["code"], "REINFORCE", lr, seed)
        model.eval(); out = {}
        for name in ("default", "code"):
            model.set_adapter(name); out["math expert" if name == "default" else "code expert"] = against(base, test(model, asked))
        if method == "SVF":
            def add(prompts): return torch.ones(len(prompts), 2)
            add.experts = ["default", "code"]
            out["sum"] = against(base, test(model, asked, add))
        else:
            model.add_weighted_adapter(["default", "code"], [1., 1.], "sum", combination_type="cat"); model.set_adapter("sum")
            out["sum"] = against(base, test(model, asked))
        joint = dress(method, "all-linear", seed)
        fit(joint, both(), "REINFORCE", lr, seed, steps=2 * BUDGET["steps"], val_every=2 * BUDGET["val_every"])
        out["joint"] = against(base, test(joint.eval(), asked))
        return out
    return dict(method=method, lr=lr, seed=seed) | dict(tasks=work.do(f"compose_{method}_{seed}", one))


def child(method):
    "Three steps of Adam at width 1,024 on 1,024 tokens; prints seconds of a step and MB above the resting process"
    torch.set_num_threads(1)
    model = dress(method, "all-linear", 0, transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=256, hidden_size=1024, intermediate_size=3584, num_hidden_layers=4, num_attention_heads=16))).train()
    ids = torch.randint(256, (8, 128), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    rest, seconds = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(), []
    Path("/proc/self/clear_refs").write_text("5") # start the peak anew
    for _ in range(3):
        began = time.perf_counter()
        model(ids, labels=ids).loss.backward(); optimizer.step(); optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    peak = next(int(l.split()[1]) << 10 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    print(json.dumps(dict(seconds=min(seconds), peak_mb=(peak - rest) / 2 ** 20)))


def cost(rounds=3):
    "Every method in a process of its own, in turn, round after round; times as ratios to LoRA r16 of the same round"
    seen = {m: [] for m in METHODS}
    for _ in range(rounds):
        for m in METHODS: seen[m].append(json.loads(subprocess.run([sys.executable, __file__, "--child", m], capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
    ratio = lambda m: [a["seconds"] / b["seconds"] for a, b in zip(seen[m], seen["LoRA r16"])]
    return {m: dict(step=round(statistics.median(ratio(m)), 3), low=round(min(ratio(m)), 3), high=round(max(ratio(m)), 3),
                    peak_mb=round(statistics.median(r["peak_mb"] for r in seen[m]))) for m in METHODS}


def main(a):
    began, work = time.perf_counter(), Work(a.work)
    model = lab.load("A")[0]
    base = test(model, ("math", "math-hard", "code", "logic", "code+math"))
    record = dict(command=f"python benchmarks/baselines.py --parts {' '.join(a.parts)}", base="A", skill="math", budget=BUDGET, grid=GRID, tuning_seed=100, seeds=SEEDS,
                  base_scores={n: dict(correct=r.correct, n=r.n) for n, r in base.items()}, rows=[], compose=[], overfit=[])
    tuned = lambda m, loss="REINFORCE": work.do(f"tuned_{loss}_all-linear_{m}", lambda: tune(work, m, loss, "all-linear"))["lr"]
    two = ("SVF", "LoRA r16")
    if "main" in a.parts: record["rows"] += table(work, base, "REINFORCE", "all-linear", METHODS)
    if "compose" in a.parts: record["compose"] = [compose(work, base, m, tuned(m), s) for m in two for s in SEEDS]
    if "overfit" in a.parts: record["overfit"] = [overfit(work, m, loss, tuned(m, loss), n, s) for loss in ("REINFORCE", "next-token") for m in two for n in (32, 128, 512) for s in SEEDS]
    if "next-token" in a.parts: record["rows"] += table(work, base, "next-token", "all-linear", METHODS)
    if "modules" in a.parts:
        for loss in ("REINFORCE", "next-token"):
            for modules in ("attention", "mlp"): record["rows"] += table(work, base, loss, modules, two)
    if "cost" in a.parts: record["cost"] = work.do("cost", cost)
    record |= dict(seconds=round(time.perf_counter() - began)) | about()
    write_atomic(a.out, json.dumps(record) + "\n")


if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--work", default="runs/baselines", help="folder for finished pieces")
    parse.add_argument("--parts", nargs="+", default=["main", "compose", "overfit", "next-token", "modules", "cost"])
    parse.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "baselines.json")
    parse.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    a = parse.parse_args()
    if a.child: child(a.child)
    else:
        torch.set_num_threads(1)
        _, TOK, TASKS = lab.load("A")
        main(a)
