"""What a reader of room 03 need not see: precisions, trained biases, two processes."""
import os

import pytest, torch
from peft import get_peft_model

from svf_toy import IDS, cosine, grads, llama, turned
from transformer2_nbdev.adapter import SvfConfig, svf_layers
from transformer2_nbdev.fused import fused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    full, base = turned(get_peft_model(llama(), SvfConfig())), llama().to(dtype)
    low = turned(get_peft_model(llama().to(dtype), SvfConfig()))
    assert cosine(grads(low, fused(low)), grads(full)) > 0.99
    with fused(low): pass
    assert all(torch.equal(l.get_base_layer().weight, base.get_submodule(n).weight) for n, l in svf_layers(low).items())


def test_autocast():
    m = turned(get_peft_model(llama(), SvfConfig()))
    exact = grads(m)
    m.zero_grad()
    with fused(m):
        with torch.autocast("cpu", torch.bfloat16): loss = m(IDS, labels=IDS).loss
        loss.backward()  # outside autocast, as in every training loop
    assert cosine(torch.cat([p.grad.flatten() for p in m.parameters() if p.requires_grad]), exact) > 0.99


def test_trained_biases():
    biased = turned(get_peft_model(llama(attention_bias=True), SvfConfig(bias="svf_only")))
    torch.testing.assert_close(grads(biased, fused(biased)), grads(biased), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kw", [dict(parametrization="sigmoid", preserve_nuclear_norm=True), dict(preserve_nuclear_norm=True), dict(rank=7)], ids=str)
def test_every_parametrisation(kw):
    m = turned(get_peft_model(llama(), SvfConfig(**kw)))
    torch.testing.assert_close(grads(m, fused(m)), grads(m), rtol=1e-4, atol=1e-6)


def _worker(rank, folder, world):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29577", RANK=str(rank), WORLD_SIZE=str(world))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    m = turned(get_peft_model(llama(), SvfConfig()))
    part = IDS[:2].chunk(world)[rank]
    with fused(m): m(part, labels=part).loss.backward()
    torch.save({n: p.grad for n, p in m.named_parameters() if p.requires_grad}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_fused_in_two_processes(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path), 2), nprocs=2)
    a, b = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    m = turned(get_peft_model(llama(), SvfConfig()))
    m(IDS[:2], labels=IDS[:2]).loss.backward()  # the same two rows in one process: the mean of two halves of equal length
    for n, p in m.named_parameters():
        if p.requires_grad:
            assert torch.equal(a[n], b[n])
            assert (a[n] - p.grad).norm() / p.grad.norm() < 1e-5


def test_a_late_backward_is_no_silent_nothing():
    m = turned(get_peft_model(llama(), SvfConfig()))
    with fused(m): loss = m(IDS, labels=IDS).loss
    with pytest.raises(RuntimeError, match="backward inside fused"): loss.backward()
    m.zero_grad()
    torch.testing.assert_close(grads(m, fused(m)), grads(m), rtol=1e-4, atol=1e-6)
