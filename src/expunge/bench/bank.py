"""The trajectory bank: does using a latent several times, or rolling out fewer trajectories at once, hurt?

ESD with its defaults but for `reuse` and `rollouts`, on objects outside the bench targets; UA and IRA by a short
version of `emoji-v1` (24 target, 64 retained pictures), seconds of the erasure beside them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ..auditing import audit
from ..backbones import load
from ..concept import Concept
from ..door import erase
from ..methods.esd import ESD
from ..storage import write_json
from .cells import SHORT

ROLLOUTS = 8  # while reuse varies, which the plot is about
GRID = [(reuse, ROLLOUTS) for reuse in (1, 2, 4, 8)] + [(2, rollouts) for rollouts in (2, 4, 16)]


def measure(concepts: Sequence[str], out: Path, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run every cell of the grid that `out` lacks for the present model, and write each as soon as it is there."""
    model = load("emoji")
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    rows = [row for row in rows if row["base_hash"] == model.hash]
    for concept in concepts:
        for reuse, rollouts in GRID:
            key = {"base_hash": model.hash, "concept": concept, "reuse": reuse, "rollouts": rollouts}
            if any(key.items() <= row.items() for row in rows):
                continue
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run"
                edit = erase(model, Concept(concept), ESD(reuse=reuse, rollouts=rollouts), seed=0, out=run)
                scores = {s.metric: s for s in audit(run, SHORT, model=model)}
            found = {m: [scores[m].value, scores[m].low, scores[m].high] for m in ("ua", "ira")}
            rows.append(key | found | {"seconds": edit.card.seconds if edit.card else None})
            progress(json.dumps(rows[-1]))
            write_json(out, rows)
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot UA, IRA and seconds against reuse, as SVG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "expunge", "text.parse_math": False}):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        axes = figure.subplots(1, 2)
        for concept in dict.fromkeys(r["concept"] for r in rows):
            mine = [r for r in rows if r["concept"] == concept and r["rollouts"] == ROLLOUTS]
            mine.sort(key=lambda r: r["reuse"])
            reuse = [r["reuse"] for r in mine]
            for metric, style in (("ua", "o-"), ("ira", "s--")):
                value, low, high = (list(v) for v in zip(*(r[metric] for r in mine), strict=True))
                error = [
                    [v - a for v, a in zip(value, low, strict=True)],
                    [b - v for v, b in zip(value, high, strict=True)],
                ]
                axes[0].errorbar(reuse, value, error, fmt=style, capsize=3, label=f"{metric.upper()}, {concept}")
            axes[1].plot(reuse, [r["seconds"] for r in mine], "o-", label=concept)
        axes[0].set(xlabel="uses of each latent", ylabel="rate, 95 % interval", ylim=(0, 1.02), xscale="log")
        axes[1].set(xlabel="uses of each latent", ylabel="seconds of the erasure", xscale="log", ylim=(0, None))
        for axis in axes:
            axis.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
            axis.minorticks_off()
            axis.legend(fontsize=8)
        FigureCanvasSVG(figure)
        figure.savefig(path, metadata={"Date": None})
