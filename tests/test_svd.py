"""What the notebooks 00_svd and 01_svf cannot show in one process: crowds, other processes, imports, threads, the benchmark script."""
import json, os, subprocess, sys
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file, save_file

from transformer2_nbdev import svd
from transformer2_nbdev.svd import cached_decompose, decompose, digest, fingerprint
from transformer2_nbdev.svf import compose, grad_from_square, svf_linear

ROOT = Path(__file__).resolve().parents[1]


def python(code, **env):
    "Run code in a fresh interpreter at the repository's root; its stdout."
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def weight(m=48, n=96, seed=0): return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def test_imports_torch_alone():
    loaded = python("import sys, transformer2_nbdev.svf; print(*sorted({m.split('.')[0] for m in sys.modules}))").split()
    assert "torch" in loaded and not {"transformers", "peft", "safetensors", "matplotlib", "fastcore", "nbdev"} & set(loaded)


def test_two_runs_and_other_thread_counts_agree():
    code = ("import torch; from transformer2_nbdev.svd import decompose\n"
            "Q, S, _ = decompose(torch.randn(64, 160, generator=torch.Generator().manual_seed(0)))\n"
            "print((Q.double() * torch.arange(1, 65)).sum(1).tolist(), S.tolist(), sep=';')")
    runs = [[torch.tensor(json.loads(part)) for part in python(code, OMP_NUM_THREADS=n).split(";")] for n in ("1", "1", "2")]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1]))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(runs[0], runs[2]))


def test_signs_do_not_depend_on_the_route():
    W = weight()
    assert torch.allclose(decompose(W).Q, decompose(W, "svd").Q, atol=1e-4)
    assert torch.allclose(decompose(W).Q, decompose(W.T).Q, atol=1e-5) and decompose(W.T).side == "right"


@pytest.mark.parametrize("work", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("m,n", [(300, 700), (700, 300), (200, 200), (1, 9), (9, 1)])
def test_orthonormal_and_exact(m, n, dtype, work):
    W = weight(m, n).to(dtype)
    F, exact = decompose(W, dtype=work), torch.linalg.svdvals(W.double())
    assert F.Q.dtype == F.S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (F.Q.double().T @ F.Q.double() - torch.eye(min(m, n))).abs().max() < 1e-6
    assert (F.S - exact).abs().max() < 1e-5 * exact[0] and (F.S[1:] <= F.S[:-1]).all()
    if work == torch.float64: assert ((F.S - exact).abs() / exact).max() < 1e-6


@pytest.mark.parametrize("work,bound", [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_steep_spectrum(work, bound):
    "Relative to the first, every singular value is right, and the rank-k part of W is the best one, for a spectrum of 12 decades."
    true = torch.logspace(0, -12, 90, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    U, V = (torch.linalg.qr(torch.randn(n, 90, dtype=torch.float64, generator=g))[0] for n in (90, 300))
    W = (U * true) @ V.T
    F = decompose(W, dtype=work)
    assert (F.S - true).abs().max() < bound
    for k in (5, 20, 40): assert ((W - F.Q[:, :k] @ (F.Q[:, :k].T @ W)).norm() - true[k:].norm()).abs() < bound


def test_rank_deficient_zero_and_repeated_rows():
    for W in (torch.zeros(5, 9), torch.ones(9, 5), weight(5, 9)[[0, 0, 1, 1, 2]], torch.eye(6)):
        F = decompose(W)
        assert (F.Q.T @ F.Q - torch.eye(len(F.S))).abs().max() < 1e-6 and torch.equal(compose(W, torch.ones(len(F.S)), F), W)
        assert torch.allclose(F.S.double(), torch.linalg.svdvals(W.double()), atol=1e-6)


def test_views_parameters_and_inference_tensors():
    W = weight(40, 60)
    expected = decompose(W)
    with torch.inference_mode(): inferred = W.clone()
    for same in (W.T.contiguous().T, torch.nn.Parameter(W), torch.cat([W, W])[:40], inferred):
        F = decompose(same)
        assert torch.allclose(F.Q, expected.Q, atol=1e-5) and not F.Q.requires_grad and F.Q.is_contiguous()
        assert digest(same) == digest(W)


def test_input_is_left_alone():
    W = weight(); before = W.clone()
    for work in (torch.float32, torch.float64): decompose(W, dtype=work)
    digest(W), fingerprint(W)
    assert torch.equal(W, before)


def test_w_prime_within_a_thousandth_of_the_reference():
    W = weight(128, 512, seed=3)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    for work in (torch.float64, torch.float32):
        F = decompose(W, dtype=work)
        for seed in range(5):
            z = 0.5 + torch.rand(128, generator=torch.Generator().manual_seed(seed))
            reference = (U * (S * z)) @ Vh
            assert (compose(W, z, F) - reference).norm() < 1e-3 * reference.norm()


def test_cache_is_hit(tmp_path, monkeypatch):
    W = weight()
    first = cached_decompose(W, tmp_path)
    monkeypatch.setattr(svd, "decompose", lambda *a, **k: pytest.fail("decomposed again"))
    second = cached_decompose(W, tmp_path)
    assert torch.equal(first.Q, second.Q) and torch.equal(first.S, second.S) and first.side == second.side


def test_cache_keeps_weights_methods_and_precisions_apart(tmp_path):
    W = weight()
    for kw in ({}, dict(method="svd"), dict(dtype=torch.float32)): cached_decompose(W, tmp_path, **kw)
    cached_decompose(W.T, tmp_path); cached_decompose(W.double(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 5
    assert cached_decompose(W.double(), tmp_path).Q.dtype == torch.float64


def damaged(path, how, other):
    "Damage the cache file in one of the ways that disks and people know."
    data = path.read_bytes()
    if how == "empty": path.write_bytes(b"")
    if how == "truncated": path.write_bytes(data[:-10])
    if how == "text": path.write_text("not safetensors")
    if how == "flipped": path.write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
    if how == "another weight": path.write_bytes(other.read_bytes())
    if how == "no metadata": save_file(load_file(path), path)
    if how == "wrong shape": save_file(dict(Q=torch.eye(3), S=torch.ones(3)), path)


@pytest.mark.parametrize("how", ["empty", "truncated", "text", "flipped", "another weight", "no metadata", "wrong shape"])
def test_damaged_cache_is_rebuilt(tmp_path, monkeypatch, how):
    W = weight()
    good = cached_decompose(W, tmp_path / "a")
    cached_decompose(2 * W, tmp_path / "b")
    (path,), (other,) = (tmp_path / "a").iterdir(), (tmp_path / "b").iterdir()
    damaged(path, how, other)
    again = cached_decompose(W, tmp_path / "a")
    assert torch.equal(again.Q, good.Q) and torch.equal(again.S, good.S)
    monkeypatch.setattr(svd, "decompose", lambda *a, **k: pytest.fail("not rebuilt on disk"))
    assert torch.equal(cached_decompose(W, tmp_path / "a").Q, good.Q)


def test_processes_write_the_cache_at_once(tmp_path):
    code = ("import sys, torch; from transformer2_nbdev.svd import cached_decompose, digest\n"
            "for i in range(20):\n"
            "    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(i))\n"
            "    print(digest(cached_decompose(W, sys.argv[1]).Q))")
    jobs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(3)]
    outs = [job.communicate()[0] for job in jobs]
    assert all(job.returncode == 0 for job in jobs) and len(outs[0].split()) == 20 and outs[0] == outs[1] == outs[2]
    assert len(list(tmp_path.glob("*.safetensors"))) == 20 == len(list(tmp_path.iterdir()))


def test_refused_weight_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="NaN"): cached_decompose(torch.full((3, 4), float("nan")), tmp_path)
    assert not list(tmp_path.iterdir())


def test_fingerprint_across_precisions():
    published = weight().bfloat16()
    assert fingerprint(published) == fingerprint(published.float()) == fingerprint(published.double())
    assert fingerprint(published) != fingerprint(published.T) and len(fingerprint(published)) == 16


def test_gradient_from_the_square_in_micro_batches():
    W, x, target = weight(20, 50), weight(64, 50, 1), weight(64, 20, 2)
    F, z = decompose(W), torch.linspace(0.6, 1.4, 20).requires_grad_()
    (svf_linear(lambda x: x @ W.T, x, F.Q, z, F.side) - target).square().sum().backward()
    Wp, M = compose(W, z.detach(), F), torch.zeros(20, 20)
    for part in range(0, 64, 16):
        y = x[part:part + 16] @ Wp.T
        M += (2 * (y - target[part:part + 16])).T @ y
    assert (grad_from_square(M, F, z) - z.grad).norm() < 1e-5 * z.grad.norm()


def test_benchmark_script_runs(tmp_path):
    out = tmp_path / "svd.json"
    run = subprocess.run([sys.executable, "benchmarks/svd.py", "--m", "96", "--n", "256", "--repeats", "1", "--out", str(out)],
                         cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert result["shape"] == [96, 256] and {"command", "device", "threads", "seed", "versions", "routes"} <= result.keys()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda(tmp_path):
    W = weight(200, 500)
    here, there = decompose(W), cached_decompose(W.cuda(), tmp_path)
    assert there.Q.is_cuda and cached_decompose(W.cuda(), tmp_path).Q.is_cuda and digest(W) == digest(W.cuda())
    assert torch.allclose(here.S, there.S.cpu(), rtol=1e-5) and torch.allclose(here.Q, there.Q.cpu(), atol=1e-3)
