"""Gram route against torch.linalg.svd: ratios of time and the difference of W', measured in one run, routes taking turns.

usage: python benchmarks/svd.py [--m 1024] [--n 4096] [--repeats 7] [--seed 0] [--device cpu] [--threads 1] [--out FILE]
Asserts (on CPU, at 1024 x 4096): the float64 Gram route is at least 4 times as fast, W' within 1e-3 relative for random z in [0.5, 1.5].
"""
import argparse, json, platform, statistics, sys, time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pieces import RECORDS
from transformer2_nbdev.svd import decompose

ap = argparse.ArgumentParser()
for name, default in dict(m=1024, n=4096, repeats=7, seed=0, threads=1).items(): ap.add_argument(f"--{name}", type=int, default=default)
ap.add_argument("--device", default="cpu")
ap.add_argument("--out", default=str(RECORDS / "svd.json"))
args = ap.parse_args()
torch.set_num_threads(args.threads); torch.manual_seed(args.seed)
sync = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None

W = (torch.randn(args.m, args.n) / args.n ** 0.5).to(args.device)
zs = 0.5 + torch.rand(5, min(args.m, args.n), dtype=torch.float64, device=args.device)  # the worst of 5 random z is reported


def wide(Q, side, z):
    "W' from the basis alone, in float64: what is compared is the basis, not the precision of this product."
    Q, A = Q.double(), W.double()
    return (Q * z) @ (Q.T @ A) if side == "left" else ((A @ Q) * z) @ Q.T


U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
references = [(U * (S * z)) @ Vh for z in zs]


def difference(factors):
    "Worst relative Frobenius distance of W' from the float64 reference."
    Q, side = factors
    return max(((wide(Q, side, z) - ref).norm() / ref.norm()).item() for z, ref in zip(zs, references))


def plain():
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U, "left") if args.m <= args.n else (Vh.T, "right")


def ours(**kw):
    F = decompose(W, **kw)
    return F.Q, F.side


routes = {"torch.linalg.svd": plain, "gram, float64": ours, "gram, float32": lambda: ours(dtype=torch.float32)}
seconds, found = {k: [] for k in routes}, {k: f() for k, f in routes.items()}  # the first call of each is the warm-up
for _ in range(args.repeats):
    for name, f in routes.items():
        sync(); t = time.perf_counter(); f(); sync()
        seconds[name].append(time.perf_counter() - t)

median = {k: statistics.median(v) for k, v in seconds.items()}
rows = {k: dict(speed=round(median["torch.linalg.svd"] / median[k], 2), difference=float(f"{difference(found[k]):.2g}"),
                seconds=round(median[k], 4), spread=[round(min(seconds[k]), 4), round(max(seconds[k]), 4)]) for k in routes}
cpuinfo = Path("/proc/cpuinfo")
models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
device = torch.cuda.get_device_name() if args.device.startswith("cuda") else (models or [platform.processor() or platform.machine()])[0]
result = dict(command=" ".join(["python", "benchmarks/svd.py", *sys.argv[1:]]), shape=[args.m, args.n], dtype="float32", device=device,
              threads=args.threads, repeats=args.repeats, seed=args.seed, z="5 draws, uniform in [0.5, 1.5]",
              versions=dict(torch=torch.__version__, python=platform.python_version()), routes=rows)
Path(args.out).parent.mkdir(parents=True, exist_ok=True)
Path(args.out).write_text(json.dumps(result, indent=1) + "\n")

print(f"{args.m} x {args.n} float32, {device}, {args.threads} threads, median of {args.repeats}")
for name, row in rows.items(): print(f"{name:18s} speed x{row['speed']:5.2f}   W' differs by {row['difference']:.1e}")
if args.device == "cpu" and (args.m, args.n) == (1024, 4096): assert rows["gram, float64"]["speed"] >= 4, rows
assert all(row["difference"] <= 1e-3 for row in rows.values()), rows
