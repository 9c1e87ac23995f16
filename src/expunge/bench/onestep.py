"""One-step generators beside what they were distilled from: how much faster they draw, and what they draw afterwards.

Both belong to `bench classes`, whose models and cells they take.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..edits import load_edit
from ..errors import BadRun, SettingError
from ..kernel.model import Model
from ..records import EDIT, Json
from ..sheet import contact, picture, png
from ..storage import write_atomic, write_json
from . import cells
from .cells import MEASURES, Progress
from .classes import Bench, starts_in_steps
from .measures import measured

SPEED = "one-step-speed"  # cell of the sampling times
TIMED, REPEATS = 32, 3  # pictures a batch; base and generator by turns
STEPS = 50  # of the base, whatever it is shipped with: what one step is compared with in papers
SAMPLES, ZOOM = 4, 3  # the figure's pictures of each class, before and after; screen pixels a pixel


def speed(bench: Bench, progress: Progress) -> Json:
    """Time a batch of the base and one of the generator, by turns; measured once for the two models.

    Returns:
        `steps`, `guidance` of the base, `batch`, `threads`, `device`, and `seconds`, (base, generator) a repeat;
        nothing where there is no generator, or another process is measuring.
    """
    if bench.generator is None:
        return {}
    pair, folder = (bench.model, bench.generator), bench.work / SPEED
    sampling, names = bench.model.sampling, [bench.world.objects[i % len(bench.world.objects)] for i in range(TIMED)]
    key = {
        "hashes": [m.hash for m in pair], "steps": STEPS, "guidance": sampling.guidance, "batch": TIMED,
        "device": bench.model.device.type,
    }  # fmt: skip

    def known() -> Json:
        made = measured(folder)
        return made if made | key == made else {}

    if known():
        return known()
    with cells.claimed(folder) as mine:
        if mine and not known():
            for model in pair:  # the first call also warms up
                model.generate(names, seeds=range(TIMED), steps=1)
            seconds = []
            for i in range(REPEATS):
                progress("timing: a batch of the base and one of the generator", i, REPEATS)
                seconds.append([_timed(model, names) for model in pair])
            progress("timing", REPEATS, REPEATS)
            write_json(folder / MEASURES, key | {"threads": torch.get_num_threads(), "seconds": seconds})
    return known()


def _timed(model: Model, names: Sequence[str]) -> float:
    """Return the seconds of one batch."""
    began = time.perf_counter()
    steps = None if model.one_step else STEPS
    model.generate(names, seeds=range(len(names)), steps=steps, batch=len(names))
    return time.perf_counter() - began


def check_figure(path: Path, arms: Sequence[str]) -> str:
    """Return the arm that a figure shows: the first that forgets in a one-step generator.

    Raises:
        SettingError: there is none, or the file would be no PNG.
    """
    shown = [arm for arm in arms if not starts_in_steps(arm)]
    if not shown:
        raise SettingError("--figure shows a one-step generator before and after, and no arm runs on one. Add sfd.")
    if path.suffix.lower() != ".png":
        raise SettingError(f"--figure {path} is written as PNG. Give a name that ends in .png.")
    return shown[0]


def figure(bench: Bench, arm: str, classes: Sequence[str], path: Path) -> list[str]:
    """Draw classes by the generator before and after each was forgotten, as a sheet: a column a class.

    The upper half of the rows is the generator's, the lower that of the edit which forgot the column's class; row for
    row the seeds are the same.

    Args:
        bench: the models and the cells.
        arm: whose edits are shown.
        classes: the columns, but for those whose edit is not there.
        path: PNG to write.

    Returns:
        The classes that are left out: refused, or found on another machine, whose edit stayed there.

    Raises:
        BadRun: that is all of them.
    """
    model, shown = bench.base(arm), [c for c in classes if (bench.folder(arm, c) / EDIT).is_file()]
    shown = [c for c in shown if bench.whole(arm, c)]
    if not shown:
        raise BadRun(f"no edit of {arm!r} lies under {bench.work} to draw with. Run its cells here, without --known.")
    columns: list[list[Image.Image]] = []
    for name in shown:
        ask: dict[str, Any] = {"prompts": [name] * SAMPLES, "seeds": range(SAMPLES)}
        before = model.generate(**ask)
        with load_edit(bench.folder(arm, name)).on(model) as forgetful:
            drawn = torch.cat([before, forgetful.generate(**ask)])
        columns.append([_zoomed(picture(image)) for image in drawn])
    rows = [image for row in zip(*columns, strict=True) for image in row]
    told = {"columns": ", ".join(shown), "rows": f"{SAMPLES} of {model.name}, {SAMPLES} after {arm}"}
    write_atomic(path, png(contact(rows, len(columns)), told))
    return [c for c in classes if c not in shown]


def _zoomed(image: Image.Image) -> Image.Image:
    return image.resize((image.width * ZOOM, image.height * ZOOM), Image.Resampling.NEAREST)
