"""Seconds and memory of ESD and SDD here against a plain loop as the papers' scripts have it.

The plain loop: two full networks, every weight of the student with a gradient, one fresh guided rollout of 50 steps an
update, stopped at a random step, batch 1. Ours: `expunge.erase` with the method's defaults and, for the memory column,
batch 1. Every cell runs in its own process (`python -m expunge.bench.speed MODEL KIND METHOD UPDATES`); memory is the
peak resident size above that of the process with the model loaded and nothing else done.
"""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..backbones import load
from ..concept import Concept
from ..door import erase
from ..errors import Unsupported
from ..kernel.model import Model
from ..methods import get
from ..storage import write_json

CONCEPT, KEPT = "rhinoceros", "panda"
METHODS = ("esd", "sdd")
KINDS = ("plain", "ours", "ours-batch-1")


def resident() -> float:
    """Peak resident size so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def plain(model: Model, method: str, updates: int) -> int:
    """Run the papers' loop; returns samples seen."""
    net = model.denoiser.module
    # ESD's untouched original, or SDD's average of the student, which draws the rollouts
    second = copy.deepcopy(net)
    net.requires_grad_(True)
    weights = [p for n, p in net.named_parameters() if "attn2" in n]
    opt = torch.optim.Adam(weights, lr=1e-5)
    d, c, null = model.denoiser, model.encode(f"an emoji of {CONCEPT}"), model.encode("")
    g = torch.Generator().manual_seed(0)
    times = d.path.grid(50)
    for _ in range(updates):
        stop = int(torch.randint(50, (1,), generator=g))
        x = torch.randn(1, *d.shape, generator=g)
        sampler = second if method == "sdd" else net
        with torch.no_grad():
            for i in range(stop):
                t, s = times[i].expand(1), times[i + 1].expand(1)
                e_c, e_0 = d.call(sampler, x, t, c), d.call(sampler, x, t, null)
                a, b = d.path.levels(t, x)
                v = e_0 + 3.0 * (e_c - e_0)
                x0, eps = a * x - b * v, b * x + a * v
                a, b = d.path.levels(s, x)
                x = a * x0 + b * eps
            t = times[stop].expand(1)
            if method == "esd":
                e_c, e_0 = d.call(second, x, t, c), d.call(second, x, t, null)
                target = e_0 - (e_c - e_0)
            else:
                target = d.call(net, x, t, null)
        F.mse_loss(d.call(net, x, t, c), target).backward()  # type: ignore[no-untyped-call]
        opt.step()
        opt.zero_grad()
        if method == "sdd":
            with torch.no_grad():
                for p, q in zip(second.parameters(), net.parameters(), strict=True):
                    p.lerp_(q, 0.001)
    return updates


def ours(model: Model, method: str, updates: int, batch: int | None) -> int:
    """Run the package's method; returns samples seen."""
    settings: dict[str, Any] = {"steps": updates} | ({} if batch is None else {"batch": batch, "rollouts": batch})
    made = get(method)(**settings)
    erase(model, Concept(CONCEPT, templates=("an emoji of {c}",), keep=(KEPT,)), made, seed=0)
    batch_size: int = made.batch
    return updates * batch_size


def cell(name: str, kind: str, method: str, updates: int) -> dict[str, float]:
    """Measure one cell in this process."""
    model = load(name)
    model.encode("")
    before, start = resident(), time.perf_counter()
    if kind == "plain":
        samples = plain(model, method, updates)
    else:
        samples = ours(model, method, updates, 1 if kind == "ours-batch-1" else None)
    seconds = time.perf_counter() - start
    return {
        "seconds_per_update": seconds / updates,
        "seconds_per_sample": seconds / samples,
        "mb_above_model": resident() - before,
    }


def measure(model: str, updates: int, out: Path, progress: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Measure every cell in a process of its own and write the cells, with their ratios, to `out`.

    Raises:
        Unsupported: a cell ended with an error.
    """
    rows: dict[str, dict[str, float]] = {}
    for method in METHODS:
        for kind in KINDS:
            command = [sys.executable, "-m", __spec__.name, model, kind, method, str(updates)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
            if done.returncode:
                why = done.stderr.strip().rpartition("\n")[2]
                raise Unsupported(f"the cell {method} {kind} of the speed benchmark failed on {model!r}: {why}")
            rows[f"{method} {kind}"] = json.loads(done.stdout.strip().split("\n")[-1])
            progress(f"{method} {kind}: {rows[f'{method} {kind}']}")
    for method in METHODS:
        base = rows[f"{method} plain"]
        for kind in KINDS[1:]:
            row = rows[f"{method} {kind}"]
            row["speedup_per_sample"] = base["seconds_per_sample"] / row["seconds_per_sample"]
            row["memory_ratio"] = row["mb_above_model"] / base["mb_above_model"]
    write_json(out, rows)
    return rows


if __name__ == "__main__":
    model_name, kind_name, method_name, count = sys.argv[1:]
    print(json.dumps(cell(model_name, kind_name, method_name, int(count))))
