"""Weights whose gradient is large on every one of several batches: an augmented saliency map (arXiv:2504.12782)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import SettingError
from .descent import Weights
from .saliency import gradient, top


class Salient:
    """The intersection of saliency maps, each relative to its own size.

    A weight's score is the smallest of |g| / rms(g) over the maps: it exceeds a threshold where every map does. So the
    largest scores are the intersection of the maps' masks for the one threshold that leaves the wanted density, while
    the intersection of masks of a fixed share leaves whatever remains, with many maps next to nothing.

    Args:
        weights: name -> parameter; must not move between maps.

    Attributes:
        least: name -> score so far, shape of the weight; empty before the first map.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights, self.least = dict(weights), dict[str, Tensor]()

    def add(self, loss: Tensor) -> float:
        """Take in the map of one loss and return the loss' value; a loss whose gradient is zero says nothing."""
        sizes = {name: g.float().abs() for name, g in gradient(loss, self.weights).items()}
        rms = torch.cat([s.flatten() for s in sizes.values()]).square().mean().sqrt()
        if rms > 0:
            self.least = {name: torch.minimum(s / rms, self.least.get(name, s / rms)) for name, s in sizes.items()}
        return loss.item()

    def scores(self) -> dict[str, Tensor]:
        """Return the scores of all weights.

        Raises:
            SettingError: no map had a gradient.
        """
        if not self.least:
            raise SettingError(
                "no saliency map has a gradient: the concept's words are nothing to the model, or no latent was late. "
                "Look at the words, raise split or maps, or set density=1."
            )
        return dict(self.least)

    def mask(self, density: float) -> dict[str, Tensor]:
        """Return 0/1 masks with exactly `round(density * total)` ones, at the most salient weights."""
        return top(self.scores(), density)

    def state_dict(self) -> dict[str, Any]:
        """Return the scores."""
        return dict(self.least)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with saved scores."""
        self.least = {name: v.to(self.weights[name].device) for name, v in state.items()}
