"""SaRA's selection inside a method: what is not among the smallest weights stays bit for bit, in the average too."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.backbones import toy
from expunge.concept import Concept
from expunge.door import erase
from expunge.errors import SettingError
from expunge.kernel.saliency import smallest
from expunge.kernel.state import Step
from expunge.methods.esd import ESD
from expunge.methods.sdd import SDD

BOMB = Concept("bomb", templates=("{c} red green blue bright dark",), keep=())
SHORT: dict[str, Any] = {"steps": 8, "lr": 0.05, "batch": 8, "rollouts": 2, "sampling_steps": 6}


METHODS = {"esd": partial(ESD, **SHORT), "sdd": partial(SDD, decay=0.5, **SHORT)}
methods = pytest.mark.parametrize("name", METHODS)


def moved(name: str, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the edit differs from the base, and where the smallest weights are."""
    model = toy.model("v")
    base = model.network.to_mean.weight.detach().clone()
    edit = erase(model, BOMB, METHODS[name](smallest=share), seed=0).tensors()
    chosen = smallest({"w": base}, share)["w"].bool()
    return edit["unet.to_mean.weight"] != base, chosen


@methods
def test_the_smallest_weights_alone_are_trained(name: str) -> None:
    read = torch.zeros(3, len(toy.WORDS), dtype=torch.bool)
    read[:, [toy.WORDS.index(w) for w in BOMB.templates[0].format(c="bomb").split()]] = True
    everywhere, _ = moved(name, 0.0)
    assert torch.equal(everywhere, read)
    some, chosen = moved(name, 0.25)
    assert torch.equal(some, read & chosen)
    assert some.any()


@methods
def test_not_with_low_rank_factors(name: str) -> None:
    with pytest.raises(SettingError, match="rank must be 0"):
        erase(toy.model("v"), BOMB, METHODS[name](smallest=0.25, rank=1))


@methods
def test_halfway_what_has_outgrown_its_bound_stands_still(name: str) -> None:
    """Some weights are beyond their tensor's bound by then; they keep their value, and others go on."""
    model = toy.model("v")
    base = model.network.to_mean.weight.detach().clone()
    chosen = smallest({"w": base}, 0.25)["w"].bool()
    bound = (base.abs() * chosen).amax()
    seen: list[torch.Tensor] = []

    def look(_: Step) -> None:
        seen.append(model.network.to_mean.weight.detach().clone())

    erase(model, BOMB, METHODS[name](smallest=0.25, steps=20, lr=0.02), seed=0, progress=look)
    half, end = seen[9], seen[-1]
    outgrown = chosen & (half.abs() > bound)
    assert outgrown.any()
    assert not (end != half)[outgrown].any()
    assert (end != half).any()


@methods
def test_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Killed behind the adjustment, which is where the masks are no longer those of the base."""
    method = METHODS[name](smallest=0.25, steps=12)
    wanted = erase(toy.model("v"), BOMB, method, seed=3).tensors()

    def stop(step: Step) -> None:
        if step.i == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        erase(toy.model("v"), BOMB, method, seed=3, out=tmp_path / "run", save_every=0, progress=stop)
    found = erase(toy.model("v"), BOMB, method, seed=3, out=tmp_path / "run", resume=True).tensors()
    assert all(torch.equal(found[k], v) for k, v in wanted.items())
