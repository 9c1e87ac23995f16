"""UCE (readers, tokens), RECE, SPEED and TUCE on many concepts at once: seconds, and what becomes of all objects.

The erased ones are the first n objects of the world in a fixed shuffled order, bench targets left out. Scoring:
protocol `emoji-v1`'s judge, sampler and prompts; 64 pictures of erased objects and 96 of retained ones a count.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..backbones import load
from ..concept import Concept
from ..door import erase
from ..errors import SettingError
from ..judges.classifier import load_judge
from ..kernel.model import Model
from ..methods.base import Method
from ..methods.rece import RECE
from ..methods.speed import SPEED
from ..methods.tuce import TUCE
from ..methods.uce import UCE
from ..metrics.rates import wilson
from ..protocols import protocol, shuffled
from ..storage import write_json
from ..zoo.emoji.world import BENCH_TARGETS, STYLES, WEIGHTS, world
from .measures import label

RULES = protocol("emoji-v1")
METHODS = (UCE(), UCE(reads="tokens"), RECE(), SPEED(), TUCE())
SPARED = 8  # objects left to retain
ERASED, RETAINED = 64, 96  # pictures of each


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


def measure(
    counts: Sequence[int], out: Path, progress: Callable[[str], None], methods: Sequence[Method] = METHODS
) -> list[dict[str, Any]]:
    """Measure every count with every method and write the rows to `out`.

    Raises:
        SettingError: more concepts than the world can spare.
    """
    objects = world().objects
    order = [o for o in shuffled(objects) if o not in BENCH_TARGETS]
    if max(counts) > len(order) - SPARED:
        raise SettingError(f"--counts {max(counts)}: the shipped world can lose at most {len(order) - SPARED} objects.")
    model, rows = load("emoji"), list[dict[str, Any]]()
    for n in counts:
        erased, kept = order[:n], [o for o in objects if o not in order[:n]]
        asked = {"erased": (erased, ERASED), "retained": (kept, RETAINED)}
        base = {f"{k}_base": recognised(*pictures(model, *what)) for k, what in asked.items()}
        for method in methods:
            start = time.perf_counter()
            edit = erase(model, [Concept(o) for o in erased], method, seed=0)
            seconds = time.perf_counter() - start
            with edit.on(model):
                now = {k: recognised(*pictures(model, *what)) for k, what in asked.items()}
            rows.append({"method": label(method), "n": n, "seconds": seconds, **base, **now})
            progress(json.dumps(rows[-1]))
            write_json(out, rows)
    return rows
