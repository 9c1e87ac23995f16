"""Stage `card`: measure the world, write what it is made of, put it into the package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...backbones import load
from ...judges.classes import REAL, ClassPanel, load_judge, load_panel
from ...kernel.model import Model
from ...metrics.manifold import precision, recall
from ...metrics.rates import wilson
from ...metrics.sets import Real, everything, fid_to, kid_to
from ..emoji.card import cost
from ..emoji.judges import blur
from .data import Pictures
from .judges import file_of, sample
from .world import WEIGHTS, Source

COUNT = 10_000  # pictures drawn, equally many of each class
CHUNK = 500  # pictures between two files of what is drawn, so that a killed run goes on
NEAREST = 3
GRID = 10  # pictures of each class in the grid
SOFT = 0.5  # pixels of blur that show how much a distance notices


def drawn(work: Path, model: Model, classes: Sequence[str]) -> Tensor:
    """Return COUNT pictures in [0, 1], classes in turn; kept in `work/drawn` by weights, scheduler and guidance."""
    folder = work / "drawn" / (model.hash[:16] + model.painter[:16])
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for begin in tqdm(range(0, COUNT, CHUNK), desc="draw"):
        path = folder / f"{begin:06}.pt"
        if not path.exists():
            seeds = range(begin, begin + CHUNK)
            images = model.generate([classes[s % len(classes)] for s in seeds], seeds=seeds)
            torch.save((images * 255).round().byte(), path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        parts.append(torch.load(path, weights_only=True).float() / 255)
    return torch.cat(parts)


def distances(images: Tensor, panel: ClassPanel, name: str) -> dict[str, float]:
    """Return FID, KID, precision and recall of pictures (n, 3, 32, 32) to the real test pictures."""
    x, real = panel.network.describe(images).double(), Real(panel.real.double())
    return {
        f"fid_{name}": fid_to(real, x)(everything(len(x))),
        f"kid_{name}": kid_to(real, x)(everything(len(x))),
        f"precision_{name}": float(precision(x, real.features, NEAREST).mean()),
        f"recall_{name}": float(recall(x, real.features, NEAREST).mean()),
    }


def measure(work: Path, source: Source) -> tuple[dict[str, Any], Tensor]:
    """Measure the pipeline in `work`; return figures and the drawn pictures."""
    folder = work / "pipeline"
    model = load(folder)
    panel = load_panel(work, "judge-b", source.network)
    images = drawn(work, model, source.classes)
    label = panel.scorer.read(images).argmax(1)
    wanted = torch.arange(COUNT) % len(source.classes)
    hits = int((label == wanted).sum())
    real, _ = sample(work, "train", min(COUNT, len(Pictures(work, "train"))))
    figures = {
        "sampling": {"steps": model.sampling.steps, "guidance": model.sampling.guidance},
        "pictures": COUNT,
        "accuracy": [hits / COUNT, *(wilson(hits, COUNT) or ())],
        "accuracy_by_class": {c: (label[i :: len(source.classes)] == i).float().mean().item()
                              for i, c in enumerate(source.classes)},
        "drawn": distances(images, panel, source.network),
        "real": distances(real, panel, source.network),
        "real, softened": distances(blur(real, torch.full((len(real),), SOFT)), panel, source.network),
        "judges": {w: load_judge(work / f"{file_of(w)}.safetensors").accuracy for w in ("a", "b", "features")},
    }  # fmt: skip
    return figures, images


def grid(images: Tensor, classes: int) -> Image.Image:
    """Return a picture of GRID drawings of every class, a row a class."""
    x = images[: GRID * classes].view(GRID, classes, 3, 32, 32).permute(1, 3, 0, 4, 2)
    return Image.fromarray((x.reshape(classes * 32, GRID * 32, 3) * 255).round().byte().numpy())


def text(source: Source, figures: dict[str, Any], spent: dict[str, dict[str, float]]) -> str:
    """Return the card as Markdown."""
    share, low, high = figures["accuracy"]
    how = figures["sampling"]
    columns = ("drawn", "real", "real, softened")
    lines = [
        f"# The `{source.world}` world",
        "",
        f"A class-conditional diffusion model trained from scratch on {source.title}, for measuring how a class is",
        f"forgotten. {len(source.classes)} classes, 32x32 pixels. Made by",
        f"`python -m expunge.zoo.fashion all --world {source.world}`.",
        "",
        "| measured | figure |",
        "|---|---|",
        f"| class, top-1 of judge b, {how['steps']} steps, guidance {how['guidance']:g}, n = {figures['pictures']} "
        f"| {share:.1%} [{low:.1%}, {high:.1%}] |",
        *(f"| {c} | {v:.1%} |" for c, v in figures["accuracy_by_class"].items()),
        *(f"| {name} on the real test pictures | {v:.2%} |" for name, v in named(figures["judges"]).items()),
        "",
        "Distances to the real test pictures, by the feature network that their names tell; never comparable with",
        f"Inception figures. `real`: training pictures, the floor. `softened`: the same, blurred by {SOFT} pixels.",
        "",
        f"| distance | {' | '.join(columns)} |",
        "|---|---|---|---|",
        *(f"| {k} | {' | '.join(f'{figures[c][k]:.4g}' for c in columns)} |" for k in figures["drawn"]),
        "",
        "| training | steps | seconds | last loss |",
        "|---|---|---|---|",
        *(f"| {k} | {v['steps']} | {v['seconds']} | {v['loss']} |" for k, v in spent.items()),
        "",
        "Seconds are wall time of the machine that trained it, whatever else it did.",
        f"The pictures of {source.title} are {source.credit}.",
    ]
    return "\n".join(lines) + "\n"


def named(judges: dict[str, float]) -> dict[str, float]:
    """Return accuracies under readable names."""
    return {"feature network" if k == "features" else f"judge {k}": v for k, v in judges.items()}


def assemble(work: Path, source: Source) -> Path:
    """Measure, and put everything that a model's folder holds into `work/pipeline`."""
    figures, images = measure(work, source)
    folder = work / "pipeline"
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    for name in (*(f"{file_of(w)}.safetensors" for w in ("a", "b", "features")), REAL):
        shutil.copy(work / name, folder)
    (folder / "card.md").write_text(text(source, figures, cost(work)))
    grid(images, len(source.classes)).save(folder / "grid.png")
    accuracy, distance = figures["accuracy"][0], figures["drawn"][f"fid_{source.network}"]
    floor = figures["real"][f"fid_{source.network}"]
    tqdm.write(f"{folder}: class {accuracy:.1%}, fid_{source.network} {distance:.2f} (real {floor:.2f})")
    return folder


def ship(folder: Path) -> None:
    """Copy an assembled folder into the package."""
    new = WEIGHTS.with_name("weights.new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(folder, new)
    shutil.rmtree(WEIGHTS, ignore_errors=True)
    new.rename(WEIGHTS)
    size = sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) / 1e6
    tqdm.write(f"shipped {size:.1f} MB")
