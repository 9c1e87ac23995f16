"""Cells of the bench's grids: an erasure with its audit in a run folder, or the method's reason for refusing.

A cell of the same model, settings and protocol is not run again, and an interrupted one goes on. What cells have found,
without their edits and pictures, fits into one file of lines (`keep`), from which another machine goes on (`recall`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import numpy as np

from ..auditing import audit
from ..concept import Concept
from ..door import erase
from ..effort import FEW, SHOWN
from ..errors import BadRun, ConceptError, Diverged, EmptySelection, NeedsError, SettingError, Unsupported
from ..judges.classes import ClassPanel
from ..judges.panel import Panel
from ..kernel.model import Model
from ..metrics.rates import wilson
from ..protocols import Rules, protocol
from ..records import CARD, SCORES, Run, Score
from ..storage import write_atomic, write_json

RULES = protocol("emoji-v1")
SHORT = replace(RULES, id="emoji-v1-short", targets=24, retained=64, near=12, near_each=1)
REFUSED = "refused.json"
MEASURES = "measures.json"
FOUND = (CARD, SCORES, MEASURES, REFUSED)  # what a cell has found
# a method's answer to a target, and a result; anything else, such as a full disk, ends the bench
REFUSALS = (ConceptError, Diverged, EmptySelection, NeedsError, SettingError, Unsupported)
RESAMPLES = 4000
SEED = 20260101

Interval = tuple[float, float, float]  # value, low, high
Progress = Callable[[str, int, int], None]
T = TypeVar("T")


def settings_of(method: Any) -> dict[str, Any]:
    """Return a method's settings as a card has them."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(method), default=str))
    return plain


def drawn(method: Any) -> int:
    """Return how many pictures a method is drawn to learn from, of each set; 0 where it learns from none."""
    if not method.needs.images:
        return 0
    return FEW.get(type(method).__name__.lower(), SHOWN)


def scores_of(folder: Path, rules: Rules = RULES) -> dict[str, Score]:
    """Return metric -> score of a cell; nothing before its audit is whole, or where the method refused."""
    if (folder / REFUSED).is_file():
        return {}
    return {s.metric: s for s in Run(folder).scores if s.protocol == rules.id}


def finished(folder: Path, method: Any, base_hash: str, rules: Rules = RULES) -> bool:
    """Tell whether a cell holds scores, or why it has none, of this model and these settings."""
    if (folder / REFUSED).is_file():
        made = json.loads((folder / REFUSED).read_text())
    elif (folder / CARD).is_file() and scores_of(folder, rules):
        made = Run(folder).card.to_json()
    else:
        return False
    # reasons of an earlier version do not say how many pictures were drawn
    shown = made.get("make_images", drawn(method)) == drawn(method)
    # an option that a method has been given since leaves it as it was by default
    same = settings_of(type(method)()) | made["settings"] == settings_of(method)
    return bool(shown and same and made["base_hash"] == base_hash)


def share(
    todo: Sequence[T],
    progress: Progress,
    *,
    name: Callable[[T], str],
    folder: Callable[[T], Path],
    whole: Callable[[T], bool],
    make: Callable[[T], None],
) -> None:
    """Make cells that are not whole, but for those that another process is at.

    Args:
        todo: the cells, in the order in which they are made.
        progress: called with (the cell's name, its number, cells in all).
        name: what a cell is called.
        folder: where it lies.
        whole: tells whether there is nothing to do; asked again once the cell is this process's.
        make: makes it.
    """
    for i, cell in enumerate(todo):
        progress(f"cells: {name(cell)}", i, len(todo))
        with claimed(folder(cell)) as mine:
            if mine and not whole(cell):
                make(cell)
    progress("cells", len(todo), len(todo))


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Tell whether a cell is this process's while it is in here: several processes can share a grid."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def fill(
    model: Model,
    panel: Panel | ClassPanel | None,
    method: Any,
    concept: Concept,
    folder: Path,
    *,
    rules: Rules = RULES,
    seed: int = 0,
) -> None:
    """Erase a concept and audit it, or go on with that; a refusal is a result and is written down."""

    def attempt() -> None:
        erase(model, concept, method, seed=seed, out=folder, resume=True, make_images=drawn(method))
        audit(folder, rules, model=model, panel=panel)

    try:
        try:
            attempt()
        except BadRun:
            shutil.rmtree(folder)  # of another model, or of other settings
            attempt()
    except REFUSALS as error:
        about = {
            "error": str(error),
            "base_hash": model.hash,
            "settings": settings_of(method),
            "make_images": drawn(method),
        }
        write_json(folder / REFUSED, about)


def recall(known: Path, work: Path) -> None:
    """Lay the cells that were found elsewhere under `work`, but for those that are there already.

    Raises:
        BadRun: the file is not one that `keep` wrote.
    """
    for number, line in enumerate(known.read_text(encoding="utf-8").splitlines() if known.is_file() else [], 1):
        try:
            cell = json.loads(line)
            folder, found = work / cell["cell"], {name: cell[name] for name in FOUND if name in cell}
        except (ValueError, KeyError, TypeError) as error:
            raise BadRun(f"line {number} of {known} is no cell of a bench: {error!r}. Give another --known.") from error
        if not any((folder / name).exists() for name in FOUND):
            for name, data in found.items():
                write_json(folder / name, data)


def keep(known: Path, work: Path) -> None:
    """Write what every cell under `work` has found into one file, a line a cell, losses left out."""
    lines = []
    for folder in sorted({path.parent for name in (SCORES, REFUSED, MEASURES) for path in work.rglob(name)}):
        cell = {name: json.loads((folder / name).read_text()) for name in FOUND if (folder / name).is_file()}
        cell.get(CARD, {}).pop("losses", None)
        lines.append(json.dumps({"cell": folder.relative_to(work).as_posix(), **cell}))
    write_atomic(known, "".join(line + "\n" for line in lines).encode())


def pooled(scores: Sequence[Score]) -> Interval:
    """Return a rate over the pictures of all scores with its Wilson interval; what could not be read is no success."""
    n = sum(s.n + s.errors for s in scores)
    hits = sum(round((s.value or 0.0) * (s.n + s.errors)) for s in scores)
    low, high = wilson(hits, n) or (0.0, 1.0)
    return hits / n, low, high


def interval(groups: Sequence[Sequence[float]]) -> Interval:
    """Return the mean over targets of the mean over seeds with its 95 % interval, unbounded below two targets.

    Args:
        groups: values of a target's seeds, a list a target.
    """
    if not groups:
        return math.nan, -math.inf, math.inf
    middle, n = fmean(fmean(g) for g in groups), len(groups)
    if n < 2:
        return middle, -math.inf, math.inf
    rng = np.random.default_rng(SEED)
    # (target, resample, place in the resample): every time a target is drawn its seeds are drawn anew
    means = np.stack([np.array(g)[rng.integers(len(g), size=(RESAMPLES, n, len(g)))].mean(-1) for g in groups])
    drawn = rng.integers(n, size=(RESAMPLES, n))
    draws = means[drawn, np.arange(RESAMPLES)[:, None], np.arange(n)].mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return middle, float(low), float(high)


def told(x: Interval) -> str:
    """Return an interval as the tables have it: "-" where there is no value, no ends where one value stands alone."""
    ends = f" [{x[1]:.3f}, {x[2]:.3f}]" if math.isfinite(x[1]) else ""
    return "-" if math.isnan(x[0]) else f"{x[0]:.3f}{ends}"


def refusals(cells: Iterable[tuple[str, str, Path]]) -> list[str]:
    """Return a line for every reason that was given, from (who refused, on what, folder) of every cell."""
    found: dict[tuple[str, str], list[str]] = {}
    for who, what, folder in cells:
        if (folder / REFUSED).is_file():
            why = json.loads((folder / REFUSED).read_text())["error"]
            found.setdefault((who, why), []).append(what)
    return [f"{who} on {', '.join(of)}: {why}" for (who, why), of in found.items()]
