"""The terms that score methods add up, and the gate that parts a trajectory into phases.

    L = || e_theta(x_t, t, c) - T ||^2 + w_u || e_theta(x_t, t, null) - e(x_t, t, null) ||^2
                                       + w_k || e_theta(x_t, t, k) - e(x_t, t, k) ||^2

Forget c, hold the unconditional prediction, hold what is kept. Methods differ in the target T, in whose trajectories
x_t lies on, and in the phase that a term counts in.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .condition import Condition
from .denoiser import Denoiser
from .descent import mse
from .path import x0_and_eps

Space = Literal["native", "x0"]


def held(denoiser: Denoiser, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
    """Return `|| e_theta(x_t, t, c) - e(x_t, t, c) ||^2`, averaged over every element, with gradient."""
    return mse(denoiser(x_t, t, c), denoiser.teacher(x_t, t, c))


def some(c: Condition, n: int, generator: torch.Generator) -> Condition:
    """Return n conditions drawn from a batch, with replacement."""
    return c[torch.randint(len(c), (n,), generator=generator).to(c.tokens.device)]


def errors(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared difference of each sample, (b,), in float32."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def distance(denoiser: Denoiser, t: Tensor, a: Tensor, b: Tensor, space: Space) -> Tensor:
    """Return the mean squared difference of two native predictions for times (b,), as they are or as clean latents.

    In x0 times are weighted by the square of noise over signal, (sigma / alpha)^2, where the network predicts eps.
    """
    return mse(a, b) if space == "native" else (scale(denoiser, t, space) * errors(a, b)).mean()


def scale(denoiser: Denoiser, t: Tensor, space: Space) -> Tensor:
    """Return by how much a squared difference of native predictions at times (b,) counts in a space, (b,)."""
    one = torch.ones(len(t), device=t.device)
    if space == "native":
        return one
    # x0 is linear in the prediction, so that x_t drops out of differences
    return x0_and_eps(denoiser.kind, torch.zeros_like(one), one, *denoiser.path.levels(t, one))[0].square()


def is_late(denoiser: Denoiser, t: Tensor, split: float) -> Tensor:
    """Return which times (b,) belong to the late phase, where details form; the early one lays out the picture.

    Args:
        denoiser: gives the time axis.
        t: times (b,).
        split: share of the time axis, from no noise, that is late; 1 for all of it.
    """
    return t <= split * denoiser.path.last


def phased(denoiser: Denoiser, x_t: Tensor, t: Tensor, c: Condition, late: Tensor, split: float) -> Tensor:
    """Return a target by phase, (b, ...): `late` in the late one, in the early one what the original predicts under c.

    Args:
        denoiser: gives the time axis and the original.
        x_t: latents (b, ...).
        t: their times (b,).
        c: condition whose own prediction is held while the picture is laid out (b).
        late: target of the late phase, shape of x_t.
        split: see `is_late`; with 1 the original is not asked.
    """
    return late if split == 1 else gated(is_late(denoiser, t, split), late, denoiser.teacher(x_t, t, c))


def gated(chosen: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Return, sample by sample, `yes` where `chosen` (b,) and `no` elsewhere; both are (b, ...)."""
    return torch.where(chosen.view(-1, *(1,) * (yes.ndim - 1)), yes, no)


def over(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of the chosen values (b,), 0 when none is."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)
