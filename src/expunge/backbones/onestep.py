"""One-step generators as diffusers pipelines: the scheduler that makes their one call, and the file that says so.

diffusers' `EulerDiscreteScheduler`, over the noise schedule up to the generator's time t, starts at sigma z and returns
the clean prediction after one step, in every parameterisation. A pipeline with it needs nothing of ours.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, EulerDiscreteScheduler

from ..errors import BadModel
from ..kernel.model import OneStep
from ..kernel.path import Path as NoisePath
from ..storage import write_json

FILE = "one_step.json"


def scheduler(of: Any, t: int) -> EulerDiscreteScheduler:
    """Return the one-step scheduler at time t on the noise schedule of another."""
    betas = DDIMScheduler.from_config(of.config).betas[: t + 1]
    return EulerDiscreteScheduler(
        num_train_timesteps=t + 1, trained_betas=betas.tolist(), prediction_type=of.config.prediction_type,
        timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip


@contextmanager
def held(pipe: Any, one_step: OneStep | None) -> Iterator[None]:
    """Let a pipeline have the scheduler of its generator for a while, if it is one."""
    if one_step is None:
        yield
        return
    before, pipe.scheduler = pipe.scheduler, scheduler(pipe.scheduler, one_step.t)
    try:
        with warnings.catch_warnings():
            # numpy 2 about a line of diffusers'
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            yield
    finally:
        pipe.scheduler = before


def save(pipe: Any, one_step: OneStep | None, folder: Path) -> None:
    """Write a pipeline as a diffusers folder; of a generator with its scheduler."""
    with held(pipe, one_step):
        pipe.save_pretrained(folder)
    if one_step is not None:
        write_json(folder / FILE, {"t": one_step.t})


def read(folder: Path | None, path: NoisePath) -> OneStep | None:
    """Return what a folder says of its generator, None for a model that is sampled in steps.

    Args:
        folder: of the model; None where it lies in none.
        path: the model's noise path.

    Raises:
        BadModel: the file is damaged, or its time is not on the path.
    """
    if folder is None or not (folder / FILE).is_file():
        return None
    try:
        t = int(json.loads((folder / FILE).read_text())["t"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadModel(f"{folder / FILE} cannot be read ({error}). Export the generator again.") from error
    if not 0 < t <= path.last:
        raise BadModel(f"{folder / FILE} has the time {t}, its scheduler 1 to {path.last:g}. Export it again.")
    return OneStep(t)
