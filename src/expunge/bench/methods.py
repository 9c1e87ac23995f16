"""Every method with its defaults on the bench targets: erase, audit, one table, one plot.

An arm is a method's name, alone for its defaults or with settings ("sdd steps=300"); a cell is one arm on one target,
a run folder under `work`. A cell that holds scores of the same model and settings is not run again, an interrupted one
goes on, and several processes share the cells. Defaults are chosen on objects that are no targets (docs/dev/log.md), so
the table is not tuned to itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .. import flags
from ..concept import Concept
from ..judges.panel import load_panel
from ..kernel.model import Model
from ..methods import get
from ..records import Run, Score
from ..zoo.emoji.world import STYLES, WEIGHTS
from . import cells
from .cells import RESAMPLES, RULES, SEED, Interval, Progress, scores_of, told


@dataclass(frozen=True)
class Row:
    """One method over its targets of a kind.

    Attributes:
        method: its name.
        kind: "object" or "style".
        n: targets measured.
        ua: pooled unlearning accuracy with its Wilson interval.
        worst: lowest UA of a target.
        ira: mean of IRA / the base's IRA, interval by bootstrap over targets.
        cra: likewise.
        means: mean over targets of other metrics.
        seconds: mean time of an erasure.
    """

    method: str
    kind: str
    n: int
    ua: Interval
    worst: float
    ira: Interval
    cra: Interval
    means: Mapping[str, float | None]
    seconds: float


def grid(methods: Sequence[str], targets: Sequence[str]) -> list[tuple[str, str]]:
    """Return the grid, target by target, so that an interrupted one compares all methods on some targets."""
    return [(m, t) for t in targets for m in methods]


def kind_of(target: str) -> Literal["object", "style"]:
    """Return what a target is."""
    return "style" if target in STYLES else "object"


def folder_of(work: Path, arm: str, target: str) -> Path:
    """Return the run folder of a cell."""
    # "T-shirt/top" is one folder
    return work / arm.replace(" ", "-") / target.replace(" ", "-").replace("/", "-")


def built(arm: str) -> Any:
    """Return the method of an arm.

    Raises:
        SettingError: an unknown method or setting.
    """
    name, *settings = arm.split()
    return flags.build(get(name), flags.parse(settings))


def finished(work: Path, arm: str, target: str, base_hash: str) -> bool:
    """Tell whether a cell holds scores, or why it has none, of this model and the arm's settings."""
    return cells.finished(folder_of(work, arm, target), built(arm), base_hash)


def run(model: Model, todo: Sequence[tuple[str, str]], work: Path, progress: Progress) -> None:
    """Run cells, (arm, target) each, but for those that another process is at."""
    panel = load_panel(WEIGHTS, RULES.scorer, RULES.trunk, RULES.hashes) if todo else None

    def make(cell: tuple[str, str]) -> None:
        arm, target = cell
        cells.fill(model, panel, built(arm), Concept(target, kind=kind_of(target)), folder_of(work, *cell))

    cells.share(
        todo,
        progress,
        name=" on ".join,
        folder=lambda cell: folder_of(work, *cell),
        whole=lambda cell: finished(work, *cell, model.hash),
        make=make,
    )


def rows(methods: Sequence[str], targets: Sequence[str], work: Path) -> list[Row]:
    """Summarise the finished cells, a row a method and kind of target."""
    found = [row(m, kind, targets, work) for m in methods for kind in ("object", "style")]
    return [r for r in found if r is not None]


def row(method: str, kind: str, targets: Sequence[str], work: Path) -> Row | None:
    """Summarise one method on the targets of a kind; None when nothing of it was measured."""
    folders = [folder_of(work, method, t) for t in targets if kind_of(t) == kind]
    measured = {f: s for f in folders if (s := scores_of(f))}
    if not measured:
        return None
    scores = list(measured.values())
    return Row(
        method,
        kind,
        len(scores),
        cells.pooled([s["ua"] for s in scores]),
        min(s["ua"].value or 0.0 for s in scores),
        relative([s["ira"] for s in scores]),
        relative([s["cra"] for s in scores]),
        {m: mean(scores, m) for m in ("h", "clip_score", "fid", "degenerate_target")},
        fmean(Run(f).card.seconds for f in measured),
    )


def refusals(methods: Sequence[str], targets: Sequence[str], work: Path) -> list[str]:
    """Return a line for every reason that a method gave, with the targets it gave it for."""
    return cells.refusals((m, t, folder_of(work, m, t)) for m, t in grid(methods, targets))


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


def table(found: Sequence[Row], singles: Sequence[str] = (), refused: Sequence[str] = ()) -> str:
    """Return the rows as a Markdown table, after it that of the single targets (`by_target`) and what was refused."""
    head = "| method | targets | UA | worst UA | IRA / base | CRA / base | H | CLIP | FID | degenerate | s |"
    parts = [head, "|---" * 11 + "|", *(line(r) for r in found)]
    if singles:
        head = "| target | method | UA (base) | IRA (base) | CRA (base) | FID | degenerate (base) |"
        parts += ["", head, "|---" * 7 + "|", *singles]
    return "\n".join([*parts, *(f"\n{why}" for why in refused)]) + "\n"


def by_target(methods: Sequence[str], targets: Sequence[str], work: Path) -> list[str]:
    """Return a line of a Markdown table for every finished cell, target by target."""

    def said(s: Score | None) -> str:
        if s is None or s.value is None:
            return "-"
        return f"{s.value:.3f}" + (f" ({s.base:.3f})" if s.base is not None else "")

    lines = []
    for method, target in grid(methods, targets):
        if found := scores_of(folder_of(work, method, target)):
            name = f"style {target}" if kind_of(target) == "style" else target
            shown = [said(found.get(m)) for m in ("ua", "ira", "cra", "fid", "degenerate_target")]
            lines.append("| " + " | ".join([name, method, *shown]) + " |")
    return lines


def line(r: Row) -> str:
    """Return one line of the table."""
    means = ["-" if v is None else f"{v:.3f}" for v in r.means.values()]
    targets = f"{r.n} {r.kind}{'s' if r.n > 1 else ''}"
    said = [r.method, targets, told(r.ua), f"{r.worst:.3f}", told(r.ira), told(r.cra), *means]
    return "| " + " | ".join([*said, f"{r.seconds:.1f}"]) + " |"


def plot(found: Sequence[Row], path: Path) -> None:
    """Write erasure against retention as SVG, a panel a kind of target; a dot grows with the logarithm of seconds."""
    methods, kinds = (list(dict.fromkeys(x)) for x in zip(*((r.method, r.kind) for r in found), strict=True))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "expunge", "text.parse_math": False}):
        figure = Figure(figsize=(5.6 * len(kinds), 5), layout="constrained")
        for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            shown = sorted((r for r in found if r.kind == kind), key=lambda r: (-r.ira[0], -r.ua[0]))
            for r in shown:
                dot(axes, r, mpl.colormaps["tab20"](methods.index(r.method) % 20))
            low, high = axes.get_ylim()
            heights = apart([(100 * r.ira[0] - low) / (high - low) for r in shown])
            for r, height in zip(shown, heights, strict=True):
                name(axes, r, mpl.colormaps["tab20"](methods.index(r.method) % 20), height)
            axes.set(title=f"{kind}s", xlabel="unlearning accuracy, %", ylabel="retained, % of the base model's")
            axes.grid(color="0.9")
        FigureCanvasSVG(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def dot(axes: Axes, r: Row, colour: Any) -> None:
    """Draw a row with its intervals."""
    x, y = r.ua, r.ira
    reach = [[[100 * (v[0] - v[1])], [100 * (v[2] - v[0])]] for v in (x, y)]
    axes.errorbar(100 * x[0], 100 * y[0], reach[1], reach[0], fmt="none", ecolor=colour, alpha=0.4, zorder=1)
    size = 30 + 40 * np.log10(1 + r.seconds)
    axes.scatter(100 * x[0], 100 * y[0], s=size, color=colour, edgecolors="0.3", linewidths=0.5, zorder=2)


def name(axes: Axes, r: Row, colour: Any, height: float) -> None:
    """Write a row's name beside the axes at a height (0 to 1), and draw a line to it."""
    line = {"arrowstyle": "-", "color": colour, "alpha": 0.8, "linewidth": 0.8, "relpos": (0, 0.5)}
    axes.annotate(
        f"{r.method}, {r.seconds:.0f} s", (100 * r.ua[0], 100 * r.ira[0]), (1.06, height), textcoords="axes fraction",
        fontsize=9, va="center", arrowprops=line,
    )  # fmt: skip


def apart(heights: Sequence[float], gap: float = 0.054) -> list[float]:
    """Return heights, highest first, moved so that there is a gap between any two, and none below 0 if they fit."""
    found: list[float] = []
    for wanted in heights:
        found.append(min(wanted, found[-1] - gap) if found else wanted)
    floor = 0.0
    for i in reversed(range(len(found))):
        found[i] = max(found[i], floor)
        floor = found[i] + gap
    return found
