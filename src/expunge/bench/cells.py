"""Cells of the bench's grids: an erasure with its audit in a run folder, or the method's reason for refusing.

A cell of the same model, settings and protocol is not run again, and an interrupted one goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..audit import audit
from ..concept import Concept
from ..door import erase
from ..errors import BadRun, ConceptError, Diverged, EmptySelection, NeedsError, SettingError, Unsupported
from ..judges.panel import Panel
from ..kernel.model import Model
from ..protocols import Protocol, protocol
from ..records import CARD, Run, Score
from ..storage import write_json

RULES = protocol("emoji-v1")
SHORT = replace(RULES, id="emoji-v1-short", targets=24, retained=64, near=12, near_each=1)
PICTURES = 64  # drawn of the target, and to retain, for methods that learn from pictures
REFUSED = "refused.json"
# a method's answer to a target, and a result; anything else, such as a full disk, ends the bench
REFUSALS = (ConceptError, Diverged, EmptySelection, NeedsError, SettingError, Unsupported)
RESAMPLES = 4000
SEED = 20260101

Interval = tuple[float, float, float]  # value, low, high


def settings_of(method: Any) -> dict[str, Any]:
    """Return a method's settings as a card has them."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(method), default=str))
    return plain


def scores_of(folder: Path, rules: Protocol = RULES) -> dict[str, Score]:
    """Return metric -> score of a cell; nothing before its audit is whole, or where the method refused."""
    if (folder / REFUSED).is_file():
        return {}
    return {s.metric: s for s in Run(folder).scores if s.protocol == rules.id}


def finished(folder: Path, method: Any, base_hash: str, rules: Protocol = RULES) -> bool:
    """Tell whether a cell holds scores, or why it has none, of this model and these settings."""
    if (folder / REFUSED).is_file():
        made = json.loads((folder / REFUSED).read_text())
    elif (folder / CARD).is_file() and scores_of(folder, rules):
        made = Run(folder).card.to_json()
    else:
        return False
    return bool(made["base_hash"] == base_hash and made["settings"] == settings_of(method))


def fill(
    model: Model,
    panel: Panel | None,
    method: Any,
    concept: Concept,
    folder: Path,
    *,
    rules: Protocol = RULES,
    seed: int = 0,
    pictures: int = PICTURES,
) -> None:
    """Erase a concept and audit it, or go on with that; a refusal is a result and is written down."""

    def attempt() -> None:
        erase(
            model, concept, method, seed=seed, out=folder, resume=True,
            make_images=pictures if method.needs.images else 0,
        )  # fmt: skip
        audit(folder, rules, model=model, panel=panel)

    try:
        try:
            attempt()
        except BadRun:
            shutil.rmtree(folder)  # of another model, or of other settings
            attempt()
    except REFUSALS as error:
        about = {"error": str(error), "base_hash": model.hash, "settings": settings_of(method)}
        write_json(folder / REFUSED, about)


def refusals(cells: Iterable[tuple[str, str, Path]]) -> list[str]:
    """Return a line for every reason that was given, from (who refused, on what, folder) of every cell."""
    found: dict[tuple[str, str], list[str]] = {}
    for who, what, folder in cells:
        if (folder / REFUSED).is_file():
            why = json.loads((folder / REFUSED).read_text())["error"]
            found.setdefault((who, why), []).append(what)
    return [f"{who} on {', '.join(of)}: {why}" for (who, why), of in found.items()]
