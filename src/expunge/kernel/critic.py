"""Away from what a critic rejects, along what a network thinks its picture may still become.

    y <- y - (s sigma_t / n) g(x_0) C grad l(y) / rms(C grad l(y)),    n times, from the clean prediction x_0 at x_t
    C = (sigma_t^2 / alpha_t) dx_0/dx_t + d I

l is the critic's logit and r = sigmoid(l). The gate g(x_0) = clip((r - low) / (high - low), 0, 1) leaves alone what it
accepts. It is asked once: a step along its own gradient is soon enough for a critic, long before the look is gone.

Of a perfect network (sigma^2 / alpha) dx_0/dx_t is the covariance of the clean latents given x_t (the second order of
Tweedie's formula), and x_0 - s C grad l is to first order their mean once their density is weighed by exp(-s l). A
gradient through a decoder and an image tower is mostly grain that no picture has; C leaves of it what pictures vary in.
Diffusion posterior sampling (arXiv:2209.14687) guides by the same product. Its length, which says how sure a critic is
and not how far to go, is taken out here, and one sigma is left: then every network, whatever it predicts, is asked for
a bounded change at every time. d grants every latent a little variance, for networks that are sure of their picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .condition import Condition
from .denoiser import Denoiser
from .path import native, x0_and_eps

LOOKS = 3  # n: one long step would leave the region in which the gradient says anything
SMALLEST = 1e-8  # of a gradient's root mean square
GRANTED = 0.01  # d: latents have variance 1


@dataclass(frozen=True)
class Critic:
    """A differentiable judge of latents.

    Attributes:
        logit: clean latents (b, ...) -> logits (b,) of being rejected, with gradient.
        low, high: probabilities at which the gate begins to open, and is open.
    """

    logit: Callable[[Tensor], Tensor]
    low: float
    high: float

    def judged(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return gate (b,) and gradient of the logit, of unit root mean square a sample, at clean latents (b, ...)."""
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            logit = self.logit(y)
            (slope,) = torch.autograd.grad(logit.sum(), y)
        gate = ((logit.detach().sigmoid() - self.low) / max(self.high - self.low, SMALLEST)).clamp(0, 1)
        return gate, unit(slope)


def unit(way: Tensor) -> Tensor:
    """Return ways (b, ...) of root mean square 1 a sample; 0 where there is none."""
    return way / way.flatten(1).square().mean(1).sqrt().clamp(min=SMALLEST).view(-1, *(1,) * (way.ndim - 1))


def spread(denoiser: Denoiser, x_t: Tensor, t: Tensor, c: Condition) -> Callable[[Tensor], Tensor]:
    """Return alpha C as a function of vectors (b, ...), at latents x_t (b, ...) and times t (b,) under c (b)."""
    alpha, sigma = denoiser.path.levels(t, x_t)
    with torch.enable_grad():
        x = x_t.detach().requires_grad_(True)
        x_0, _ = x0_and_eps(denoiser.kind, x, denoiser(x, t, c), alpha, sigma)

    def times(v: Tensor) -> Tensor:
        (out,) = torch.autograd.grad(x_0, x, v, retain_graph=True)
        return sigma**2 * out + GRANTED * alpha * v

    return times


def led_away(
    denoiser: Denoiser, critics: Sequence[Critic], x_t: Tensor, t: Tensor, c: Condition, strength: float
) -> Tensor:
    """Return the native prediction whose clean latents critics accept better, shape of x_t, without gradient.

    Args:
        denoiser: whose prediction it is; frozen.
        critics: each leads away in turn.
        x_t: latents (b, ...).
        t: their times (b,).
        c: the condition they are predicted under (b).
        strength: s, how far in units of the latents' own where all is noise.
    """
    alpha, sigma = denoiser.path.levels(t, x_t)
    with torch.no_grad():
        y, _ = x0_and_eps(denoiser.kind, x_t, denoiser(x_t, t, c), alpha, sigma)
    for critic in critics:
        gate, slope = critic.judged(y)
        # what the gate holds stays, however often the critic is asked
        rows = gate.nonzero()[:, 0]
        if not len(rows):
            continue
        alpha_c = spread(denoiser, x_t[rows], t[rows], c[rows])
        far, slope = strength * sigma[rows] / LOOKS * gate[rows].view(-1, *(1,) * (y.ndim - 1)), slope[rows]
        for look in range(LOOKS):
            slope = critic.judged(y[rows])[1] if look else slope
            y = y.index_add(0, rows, (far * unit(alpha_c(slope))).to(y), alpha=-1)
    return native(denoiser.kind, y, (x_t - alpha * y) / sigma, alpha, sigma)
