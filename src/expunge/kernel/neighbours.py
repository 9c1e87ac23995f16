"""Which words stand near a concept, as a model's text encoder sees them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .condition import Condition
from .model import Model

TOGETHER = 64  # words the text encoder takes at once


@torch.no_grad()
def nearest(model: Model, words: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """Return words by the Euclidean distance of their encodings (n d) to the nearest of some prompts', nearest first.

    Args:
        model: its text encoder decides.
        words: to be ordered; equals keep their order.
        prompts: of the concept.
    """
    goal = model.encode(prompts).tokens.flatten(1).float()
    parts = [words[i : i + TOGETHER] for i in range(0, len(words), TOGETHER)]
    away = [torch.cdist(model.encode(part).tokens.flatten(1).float(), goal).amin(1) for part in parts]
    return [words[j] for j in torch.cat(away).argsort(stable=True).tolist()]


def encoded(model: Model, words: Sequence[str]) -> Condition:
    """Return the conditions of many words, encoded a few at a time."""
    return Condition.cat([model.encode(words[i : i + TOGETHER]) for i in range(0, len(words), TOGETHER)])


def thinned(words: Sequence[str], n: int) -> list[str]:
    """Return at most n of the words, spread evenly over their order; the first is always among them."""
    places = torch.linspace(0, len(words) - 1, min(n, len(words))).round().long()
    return [words[j] for j in places.tolist()]
