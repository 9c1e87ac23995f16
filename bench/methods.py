"""Every method with its defaults on the bench targets: erase, audit, table.

    python bench/methods.py [--methods esd,sdd,uce] [--targets bomb,dagger] [--work bench/runs] [--table docs/bench.md]

Resumable: a cell whose run folder holds scores is not run again. Defaults were chosen on objects outside the targets.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import expunge
from expunge.audit import audit
from expunge.concept import Concept
from expunge.methods import get, names
from expunge.records import Run, Score
from expunge.zoo.emoji.world import BENCH_STYLES, BENCH_TARGETS

METRICS = ("ua", "ira", "cra", "h", "clip_score", "fid", "kid", "perceptual", "degenerate", "seconds")


def cell(method: str, target: str, work: Path, protocol: str) -> Run:
    """Erase one target by one method and audit it, unless that is done."""
    folder = work / method / target.replace(" ", "-")
    if (folder / "scores.json").is_file() and json.loads((folder / "scores.json").read_text()):
        return Run.open(folder)
    shutil.rmtree(folder, ignore_errors=True)
    model = expunge.load("emoji")
    kind = "style" if target in BENCH_STYLES else "object"
    start = time.perf_counter()
    expunge.erase(model, Concept(target, kind=kind), get(method)(), seed=0, out=folder)
    erased = time.perf_counter()
    audit(folder, protocol)
    print(
        f"{method} {target}: erased in {erased - start:.0f} s, audited in {time.perf_counter() - erased:.0f} s",
        flush=True,
    )
    return Run.open(folder)


def by_name(run: Run) -> dict[str, Score]:
    """Return a run's scores by metric."""
    return {s.metric: s for s in run.scores}


def row(label: str, runs: Sequence[Run]) -> str:
    """Return one line of the table: means over targets, worst UA, retention relative to the base model's own."""
    scores = [by_name(r) for r in runs]

    def mean(metric: str) -> str:
        values = [s[metric].value for s in scores if metric in s and s[metric].value is not None]
        return f"{fmean(v for v in values if v is not None):.3f}" if values else "-"

    def relative(metric: str) -> str:
        pairs = [(s[metric].value, s[metric].base) for s in scores if metric in s]
        ratios = [v / b for v, b in pairs if v is not None and b]
        return f"{fmean(ratios):.3f}" if ratios else "-"

    worst = min((s["ua"].value or 0.0 for s in scores if "ua" in s), default=0.0)
    seconds = fmean(r.card.seconds for r in runs)
    cells = [
        label,
        str(len(runs)),
        mean("ua"),
        f"{worst:.3f}",
        mean("ira"),
        relative("ira"),
        mean("cra"),
        relative("cra"),
        mean("h"),
    ]
    cells += [mean(m) for m in ("clip_score", "fid", "kid", "perceptual", "degenerate")]
    return "| " + " | ".join([*cells, f"{seconds:.0f}"]) + " |"


def table(runs: dict[str, list[Run]]) -> str:
    """Return the table over methods."""
    head = [
        "method",
        "n",
        "UA",
        "worst UA",
        "IRA",
        "IRA/base",
        "CRA",
        "CRA/base",
        "H",
        "CLIP",
        "FID",
        "KID",
        "perceptual",
        "degenerate",
        "s",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(row(m, r) for m, r in runs.items() if r)]) + "\n"


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(names()))
    parser.add_argument("--targets", default=",".join(BENCH_TARGETS))
    parser.add_argument("--protocol", default="emoji-v1")
    parser.add_argument("--work", type=Path, default=Path("bench/runs"))
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    runs: dict[str, list[Run]] = {}
    for method in args.methods.split(","):
        runs[method] = [cell(method, target, args.work, args.protocol) for target in args.targets.split(",")]
    text = table(runs)
    print(text)
    if args.table:
        args.table.write_text(text)


if __name__ == "__main__":
    main()
