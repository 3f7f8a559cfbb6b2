"""What a reader of room 04 need not see: gradient checkpointing by hand, and what a mixture leaves out."""
import pytest, torch
from torch.utils.checkpoint import checkpoint
from peft import get_peft_model

from svf_toy import IDS, grads, llama, turned
from transformer2_nbdev.adapter import SvfConfig, svf_layers
from transformer2_nbdev.mixture import mixture


def test_generate_with_per_sample_mixture_matches_single_runs():
    m = turned(get_peft_model(llama(), SvfConfig()))
    m.add_adapter("b", SvfConfig(init_weights=False)); m.eval()
    kw = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    with mixture(m, [[1, 0], [0, 1], [0.5, 0.5]]): mixed = m.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **kw)
    for i, w in enumerate([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]):
        with mixture(m, w): alone = m.generate(input_ids=IDS[i:i + 1], attention_mask=torch.ones_like(IDS[:1]), **kw)
        assert torch.equal(mixed[i], alone[0])


def two_experts(**kw):
    m = turned(get_peft_model(llama(), SvfConfig(**kw), "a"), name="a")
    m.add_adapter("b", SvfConfig())
    return turned(m, seed=1, name="b")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_experts_trained_through_a_checkpointed_mixture(reentrant, inside):
    "The experts' own gradients, with rows per sample and per layer"
    rows = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0))
    m = two_experts()
    for l in svf_layers(m).values(): l.svf_d.requires_grad_(True)
    def gradient():
        m.zero_grad()
        with mixture(m, rows):
            loss = m(IDS, labels=IDS).loss
            if inside: loss.backward()
        if not inside:
            with mixture(m, [0., 5.]): pass  # another mixture meanwhile
            loss.backward()
        return torch.cat([p.grad.flatten() for l in svf_layers(m).values() for p in l.svf_d.parameters()])
    exact = gradient()
    m.train(); m.enable_input_require_grads()
    m.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    torch.testing.assert_close(gradient(), exact, rtol=1e-4, atol=1e-6)
    blocks = [b for b in m.modules() if "_gradient_checkpointing_func" in vars(b)]
    assert blocks and not any("keeping" in getattr(b._gradient_checkpointing_func, "__qualname__", "") for b in blocks)


def test_a_checkpoint_by_hand_raises_where_its_mixture_is_gone():
    m, alpha = two_experts(), torch.tensor([.5, .5], requires_grad=True)
    def loss(): return checkpoint(lambda: m(IDS, labels=IDS).loss, use_reentrant=False)
    with mixture(m, alpha): loss().backward()
    inside = alpha.grad.clone(); alpha.grad = None
    with mixture(m, alpha): m(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(inside, alpha.grad)
    with mixture(m, alpha): late = loss()
    with pytest.raises(RuntimeError, match="backward inside the mixture"): late.backward()


def test_what_is_no_late_mixture_does_not_raise():
    "A plain step under checkpointing, with a mixture that is only listened to in between"
    m = two_experts()
    exact = grads(m)
    m.train(); m.enable_input_require_grads(); m.gradient_checkpointing_enable(dict(use_reentrant=False))
    m.zero_grad()
    loss = m(IDS, labels=IDS).loss
    with torch.no_grad(), mixture(m, [.5, .5]): m(IDS)
    loss.backward()
    torch.testing.assert_close(torch.cat([p.grad.flatten().float() for p in m.parameters() if p.requires_grad]), exact, rtol=1e-4, atol=1e-6)
    with mixture(m, [.5, .5]): m(IDS, labels=IDS).loss
    m.zero_grad()
    m(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(torch.cat([p.grad.flatten().float() for p in m.parameters() if p.requires_grad]), exact, rtol=1e-4, atol=1e-6)


def test_modules_to_save_are_not_mixed_and_that_is_said():
    m = two_experts(modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="modules_to_save of a are not mixed"), mixture(m, [.5, .5]): pass
