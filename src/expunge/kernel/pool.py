"""Pictures to train on: every one once a pass, each draw at a time and with noise of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .condition import Condition
from .denoiser import Denoiser
from .descent import mse
from .path import Path, native
from .state import State


class Noised(NamedTuple):
    """Pictures at some noise level.

    Attributes:
        x_t: noisy latents (b, ...).
        t: their times (b,).
        x0, eps: the clean latents and the noise that they are made of, shape of x_t.
        k: which condition describes each (b,).
    """

    x_t: Tensor
    t: Tensor
    x0: Tensor
    eps: Tensor
    k: Tensor


class Pool:
    """Latents of pictures in shuffled passes.

    Published loops restart an unshuffled loader at every update and so train on its first batch alone; here nothing
    comes again before everything else has come.

    Args:
        denoiser: gives path and parameterisation.
        z: latents (n, ...).
        k: which condition describes each (n,).
        state: of the fit; supplies randomness.
        batch: pictures a draw; may exceed n.
    """

    def __init__(self, denoiser: Denoiser, z: Tensor, k: Tensor, state: State, batch: int) -> None:
        self.denoiser, self.z, self.k, self.batch = denoiser, z, k, batch
        self.generator = state.generator
        self.order = torch.empty(0, dtype=torch.long)

    def draw(self) -> Noised:
        """Return the next pictures of the pass, each at its own time."""
        while len(self.order) < self.batch:
            self.order = torch.cat([self.order, torch.randperm(len(self.z), generator=self.generator)])
        index, self.order = self.order[: self.batch].to(self.z.device), self.order[self.batch :]
        x0, t = self.z[index], times(self.denoiser.path, self.batch, self.generator).to(self.z.device)
        eps = torch.randn(x0.shape, generator=self.generator).to(x0)
        return Noised(self.denoiser.path.noised(x0, eps, t), t, x0, eps, self.k[index])

    def truth(self, drawn: Noised) -> Tensor:
        """Return what a perfect network would output for a draw: the target of denoising score matching, (b, ...)."""
        return native(self.denoiser.kind, drawn.x0, drawn.eps, *self.denoiser.path.levels(drawn.t, drawn.x0))

    def error(self, drawn: Noised, c: Condition) -> Tensor:
        """Return the denoising error of a draw under rows k of `c`: mean square from the truth, with gradient."""
        return mse(self.denoiser(drawn.x_t, drawn.t, c[drawn.k]), self.truth(drawn))

    def state_dict(self) -> dict[str, Any]:
        """Return what is left of the pass."""
        return {"order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a pass."""
        self.order = state["order"]


def times(path: Path, n: int, generator: torch.Generator) -> Tensor:
    """Return n times (n,), one from each of n equal spans: errors vary over times far more than over anything else.

    Never time zero of a continuous path: without noise there is nothing to predict.
    """
    share = (torch.arange(n) + 1 - torch.rand(n, generator=generator)) / n
    if path.grid(1).is_floating_point():
        return share * path.last
    return (share * (path.last + 1)).ceil().long() - 1
