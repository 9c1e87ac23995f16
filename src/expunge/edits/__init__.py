"""Results of an erasure: apply, restore bit for bit, save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from ..errors import BadEdit
from ..kernel.model import Model
from ..kernel.student import Student
from .io import read
from .lowrank import LowRankEdit, compress
from .weights import WeightEdit

Edit: TypeAlias = WeightEdit | LowRankEdit

# what a file may hold; an edit's class makes itself from the file's tensors
KINDS = {edit.kind: edit for edit in (WeightEdit, LowRankEdit)}

__all__ = ["Edit", "LowRankEdit", "WeightEdit", "component_of", "compress", "load_edit", "of"]


def of(model: Model, student: Student, values: Mapping[str, Tensor] | None = None) -> Edit:
    """Return what a student has become as an edit of its model.

    Args:
        model: the model the student belongs to.
        student: the trained group.
        values: weights to take instead of the live ones (an average, say).
    """
    component = component_of(model, student.module)
    values = {k: v.detach().clone() for k, v in (values or student.weights).items()}
    if not student.rank:
        return WeightEdit({f"{component}.{k}": v for k, v in values.items()})
    return LowRankEdit({f"{component}.{n}": (values[f"{n}.down"], values[f"{n}.up"]) for n in student.adapters})


def component_of(model: Model, module: nn.Module) -> str:
    """Return the name under which a model holds a network."""
    return next(name for name, candidate in model.modules().items() if candidate is module)


def load_edit(path: Path | str) -> Edit:
    """Read an edit file, or the `edit.safetensors` of a run folder.

    Raises:
        BadEdit: missing, cut off, or not an edit of ours.
    """
    path = Path(path)
    tensors, kind, card = read(path / "edit.safetensors" if path.is_dir() else path)
    if kind not in KINDS:
        raise BadEdit(f"{path} holds an edit of kind {kind!r}; this version reads {', '.join(KINDS)}. Update expunge.")
    return KINDS[kind].from_tensors(tensors, card)
