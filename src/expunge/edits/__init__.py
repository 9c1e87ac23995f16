"""Results of an erasure: apply, restore bit for bit, save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from ..errors import BadEdit
from ..kernel.model import Model, component_of
from ..kernel.student import Student
from .gated import GatedEdit, Membrane
from .generator import GeneratorEdit
from .hook import HookEdit
from .io import read
from .lowrank import LowRankEdit, compress
from .weights import WeightEdit

Edit: TypeAlias = WeightEdit | LowRankEdit | HookEdit | GeneratorEdit | GatedEdit

# what a file may hold; an edit's class makes itself from the file's tensors
KINDS = {edit.kind: edit for edit in (WeightEdit, LowRankEdit, HookEdit, GeneratorEdit, GatedEdit)}

__all__ = [
    "Edit",
    "GatedEdit",
    "GeneratorEdit",
    "HookEdit",
    "LowRankEdit",
    "Membrane",
    "WeightEdit",
    "component_of",
    "compress",
    "generator_of",
    "load_edit",
    "of",
]


def of(model: Model, student: Student, values: Mapping[str, Tensor] | None = None) -> Edit:
    """Return what a student has become as an edit of its model.

    Args:
        model: the model the student belongs to.
        student: the trained group.
        values: weights to take instead of the live ones (an average, say).
    """
    return _weights(component_of(model, student.module), student, values or student.weights)


def generator_of(model: Model, student: Student, values: Mapping[str, Tensor], t: int) -> GeneratorEdit:
    """Return the one-step generator that was made of a model.

    Args:
        model: the model it started from.
        student: what was trained, in a copy of the model's denoiser.
        values: the trained weights to take.
        t: time of its only network call.
    """
    return GeneratorEdit(_weights(component_of(model, model.denoiser.module), student, values), t)


def _weights(component: str, student: Student, values: Mapping[str, Tensor]) -> WeightEdit | LowRankEdit:
    found = {k: v.detach().clone() for k, v in values.items()}
    if not student.rank:
        return WeightEdit({f"{component}.{k}": v for k, v in found.items()})
    return LowRankEdit({f"{component}.{n}": (found[f"{n}.down"], found[f"{n}.up"]) for n in student.adapters})


def load_edit(path: Path | str) -> Edit:
    """Read an edit file, or the `edit.safetensors` of a run folder.

    Raises:
        BadEdit: missing, cut off, or not an edit of ours.
    """
    path = Path(path)
    tensors, kind, card = read(path / "edit.safetensors" if path.is_dir() else path)
    if kind not in KINDS:
        raise BadEdit(f"{path} holds an edit of kind {kind!r}; this version reads {', '.join(KINDS)}. Update expunge.")
    try:
        return KINDS[kind].from_tensors(tensors, card)
    except (KeyError, ValueError, RuntimeError) as error:
        raise BadEdit(f"{path} lacks a part of an edit of kind {kind!r} ({error}). Erase again.") from error
