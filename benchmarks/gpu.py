"""What needs a GPU, in three stages, each under nine minutes from a clean machine.

    python benchmarks/gpu.py decompose                    singular bases of Llama-3-8B's matrices
    python benchmarks/gpu.py step [--bits 4] [--cap 16]   time and peak memory of a step on a
                                                          Llama-3-8B of random weights
    python benchmarks/gpu.py learn --model FOLDER --data-dir D [--jobs 12]      a real small chat
                    model learns four tasks by SVF, LoRA and SVF on gold answers, three seeds each

Every stage writes transformer2_nbdev/data/records/gpu-STAGE[...].json with the device's name. `--tiny` shrinks
the shapes, so that a CPU runs a stage in seconds (for the tests: its times mean nothing).
`--cap 16` makes a larger card answer like one of 16 GB. A stage starts no new work when
`--minutes` are over; `learn` goes on where it stopped, from the pieces in --work.

`learn` uses one command and the defaults (lr="auto") for every run; LEARN below says how many steps
of how many answers. The z of the last step is what is asked: nothing is chosen on a validation.
Its matrix products are TF32 on a GPU, its programs (mbpp) run in the sandbox of room 17.
"""
import argparse, gc, json, multiprocessing, statistics, sys, time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pieces import RECORDS, Work, about

from transformer2_nbdev import adapter, scale
from transformer2_nbdev.fused import fused
from transformer2_nbdev.reinforce import policy_loss
from transformer2_nbdev.rollout import Rollouts
from transformer2_nbdev.svd import Factors, decompose, side_of
from transformer2_nbdev.svf import compose, linear_shapes

TINY = dict(model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=64,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def shape(a):
    "The config of the model that is measured"
    from transformers import AutoConfig
    return AutoConfig.for_model(**TINY) if a.tiny else scale.config_of("llama3-8b")


def clock(device):
    if device == "cuda": torch.cuda.synchronize()
    return time.perf_counter()


def timed(f, device, repeats=3):
    "Median seconds of a call, after one for nothing"
    seen = []
    for _ in range(repeats + 1):
        began = clock(device); f(); seen.append(clock(device) - began)
    return statistics.median(seen[1:])


def peak(device):
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def device_of(a):
    "The device's name, for the record; the cap is set here"
    if a.device != "cuda": return about()["processor"]
    total = torch.cuda.get_device_properties(0).total_memory
    if a.cap:
        if a.cap * 1e9 > total:
            raise ValueError(f"--cap {a.cap}: this card has {total / 1e9:.0f} GB")
        torch.cuda.set_per_process_memory_fraction(a.cap * 1e9 / total)
    return torch.cuda.get_device_name()


# --- 1: decomposition

def decompositions(a):
    "Every shape once: seconds by route, and how far W' is from float64's"
    with torch.device("meta"): model = scale.skeleton(shape(a))
    count = {}
    for name, mn in linear_shapes(model).items():
        if name in adapter.linear_names(model): count[mn] = count.get(mn, 0) + 1
    rows, total = {}, dict(float64=0., float32=0.)
    for (m, n), times in count.items():
        g = torch.Generator(a.device).manual_seed(a.seed)
        W = torch.randn(m, n, device=a.device, generator=g, dtype=torch.bfloat16) / n ** .5
        if a.device == "cuda": torch.cuda.reset_peak_memory_stats()
        row, found = dict(times=times), {}
        for route, dtype in (("float64", torch.float64), ("float32", torch.float32)):
            row[route] = timed(lambda: found.__setitem__(route, decompose(W, dtype=dtype)),
                               a.device, repeats=1)
            total[route] += times * row[route]
        z = 1 + .1 * torch.randn(min(m, n), device=a.device, generator=g)
        dense = [compose(W.float(), z, found[r].Q) for r in ("float64", "float32")]
        row["float32_differs"] = float((dense[0] - dense[1]).norm() / (dense[0] - W.float()).norm())
        row["peak"] = peak(a.device)
        rows[f"{m}x{n}"] = row
        print(f"{m:6d} x {n:6d}, {times:3d} of them: float64 {row['float64']:.2f} s, "
              f"float32 {row['float32']:.2f} s", flush=True)
    return dict(shapes=rows, seconds_for_all=total)


# --- 2: one step

class Official(nn.Module):
    "The official composition: U diag(S z) V' under autograd in every forward, beside W"
    def __init__(self, lin):
        super().__init__()
        m, n = lin.weight.shape
        r, like = min(m, n), dict(device=lin.weight.device, dtype=lin.weight.dtype)
        self.W, self.S = lin.weight, torch.ones(r, **like)
        self.U, self.V = torch.randn(m, r, **like) / m ** .5, torch.randn(r, n, **like) / n ** .5
        self.p = nn.Parameter(torch.full((r,), .1, device=lin.weight.device))

    def forward(self, x):
        z = torch.sigmoid(self.p).to(self.S.dtype)
        return F.linear(x, self.U @ torch.diag_embed(self.S * z) @ self.V
                        * (self.S.sum() / (self.S * z).sum()))

    @property
    def in_features(self): return self.W.shape[1]


def random_model(a):
    "The model with random weights; in four bits, no more than one dense matrix at a time is there"
    from transformers import AutoModelForCausalLM
    torch.manual_seed(a.seed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape(a), dtype=a.dtype)
    if a.bits < 16: pack(model, a)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or not p.is_meta: continue
            new = torch.empty_like(p, device=a.device)
            module._parameters[name] = nn.Parameter(drawn(new), requires_grad=False)
    rotary = type(model.model.rotary_emb)                     # its tables follow from the config
    model.model.rotary_emb = rotary(model.config).to(a.device)
    return model.eval()


def drawn(p):
    "Random numbers of the size that a model's weights have, in place"
    return p.normal_(0, .02) if p.ndim > 1 else p.fill_(1.)


def pack(model, a):
    "bitsandbytes' linear layers in place of the dense ones, one after the other"
    import bitsandbytes as bnb
    for name in adapter.linear_names(model):
        parent, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        m, n = getattr(parent, leaf).weight.shape
        new = bnb.nn.Linear4bit(n, m, bias=False, compute_dtype=a.dtype, quant_type="nf4",
                                device="meta")
        new.support_avx512bf16_for_cpu = False       # a rehearsal on a CPU: no packed kernel
        new.weight = bnb.nn.Params4bit(drawn(torch.empty(m, n, dtype=a.dtype, device=a.device)),
                                       requires_grad=False, quant_type="nf4", module=new)
        setattr(parent, leaf, new.to(a.device))


def with_random_bases(make):
    "Q is a random orthonormal matrix, one for each size: costs do not depend on its contents"
    kept, real = {}, adapter.cached_decompose
    def stand_in(W, *args, **kwargs):
        r = min(W.shape)
        if r not in kept: kept[r] = torch.linalg.qr(torch.randn(r, r, device=W.device))[0]
        return Factors(kept[r], torch.ones(r, device=W.device), side_of(W.shape))
    adapter.cached_decompose = stand_in
    try: return make()
    finally: adapter.cached_decompose = real


def contenders(a):
    "Name -> a function that makes the model ready, and the planner's name for it"
    def adapted(**kw):
        return scale.adapt(random_model(a), scale.Setup(target_modules=a.target_modules, **kw))
    def svf(): return with_random_bases(adapted)
    def lora(): return adapted(method="lora", rank=16)
    def official():
        model = random_model(a)
        for name in scale.linear_names(model, a.target_modules):
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2],
                    Official(model.get_submodule(name)))
        return model
    found = {"additive": svf, "lora": lora}
    return found if a.bits < 16 else {"additive": svf, "fused": svf, "lora": lora,
                                      "official": official}


def one_step(model, name, a):
    "Loss and gradients; the official form has no adapter to switch off: no KL term there"
    ids = torch.randint(2, model.config.vocab_size, (a.batch, a.prompt + a.new), device=a.device)
    ones, zeros = torch.ones_like(ids), torch.zeros(a.batch, a.new, device=a.device)
    A = torch.linspace(-1, 1, a.batch, device=a.device)
    r = Rollouts([""] * a.batch, [""] * a.batch, ids, ones, ones[:, a.prompt:], zeros, a.prompt,
                 ones[:, 0] == 1)
    inside = fused(model) if name == "fused" else nullcontext()
    kl = dict(lam=0., track_kl=False) if name == "official" else {}
    with inside: policy_loss(model, r, A, **kl)[0].sum().backward()
    for p in model.parameters(): p.grad = None


def out_of_memory(e):
    return isinstance(e, torch.OutOfMemoryError) or "out of memory" in str(e).lower()


def steps(a):
    "Seconds and peak bytes of every contender, beside what the planner foretold"
    rows, began = {}, time.monotonic()
    for name, make in contenders(a).items():
        if time.monotonic() - began > 60 * a.minutes:
            rows[name] = dict(skipped="the minutes were over"); continue
        model = None
        try:
            model = make()
            model.train(a.checkpointing)
            if a.checkpointing:
                base = model if name == "official" else model.get_base_model()
                base.gradient_checkpointing_enable(dict(use_reentrant=False))
            if a.device == "cuda": torch.cuda.reset_peak_memory_stats()
            learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
            step = partial(one_step, model, name, a)
            rows[name] = dict(seconds=timed(step, a.device),
                              peak=peak(a.device), learned=learned)
        except RuntimeError as e:
            if not out_of_memory(e): raise
            rows[name] = dict(fits=False)
        del model
        step = None                                          # it holds the model, too
        gc.collect()
        if a.device == "cuda": torch.cuda.empty_cache()
        if name != "official": rows[name]["foretold"] = foretold(name, a)
        print(name, rows[name], flush=True)
    return dict(batch=a.batch, prompt=a.prompt, new=a.new, bits=a.bits,
                target_modules=a.target_modules, checkpointing=a.checkpointing, rows=rows)


def foretold(name, a):
    "The planner's peak for the same learning pass, in bytes"
    s = scale.Setup(method=name, prompt=a.prompt, new=a.new, target_modules=a.target_modules,
                    dtype=a.dtype, checkpointing=a.checkpointing)
    seen = scale.foretell(shape(a), s)(a.batch)
    saved, unpacked = scale.packing(scale.skeleton(shape(a), a.dtype), a.bits, a.dtype)
    return max(seen[k].peak for k in scale.LEARNING) - saved + unpacked


# --- 3: learning

DISPATCH = [("real.dispatch", "test", 90), ("real.dispatch", "transfer", 300)]
ARC = [("real.arc", "test", 256), ("real.arc_challenge", "test", 256)]
LEARN = {                          # the longest first; asked before and after: task, split, n
    "mbpp": dict(steps=20, batch=64, new=160, asked=[("mbpp", "test", 200)]),
    "real.gsm8k": dict(steps=24, batch=64, new=96, asked=[("real.gsm8k", "test", 256)]),
    "real.arc": dict(steps=32, batch=64, new=12, asked=ARC),
    "real.dispatch": dict(steps=24, batch=64, new=4, asked=DISPATCH),
}
TINY_LEARN = {"lab:math": dict(steps=1, batch=2, new=6, asked=[("lab:math", "test", 16)])}
METHODS = ("svf", "lora", "labels")          # labels: SVF on the gold answers (paper, Table 4)


def fresh(a, method=None):
    "The model, with the adapter of a method; all runs share their singular bases in a folder"
    from peft import LoraConfig, get_peft_model
    from transformer2_nbdev import cli
    model, tokenizer = cli.load_model(a.model, "auto", a.device)
    if not method: return model, tokenizer
    svf = adapter.SvfConfig(target_modules="all-linear", cache_dir=str(Path(a.work) / "bases"))
    lora = LoraConfig(r=16, target_modules=adapter.resolve_targets(svf, model))
    return get_peft_model(model, lora if method == "lora" else svf), tokenizer


def asked(a, model, tokenizer, task):
    "Question by question: who was right, who could be read"
    from transformer2_nbdev import cli
    from transformer2_nbdev.evaluate import evaluate, pack
    rows = []
    for name, split, n in a.learn[task]["asked"]:
        r = evaluate(model, tokenizer, cli.task_of(name, a.data_dir, None, None, None), split=split,
                     limit=n, batch_size=64, max_new_tokens=a.learn[task]["new"], progress=False)
        rows.append(dict(task=name, split=split, n=r.n, correct=r.correct, bits=pack(r.items),
                         parsed=pack(i["parsed"] is not None for i in r.items)))
    return rows


def learn_one(a, task, method, seed):
    "One expert: how it was trained, and what it answers"
    from transformer2_nbdev import cli
    from transformer2_nbdev.reinforce import ReinforceConfig, sft, train_expert
    torch.manual_seed(seed)
    how = a.learn[task]
    model, tokenizer = fresh(a, method)
    config = ReinforceConfig(steps=how["steps"], batch_size=how["batch"], max_new_tokens=how["new"],
                             rollout_batch=how["batch"], val_every=0, val_limit=8, val_samples=1,
                             seed=seed, save_every=how["steps"])
    out = Path(a.work) / "experts" / f"{task}-{method}-{seed}".replace(":", "-")
    h = (sft if method == "labels" else train_expert)(
        model, tokenizer, cli.task_of(task, a.data_dir, None, None, None), config, out=out,
        resume=(out / "state.pt").is_file(), progress=False)
    seen = {k: [float(f"{x:.4g}") for x in h.column(k)[1]]
            for k in ("accuracy", "reward", "nll", "kl", "step_kl", "lr", "seconds")
            if any(k in m for m in h.metrics)}
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return dict(task=task, method=method, seed=seed, learned=learned, curve=seen,
                asked=asked(a, model, tokenizer, task))


def piece(a, ends, task, method, seed):
    "A finished run, or None when the time is over: the work of one process"
    if a.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.set_num_threads(1)
    work = Work(a.work)
    key = f"{Path(a.model).name}-{task}-{method}-{seed}".replace(":", "-")
    if time.time() > ends and not (work.folder / f"{key}.json").is_file(): return None
    if method == "base":
        return work.do(key, lambda: dict(task=task, method=method, asked=asked(a, *fresh(a), task)))
    return work.do(key, lambda: learn_one(a, task, method, seed))


def learn(a):
    "As many runs as the minutes allow; what is there already is read"
    if not a.model: raise ValueError("learn needs --model: a folder, a hub id, or lab:A")
    fresh(a, "svf")                                  # the singular bases, for all
    runs = [(task, "base", 0) for task in a.learn]
    runs += [(t, m, s) for s in range(a.seeds) for t in a.learn for m in METHODS]
    ends = time.time() + 60 * a.minutes
    if a.jobs == 1: found = [piece(a, ends, *r) for r in runs]
    else:
        with ProcessPoolExecutor(a.jobs, multiprocessing.get_context("spawn")) as pool:
            started = [pool.submit(piece, a, ends, *r) for r in runs]
            found = [finished(*x) for x in zip(runs, started)]
    rows = [r for r in found if r]
    for r in rows: compare(r, next((b for b in rows if b["task"] == r["task"]), r))
    return dict(model=a.model if a.model.startswith("lab:") else Path(a.model).name,
                matmul="tf32" if a.device == "cuda" else "float32", plan=a.learn, rows=rows, left_to_do=found.count(None))


def finished(run, future):
    "A run's row; one that failed is said, and left to do"
    try: return future.result()
    except Exception as e: print(*run, "failed:", f"{type(e).__name__}: {e}"[:300], flush=True)


def compare(row, base):
    "Gain over the base on the same questions, with its interval"
    from transformer2_nbdev.evaluate import paired, unpack
    items = lambda x: [dict(id=str(i), gold="", correct=c) for i, c in enumerate(unpack(x["bits"]))]
    for after, before in zip(row["asked"], base["asked"]):
        d = paired(items(before), items(after))
        after.update(before=before["correct"], diff=d.diff, low=d.low, high=d.high, p=d.p)


STAGES = dict(decompose=decompositions, step=steps, learn=learn)


def options(words=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("stage", choices=STAGES)
    p.add_argument("--tiny", action="store_true"); p.add_argument("--cap", type=float)
    p.add_argument("--bits", type=int, choices=(4, 16), default=16)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--minutes", type=float, default=8.)
    p.add_argument("--batch", type=int); p.add_argument("--prompt", type=int)
    p.add_argument("--new", type=int)
    p.add_argument("--target-modules", default="mlp")
    p.add_argument("--checkpointing", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--model"); p.add_argument("--data-dir")
    p.add_argument("--tasks", nargs="+", choices=list(LEARN), default=list(LEARN))
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--jobs", type=int, default=1, help="runs of `learn` beside each other")
    p.add_argument("--work", default="runs/gpu-learn"); p.add_argument("--out")
    a, said = p.parse_args(words), sys.argv[1:] if words is None else words
    hidden = (a.model if a.model and Path(a.model).is_dir() else None, a.data_dir, a.work, a.out)
    a.command = " ".join(["python benchmarks/gpu.py",
                          *[Path(w).name if w in hidden else w for w in said]])
    a.batch = a.batch or (2 if a.tiny else 1)
    a.prompt, a.new = a.prompt or (6 if a.tiny else 256), a.new or (6 if a.tiny else 256)
    a.dtype = torch.float32 if a.tiny or a.device == "cpu" else torch.bfloat16
    a.learn = TINY_LEARN if a.tiny else {t: LEARN[t] for t in LEARN if t in a.tasks}
    if a.tiny: a.seeds = 1
    return a


def main(a):
    device, began = device_of(a), time.monotonic()
    r = dict(command=a.command, device=device, cap=a.cap, tiny=a.tiny,
             dtype=str(a.dtype).removeprefix("torch."), seed=a.seed, **about())
    r |= STAGES[a.stage](a) | dict(minutes=round((time.monotonic() - began) / 60, 2))
    words = ["gpu", a.stage, f"{a.bits}bit" if a.stage == "step" and a.bits < 16 else "",
             f"cap{a.cap:g}" if a.cap else "", "tiny" if a.tiny else ""]
    out = Path(a.out) if a.out else RECORDS / f"{'-'.join(filter(None, words))}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(r, indent=1) + "\n")
    return r


if __name__ == "__main__": main(options())
