"""The phase gate and the unconditional anchor in every score method, where each phase has weights of its own."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge.backbones import toy
from expunge.concept import Concept, Targets
from expunge.door import erase
from expunge.kernel.critic import Critic
from expunge.kernel.denoiser import Denoiser
from expunge.kernel.state import State
from expunge.methods import METHODS, get
from expunge.methods.allbutone import AllButOne
from expunge.methods.ap import AP
from expunge.methods.hfi import HFI
from expunge.methods.sdd import SDD
from expunge.methods.spm import SPM

BINS = 5  # of the time axis; the late ones are the first three
LATE = 3
CONVERGED = 3e-2  # predictions are of order 1; what Adam at these rates leaves after the steps below
BOMB = Concept("bomb", templates=("{c}",), keep=("cat",))
TRAIN: dict[str, Any] = {"lr": 0.03, "batch": 32, "rollouts": 8, "sampling_steps": 20, "steps": 150}
ALL: dict[str, Any] = {"group": "all", "anchor": 2.0, **TRAIN}
AVERAGED: dict[str, Any] = {"decay": 0.8, **ALL}


class Phased(nn.Module):
    """A denoiser that is linear in the words, with a layer of its own for each fifth of the time axis."""

    def __init__(self, last: float) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.last, self.layers = last, nn.ModuleList(nn.Linear(len(toy.WORDS), 3) for _ in range(BINS))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        i, words = (t / (self.last + 1) * BINS).long(), tokens.sum(1)
        out = torch.stack([layer(words) for layer in self.layers])[i, torch.arange(len(i))]
        return out[:, :, None, None].expand_as(x_t)


class PhasedModel(toy.ToyModel):
    """The words of the toy world, drawn by `Phased`."""

    def __init__(self) -> None:
        super().__init__("eps")
        old = self.denoiser
        self.phased, groups = Phased(old.path.last), {"all": lambda _: True, "transformer-blocks": lambda _: True}
        self.denoiser = Denoiser(self.phased, old.path, "eps", old.call, (3, 4, 4), groups)

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.phased}


@torch.no_grad()
def predictions(model: PhasedModel, prompt: str) -> Tensor:
    """What is predicted in each fifth of the time axis, (BINS, 3)."""
    t = ((torch.arange(BINS) + 0.5) / BINS * model.denoiser.path.last).long()
    return model.denoiser(torch.zeros(BINS, 3, 4, 4), t, model.encode(prompt))[:, :, 0, 0].clone()


# with what becomes of the late phase: null - eta (bomb - null)
METHODS_AT_WORK = [
    (AP(**ALL), 1.0),
    (SPM(**{**TRAIN, "anchoring": 1.0}), 1.0),
    (SDD(**AVERAGED), 0.0),
    (HFI(alpha=1.0, beta=1.0, **AVERAGED), 0.0),
    (AllButOne(**ALL), 0.0),
]
table = pytest.mark.parametrize(("method", "eta"), METHODS_AT_WORK, ids=[type(m).__name__ for m, _ in METHODS_AT_WORK])


@table
def test_erased_late_kept_early_and_the_unconditional_held(method: Any, eta: float) -> None:
    model = PhasedModel()
    bomb, null = predictions(model, "bomb"), predictions(model, "")
    erased = null - eta * (bomb - null)
    assert (erased - bomb).norm(dim=1).min() > 0.1
    for split, late in ((1.0, BINS), (LATE / BINS, LATE)):
        wanted = torch.cat([erased[:late], bomb[late:]])
        with erase(model, BOMB, replace(method, split=split), seed=0).on(model):
            torch.testing.assert_close(predictions(model, "bomb"), wanted, atol=CONVERGED, rtol=0)
            torch.testing.assert_close(predictions(model, ""), null, atol=CONVERGED, rtol=0)


def test_rejected_prompts_are_led_away_in_the_late_phase_only() -> None:
    drift = {}
    for split in (1.0, LATE / BINS):
        model = PhasedModel()
        cat = predictions(model, "cat")
        judge = Critic(lambda y: 9 + y.sum((1, 2, 3)) / 1000, 0.0, 0.5)  # rejects all that is drawn
        target: Targets = replace(BOMB.resolve(), rejected=("cat",), keeps=(), critic=judge)
        state, method = State(0), HFI(alpha=1.0, beta=1.0, split=split, **AVERAGED)
        steps = method.fit(model, [target], state)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                model.lock()
                edit = end.value
                break
        with edit.on(model):
            drift[split] = (predictions(model, "cat") - cat).norm(dim=1)
    assert drift[1.0].min() > 0.1
    assert drift[LATE / BINS][:LATE].min() > 0.1
    assert drift[LATE / BINS][LATE:].max() < CONVERGED


@pytest.mark.parametrize("split", [1.0, LATE / BINS])
def test_without_its_anchor_ap_moves_the_unconditional_prediction(split: float) -> None:
    """The adversary and what is kept share a bias with the empty prompt, and hold it only as far as they are words."""
    drift = {}
    for anchor in (0.0, 2.0):
        model = PhasedModel()
        null = predictions(model, "")
        method = replace(METHODS_AT_WORK[0][0], split=split, anchor=anchor, adversarial=0.0, preserve=0.0)
        with erase(model, BOMB, method, seed=0).on(model):
            drift[anchor] = (predictions(model, "") - null).norm(dim=1)[:LATE]
    assert drift[0.0].min() > 0.1
    assert drift[2.0].max() < CONVERGED


# a generator of one step has no trajectory to part, and is asked for nothing without a prompt
SCORES = [n for n in METHODS if get(n).family == "score distillation" and n != "sfd"]


@pytest.mark.parametrize("name", SCORES)
def test_every_score_method_has_both(name: str) -> None:
    assert {"split", "anchor"} <= {f.name for f in fields(get(name))}
