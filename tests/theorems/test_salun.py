"""SalUn: an exact mask over the largest gradients; what it leaves out stays bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from expunge.backbones import tiny, toy
from expunge.concept import Concept
from expunge.door import erase
from expunge.kernel.model import Model
from expunge.kernel.path import KINDS, Kind
from expunge.methods.salun import SalUn

BOMB = Concept("bomb", templates=("{c}",), anchor="cat", keep=("cat", "dog"))
TRAIN: dict[str, Any] = {"group": "cross-attention", "lr": 0.1, "batch": 8, "steps": 90}
SHORT: dict[str, Any] = {"lr": 1e-2, "batch": 2, "steps": 2, "draws": 2}


def mean(model: toy.ToyModel, prompt: str) -> Tensor:
    """The colour that a prompt stands for."""
    c = model.encode(prompt).tokens
    layer = model.network.to_mean
    return (c.sum(1) @ layer.weight.T + layer.bias).detach()[0]


def changed(model: Model, method: SalUn, **options: Any) -> tuple[dict[str, Tensor], int, int]:
    """Erase; return where weights differ from the base, how many do, and of how many."""
    base = {f"unet.{n}": p.detach().clone() for n, p in model.denoiser.module.named_parameters()}
    edit = erase(model, BOMB, method, make_images=3, **options)
    where = {n: v != base[n] for n, v in edit.tensors().items()}
    return where, sum(int(w.sum()) for w in where.values()), sum(w.numel() for w in where.values())


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5])
def test_exactly_the_masked_share_is_trained(density: float) -> None:
    """In a network where every weight has a gradient, so that each weight that may move does."""
    model = tiny.model()
    _, number, total = changed(model, SalUn(group="text-readers", density=density, **SHORT))
    assert number == round(density * total)
    _, free, _ = changed(model, SalUn(group="text-readers", density=1.0, **SHORT))
    assert free > 0.99 * total


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_finds_the_weights_of_the_concept_and_they_suffice(kind: Kind) -> None:
    """In the Gaussian world the word's three weights are all that its pictures' loss depends on."""
    model = toy.model(kind)
    bomb, cat, dog = toy.WORDS.index("bomb"), mean(model, "cat"), mean(model, "dog")
    assert (mean(model, "bomb") - cat).norm() > 0.5
    method = SalUn(density=3 / 36, **TRAIN)
    where, number, _ = changed(model, method)
    assert number == 3
    assert where["unet.to_mean.weight"][:, bomb].all()
    with erase(model, BOMB, method, make_images=3).on(model):
        # means are of order 1; what Adam at this rate leaves after so few steps
        torch.testing.assert_close(mean(model, "bomb"), cat, atol=0.05, rtol=0)
        assert torch.equal(mean(model, "dog"), dog)


def test_without_a_mask_what_is_retained_moves() -> None:
    model = toy.model("eps")
    dog = mean(model, "dog")
    with erase(model, BOMB, SalUn(density=1.0, **TRAIN), make_images=3).on(model):
        assert not torch.equal(mean(model, "dog"), dog)


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_soft_threshold_ends_with_no_more_than_its_share(density: float) -> None:
    model = toy.model("v")
    cat = mean(model, "cat")
    before = (mean(model, "bomb") - cat).norm()
    method = SalUn(threshold="soft", density=density, **TRAIN)
    _, number, total = changed(model, method)
    assert 0 < number <= round(density * total)
    with erase(model, BOMB, method, make_images=3).on(model):
        assert (mean(model, "bomb") - cat).norm() < before / 2


def test_a_random_retained_prompt_stands_in_without_an_anchor() -> None:
    """The mean of what is retained, then: each of them is the target as often as the others."""
    model = toy.model("eps")
    concept = Concept("bomb", templates=("{c}",), keep=("cat", "dog"))
    model.world = None
    kept = [mean(model, f) for w in ("cat", "dog") for f in (w, f"a picture of {w}", f"a photo of {w}")]
    middle = torch.stack(kept).mean(0)
    before = (mean(model, "bomb") - middle).norm()
    with erase(model, concept, SalUn(density=1.0, **TRAIN), make_images=12).on(model):
        assert (mean(model, "bomb") - middle).norm() < before / 2
