"""A Llama small enough for any test of the adapter rooms, an expert on it, and its gradient."""
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from transformer2_nbdev.adapter import svf_layers


def llama(seed=0, **kw):
    torch.manual_seed(seed)
    cfg = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
               num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
               bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return LlamaForCausalLM(LlamaConfig(**cfg | kw)).eval()


def turned(model, by=0.2, seed=0, name="default"):
    "The model, its expert's d moved at random"
    g = torch.Generator().manual_seed(seed)
    for l in svf_layers(model).values():
        if name in l.svf_d: l.svf_d[name].data += by * torch.randn(l.svf_d[name].shape, generator=g)
    return model


IDS = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))


def cosine(a, b): return torch.nn.functional.cosine_similarity(a.float().flatten(), b.float().flatten(), 0).item()


def grads(model, context=None, ids=IDS):
    "All trainable gradients of one loss, in one vector"
    model.zero_grad()
    if context is None: model(ids, labels=ids).loss.backward()
    else:
        with context: model(ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])
