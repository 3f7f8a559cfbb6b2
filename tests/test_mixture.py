"""What a reader of room 04 need not see."""
import torch
from peft import get_peft_model

from svf_toy import IDS, llama, turned
from transformer2_nbdev.adapter import SvfConfig
from transformer2_nbdev.mixture import mixture


def test_generate_with_per_sample_mixture_matches_single_runs():
    m = turned(get_peft_model(llama(), SvfConfig()))
    m.add_adapter("b", SvfConfig(init_weights=False)); m.eval()
    kw = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    with mixture(m, [[1, 0], [0, 1], [0.5, 0.5]]): mixed = m.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **kw)
    for i, w in enumerate([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]):
        with mixture(m, w): alone = m.generate(input_ids=IDS[i:i + 1], attention_mask=torch.ones_like(IDS[:1]), **kw)
        assert torch.equal(mixed[i], alone[0])
