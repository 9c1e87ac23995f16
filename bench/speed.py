"""Seconds and memory of ESD and SDD here against a plain loop as the papers' scripts have it.

    python bench/speed.py [--model emoji] [--updates 40] [--out bench/results/speed.json]

The plain loop: two full networks, every weight of the student with a gradient, one fresh guided rollout of 50 steps an
update, stopped at a random step, batch 1. Ours: `expunge.erase` with the method's defaults and, for the memory column,
batch 1. Every cell runs in its own process; memory is the peak resident size above that of the process with the model
loaded and nothing else done.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import expunge
from expunge.concept import Concept
from expunge.kernel.model import Model
from expunge.methods import get

CONCEPT = "rhinoceros"


def resident() -> float:
    """Peak resident size so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def plain(model: Model, method: str, updates: int) -> int:
    """Run the papers' loop; returns samples seen."""
    net, old = model.denoiser.module, copy.deepcopy(model.denoiser.module)
    net.requires_grad_(True)
    average = copy.deepcopy(net) if method == "sdd" else None
    weights = [p for n, p in net.named_parameters() if "attn2" in n]
    opt = torch.optim.Adam(weights, lr=1e-5)
    d, c, null = model.denoiser, model.encode(f"an emoji of {CONCEPT}"), model.encode("")
    g = torch.Generator().manual_seed(0)
    times = d.path.grid(50)
    for _ in range(updates):
        stop = int(torch.randint(50, (1,), generator=g))
        x = torch.randn(1, *d.shape, generator=g)
        sampler = average if average is not None else net
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
                e_c, e_0 = d.call(old, x, t, c), d.call(old, x, t, null)
                target = e_0 - (e_c - e_0)
            else:
                target = d.call(net, x, t, null)
        F.mse_loss(d.call(net, x, t, c), target).backward()
        opt.step()
        opt.zero_grad()
        if average is not None:
            with torch.no_grad():
                for p, q in zip(average.parameters(), net.parameters(), strict=True):
                    p.lerp_(q, 0.001)
    return updates


def ours(model: Model, method: str, updates: int, batch: int | None) -> int:
    """Run the package's method; returns samples seen."""
    settings: dict[str, Any] = {"steps": updates} | ({} if batch is None else {"batch": batch, "rollouts": batch})
    made = get(method)(**settings)
    expunge.erase(model, Concept(CONCEPT, templates=("an emoji of {c}",), keep=("koala",)), made, seed=0)
    return updates * made.batch


def cell(name: str, kind: str, method: str, updates: int) -> dict[str, float]:
    """Measure one cell in this process."""
    model = expunge.load(name)
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


def main() -> None:
    """Measure every cell and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("bench/results/speed.json"))
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(args.model, *args.cell, args.updates)))
        return
    rows = {}
    for method in ("esd", "sdd"):
        for kind in ("plain", "ours", "ours-batch-1"):
            command = [
                sys.executable,
                __file__,
                "--model",
                args.model,
                "--updates",
                str(args.updates),
                "--cell",
                kind,
                method,
            ]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows[f"{method} {kind}"] = json.loads(out.strip().split("\n")[-1])
            print(f"{method} {kind}: {rows[f'{method} {kind}']}", flush=True)
    for method in ("esd", "sdd"):
        base = rows[f"{method} plain"]
        for kind in ("ours", "ours-batch-1"):
            row = rows[f"{method} {kind}"]
            row["speedup_per_sample"] = base["seconds_per_sample"] / row["seconds_per_sample"]
            row["memory_ratio"] = row["mb_above_model"] / base["mb_above_model"]
            print(
                f"{method} {kind}: {row['speedup_per_sample']:.1f}x a sample, "
                f"{row['memory_ratio']:.2f}x memory above the model"
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
