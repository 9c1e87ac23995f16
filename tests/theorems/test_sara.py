"""SaRA's selection inside a method: what is not among the smallest weights stays bit for bit, in the average too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expunge.backbones import toy
from expunge.concept import Concept
from expunge.door import erase
from expunge.errors import SettingError
from expunge.kernel.saliency import smallest
from expunge.methods.sdd import SDD

BOMB = Concept("bomb", templates=("{c} red green blue bright dark",), keep=())
SHORT: dict[str, Any] = {"steps": 8, "lr": 0.05, "batch": 8, "rollouts": 2, "sampling_steps": 6}


def moved(share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the edit differs from the base, and where the smallest weights are."""
    model = toy.model("v")
    base = model.network.to_mean.weight.detach().clone()
    edit = erase(model, BOMB, SDD(smallest=share, decay=0.5, **SHORT), seed=0).tensors()
    chosen = smallest({"w": base}, share)["w"].bool()
    return edit["unet.to_mean.weight"] != base, chosen


def test_sdd_trains_the_smallest_weights_alone() -> None:
    read = torch.zeros(3, len(toy.WORDS), dtype=torch.bool)
    read[:, [toy.WORDS.index(w) for w in BOMB.templates[0].format(c="bomb").split()]] = True
    everywhere, _ = moved(0.0)
    assert torch.equal(everywhere, read)
    some, chosen = moved(0.25)
    assert torch.equal(some, read & chosen)
    assert some.any()


def test_not_with_low_rank_factors() -> None:
    with pytest.raises(SettingError, match="rank must be 0"):
        erase(toy.model("v"), BOMB, SDD(smallest=0.25, rank=1, **SHORT))
