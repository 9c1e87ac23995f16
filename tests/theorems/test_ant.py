"""ANT's phases, anchors and mask, where every time has weights of its own and the optimum is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge.backbones import tiny, toy
from expunge.concept import Concept
from expunge.door import erase
from expunge.kernel.denoiser import Denoiser
from expunge.kernel.path import KINDS, Kind
from expunge.kernel.state import Step
from expunge.methods.ant import ANT
from expunge.methods.esd import ESD

BINS = 10  # of the time axis; the late ones below are the first six
LATE = 6
CONVERGED = 2e-2  # predictions are of order 1; what Adam at this rate leaves after the steps below
TRAIN: dict[str, Any] = {"group": "all", "lr": 0.03, "batch": 64, "rollouts": 16, "sampling_steps": 20, "steps": 120}
BOMB = Concept("bomb", templates=("{c}",))


class Phased(nn.Module):
    """A denoiser that is linear in the words, with weights of its own for each tenth of the time axis."""

    def __init__(self, last: float) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.last = last
        self.weight = nn.Parameter(torch.randn(BINS, 3, len(toy.WORDS), generator=g) * 0.3)
        self.bias = nn.Parameter(torch.randn(BINS, 3, generator=g) * 0.2)

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        i = (t / (self.last + 1) * BINS).long()
        out = (self.weight[i] @ tokens.sum(1)[:, :, None])[..., 0] + self.bias[i]
        return out[:, :, None, None].expand_as(x_t)


class PhasedModel(toy.ToyModel):
    """The words of the toy world, drawn by `Phased`."""

    def __init__(self, kind: Kind = "eps") -> None:
        super().__init__(kind)
        path, self.phased = self.denoiser.path, Phased(self.denoiser.path.last)
        call = self.denoiser.call
        self.denoiser = Denoiser(self.phased, path, kind, call, (3, 4, 4), {"all": lambda _: True})

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.phased}


def predictions(model: PhasedModel, prompt: str) -> Tensor:
    """What is predicted in each tenth of the time axis, (BINS, 3)."""
    words = model.encode(prompt).tokens[0].sum(0)
    return (model.phased.weight @ words + model.phased.bias).detach().clone()


BOTH = [(ANT(split=0.6, density=1.0, anchor=2.0, **TRAIN), k) for k in KINDS]
BOTH += [(ESD(split=0.6, anchor=2.0, **TRAIN), "eps")]


@pytest.mark.parametrize(("method", "kind"), BOTH)
def test_reversed_late_kept_early_and_the_unconditional_held(method: Any, kind: Kind) -> None:
    model = PhasedModel(kind)
    bomb, null = predictions(model, "bomb"), predictions(model, "")
    wanted = torch.cat([(2 * null - bomb)[:LATE], bomb[LATE:]])
    assert (wanted - bomb)[:LATE].norm(dim=1).min() > 0.1
    with erase(model, BOMB, method, seed=0).on(model):
        torch.testing.assert_close(predictions(model, "bomb"), wanted, atol=CONVERGED, rtol=0)
        torch.testing.assert_close(predictions(model, ""), null, atol=CONVERGED, rtol=0)


def test_a_single_phase_without_anchors_changes_both() -> None:
    """Before: ESD as published reverses the early phase as well, and drags the unconditional prediction along."""
    model = PhasedModel()
    bomb, null = predictions(model, "bomb"), predictions(model, "")
    with erase(model, BOMB, ESD(**TRAIN), seed=0).on(model):
        assert (predictions(model, "bomb") - bomb)[LATE:].norm(dim=1).min() > 0.1
        assert (predictions(model, "") - null).norm(dim=1).min() > 0.1


def test_the_unconditional_anchors_have_a_gradient_in_both_phases() -> None:
    """In released code they are computed under no_grad, and do nothing."""
    drift = {}
    for anchor in (0.0, 2.0):
        model = PhasedModel()
        null = predictions(model, "")
        # a neighbour in both phases pulls on what the empty prompt shares with it
        concept = Concept("bomb", templates=("{c}",), anchor="cat")
        with erase(model, concept, ANT(split=0.6, density=1.0, early=1.0, anchor=anchor, **TRAIN), seed=0).on(model):
            drift[anchor] = (predictions(model, "") - null).norm(dim=1)
    assert drift[0.0][:LATE].min() > 0.1
    assert drift[2.0][:LATE].max() < drift[0.0][:LATE].min() / 4


def test_the_mask_keeps_the_largest_gradients() -> None:
    """Only the late phase's weights of the concept's word and the bias have a gradient: a mask of that size is they."""
    model = PhasedModel()
    bomb, null = predictions(model, "bomb"), predictions(model, "")
    base = {n: p.detach().clone() for n, p in model.phased.named_parameters()}
    salient = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in base.items()}
    salient["weight"][:LATE, :, toy.WORDS.index("bomb")] = True
    salient["bias"][:LATE] = True
    total = sum(p.numel() for p in base.values())
    density = sum(int(m.sum()) for m in salient.values()) / total
    method = ANT(split=0.6, density=density, maps=5, anchor=2.0, **TRAIN)
    with erase(model, BOMB, method, seed=0).on(model):
        now = {n: p.detach().clone() for n, p in model.phased.named_parameters()}
        torch.testing.assert_close(predictions(model, "bomb")[:LATE], (2 * null - bomb)[:LATE], atol=CONVERGED, rtol=0)
    assert all(torch.equal(now[n] != base[n], salient[n]) for n in base)


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_masked_weights_are_bit_identical_and_the_density_exact(density: float) -> None:
    model = tiny.model()
    base = {f"unet.{n}": p.detach().clone() for n, p in model.denoiser.module.named_parameters()}
    method = ANT(density=density, maps=2, steps=3, batch=4, rollouts=2, sampling_steps=2, lr=1e-2)
    edit = erase(model, BOMB, method, seed=0).tensors()
    moved = sum(int((v != base[k]).sum()) for k, v in edit.items())
    # an update smaller than a weight's rounding leaves it where it is
    total = sum(v.numel() for v in edit.values())
    assert 0.95 * round(density * total) < moved <= round(density * total)


@pytest.mark.parametrize("at", [1, 4])
def test_ant_resumes_bit_for_bit(at: int, tmp_path: Path) -> None:
    """Killed while the maps are drawn, and while the weights are trained."""
    model = toy.model("v")
    method = ANT(density=0.2, maps=3, steps=4, batch=2, rollouts=2, sampling_steps=2, reuse=1, lr=1e-2)
    wanted = erase(model, BOMB, method, seed=3).tensors()

    def stop(step: Step) -> None:
        if step.i == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        erase(model, BOMB, method, seed=3, out=tmp_path / "run", save_every=0, progress=stop)
    seen: list[Step] = []
    found = erase(model, BOMB, method, seed=3, out=tmp_path / "run", resume=True, progress=seen.append).tensors()
    assert [s.i for s in seen] == list(range(at + 1, 7))
    assert all(torch.equal(found[k], v) for k, v in wanted.items())
