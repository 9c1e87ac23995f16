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
from ...errors import BadModel
from ...judges.classes import REAL, ClassJudge, ClassPanel, load_judge, load_panel
from ...kernel.model import Model
from ...metrics.manifold import precision, recall
from ...metrics.rates import wilson
from ...metrics.sets import Real, everything, fid_to, kid_to
from ..emoji.card import cost, met
from ..emoji.judges import blur
from .data import Pictures
from .judges import file_of, sample
from .world import WEIGHTS, Source

COUNT = 10_000  # pictures drawn, equally many of each class
CHUNK = 500  # pictures between two files of what is drawn, so that a killed run goes on
NEAREST = 3
GRID = 10  # pictures of each class in the grid
SOFT = 0.5  # pixels of blur that show how much a distance notices
JUDGED, DRAWN = 0.93, 0.97  # aims: a judge's accuracy on real test pictures, and judge b's on drawn ones
LARGEST = 15 * 10**6  # bytes of the shipped folder


def drawn(
    work: Path,
    model: Model,
    classes: Sequence[str],
    count: int,
    *,
    guidance: float | None = None,
    steps: int | None = None,
) -> Tensor:
    """Return pictures (count, 3, 32, 32) in [0, 1], classes and seeds in turn; kept in `work/drawn` for the next time.

    Args:
        work: the recipe's work folder.
        model: what draws.
        classes: names of its classes.
        count: how many pictures.
        guidance: guidance scale; the model's own where missing.
        steps: sampling steps; the model's own where missing.
    """
    scale = float(model.sampling.guidance if guidance is None else guidance)
    steps = steps or model.sampling.steps
    folder = work / "drawn" / f"{model.hash[:16]}{model.painter[:16]}-{scale}-{steps}"
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    with tqdm(total=count, desc=f"draw, guidance {scale:g}", mininterval=5) as bar:
        for begin in range(0, count, CHUNK):
            seeds = range(begin, min(begin + CHUNK, count))
            path = folder / f"{begin:06}-{seeds.stop:06}.pt"
            if not path.exists():
                prompts = [classes[s % len(classes)] for s in seeds]
                images = model.generate(prompts, seeds=seeds, guidance=scale, steps=steps, progress=bar.update)
                torch.save((images * 255).round().byte(), path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)
            bar.update(seeds.stop - bar.n)
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


def told(images: Tensor, judge: ClassJudge) -> tuple[list[float], Tensor]:
    """Return a judge's accuracy on pictures (n, 3, 32, 32) of classes in turn, with its interval, and hits (n,)."""
    wanted = torch.arange(len(images)) % len(judge.classes)
    right = judge.read(images).argmax(1) == wanted
    hits = int(right.sum())
    return [hits / len(images), *(wilson(hits, len(images)) or ())], right


def measure(work: Path, source: Source) -> tuple[dict[str, Any], Tensor]:
    """Measure the pipeline in `work`; return figures and the drawn pictures."""
    folder = work / "pipeline"
    model = load(folder)
    panel = load_panel(work, "judge-b", source.network)
    images = drawn(work, model, source.classes, COUNT)
    accuracy, right = told(images, panel.scorer)
    real, _ = sample(work, "train", min(COUNT, len(Pictures(work, "train"))))
    figures = {
        "sampling": {"steps": model.sampling.steps, "guidance": model.sampling.guidance},
        "pictures": COUNT,
        "accuracy": accuracy,
        "accuracy_by_class": {c: right[i :: len(source.classes)].float().mean().item()
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
        "| measured | figure | aim |",
        "|---|---|---|",
        f"| class, top-1 of judge b, {how['steps']} steps, guidance {how['guidance']:g}, n = {figures['pictures']} "
        f"| {share:.2%} [{low:.1%}, {high:.1%}] | {DRAWN:.0%}: {met(share, DRAWN)} |",
        *(f"| {c} | {v:.1%} | |" for c, v in figures["accuracy_by_class"].items()),
        *(
            f"| judge {w} on the real test pictures | {v:.2%} | {JUDGED:.0%}: {met(v, JUDGED)} |"
            for w, v in figures["judges"].items()
            if w != "features"
        ),
        f"| feature network on the real test pictures | {figures['judges']['features']:.2%} | |",
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


def ship(folder: Path, *, anyway: bool = False) -> None:
    """Copy an assembled folder into the package; files and folders there whose names it lacks stay.

    The new folder is whole before it takes the old one's place; what a kill between the two leaves, the next run mends.

    Args:
        folder: what `assemble` returned.
        anyway: ship a model that misses an aim.

    Raises:
        BadModel: it misses an aim; the package is left as it was.
    """
    new, old = (WEIGHTS.with_name(f"{WEIGHTS.name}.{end}") for end in ("new", "old"))
    if old.is_dir() and not WEIGHTS.is_dir():
        # killed between the two renames below
        old.rename(WEIGHTS)
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(folder, new)
    others = [p for p in sorted(WEIGHTS.iterdir()) if not (new / p.name).exists()] if WEIGHTS.is_dir() else []
    for other in others:
        (shutil.copytree if other.is_dir() else shutil.copy2)(other, new / other.name)
    size = sum(f.stat().st_size for f in new.rglob("*") if f.is_file())
    missed = shortfalls(json.loads((folder / "figures.json").read_text()), size)
    if missed and not anyway:
        shutil.rmtree(new)
        raise BadModel(
            f"{folder} is not shipped: {'; '.join(missed)}. Train longer (--steps of its stage), take out of {WEIGHTS} "
            "what nobody needs, or ship it as it is: card --anyway. The package is as it was."
        )
    shutil.rmtree(old, ignore_errors=True)
    if WEIGHTS.is_dir():
        WEIGHTS.rename(old)
    new.rename(WEIGHTS)
    shutil.rmtree(old, ignore_errors=True)
    kept = f", of which were there before: {', '.join(p.name for p in others)}" if others else ""
    tqdm.write(f"shipped {size / 1e6:.1f} MB{kept}")


def shortfalls(figures: dict[str, Any], size: int) -> list[str]:
    """Return what misses its aim, each with its figure and the aim.

    Args:
        figures: of `measure`.
        size: bytes that the package's folder would have.
    """
    shares = {f"judge {w} reads {{}} of the real test pictures": (figures["judges"][w], JUDGED) for w in ("a", "b")}
    shares["judge b reads {} of the drawn pictures as their class"] = (figures["accuracy"][0], DRAWN)
    # asked this way round, a figure that is no number misses
    missed = [f"{what.format(f'{x:.2%}')}, the aim is {aim:.0%}" for what, (x, aim) in shares.items() if not x >= aim]
    if size > LARGEST:
        missed.append(f"the folder has {size:,} bytes, at most {LARGEST:,} are allowed")
    return missed
