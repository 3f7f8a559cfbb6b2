"""Speed and memory of SVF on one Llama MLP, as ratios measured in one run.

    python benchmarks/adapter.py [--hidden 1024 --ffn 3584 --device cpu --dtype float32 --rounds 9 --seed 0]

Every contender is timed once per round, in turn, and a ratio is the median over rounds of (its time / the reference's time in the same
round), so that a machine busy with other work disturbs both alike. Writes transformer2_nbdev/data/records/adapter-<device>.json.
"""
import argparse, json, platform, statistics, sys, time
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from pieces import RECORDS
from transformer2_nbdev.adapter import SvfConfig, svf_layers
from transformer2_nbdev.fused import fused
from transformer2_nbdev.mixture import mixture

TARGETS = ["gate_proj", "up_proj", "down_proj"]


class Block(nn.Module):
    "A Llama MLP under a name of its own, so that PEFT can find its layers"
    def __init__(self, hidden, ffn):
        super().__init__()
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=ffn))

    def forward(self, x): return self.mlp(x)


class Composed(nn.Module):
    "W' rebuilt under autograd for every forward, U, S, V beside W; `official` as that code does it: U diag(S z) V^T, rescaled to W's nuclear norm"
    def __init__(self, lin, official):
        super().__init__()
        self.official = official
        U, self.S, Vh = torch.linalg.svd(lin.weight.data.float(), full_matrices=False)
        self.U, self.Vh = U.to(lin.weight.dtype), Vh.to(lin.weight.dtype)
        self.z = nn.Parameter(torch.ones_like(self.S))

    def forward(self, x):
        s = (self.S * self.z).to(self.U.dtype)
        if not self.official: return F.linear(x, (self.U * s) @ self.Vh)
        return F.linear(x, self.U @ torch.diag_embed(s) @ self.Vh * (self.S.sum() / s.sum()))


def step(model, x, micro, context=nullcontext):
    "One optimizer step: `micro` forwards and backwards"
    with context():
        for _ in range(micro): model(x).float().square().mean().backward()


def clock(device):
    if device == "cuda": torch.cuda.synchronize()
    return time.perf_counter()


def ratios(contenders: dict, reference: str, rounds: int, device: str) -> dict:
    "Median over rounds of time / reference's time; one warm-up round"
    seen = {k: [] for k in contenders}
    for i in range(rounds + 1):
        t = {}
        for k, f in contenders.items():
            start = clock(device); f(); t[k] = clock(device) - start
        if i:
            for k in t: seen[k].append(t[k] / t[reference])
    return {k: dict(median=round(statistics.median(v), 3), low=round(min(v), 3), high=round(max(v), 3)) for k, v in seen.items()}


def bytes_beside(dtype, m=4096, n=14336) -> float:
    "Bytes the additive form holds beside one frozen m x n weight, as a share of that weight's"
    lin = nn.Module(); lin.l = nn.Linear(n, m, bias=False, dtype=dtype, device="meta")
    layer = next(iter(svf_layers(get_peft_model(lin, SvfConfig(target_modules=["l"]))).values()))
    held = [layer.svf_Q, layer.svf_S, *layer.svf_d.values()]
    return sum(t.numel() * t.element_size() for t in held) / (m * n * lin.l.weight.element_size())


@torch.no_grad()
def main(a):
    torch.manual_seed(a.seed)
    dtype = getattr(torch, a.dtype)
    make = lambda: Block(a.hidden, a.ffn).to(a.device, dtype)
    x = lambda tokens: torch.randn(1, tokens, a.hidden, device=a.device, dtype=dtype, requires_grad=True)
    dense = make().requires_grad_(False)
    lora = get_peft_model(make(), LoraConfig(r=16, target_modules=TARGETS))
    svf = get_peft_model(make(), SvfConfig(target_modules=TARGETS))
    for l in svf_layers(svf).values(): l.svf_d["default"].data.normal_(0, 0.1)
    composed = {"composed under autograd": make().requires_grad_(False), "composed, columns scaled": make().requires_grad_(False)}
    for (k, m) in composed.items():
        for n in TARGETS: setattr(m.mlp, n, Composed(getattr(m.mlp, n), k == "composed under autograd"))
    out = {}
    with torch.enable_grad():
        for tokens, micro in ((512, 1), (4096, 4), (8192, 8)):
            xi = x(tokens // micro)
            runs = dict(lora=lambda: step(lora, xi, micro), dense=lambda: step(dense, xi, micro), additive=lambda: step(svf, xi, micro),
                        fused=lambda: step(svf, xi, micro, lambda: fused(svf)))
            if tokens == 512: runs |= {k: lambda m=m: step(m, xi, 1) for k, m in composed.items()}
            out[f"step, {tokens} tokens in {micro} micro-batches, LoRA r16 = 1"] = ratios(runs, "lora", a.rounds * 4096 // max(tokens, 2048), a.device)
    xi = x(2048).detach()
    with fused(svf): out["rollout forward, 2048 tokens, base = 1"] = ratios(dict(base=lambda: dense(xi), fused=lambda: svf(xi)), "base", 3 * a.rounds, a.device)
    for e in ("b", "c"): svf.add_adapter(e, SvfConfig(target_modules=TARGETS, init_weights=False))
    xb = x(2048).detach().reshape(16, 128, a.hidden)
    with mixture(svf, torch.rand(16, 3, device=a.device)):
        out["forward with a mixture per sample, 16 x 128 tokens, base = 1"] = ratios(dict(base=lambda: dense(xb), mixture=lambda: svf(xb)), "base", 3 * a.rounds, a.device)
    memory = {"additive form, 4096 x 14336 bf16, bytes beside the weight's": round(bytes_beside(torch.bfloat16), 4)}
    return dict(command=" ".join(["python", *sys.argv]), seed=a.seed, device=device_name(a.device), threads=torch.get_num_threads(), dtype=a.dtype,
                shapes=f"{a.hidden} -> {a.ffn}", rounds=a.rounds, torch=torch.__version__, ratios=out, memory=memory)


def device_name(device):
    if device == "cuda": return torch.cuda.get_device_name()
    model = [l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
    return model[0] if model else platform.processor()


def limits(r: dict) -> list[tuple[str, float, float]]:
    "What the package promises on a CPU, as (claim, measured, limit)"
    t = {k.split(",")[1].split()[0]: v for k, v in r["ratios"].items() if k.startswith("step")}
    get = lambda prefix, who: next(v for k, v in r["ratios"].items() if k.startswith(prefix))[who]["median"]
    return [("additive step, 512 tokens", t["512"]["additive"]["median"], 1.5), ("fused step, 8192 tokens", t["8192"]["fused"]["median"], 1.15),
            ("additive / composed under autograd", t["512"]["additive"]["median"] / t["512"]["composed under autograd"]["median"], 1 / 3),
            ("rollout inside fused", get("rollout", "fused"), 1.03), ("mixture per sample", get("forward", "mixture"), 1.7),
            ("bytes beside the weight", next(iter(r["memory"].values())), 0.30)]


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--hidden", type=int, default=1024); p.add_argument("--ffn", type=int, default=3584)
    p.add_argument("--device", default="cpu"); p.add_argument("--dtype", default="float32")
    p.add_argument("--rounds", type=int, default=9); p.add_argument("--seed", type=int, default=0); p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    r = main(a)
    for k, v in r["ratios"].items(): print(k, {n: f"{x['median']:.2f} [{x['low']:.2f}, {x['high']:.2f}]" for n, x in v.items()})
    print(r["memory"])
    for claim, got, limit in limits(r): print(f"{'ok  ' if got <= limit else 'OVER'} {claim}: {got:.3f} (at most {limit:.2f})")
    path = RECORDS / f"adapter-{a.device}.json"
    path.write_text(json.dumps(r, indent=1) + "\n")
