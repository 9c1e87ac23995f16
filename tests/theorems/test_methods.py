"""What each method provably converges to, in the world whose optimum is known. Each effect has its *before* check."""

from __future__ import annotations

import pytest
import torch

from expunge.backbones import toy
from expunge.concept import Concept
from expunge.door import erase
from expunge.kernel.closedform import solve
from expunge.kernel.path import KINDS, Kind
from expunge.methods.esd import ESD
from expunge.methods.sdd import SDD
from expunge.methods.uce import UCE

CONVERGED = 1e-3  # means are of order 1; what Adam at this rate leaves after the steps below
EXACT = 1e-5  # float32 weights of order 1
BOMB = Concept("bomb", templates=("{c}",), keep=())
TRAIN = {"lr": 0.02, "batch": 32, "rollouts": 8, "sampling_steps": 10}


def mean(model: toy.ToyModel, prompt: str) -> torch.Tensor:
    """The colour that a prompt stands for."""
    c = model.encode(prompt).tokens
    layer = model.network.to_mean
    return (c.sum(1) @ layer.weight.T + layer.bias).detach()[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_esd_reaches_negative_guidance(kind: Kind, eta: float) -> None:
    model = toy.model(kind)
    before, null = mean(model, "bomb"), mean(model, "")
    wanted = null - eta * (before - null)
    assert (before - wanted).norm() > 0.1
    edit = erase(model, BOMB, ESD(eta=eta, steps=400, **TRAIN), seed=0)
    with edit.on(model):
        torch.testing.assert_close(mean(model, "bomb"), wanted, atol=10 * CONVERGED, rtol=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_automatic_learning_rate_is_a_hundredth_of_the_weights_and_told(rank: int) -> None:
    """Adam's first step moves every weight by its learning rate, whatever the loss."""
    model = toy.model("v")
    student = model.denoiser.unlock("all", rank, torch.Generator())
    wanted = 0.01 * student.rms
    model.lock()
    assert wanted > 0
    told, moved = [], []
    for lr in ("auto", wanted, 2 * wanted):
        edit = erase(model, BOMB, ESD(group="all", rank=rank, lr=lr, steps=1, batch=4, rollouts=2), seed=0)
        assert edit.card is not None
        told.append(edit.card.chosen)
        moved.append(torch.cat([v.flatten() for v in edit.tensors().values()]))
    assert told == [{"lr": wanted}, {}, {}]
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])


def test_esd_towards_an_anchor() -> None:
    model = toy.model("v")
    concept = Concept("bomb", templates=("{c}",), anchor="cat")
    wanted = mean(model, "cat")
    assert (mean(model, "bomb") - wanted).norm() > 0.1
    edit = erase(model, concept, ESD(eta=0.0, steps=400, **TRAIN), seed=0)
    with edit.on(model):
        torch.testing.assert_close(mean(model, "bomb"), wanted, atol=10 * CONVERGED, rtol=0)


def test_esd_preserve_term_holds_what_shares_weights_with_the_concept() -> None:
    """With all weights trainable the bias moves under every prompt, unless the kept one is held."""
    drift = {}
    for preserve in (0.0, 10.0):
        model = toy.model("eps")
        before = mean(model, "cat")
        concept = Concept("bomb", templates=("{c}",), keep=("cat",))
        method = ESD(group="all", preserve=preserve, steps=200, **TRAIN)
        with erase(model, concept, method, seed=0).on(model):
            drift[preserve] = (mean(model, "cat") - before).norm().item()
    assert drift[0.0] > 0.05
    assert drift[10.0] < drift[0.0] / 4


@pytest.mark.parametrize("kind", KINDS)
def test_sdd_makes_the_concept_unconditional(kind: Kind) -> None:
    model = toy.model(kind)
    null = mean(model, "")
    assert (mean(model, "bomb") - null).norm() > 0.1
    edit = erase(model, BOMB, SDD(decay=0.9, steps=400, **TRAIN), seed=0)
    with edit.on(model):
        torch.testing.assert_close(mean(model, "bomb"), null, atol=10 * CONVERGED, rtol=0)


def test_sdd_result_is_the_average_not_the_student() -> None:
    """One update with decay m moves the result by (1 - m) of the student's own move."""
    moved = {}
    for decay in (0.0, 0.9):
        model = toy.model("eps")
        before = model.network.to_mean.weight.detach().clone()
        with erase(model, BOMB, SDD(decay=decay, steps=1, **TRAIN), seed=0).on(model):
            moved[decay] = model.network.to_mean.weight.detach() - before
    assert moved[0.0].norm() > 1e-3
    torch.testing.assert_close(moved[0.9], 0.1 * moved[0.0], atol=EXACT, rtol=0)


def test_sdd_unconditional_anchor_stops_the_drift() -> None:
    """The paper ties nothing to the original network: with every weight trainable the empty prompt drifts."""
    drift = {}
    for anchor in (0.0, 100.0):
        model = toy.model("eps")
        with torch.no_grad():
            model.network.to_mean.bias.fill_(0.3)
        before = mean(model, "")
        concept = Concept("bomb", templates=("{c}",), keep=("cat",))
        method = SDD(group="all", decay=0.5, anchor=anchor, preserve=1.0, steps=150, **TRAIN)
        with erase(model, concept, method, seed=0).on(model):
            drift[anchor] = (mean(model, "") - before).norm().item()
    assert drift[0.0] > 5e-3
    assert drift[100.0] < drift[0.0] / 2


def test_sdd_several_concepts_at_once() -> None:
    model = toy.model("v")
    concepts = [Concept(w, templates=("{c}",)) for w in ("bomb", "dagger")]
    for w in ("bomb", "dagger"):
        assert mean(model, w).norm() > 0.1
    with erase(model, concepts, SDD(decay=0.9, steps=500, **TRAIN), seed=0).on(model):
        for w in ("bomb", "dagger"):
            torch.testing.assert_close(mean(model, w), mean(model, ""), atol=10 * CONVERGED, rtol=0)


def test_uce_solves_the_normal_equations() -> None:
    """Eq. 7 is the minimum of sum |W* c - v|^2 + lambda |W* - W|^2: its gradient is zero there, and not at W."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(5, 7, generator=g, dtype=torch.float64)
    c, a = (torch.randn(20, 7, generator=g, dtype=torch.float64) for _ in range(2))
    gram, cross, ridge = c.T @ c, a.T @ c, 0.3
    lam = ridge * gram.diagonal().mean()
    new = solve(w, gram, cross, ridge)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        return (x @ c.T - w @ a.T) @ c + lam * (x - w)

    assert gradient(w).norm() > 1
    assert gradient(new).norm() < 1e-9


def test_uce_with_an_infinite_ridge_is_the_base() -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(5, 7, generator=g, dtype=torch.float64)
    c, a = (torch.randn(20, 7, generator=g, dtype=torch.float64) for _ in range(2))
    near, far = (solve(w, c.T @ c, a.T @ c, ridge) for ridge in (1e-3, 1e9))
    assert (near - w).norm() > 0.1
    assert (far - w).norm() < 1e-6


def test_uce_erases_and_keeps() -> None:
    model = toy.model("flow")
    concept = Concept("bomb", templates=("{c}",), anchor="cat", keep=("dog", "house"))
    cat, dog = mean(model, "cat"), mean(model, "dog")
    assert (mean(model, "bomb") - cat).norm() > 0.1
    with erase(model, concept, UCE(ridge=1e-6), seed=0).on(model):
        torch.testing.assert_close(mean(model, "bomb"), cat, atol=CONVERGED, rtol=0)
        torch.testing.assert_close(mean(model, "dog"), dog, atol=CONVERGED, rtol=0)
