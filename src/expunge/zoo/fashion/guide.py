"""Stage `guide`: what each guidance scale gives, before anything depends on the one that the model is saved with.

Judge a reads the pictures: judge b scores, and a choice made by it would have been fitted to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...backbones import load
from ...errors import NeedsError, SettingError
from ...judges.classes import load_panel
from ...storage import write_json
from .card import NEAREST, distances, drawn, told
from .world import Source

RESULT = "guide.json"


def read_scales(text: str) -> list[float]:
    """Return guidance scales from a list with commas, each once, in its order.

    Raises:
        SettingError: one is no number of at least 1, or there is none.
    """
    scales = []
    for part in text.split(","):
        try:
            scale = float(part)
        except ValueError:
            scale = math.nan
        if not 1 <= scale < math.inf:
            raise SettingError(
                f"{part.strip()!r} in --scales {text!r} is no guidance scale: numbers of at least 1 (no guidance), "
                "with commas between, such as 1,1.5,2."
            )
        scales.append(scale)
    return list(dict.fromkeys(scales))


def compare(
    work: Path, source: Source, scales: Sequence[float], count: int, steps: int | None = None
) -> dict[str, Any]:
    """Measure `work/pipeline` at each scale; return figures, which are written to `work/guide.json` scale by scale.

    Pictures are kept in `work/drawn`, so that a run goes on where it was killed. Seeds and classes are the same at
    every scale. FID is biased upwards at this count, by about the same at every scale; KID is not.

    Args:
        work: the recipe's work folder, with the stages `ddpm`, `judges` and `features` done.
        source: what the pictures are.
        scales: guidance scales, each at least 1.
        count: pictures at each, classes in turn.
        steps: sampling steps; the model's own where missing.

    Raises:
        NeedsError: there is no pipeline.
        SettingError: fewer pictures than the distances need.
        BadModel: judge a or the feature network is missing or damaged.
    """
    least = max(NEAREST + 1, len(source.classes))
    if count < least:
        raise SettingError(f"--count {count} is too few: at least {least}; 1000 tell scales apart.")
    folder = work / "pipeline"
    if not folder.is_dir():
        raise NeedsError(f"{folder} is missing. Run the stage `ddpm` (or `snapshot`) first, with the same --work.")
    panel = load_panel(work, "judge-a", source.network)
    model = load(folder)
    figures: dict[str, Any] = {
        "model": model.hash, "steps": steps or model.sampling.steps,
        "pictures": count, "judge": panel.scorer.name, "scales": {},
    }  # fmt: skip
    for scale in scales:
        images = drawn(work, model, source.classes, count, guidance=scale, steps=steps)
        accuracy, _ = told(images, panel.scorer)
        found = {"accuracy": accuracy, **distances(images, panel, source.network)}
        figures["scales"][str(float(scale))] = found
        write_json(work / RESULT, figures)
        tqdm.write(line(scale, found, source.network))
    return figures


def line(scale: float, found: dict[str, Any], network: str) -> str:
    """Return what a scale gave in a line."""
    share, low, high = found["accuracy"]
    names = (f"{m}_{network}" for m in ("fid", "kid", "precision", "recall"))
    told_of = "  ".join(f"{name} {found[name]:.4g}" for name in names)
    return f"guidance {scale:g}: class (judge a) {share:.1%} [{low:.1%}, {high:.1%}]  {told_of}"
