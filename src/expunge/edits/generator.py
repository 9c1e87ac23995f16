"""An edit that makes a one-step generator of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..kernel.model import Model, OneStep, component_of
from ..records import Card, need_empty
from .io import check_base, parameters, write
from .lowrank import LowRankEdit
from .weights import WeightEdit

TIME = "t"


@dataclass(frozen=True)
class GeneratorEdit:
    """Weights of a one-step generator, and the time of its only network call.

    Where it is applied the model *is* the generator: it draws in one step, has another hash, and refuses edits that
    were made for the multi-step model.

    Attributes:
        weights: what differs from the model that it started from.
        t: the time.
        card: where the edit comes from; None until `erase` has filled it in.
    """

    weights: WeightEdit | LowRankEdit
    t: int
    card: Card | None = None
    kind: ClassVar[str] = "generator"

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], card: Card | None) -> GeneratorEdit:
        """Make the edit from what `tensors` returned."""
        rest = {k: v for k, v in tensors.items() if k != TIME}
        low = all(k.endswith((".down", ".up")) for k in rest)
        inner = LowRankEdit.from_tensors(rest, None) if low else WeightEdit.from_tensors(rest, None)
        return cls(inner, int(tensors[TIME]), card)

    def with_card(self, card: Card) -> GeneratorEdit:
        """Return the same edit with its card."""
        return replace(self, card=card)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that is saved."""
        return {**self.weights.tensors(), TIME: torch.tensor(self.t)}

    @contextmanager
    def on(self, model: Model) -> Iterator[Model]:
        """Make the model the generator; on exit the base is back bit for bit.

        Raises:
            BadEdit: the edit was made for another base.
        """
        check_base(self.card, model)
        before = model.one_step, model.hash
        with self.weights.on(model):
            model.become(OneStep(self.t))
            try:
                yield model
            finally:
                model.become(*before)

    def settle(self, model: Model) -> Model:
        """Make the model the generator for good, with what it was as the teacher; return it.

        Raises:
            BadEdit: the edit was made for another base.
        """
        live = parameters(model)
        with self.on(model):
            values = {k: live[k].detach().clone() for k in self.names}
        if model.one_step is None:
            component = component_of(model, model.denoiser.module)
            teacher = model.denoiser.clone([k.removeprefix(f"{component}.") for k in self.names])
        else:
            teacher = model.teacher
        with torch.no_grad():
            for k, v in values.items():
                live[k].copy_(v)
        model.become(OneStep(self.t, teacher))
        return model

    @property
    def names(self) -> list[str]:
        """Names of the weights that differ, `component.parameter`."""
        return list(self.weights.values if isinstance(self.weights, WeightEdit) else self.weights.factors)

    def save(self, path: Path) -> None:
        """Write a safetensors file with the card in its metadata, atomically."""
        write(path, self.tensors(), self.kind, self.card)

    def export(self, model: Model, folder: Path) -> None:
        """Write a diffusers pipeline with a one-step scheduler: `pipe(..., num_inference_steps=1, guidance_scale=1)`.

        Args:
            model: the model that the edit was made for.
            folder: empty, or not there.

        Raises:
            BadRun: the folder holds files.
            BadEdit: the edit was made for another base.
            Unsupported: the model is no diffusers pipeline.
        """
        need_empty(folder)
        with self.on(model):
            model.save(folder)
