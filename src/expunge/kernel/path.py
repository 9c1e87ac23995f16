"""Noise paths and the four parameterisations of a denoiser.

A path mixes data and noise, `x_t = alpha x0 + sigma eps`. Every network output is linear in the two,
`out = a x0 + b eps`, so one 2x2 solve turns any output into both (the table of `rows`). Times are the network's own
(0 to 999 for Stable Diffusion).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import Unsupported

Kind = Literal["eps", "x0", "v", "flow"]
KINDS: tuple[Kind, ...] = ("eps", "x0", "v", "flow")

# diffusers' names of the same four
PREDICTION: dict[str, Kind] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow": "flow"}


@dataclass(frozen=True)
class Path:
    """A noise path.

    Attributes:
        at: times of any shape -> (alpha, sigma) of that shape.
        grid: number of sampling steps n -> n descending times, the sampler's own spacing.
        end: (alpha, sigma) that the last step of a sampler lands on.
        last: largest time.
    """

    at: Callable[[Tensor], tuple[Tensor, Tensor]]
    grid: Callable[[int], Tensor]
    end: tuple[float, float]
    last: float

    @staticmethod
    def discrete(alphas_cumprod: Tensor, grid: Callable[[int], Tensor], end_cumprod: float) -> Path:
        """A variance-preserving path over integer times (DDPM, arXiv:2006.11239, Eq. 4)."""
        alpha, sigma = alphas_cumprod.double().sqrt().float(), (1 - alphas_cumprod.double()).sqrt().float()

        def at(t: Tensor) -> tuple[Tensor, Tensor]:
            i = t.long().to(alpha.device)
            return alpha[i].to(t.device), sigma[i].to(t.device)

        return Path(at, grid, (end_cumprod**0.5, (1 - end_cumprod) ** 0.5), len(alpha) - 1)

    @staticmethod
    def straight(grid: Callable[[int], Tensor], last: float = 1000.0) -> Path:
        """The rectified-flow path `x_t = (1 - u) x0 + u eps` with u = t / last (arXiv:2209.03003)."""

        def at(t: Tensor) -> tuple[Tensor, Tensor]:
            u = t.float() / last
            return 1 - u, u

        return Path(at, grid, (1.0, 0.0), last)

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at times (b,), shaped to multiply `like` (b, ...)."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha, sigma = self.at(t)
        return alpha.to(like.dtype).view(shape), sigma.to(like.dtype).view(shape)

    def time(self, ratio: float) -> int:
        """Return the whole time whose noise over signal, sigma / alpha, is nearest `ratio`."""
        alpha, sigma = self.at(torch.arange(int(self.last) + 1))
        return int((sigma / alpha - ratio).abs().argmin())

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t of clean x0 (b, ...) and noise of the same shape at times (b,)."""
        alpha, sigma = self.levels(t, x0)
        return alpha * x0 + sigma * eps


def rows(kind: Kind, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return (a, b) with `out = a x0 + b eps`: one row of the table of parameterisations."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    return {"eps": (zero, one), "x0": (one, zero), "v": (-sigma, alpha), "flow": (-one, one)}[kind]


def x0_and_eps(kind: Kind, x_t: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Solve `x_t = alpha x0 + sigma eps`, `out = a x0 + b eps` for (x0, eps).

    Raises:
        Unsupported: the two equations are one (an eps network at pure noise, an x0 network at no noise).
    """
    a, b = rows(kind, alpha, sigma)
    det = alpha * b - sigma * a
    if bool((det == 0).any()):
        raise Unsupported(
            f"the {kind} prediction says nothing at this noise level (alpha {alpha.min():.3g}, "
            f"sigma {sigma.max():.3g}). A schedule with zero terminal signal needs a v or flow network."
        )
    return (b * x_t - sigma * out) / det, (alpha * out - a * x_t) / det


def native(kind: Kind, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return what a perfect network of this kind would output for (x0, eps)."""
    a, b = rows(kind, alpha, sigma)
    return a * x0 + b * eps
