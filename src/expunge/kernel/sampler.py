"""Deterministic sampling: one update line for every parameterisation (DDIM, arXiv:2010.02502, Eq. 12 with eta = 0)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from .condition import Condition
from .denoiser import Denoiser
from .path import x0_and_eps

Predict = Callable[[Tensor, Tensor, Condition], Tensor]


def guided(predict: Predict, c: Condition, null: Condition, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return `e_0 + s (e_c - e_0)` as a function of (x_t, t).

    s = 1 means no guidance and costs one call, else two in one batch.
    """

    def e(x_t: Tensor, t: Tensor) -> Tensor:
        n = len(x_t)
        if scale == 1.0:
            return predict(x_t, t, c.batch(n))
        both = Condition.cat([c.batch(n), null.batch(n)])
        e_c, e_0 = predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return e_0 + scale * (e_c - e_0)

    return e


def trajectory(
    denoiser: Denoiser, e: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x_t, t) for every time, from noise `x` (b, ...) downwards, then (x_0, the last time) once more.

    Args:
        denoiser: gives path and parameterisation.
        e: native prediction as a function of (x_t, t).
        x: pure noise at the first time.
        times: descending times, shape (n,) or one schedule a latent, (n, b).
    """
    path, b = denoiser.path, len(x)
    rows = [t.expand(b) for t in times]
    for t, s in pairwise([*rows, None]):
        assert t is not None
        yield x, t
        alpha, sigma = path.levels(t, x)
        x0, eps = x0_and_eps(denoiser.kind, x, e(x, t), alpha, sigma)
        alpha_s, sigma_s = path.levels(s, x) if s is not None else path.end
        x = alpha_s * x0 + sigma_s * eps
    yield x, rows[-1]


def clean(denoiser: Denoiser, e: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor) -> Tensor:
    """Return the clean latents that a native prediction at (x_t, t) means; not clamped: gradients would end there."""
    return x0_and_eps(denoiser.kind, x_t, e(x_t, t), *denoiser.path.levels(t, x_t))[0]


def one_step(denoiser: Denoiser, e: Callable[[Tensor, Tensor], Tensor], z: Tensor, t: int) -> Tensor:
    """Return what a one-step generator makes of noise `z` (b, ...): its clean prediction at time t of noise alone."""
    times = torch.full((len(z),), t, device=z.device)
    _, sigma = denoiser.path.levels(times, z)
    return clean(denoiser, e, sigma * z, times)


@torch.no_grad()
def generate(denoiser: Denoiser, c: Condition, null: Condition, x: Tensor, *, steps: int, guidance: float) -> Tensor:
    """Return the samples that noise `x` (b, ...) becomes."""
    times = denoiser.path.grid(steps).to(x.device)
    for last, _ in trajectory(denoiser, guided(denoiser, c, null, guidance), x, times):
        x = last
    return x
