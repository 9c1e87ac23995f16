"""All-but-One rewrites the guidance term and leaves the unconditional score where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge.backbones import toy
from expunge.concept import Concept
from expunge.door import erase
from expunge.kernel.denoiser import Denoiser
from expunge.kernel.model import Model
from expunge.kernel.path import KINDS, Kind
from expunge.kernel.sampler import guided
from expunge.kernel.state import Step
from expunge.methods.allbutone import AllButOne
from expunge.methods.esd import ESD

CONVERGED = 1e-2  # means are of order 1; what Adam at this rate leaves after the steps below
TRAIN: dict[str, Any] = {"lr": 0.05, "batch": 16, "rollouts": 4, "sampling_steps": 10}
SCALES = (1.0, 3.0, 7.5)


def predicted(model: Model, prompt: str, scale: float = 1.0) -> Tensor:
    """The guided prediction on fixed latents at fixed times."""
    x_t = torch.randn(4, *model.denoiser.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([100, 400, 700, 950])
    with torch.no_grad():
        return guided(model.denoiser, model.encode(prompt), model.encode(""), scale)(x_t, t)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("anchor", ["cat", ""])
def test_the_concept_draws_the_anchor_at_every_guidance_scale(kind: Kind, anchor: str) -> None:
    model = toy.model(kind)
    wanted = [predicted(model, anchor, s) for s in SCALES]
    size = wanted[0].abs().max().item()
    assert all((predicted(model, "bomb", s) - w).abs().max() > 0.1 for s, w in zip(SCALES, wanted, strict=True))
    with erase(model, Concept("bomb", templates=("{c}",), anchor=anchor), AllButOne(steps=150, **TRAIN), seed=0).on(
        model
    ):
        for s, w in zip(SCALES, wanted, strict=True):
            torch.testing.assert_close(predicted(model, "bomb", s), w, atol=s * CONVERGED * max(1, size), rtol=0)


def test_esd_moves_the_unconditional_score_and_this_does_not() -> None:
    """With every weight trainable the bias, which is all that the empty prompt has, is free to move."""
    drift = {}
    for method in (ESD(group="all", steps=100, **TRAIN), AllButOne(group="all", steps=100, **TRAIN)):
        model = toy.model("eps")
        before = predicted(model, "")
        with erase(model, Concept("bomb", templates=("{c}",)), method, seed=0).on(model):
            drift[type(method)] = (predicted(model, "") - before).abs().max().item()
    assert drift[ESD] > 0.1
    # not zero: the bias' gradient is rounding, to which Adam gives the size of a step
    assert drift[AllButOne] < drift[ESD] / 50


class Scaled(nn.Module):
    """A denoiser whose predictions share a factor: `scale (W words + b)`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.read = nn.Linear(len(toy.WORDS), 3)
        with torch.no_grad():
            self.read.weight.copy_(toy.model().network.to_mean.weight)
            self.read.bias.fill_(0.5)

    def forward(self, x_t: Tensor, _t: Tensor, tokens: Tensor) -> Tensor:
        return (self.scale * self.read(tokens.sum(1)))[:, :, None, None].expand_as(x_t)


class ScaledModel(toy.ToyModel):
    """The words of the toy world, drawn by `Scaled`."""

    def __init__(self) -> None:
        super().__init__("v")
        old, self.scaled = self.denoiser, Scaled()
        self.denoiser = Denoiser(self.scaled, old.path, old.kind, old.call, (3, 4, 4), {"all": lambda _: True})

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.scaled}


def test_without_its_term_the_unconditional_score_drifts() -> None:
    """Shrinking everything shrinks the guidance term as well, which is all that lambda = 0 asks for."""
    drift = {}
    for anchor in (0.0, 1.0):
        model = ScaledModel()
        null = predicted(model, "")
        method = AllButOne(group="all", anchor=anchor, steps=200, **TRAIN)
        with erase(model, Concept("bomb", templates=("{c}",)), method, seed=0).on(model):
            assert (predicted(model, "bomb") - predicted(model, "")).abs().max() < 5 * CONVERGED
            drift[anchor] = (predicted(model, "") - null).abs().max().item()
    assert drift[0.0] > 0.1
    assert drift[1.0] < CONVERGED


def test_several_concepts_at_once_each_to_its_anchor() -> None:
    model = toy.model("v")
    pairs = {"bomb": "cat", "dagger": "house"}
    wanted = {w: predicted(model, a, 3.0) for w, a in pairs.items()}
    concepts = [Concept(w, templates=("{c}",), anchor=a) for w, a in pairs.items()]
    assert all((predicted(model, w, 3.0) - v).abs().max() > 0.1 for w, v in wanted.items())
    with erase(model, concepts, AllButOne(steps=250, **TRAIN), seed=0).on(model):
        for w, v in wanted.items():
            torch.testing.assert_close(predicted(model, w, 3.0), v, atol=6 * CONVERGED, rtol=0)


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    model, concept = toy.model("v"), Concept("bomb", templates=("{c}",), anchor="cat", keep=("dog",))
    method = AllButOne(steps=5, batch=2, rollouts=2, sampling_steps=2, reuse=1, lr=1e-2)
    wanted = erase(model, concept, method, seed=3).tensors()

    def stop(step: Step) -> None:
        if step.i == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        erase(model, concept, method, seed=3, out=tmp_path / "run", save_every=0, progress=stop)
    found = erase(model, concept, method, seed=3, out=tmp_path / "run", resume=True).tensors()
    assert all(torch.equal(found[k], v) for k, v in wanted.items())
