"""The fake score that a distillation leaves behind: in the checkpoint that it keeps beside its generator."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint
from .errors import BadRun
from .kernel.denoiser import Denoiser
from .kernel.lowrank import product


@torch.no_grad()
def read(path: Path, teacher: Denoiser) -> dict[str, Tensor]:
    """Return the weights in which the fake score differs from the teacher, by parameter.

    Args:
        path: the checkpoint.
        teacher: what the run distilled; a low-rank update of it is merged.

    Raises:
        BadRun: the checkpoint is broken, or of another model.
    """
    with checkpoint.reading(path) as part:
        found: dict[str, Tensor] = part("fit", "psi") or {}
    own = dict(teacher.module.named_parameters())
    low = {name.rpartition(".")[0] for name in found if name.endswith((".down", ".up")) and name not in own}
    values = {name: value for name, value in found.items() if name.rpartition(".")[0] not in low}
    if strange := [name for name in (*low, *values) if name not in own]:
        raise BadRun(f"{path} has a fake score of another model: this one has no weight {min(strange)!r}.")
    for name in low:
        weight = own[name].detach().cpu().float()
        values[name] = weight + product(found[f"{name}.down"], found[f"{name}.up"])
    return values
