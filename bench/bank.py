"""The trajectory bank: does using a latent several times, or rolling out fewer trajectories at once, hurt?

    python bench/bank.py [--concepts rhinoceros,koala] [--out bench/results/bank.json] [--plot docs/img/bank.svg]

ESD with its defaults but for `reuse` and `rollouts`, on objects outside the bench targets; UA and IRA by a short
version of `emoji-v1` (24 target, 64 retained pictures), seconds of the erasure beside them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt

import expunge
from expunge import protocols
from expunge.audit import audit
from expunge.concept import Concept
from expunge.methods.esd import ESD

SHORT = replace(protocols.protocol("emoji-v1"), id="emoji-v1-short", targets=24, retained=64, near=12, near_each=1)
GRID = [(reuse, rollouts) for rollouts in (8,) for reuse in (1, 2, 4, 8)] + [(2, 2), (2, 4), (2, 16)]


def main() -> None:
    """Run the grid and plot it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", default="rhinoceros,tractor")
    parser.add_argument("--out", type=Path, default=Path("bench/results/bank.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/img/bank.svg"))
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    model = expunge.load("emoji")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with patch.dict(protocols.PROTOCOLS, {SHORT.id: SHORT}):
        for concept in args.concepts.split(","):
            for reuse, rollouts in GRID:
                key = {"concept": concept, "reuse": reuse, "rollouts": rollouts}
                if any(key.items() <= row.items() for row in rows):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "run"
                    edit = expunge.erase(model, Concept(concept), ESD(reuse=reuse, rollouts=rollouts), seed=0, out=out)
                    scores = {s.metric: s for s in audit(out, SHORT.id, model=model)}
                assert edit.card is not None
                found = {m: [scores[m].value, scores[m].low, scores[m].high] for m in ("ua", "ira")}
                rows.append(key | found | {"seconds": edit.card.seconds})
                print(json.dumps(rows[-1]), flush=True)
                args.out.write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, args.plot)


def plot(rows: list[dict], path: Path) -> None:
    """Plot UA, IRA and seconds against reuse."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for concept in dict.fromkeys(r["concept"] for r in rows):
        mine = sorted((r for r in rows if r["concept"] == concept and r["rollouts"] == 8), key=lambda r: r["reuse"])
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
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
