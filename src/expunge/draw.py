"""Pictures of a study, drawn while people rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .feedback import Study
from .sheet import picture, png

BATCH = 8  # few, so that raters need not wait long for the first ones


class Painter(Protocol):
    """The part of `Model` that draws."""

    def generate(
        self, prompts: Sequence[str], *, seeds: Sequence[int], steps: int | None, guidance: float | None
    ) -> Tensor:
        """Return pictures (n, 3, h, w) in [0, 1]."""


def draw(study: Study, model: Painter) -> int:
    """Draw what is planned and not there yet, in the order of the plan, and return how many pictures that were.

    Args:
        study: its `source` says how to sample: "steps" and "guidance", None for the model's own.
        model: what the study's pictures shall come from.
    """
    missing = [p for p in study.pictures() if not p.drawn]
    for start in range(0, len(missing), BATCH):
        part = missing[start : start + BATCH]
        images = model.generate(
            [p.prompt for p in part],
            seeds=[p.seed or 0 for p in part],
            steps=study.source.get("steps"),
            guidance=study.source.get("guidance"),
        )
        for planned, image in zip(part, images, strict=True):
            # without its prompt: raters shall judge by looks
            study.put(planned.id, png(picture(image), {}))
    return len(missing)
