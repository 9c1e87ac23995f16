"""Stage `one-step`: the trained denoiser distilled into a generator that draws in one step, measured and shipped.

The run is one of `expunge distill`, in `work/one-step`: it goes on where it was killed, with more updates too.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...backbones import load
from ...distill import SiD, distill
from ...errors import BadModel
from ...judges.classes import load_panel
from ...kernel.model import Model
from ...kernel.state import Step
from ...records import CARD, CHECKPOINT, EDIT
from ...storage import filling
from .card import COUNT, LARGEST, distances, drawn, told
from .world import FASHION, GENERATOR, WEIGHTS, Source

FIGURES = "figures.json"
# twice the default rates, for a fifth of the updates: the network has 1.4 M weights
RECIPE = SiD(steps=1000, lr=1e-4, fake_lr=3e-4)


def base(work: Path, source: Source, device: str) -> tuple[Model, Path]:
    """Load the model to distil, and return the folder of its judges: the package's for the shipped world."""
    if source is FASHION:
        return load(source.world, device=device), WEIGHTS
    return load(work / "pipeline", device=device), work


def train(work: Path, source: Source, steps: int, device: str = "cpu") -> Path:
    """Distil; return the run's folder.

    Raises:
        BadModel: the model is not there.
        BadRun: the run in `work` is of another model, or went further than `steps`.
        Diverged: the generator collapsed; its last good state stays.
    """
    model, run = base(work, source, device)[0], work / "one-step"
    with tqdm(total=steps, desc="one-step", mininterval=5) as bar:

        def progress(step: Step) -> None:
            bar.update(step.i + 1 - bar.n)

        distill(model, replace(RECIPE, steps=steps), out=run, resume=(run / CHECKPOINT).is_file(), progress=progress)
    return run


def measure(work: Path, source: Source, run: Path, device: str = "cpu") -> dict[str, Any]:
    """Draw COUNT pictures in one step, and return what judge b and the distances say of them."""
    model, panel = load(run, device=device), load_panel(base(work, source, device)[1], "judge-b", source.network)
    images = drawn(work, model, source.classes, COUNT)
    accuracy, right = told(images, panel.scorer)
    by_class = {c: right[i :: len(source.classes)].float().mean().item() for i, c in enumerate(source.classes)}
    return {
        "pictures": COUNT,
        "accuracy": accuracy,
        "accuracy_by_class": by_class,
        "drawn": distances(images, panel, source.network),
    }


def ship(run: Path, figures: dict[str, Any]) -> None:
    """Copy a run into the package, without the state that only going on would need.

    Raises:
        BadModel: the package's folder would be too large; it is left as it was.
    """
    files = [run / EDIT, run / CARD]
    others = [f for f in WEIGHTS.rglob("*") if f.is_file() and GENERATOR not in f.parents]
    size = sum(f.stat().st_size for f in (*files, *others))
    if size > LARGEST:
        raise BadModel(
            f"{run} is not shipped: {WEIGHTS} would have {size:,} bytes, at most {LARGEST:,} are allowed. Take out "
            "what nobody needs, or distil with --set rank=8."
        )
    with filling(GENERATOR) as folder:
        for file in files:
            shutil.copy(file, folder)
        (folder / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
    tqdm.write(f"{GENERATOR}: class {figures['accuracy'][0]:.1%}, shipped {size / 1e6:.1f} MB in all")
