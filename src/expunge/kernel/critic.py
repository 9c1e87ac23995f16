"""Away from what a critic rejects: the gradient of its score, taken at a network's clean prediction.

    y <- y - (s sigma_t / n) g(x_0) grad l(y) / rms(grad l(y)),    n times, from the clean prediction x_0 at x_t

l is the critic's logit and r = sigmoid(l). The gate g(x_0) = clip((r - low) / (high - low), 0, 1) leaves alone what it
accepts. It is asked once: a step along its own gradient is soon enough for a critic, long before the look is gone.
Classifier guidance (arXiv:2105.05233, Algorithm 2) moves the clean prediction by sigma^2 / alpha times the
gradient. The gradient's length, which says how sure a critic is and not how far to go, is taken out here, and one sigma
is left: then every network, whatever it predicts, is asked for a bounded change at every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Denoiser
from .path import native, x0_and_eps

LOOKS = 3  # n: one long step would leave the region in which the gradient says anything
SMALLEST = 1e-8  # of a gradient's root mean square


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
        length = slope.flatten(1).square().mean(1).sqrt().clamp(min=SMALLEST)
        gate = ((logit.detach().sigmoid() - self.low) / max(self.high - self.low, SMALLEST)).clamp(0, 1)
        return gate, slope / length.view(-1, *(1,) * (y.ndim - 1))


def led_away(
    denoiser: Denoiser, critics: Sequence[Critic], x_t: Tensor, t: Tensor, e: Tensor, strength: float
) -> Tensor:
    """Return the native prediction whose clean latents critics accept better, shape of x_t, without gradient.

    Args:
        denoiser: gives path and parameterisation.
        critics: each leads away in turn.
        x_t: latents (b, ...).
        t: their times (b,).
        e: a network's native prediction there.
        strength: s, how far in units of the latents' own where all is noise.
    """
    alpha, sigma = denoiser.path.levels(t, x_t)
    y = x0_and_eps(denoiser.kind, x_t, e.detach(), alpha, sigma)[0]
    gates: dict[int, Tensor] = {}
    for _ in range(LOOKS):
        for k, critic in enumerate(critics):
            # what a critic's gate holds stays, however often it is looked at
            rows = gates[k].nonzero()[:, 0] if k in gates else torch.arange(len(y), device=y.device)
            if len(rows):
                gate, slope = critic.judged(y[rows])
                gate = gates.setdefault(k, gate)[rows].view(-1, *(1,) * (y.ndim - 1))
                y = y.index_add(0, rows, (strength * sigma[rows] / LOOKS * gate * slope).to(y), alpha=-1)
    return native(denoiser.kind, y, (x_t - alpha * y) / sigma, alpha, sigma)
