"""An edit that changes no weight: features of the text encoders' states are ablated while a prompt is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import BadEdit
from ..kernel.model import Model
from ..kernel.sae import Ablation, hooked
from ..records import Card
from .io import check_base, write

TENSORS = ("encoder", "bias", "features", "decoder")
NUMBERS = ("k", "layer", "scale", "threshold", "first")


@dataclass(frozen=True)
class HookEdit:
    """Ablated features of a sparse autoencoder. Prompts that show too little of them are read as before, bit for bit.

    Attributes:
        ablations: by text encoder.
        card: where the edit comes from; None until `erase` has filled it in.
    """

    ablations: dict[str, Ablation]
    card: Card | None = None
    kind: ClassVar[str] = "hook"

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], card: Card | None) -> HookEdit:
        """Make the edit from what `tensors` returned."""
        found: dict[str, Ablation] = {}
        for name in sorted({k.rpartition(".")[0] for k in tensors}):
            k, layer, scale, threshold, first = tensors[f"{name}.numbers"].tolist()
            own = {t: tensors[f"{name}.{t}"] for t in TENSORS}
            found[name] = Ablation(
                **own, k=int(k), layer=int(layer), scale=scale, threshold=threshold, first=int(first)
            )
        return cls(found, card)

    def with_card(self, card: Card) -> HookEdit:
        """Return the same edit with its card."""
        return replace(self, card=card)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that is saved."""
        out: dict[str, Tensor] = {}
        for name, a in self.ablations.items():
            out |= {f"{name}.{t}": getattr(a, t) for t in TENSORS}
            out[f"{name}.numbers"] = torch.tensor([float(getattr(a, n)) for n in NUMBERS], dtype=torch.float64)
        return out

    @contextmanager
    def on(self, model: Model) -> Iterator[Model]:
        """Apply the edit to a model's text encoders; on exit they read as before.

        Raises:
            BadEdit: the edit was made for another base.
        """
        check_base(self.card, model)
        layers = {} if model.text is None else model.text.layers
        unknown = [n for n, a in self.ablations.items() if n not in layers or a.layer >= len(layers[n])]
        if unknown:
            raise BadEdit(f"the edit changes a layer of {unknown[0]!r}, and {model.name!r} has no such layer")
        with ExitStack() as stack:
            for name, ablation in self.ablations.items():
                stack.enter_context(hooked(layers[name][ablation.layer], ablation.to(model.device)))
            yield model

    def save(self, path: Path) -> None:
        """Write a safetensors file with the card in its metadata, atomically."""
        write(path, self.tensors(), self.kind, self.card)
