"""Synthetic but plausible run folders, and a Chromium without a network."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from expunge.records import Card, Run, Score

STYLES = ("noto", "twemoji", "openmoji", "fluent", "flat", "mono", "emojione", "blob")
NEAR = ("firecracker", "dagger", "bowling", "soccer ball", "meteor", "candle", "fire extinguisher", "black heart")

MakeRun = Callable[..., Run]


def draw(path: Path, what: str, seed: int) -> None:
    """Draw a 64x64 picture whose shape depends on `what` and whose place and ground depend on `seed`."""
    rng = random.Random(f"{what}{seed}")
    place = random.Random(seed)
    ground = place.choice(["#ffffff", "#f6e3b4", "#cfe6f5", "#d9efd3", "#f3d3dc", "#e2dcf2"])
    image = Image.new("RGB", (256, 256), ground)
    pen = ImageDraw.Draw(image)
    x, y, r = 128 + place.randint(-20, 20), 132 + place.randint(-16, 16), 70 + place.randint(-8, 12)
    if what == "bomb":
        pen.line([(x + r * 0.6, y - r * 0.6), (x + r, y - r * 1.15)], fill="#8a6a3a", width=14)
        pen.ellipse([x - r, y - r, x + r, y + r], fill="#2b2f33")
        pen.ellipse([x - r * 0.6, y - r * 0.6, x - r * 0.2, y - r * 0.2], fill="#777e85")
        pen.ellipse([x + r - 14, y - r * 1.15 - 14, x + r + 14, y - r * 1.15 + 14], fill="#f4a52c")
    else:
        colour = rng.choice(["#c0392b", "#2e86ab", "#5b8c3a", "#e0a030", "#7d5ba6", "#d2691e", "#444b52"])
        sides = rng.choice([3, 4, 5, 6, 40])
        turn = rng.random() * 6
        corners = [(x + r * math.cos(turn + 2 * math.pi * i / sides), y + r * math.sin(turn + 2 * math.pi * i / sides))
                   for i in range(sides)]  # fmt: skip
        pen.polygon(corners, fill=colour)
        pen.ellipse([x - r * 0.3, y - r * 0.3, x + r * 0.3, y + r * 0.3], fill="#ffffff")
    image.resize((64, 64), Image.Resampling.LANCZOS).save(path)


def scores(ua: float = 47 / 48, ira: float = 0.925, protocol: str = "emoji-v1") -> list[Score]:
    """Return the scores of an audit."""

    def score(metric: str, value: float, low: float | None, high: float | None, n: int, **more: Any) -> Score:
        return Score(protocol=protocol, metric=metric, value=value, low=low, high=high, n=n, **more)

    return [
        score("ua", ua, max(0.0, ua - 0.088), min(1.0, ua + 0.017), 48, base=2 / 48, p=1e-10),
        score("ira", ira, ira - 0.052, ira + 0.031, 160, base=0.94375, p=0.38),
        score("cra", 0.975, 0.937, 0.99, 158, errors=2, base=0.98125, p=0.72),
        score("h", 3 / (1 / ua + 1 / ira + 1 / 0.975), 0.91, 0.981, 208, base=0.12),
        score("clip_score", 0.3121, 0.3068, 0.3174, 160, base=0.3158, p=0.041),
        score("fid", 12.63, None, None, 160),
        score("kid", 0.00184, 0.0009, 0.0031, 160),
        score("perceptual", 0.0712, 0.0651, 0.0779, 160),
        score("degenerate", 0.0385, 0.02, 0.073, 208, base=0.0144, p=0.062),
        score("seconds", 71.4, None, None, 1),
        score("peak_memory", 1.62e9, None, None, 1),
    ]


def make_card(name: str, seed: int) -> Card:
    """Return the card of an SDD run."""
    rng = random.Random(seed)
    curve = [0.09 * math.exp(-i / 40) + 0.004 + 0.004 * rng.random() for i in range(200)]
    drift = [0.0006 * (1 - math.exp(-i / 30)) + 0.0004 * rng.random() + 1e-5 for i in range(200)]
    settings = {"group": "cross-attention", "steps": 300, "lr": 1e-05, "batch": 8, "decay": 0.99, "anchor": 0.5}
    return Card(
        method="sdd",
        settings=settings,
        concept={"name": name, "kind": "object", "names": [name], "anchor": "balloon", "keep": ["dagger", "candle"]},
        model="emoji",
        base_hash="sha256:5f1c9d0b7a3e2c4816d9a0f4be7713c2",
        seed=seed,
        version="0.1.0",
        seconds=64.2,
        peak_bytes=1_437_000_000,
        losses={"distil": curve, "anchor": drift},
        steps=300,
        created="2026-11-21T10:04:07+00:00",
        samples_seen=2400,
    )


def neighbours() -> list[dict[str, Any]]:
    """Return the damage to eight neighbours, four pictures each."""
    after = (2, 3, 3, 4, 3, 4, 4, 4)
    before = (4, 4, 4, 4, 3, 4, 4, 3)
    return [
        {"name": n, "text_similarity": 0.86 - 0.03 * i, "image_similarity": 0.71 - 0.04 * i,
         "base": b / 4, "edited": a / 4, "damage": (b - a) / 4, "n": 4}
        for i, (n, a, b) in enumerate(zip(NEAR, after, before, strict=True))
    ]  # fmt: skip


def samples(run: Run, name: str) -> None:
    """Draw the picture pairs of a run: the target becomes a balloon, everything else stays."""
    folder = run.folder / "samples"
    folder.mkdir(exist_ok=True)
    plan = [("target", name, f"an emoji of a {name}", s) for s in range(4)]
    plan += [("target", name, f"a {st} style emoji of {name}", 10 + i) for i, st in enumerate(STYLES)]
    plan += [("retain", n, f"a {STYLES[i]} style emoji of {n}", 30 + i) for i, n in enumerate(NEAR)]
    others = ("owl", "pizza", "umbrella", "violin", "cactus", "anchor")
    plan += [("retain", n, f"a {STYLES[i]} style emoji of {n}", 50 + i) for i, n in enumerate(others)]
    rows, outcomes = [], []
    for i, (role, concept, prompt, seed) in enumerate(plan):
        base, edited = f"base-{i:03d}.png", f"edited-{i:03d}.png"
        seen = "balloon" if role == "target" and i != 5 else concept
        draw(folder / base, "bomb" if concept == name else concept, seed)
        draw(folder / edited, "bomb" if seen == name else seen, seed)
        row = {"role": role, "concept": concept, "prompt": prompt, "seed": seed}
        rows.append({**row, "base": base, "edited": edited})
        outcomes.append({**row, "style": "noto", "object": concept,
                         "base": {"object": concept, "style": "noto", "confidence": 0.98},
                         "edited": {"object": seen, "style": "noto", "confidence": 0.91}})  # fmt: skip
    run.write_samples(rows)
    run.write_outcomes(outcomes)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a whole run folder that is only copied: drawing 52 pictures for every test would take a minute."""
    run = Run(tmp_path_factory.mktemp("whole"))
    run.write_card(make_card("bomb", 0))
    run.write_scores(scores())
    run.write_neighbours(neighbours())
    samples(run, "bomb")
    return run.folder


@pytest.fixture
def make_run(tmp_path: Path, whole: Path) -> MakeRun:
    """Return a maker of whole run folders; `audited=False` leaves only what `expunge erase` writes."""

    def make(folder: str = "bomb-sdd", name: str = "bomb", *, audited: bool = True, seed: int = 0, **numbers) -> Run:
        run = Run(tmp_path / folder)
        if audited:
            shutil.copytree(whole, run.folder)
        if (name, seed, audited) != ("bomb", 0, True):
            run.write_card(make_card(name, seed))
        if numbers:
            run.write_scores(scores(**numbers))
        return run

    return make


@pytest.fixture
def edit_json() -> Callable[[Path, Callable[[Any], Any]], None]:
    """Return a function that rewrites a JSON file through a function of its data."""

    def edit(path: Path, change: Callable[[Any], Any]) -> None:
        data = json.loads(path.read_text())
        new = change(data)
        path.write_text(json.dumps(data if new is None else new))

    return edit
