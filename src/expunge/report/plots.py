"""Figures as inline SVG. Colours become CSS variables, so that a figure follows the page's scheme and prints well.

No text of a run enters a figure (legends are HTML, which the template escapes): only numbers and our own words.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# stand-ins that survive matplotlib; each becomes the CSS variable beside it
INK, MUTED, RULE, ACCENT, PAPER = "#010203", "#010204", "#010205", "#010206", "#010207"
LINES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", ACCENT: "--accent", PAPER: "--paper"} | {
    c: f"--line-{i + 1}" for i, c in enumerate(LINES)
}
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 3)), (0, (9, 3)))

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "expunge",  # and the same figure the same bytes
    "font.size": 13,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}

# losses that span more than this are drawn on a logarithmic axis
LOG_FROM = 50.0


@dataclass(frozen=True)
class Point:
    """An edit in the plane of erasure (x) and retention (y), shares in [0, 1], each with its interval."""

    label: str
    x: float
    y: float
    x_interval: tuple[float, float] | None
    y_interval: tuple[float, float] | None
    base: tuple[float, float] | None


def plane(points: Sequence[Point], name: str) -> str:
    """Draw erasure against retention; `name` makes the ids of this figure unique in the page."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.1, 4.5))
        ax = figure.add_axes((0.115, 0.125, 0.865, 0.86))
        ax.grid(visible=True)
        ax.set_axisbelow(True)
        for p in points:
            ax.errorbar(
                *(100 * p.x, 100 * p.y),
                xerr=_reach(p.x, p.x_interval),
                yerr=_reach(p.y, p.y_interval),
                fmt="o",
                markersize=9 if len(points) == 1 else 17,
                color=ACCENT,
                markeredgecolor=PAPER,
                elinewidth=1.6,
                capsize=3,
                zorder=4,
            )
            if len(points) > 1:
                ax.annotate(
                    p.label,
                    (100 * p.x, 100 * p.y),
                    color=PAPER,
                    ha="center",
                    va="center_baseline",
                    fontsize=11,
                    zorder=6,
                )
        if len(points) == 1:
            _note(ax, "edited", (points[0].x, points[0].y), ACCENT)
        _bases(ax, points)
        lows = [y for p in points for y in (p.y, *(p.y_interval or ()), *((p.base[1],) if p.base else ()))]
        # nothing is hidden below the axis, and a kept 95 % still stands apart from a kept 90 %
        bottom = min(80, 10 * math.floor(10 * min(lows) - 0.5))
        ax.set_xlim(-4, 104)
        ax.set_ylim(max(bottom, 0) - 1, 101)
        ax.set_yticks(range(max(bottom, 0), 101, 5 if bottom >= 70 else 10 if bottom >= 30 else 20))
        ax.set_xlabel("erased: UA, %")
        ax.set_ylabel("others kept: IRA, %")
        return _svg(figure, name)


def losses(curves: Mapping[str, Sequence[float]], steps: int, name: str) -> str:
    """Draw each term of the loss over the updates, in the order and with the strokes of the HTML legend."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.1, 2.9))
        ax = figure.add_axes((0.15, 0.19, 0.83, 0.78))
        ax.grid(visible=True, axis="y")
        ax.set_axisbelow(True)
        for i, values in enumerate(curves.values()):
            last = max(steps - 1, len(values) - 1)
            xs = [j * last / max(len(values) - 1, 1) for j in range(len(values))]
            k = i % len(LINES)
            ax.plot(xs, values, color=LINES[k], linestyle=DASHES[k], linewidth=1.5, marker="o" if len(xs) == 1 else "")
        every = [v for values in curves.values() for v in values if math.isfinite(v)]
        if every and min(every) > 0 and max(every) / min(every) > LOG_FROM:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
            ax.yaxis.set_minor_formatter(lambda _x, _: "")
        else:
            ax.ticklabel_format(axis="y", useMathText=False, useOffset=False)
        ax.set_xlabel("update")
        ax.set_ylabel("loss")
        return _svg(figure, name)


def _reach(x: float, interval: tuple[float, float] | None) -> Any:
    if interval is None:
        return None
    return [[max(0.0, 100 * (x - interval[0]))], [max(0.0, 100 * (interval[1] - x))]]


def _bases(ax: Any, points: Sequence[Point]) -> None:
    """Draw the base model: one ring for each target, as it is another number for each."""
    known = [p for p in points if p.base is not None]
    for p in known:
        assert p.base is not None  # noqa: S101  (filtered the line above)
        x, y = 100 * p.base[0], 100 * p.base[1]
        ax.plot([x, 100 * p.x], [y, 100 * p.y], color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)), zorder=2)
        ax.plot(x, y, "o", markersize=9, markerfacecolor=PAPER, markeredgecolor=MUTED, markeredgewidth=1.6, zorder=3)
    if known and known[0].base:
        _note(ax, "base model", known[0].base, MUTED)


def _note(ax: Any, text: str, at: tuple[float, float], colour: str) -> None:
    """Write `text` below a point, towards the middle of the figure."""
    left = at[0] < 0.5
    ax.annotate(
        text,
        (100 * at[0], 100 * at[1]),
        xytext=(9 if left else -9, -9),
        textcoords="offset points",
        ha="left" if left else "right",
        va="top",
        color=colour,
    )


def _svg(figure: Figure, name: str) -> str:
    out = io.StringIO()
    canvas: Any = FigureCanvasSVG(figure)  # untyped
    canvas.print_svg(out, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.S)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)  # the page's own
    # two figures in one page must not share ids
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    svg = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg, count=1
    )
    return re.sub(r"\s*\n\s*", "\n", svg).replace("xlink:href", "href").strip()
