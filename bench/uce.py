"""UCE on many concepts at once: seconds, and what happens to the erased and to the rest.

    python bench/uce.py [--counts 1,10,50,100] [--out bench/results/uce.json]

The erased ones are the first n objects of the world in a fixed shuffled order, bench targets left out. Scoring:
protocol `emoji-v1`'s judge, sampler and prompts; 96 pictures of erased objects and 160 of retained ones a count.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import expunge
from expunge.concept import Concept
from expunge.judges.classifier import load_judge
from expunge.kernel.model import Model
from expunge.methods.uce import UCE
from expunge.metrics.rates import wilson
from expunge.protocols import protocol, shuffled
from expunge.zoo.emoji.world import BENCH_TARGETS, STYLES, WEIGHTS

RULES = protocol("emoji-v1")


def pictures(model: Model, objects: list[str], count: int) -> tuple[torch.Tensor, list[str]]:
    """Draw `count` pictures over objects and styles in turn."""
    asked = [(objects[i % len(objects)], list(STYLES)[(i + i // len(objects)) % len(STYLES)]) for i in range(count)]
    prompts = [RULES.prompt(o, s) for o, s in asked]
    images = model.generate(prompts, seeds=list(range(count)), steps=RULES.steps, guidance=RULES.guidance)
    return images, [o for o, _ in asked]


def recognised(images: torch.Tensor, names: list[str]) -> dict[str, float]:
    """Return the share of pictures in which judge b sees the object, with its interval."""
    judge = load_judge(WEIGHTS / "judge-b.safetensors")
    hits = int((judge.read(images).object == torch.tensor([judge.objects.index(n) for n in names])).sum())
    low, high = wilson(hits, len(names)) or (0.0, 1.0)
    return {"value": hits / len(names), "low": low, "high": high, "n": len(names)}


def main() -> None:
    """Measure every count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="1,10,50,100")
    parser.add_argument("--out", type=Path, default=Path("bench/results/uce.json"))
    args = parser.parse_args()
    model = expunge.load("emoji")
    assert model.world is not None
    order = [o for o in shuffled(model.world.objects) if o not in BENCH_TARGETS]
    rows = []
    for n in (int(c) for c in args.counts.split(",")):
        if n > len(order) - 8:
            print(f"{n}: the shipped world has {len(model.world.objects)} objects; skipped")
            continue
        erased, kept = order[:n], [o for o in model.world.objects if o not in order[:n]]
        start = time.perf_counter()
        edit = expunge.erase(model, [Concept(o) for o in erased], UCE(), seed=0)
        row = {"n": n, "seconds": time.perf_counter() - start}
        for label, objects, count in (("erased", erased, 96), ("retained", kept, 160)):
            base, names = pictures(model, objects, count)
            row[f"{label}_base"] = recognised(base, names)
            with edit.on(model):
                row[label] = recognised(*pictures(model, objects, count))
        rows.append(row)
        print(json.dumps(row), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
