"""Edits on disk: one safetensors file, its card in the metadata."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import BadEdit, BadRun
from ..kernel.model import Model
from ..records import Card
from ..storage import write_atomic

FORMAT = "expunge-edit/1"


def parameters(model: Model) -> dict[str, Tensor]:
    """Return the live parameters of everything an edit may touch, by `component.parameter`."""
    return {f"{c}.{n}": p for c, m in model.modules().items() for n, p in m.named_parameters()}


def check_base(card: Card | None, model: Model) -> None:
    """Raise BadEdit unless the model is the one the edit was made for."""
    if card is not None and card.base_hash != model.hash:
        raise BadEdit(
            f"this edit was made for {card.model!r} with weights {card.base_hash[:12]}, the model here "
            f"({model.name!r}) has {model.hash[:12]}. Load the base it was made for, or run "
            "`expunge erase` on this one."
        )


def packed(tensors: dict[str, Tensor], kind: str, card: Card | None) -> bytes:
    """Serialise tensors and card."""
    metadata = {"format": FORMAT, "kind": kind}
    if card is not None:
        metadata["card"] = json.dumps(card.to_json())
    return save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)


def write(path: Path, tensors: dict[str, Tensor], kind: str, card: Card | None) -> None:
    """Write an edit atomically."""
    write_atomic(Path(path), packed(tensors, kind, card))


def read(path: Path) -> tuple[dict[str, Tensor], str, Card | None]:
    """Return (tensors, kind, card) of an edit file.

    Raises:
        BadEdit: missing, cut off, not an edit of ours, or with a card that this version does not know.
    """
    if not path.is_file():
        raise BadEdit(f"no edit at {path}. Make one with `expunge erase`.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadEdit(f"{path} is not a whole safetensors file ({error}). Copy it again or erase again.") from error
    if metadata.get("format") != FORMAT:
        raise BadEdit(f"{path} is not an edit of expunge (format {metadata.get('format')!r}, expected {FORMAT!r})")
    try:
        card = Card.from_json(json.loads(metadata["card"])) if "card" in metadata else None
    except (ValueError, TypeError, BadRun) as error:
        told = str(error).rstrip(".")
        raise BadEdit(f"the card of the edit {path} cannot be read: {told}. Update expunge, or erase again.") from error
    return tensors, metadata.get("kind", ""), card
