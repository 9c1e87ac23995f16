"""An edit that replaces weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import BadEdit
from ..kernel.model import Model
from ..records import Card
from .io import check_base, parameters, write


@dataclass(frozen=True)
class WeightEdit:
    """New values for some of a model's weights.

    Attributes:
        values: `component.parameter` -> value, shape of the base's.
        card: where the edit comes from; None until `erase` has filled it in.
    """

    values: dict[str, Tensor]
    card: Card | None = None
    kind: ClassVar[str] = "weights"

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], card: Card | None) -> WeightEdit:
        """Make the edit from what `tensors` returned."""
        return cls(tensors, card)

    def with_card(self, card: Card) -> WeightEdit:
        """Return the same edit with its card."""
        return replace(self, card=card)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that is saved."""
        return dict(self.values)

    @contextmanager
    def on(self, model: Model) -> Iterator[Model]:
        """Apply the edit to a model; on exit the base is back bit for bit.

        Raises:
            BadEdit: the edit was made for another base.
        """
        check_base(self.card, model)
        live = parameters(model)
        unknown = [k for k in self.values if k not in live or live[k].shape != self.values[k].shape]
        if unknown:
            raise BadEdit(
                f"the edit has {len(unknown)} tensors that this model lacks or shapes otherwise, first {unknown[0]!r}"
            )
        before = {k: live[k].detach().clone() for k in self.values}
        with overwritten(live, self.values, before):
            yield model

    def save(self, path: Path) -> None:
        """Write a safetensors file with the card in its metadata, atomically."""
        write(path, self.tensors(), self.kind, self.card)


@contextmanager
def overwritten(live: dict[str, Tensor], values: dict[str, Tensor], before: dict[str, Tensor]) -> Iterator[None]:
    """Hold `values` in the live tensors, then put `before` back."""
    try:
        with torch.no_grad():
            for k, v in values.items():
                live[k].copy_(v)
        yield
    finally:
        with torch.no_grad():
            for k, v in before.items():
                live[k].copy_(v)
