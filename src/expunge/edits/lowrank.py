"""An edit that adds a low-rank update to some matrices: small, and loadable as a LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import BadEdit
from ..kernel.lowrank import factor, product
from ..kernel.model import Model
from ..records import Card
from ..storage import write_atomic
from .io import check_base, packed, parameters, write
from .weights import WeightEdit, overwritten


@dataclass(frozen=True)
class LowRankEdit:
    """`W + up @ down` for some matrices.

    Attributes:
        factors: `component.parameter` -> (down, up); down (r, in, ...), up (out, r, ...).
        card: where the edit comes from; None until `erase` has filled it in.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    card: Card | None = None
    kind: ClassVar[str] = "lowrank"

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], card: Card | None) -> LowRankEdit:
        """Make the edit from what `tensors` returned."""
        names = {k.rpartition(".")[0] for k in tensors}
        return cls({n: (tensors[f"{n}.down"], tensors[f"{n}.up"]) for n in sorted(names)}, card)

    def with_card(self, card: Card) -> LowRankEdit:
        """Return the same edit with its card."""
        return replace(self, card=card)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that is saved."""
        return {f"{k}.{n}": t for k, (d, u) in self.factors.items() for n, t in (("down", d), ("up", u))}

    @contextmanager
    def on(self, model: Model) -> Iterator[Model]:
        """Apply the edit, merged into the weights; on exit the base is back bit for bit.

        Raises:
            BadEdit: the edit was made for another base.
        """
        check_base(self.card, model)
        live = parameters(model)
        unknown = [k for k, (d, u) in self.factors.items() if k not in live or live[k].shape != (len(u), *d.shape[1:])]
        if unknown:
            raise BadEdit(
                f"the edit has {len(unknown)} matrices that this model lacks or shapes otherwise, first {unknown[0]!r}"
            )
        before = {k: live[k].detach().clone() for k in self.factors}
        after = {k: before[k] + product(*self.factors[k]).to(before[k]) for k in self.factors}
        with overwritten(live, after, before):
            yield model

    def save(self, path: Path) -> None:
        """Write a safetensors file with the card in its metadata, atomically."""
        write(path, self.tensors(), self.kind, self.card)

    def export_lora(self, folder: Path) -> list[Path]:
        """Write the update as LoRA files.

        One for diffusers (`pipe.load_lora_weights(folder)`), one in kohya's format, which ComfyUI reads too.

        Returns:
            The files, diffusers' first.
        """
        peft: dict[str, Tensor] = {}
        kohya: dict[str, Tensor] = {}
        for name, (down, up) in self.factors.items():
            layer = name.removesuffix(".weight")
            peft |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
            key = "lora_" + layer.replace("text_encoder", "te", 1).replace(".", "_")
            alpha = torch.tensor(float(len(down)))  # alpha equal to the rank: the update is applied at strength 1
            kohya |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "pytorch_lora_weights.safetensors", folder / "kohya.safetensors"]
        for file, tensors in zip(files, (peft, kohya), strict=True):
            write_atomic(file, packed(tensors, self.kind, self.card))
        return files


def compress(edit: WeightEdit, model: Model, rank: int) -> tuple[LowRankEdit, float]:
    """Turn a weight edit into the nearest low-rank one.

    Returns:
        The edit, and the share of the squared update that a rank this small loses (0: nothing). Vectors (biases, norms)
        cannot be low-rank; an update of theirs counts as lost.
    """
    live = parameters(model)
    factors, lost, total = {}, 0.0, 0.0
    for name, value in edit.values.items():
        delta = value.to(live[name].device).float() - live[name].detach().float()
        total += delta.square().sum().item()
        if delta.ndim in (2, 4) and delta.any():
            factors[name] = factor(delta, rank)
            delta = delta - product(*factors[name])
        lost += delta.square().sum().item()
    return LowRankEdit(factors, edit.card), lost / total if total else 0.0
