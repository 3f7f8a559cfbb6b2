"""Room 00's sliders, without a kernel: what the cell asks of ipywidgets, and what it draws when a slider moves."""
import json, sys, types

import pytest
import torch
from conftest import ROOT

CELLS = ["".join(c["source"]) for c in json.loads((ROOT / "nbs" / "00_svd.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("there", [True, False], ids=["with ipywidgets", "without"])
def test_a_slider_turns_its_voice(there, monkeypatch):
    asked, drawn = [], []
    stand_in = types.ModuleType("ipywidgets")
    stand_in.interact = lambda f, **sliders: asked.append((f, sliders))
    monkeypatch.setitem(sys.modules, "ipywidgets", stand_in if there else None)      # None: importing it fails
    W = torch.rand(64, 96, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    space = dict(torch=torch, W=W, U=U, voices=S[:, None, None] * U.T[:, :, None] * Vh[:, None], show=lambda P, **how: drawn.append(P))
    for start in ("def knobs(", "#| eval: false\ntry: from ipywidgets"):
        exec(next(c for c in CELLS if c.startswith(start)), space)
    assert len(asked) == there
    if not there: return
    (slide, sliders), = asked
    assert list(sliders) == ["rest", *(f"z{i}" for i in range(1, 9))] and set(sliders.values()) == {(0., 2., .05)}
    assert slide(**dict.fromkeys(sliders, 1.) | dict(z2=.5)) is None
    z = torch.ones(64).index_fill(0, torch.tensor([1]), .5)
    assert torch.allclose(drawn[-1], (U * (S * z)) @ Vh, atol=1e-4)
