"""Every method with its defaults on the bench targets: erase, audit, one table, one plot.

A cell is one method on one target, a run folder under `work`; a cell that holds scores is not run again. Defaults are
chosen on objects that are no targets (docs/dev/log.md), so the table is not tuned to itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ..audit import audit
from ..backbones import load
from ..concept import Concept
from ..door import erase
from ..errors import ExpungeError
from ..kernel.model import Model
from ..methods import get
from ..metrics.rates import wilson
from ..records import Run, Score
from ..storage import write_atomic
from ..zoo.emoji.world import BENCH_STYLES

RESAMPLES = 4000
SEED = 20260101

Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Row:
    """One method over its targets.

    Attributes:
        method: its name.
        n: targets measured.
        ua: pooled unlearning accuracy with its Wilson interval.
        worst: lowest UA of a target.
        ira: mean of IRA / the base's IRA, interval by bootstrap over targets.
        cra: likewise.
        means: mean over targets of other metrics.
        seconds: mean time of an erasure.
        failed: target -> what its cell ended with.
    """

    method: str
    n: int
    ua: Interval
    worst: float
    ira: Interval
    cra: Interval
    means: Mapping[str, float | None]
    seconds: float
    failed: Mapping[str, str]


def cells(methods: Sequence[str], targets: Sequence[str]) -> list[tuple[str, str]]:
    """Return the grid, target by target, so that an interrupted one compares all methods on some targets."""
    return [(m, t) for t in targets for m in methods]


def folder_of(work: Path, method: str, target: str) -> Path:
    """Return the run folder of a cell."""
    return work / method / target.replace(" ", "-")


def finished(work: Path, method: str, target: str) -> bool:
    """Tell whether a cell holds scores, or the reason why it cannot."""
    folder = folder_of(work, method, target)
    scores = folder / "scores.json"
    return (folder / "refused.json").is_file() or (scores.is_file() and json.loads(scores.read_text()) != [])


def run(
    methods: Sequence[str], targets: Sequence[str], work: Path, protocol: str, progress: Callable[[str, int, int], None]
) -> None:
    """Run every cell that is not finished."""
    todo = [c for c in cells(methods, targets) if not finished(work, *c)]
    if not todo:
        return
    model = load("emoji")
    for i, (method, target) in enumerate(todo):
        progress(f"cells: {method} on {target}", i, len(todo))
        cell(model, method, target, folder_of(work, method, target), protocol)


def cell(model: Model, method: str, target: str, folder: Path, protocol: str) -> None:
    """Erase one target by one method and audit it; a refusal is a result and is written down."""
    shutil.rmtree(folder, ignore_errors=True)
    made = get(method)()
    concept = Concept(target, kind="style" if target in BENCH_STYLES else "object")
    extra: dict[str, Any] = {"make_images": 64} if made.needs.images else {}
    try:
        erase(model, concept, made, seed=0, out=folder, **extra)
        audit(folder, protocol, model=model)
    except ExpungeError as error:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "refused.json", json.dumps({"error": str(error)}).encode())


def rows(methods: Sequence[str], targets: Sequence[str], work: Path) -> list[Row]:
    """Summarise the finished cells, a row a method."""
    return [r for m in methods if (r := row(m, targets, work)) is not None]


def row(method: str, targets: Sequence[str], work: Path) -> Row | None:
    """Summarise one method; None when nothing of it is finished."""
    folders = {t: folder_of(work, method, t) for t in targets if finished(work, method, t)}
    failed = {
        t: str(json.loads((f / "refused.json").read_text())["error"])
        for t, f in folders.items()
        if (f / "refused.json").is_file()
    }
    runs = [Run.open(f) for t, f in folders.items() if t not in failed]
    if not runs:
        return None
    scores = [{s.metric: s for s in r.scores} for r in runs]
    n = sum(s["ua"].n + s["ua"].errors for s in scores)
    hits = sum(round((s["ua"].value or 0.0) * (s["ua"].n + s["ua"].errors)) for s in scores)
    low, high = wilson(hits, n) or (0.0, 1.0)
    return Row(
        method,
        len(runs),
        (hits / n, low, high),
        min(s["ua"].value or 0.0 for s in scores),
        relative([s["ira"] for s in scores]),
        relative([s["cra"] for s in scores]),
        {m: mean(scores, m) for m in ("h", "clip_score", "fid", "degenerate_target")},
        fmean(r.card.seconds for r in runs),
        failed,
    )


def relative(scores: Sequence[Score]) -> Interval:
    """Return the mean of value / base over targets with a 95 % bootstrap interval over targets."""
    ratios = np.array([(s.value or 0.0) / s.base for s in scores if s.base])
    draws = np.random.default_rng(SEED).choice(ratios, (RESAMPLES, len(ratios))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(ratios.mean()), float(low), float(high)


def mean(scores: Sequence[Mapping[str, Score]], metric: str) -> float | None:
    """Return the mean of a metric over the targets that have it."""
    values = [v for s in scores if metric in s and (v := s[metric].value) is not None]
    return fmean(values) if values else None


def table(found: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = "| method | targets | UA | worst UA | IRA / base | CRA / base | H | CLIP | FID | degenerate | s |"
    return "\n".join([head, "|---" * 11 + "|", *(line(r) for r in found), *notes(found)]) + "\n"


def line(r: Row) -> str:
    """Return one line of the table."""

    def interval(x: Interval) -> str:
        return f"{x[0]:.3f} [{x[1]:.3f}, {x[2]:.3f}]"

    means = ["-" if v is None else f"{v:.3f}" for v in r.means.values()]
    cells = [r.method, str(r.n), interval(r.ua), f"{r.worst:.3f}", interval(r.ira), interval(r.cra), *means]
    return "| " + " | ".join([*cells, f"{r.seconds:.1f}"]) + " |"


def notes(found: Sequence[Row]) -> Iterator[str]:
    """Yield what cells refused, after the table."""
    for r in found:
        for target, why in r.failed.items():
            yield f"\n{r.method} on {target}: {why}"


def plot(found: Sequence[Row], path: Path) -> None:
    """Write erasure against retention as SVG; a dot's area grows with the logarithm of the erasure's seconds."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "expunge", "text.parse_math": False}):
        figure = Figure(figsize=(7.2, 5), layout="constrained")
        axes = figure.add_subplot()
        for r in found:
            x, y = r.ua, r.ira
            reach = [[[100 * (v[0] - v[1])], [100 * (v[2] - v[0])]] for v in (x, y)]
            axes.errorbar(100 * x[0], 100 * y[0], reach[1], reach[0], fmt="none", ecolor="0.75", zorder=1)
            axes.scatter(100 * x[0], 100 * y[0], s=30 + 40 * np.log10(1 + r.seconds), zorder=2)
            axes.annotate(
                f"{r.method}, {r.seconds:.0f} s", (100 * x[0], 100 * y[0]), (6, 6), textcoords="offset points"
            )
        axes.set(xlabel="unlearning accuracy, %", ylabel="retained objects, % of the base model's")
        axes.grid(color="0.9")
        FigureCanvasSVG(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
