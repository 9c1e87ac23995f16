"""Stage `card`: measure the world, write what it is made of, put it into the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...backbones import adapt, pretrained
from ...judges.classifier import load_judge
from ...kernel.model import Model, Sampling
from ...metrics.rates import wilson
from . import vae
from .training import Pictures, last
from .world import HERE, STYLES, TEMPLATES, WEIGHTS

PROMPT = TEMPLATES[0]
OBJECTS = 300  # aim: objects drawn
AIMS = {"object": 0.9, "style": 0.97}  # of judge b's top-1
RENDERS = 4096  # pictures that a judge was measured on when it was trained
INTERVALS = ("Intervals take the pictures of one prompt for independent, which they are not quite.", "")


def draw_all(model: Model, objects: list[str], seeds: int = 1) -> Tensor:
    """Return `seeds` rounds of one picture an object and style, (seeds * objects * styles, 3, 64, 64).

    Every picture has a seed of its own: pictures of one seed share noise and background, so their errors go together,
    and n of them tell less than n.
    """
    prompts = [PROMPT.format(s=s, o=o) for o in objects for s in STYLES] * seeds
    with tqdm(total=len(prompts), desc="draw", mininterval=15) as bar:
        return model.generate(prompts, seeds=range(len(prompts)), progress=bar.update)


def measure(work: Path, folder: Path, every: int = 1, seeds: int = 1) -> tuple[dict[str, Any], Tensor]:
    """Measure the pipeline in `folder` by the second judge, and the autoencoder; return figures and pictures.

    Args:
        work: the recipe's work folder.
        folder: the pipeline.
        every: draw every object (1), or every second, third, ... one.
        seeds: pictures of every object in every style; figures are of all of them, and `rounds` of one each.
    """
    pictures = Pictures(work)
    drawn = json.loads((folder / "drawn.json").read_text())
    model = adapt(
        pretrained(str(folder), torch.float32, allow_pickle=False), "emoji", "cpu", sampling=Sampling(20, 5.0, 64)
    )
    asked = drawn[::every]
    images = draw_all(model, asked, seeds)
    judge = load_judge(work / "judge-b.safetensors")
    reading = judge.read(images)
    wanted = torch.tensor([judge.objects.index(o) for o in asked for _ in STYLES]).repeat(seeds)
    style = torch.arange(len(STYLES)).repeat(len(asked) * seeds)
    hits = {"object": reading.object == wanted, "style": reading.style == style}
    figures: dict[str, Any] = {
        "candidates": len((HERE / "candidates.txt").read_text().split("\n")[:-1]),
        "known": len(pictures.entries),
        "objects": len(drawn),
        "asked": len(asked),
        "styles": len(STYLES),
        "seeds": seeds,
        "pictures": len(images),
        "hits": {head: int(right.sum()) for head, right in hits.items()},
        "style_hits_by_style": {s: int(hits["style"][style == i].sum()) for i, s in enumerate(STYLES)},
        "rounds": [{head: int(right.sum()) for head, right in zip(hits, pair, strict=True)}
                   for pair in zip(*(right.chunk(seeds) for right in hits.values()), strict=True)],
    }  # fmt: skip
    _, figures["vae_psnr_db"] = vae.measure(AutoencoderKL.from_pretrained(work / "vae").eval(), pictures)
    figures["judges"] = {w: load_judge(work / f"judge-{w}.safetensors").accuracy for w in ("a", "b")}
    return figures, images


def sets(work: Path) -> list[dict[str, str]]:
    """Return name, version, author and licence of every icon set, as the sets themselves say."""
    out = []
    for style, package in STYLES.items():
        info = json.loads((work / "sets" / package / "info.json").read_text())
        version = json.loads((work / "sets" / package / "package.json").read_text())["version"]
        out.append(
            {
                "style": style,
                "package": f"@iconify-json/{package} {version}",
                "author": f"{info['author']['name']} ({info['author'].get('url', '')})",
                "licence": f"{info['license']['title']} ({info['license'].get('url', '')})",
            }
        )
    return out


def cost(work: Path) -> dict[str, dict[str, float]]:
    """Return steps, seconds and final loss of every training log; those of gold standards have no part in the world."""
    logs = {log.stem: last(log) for log in sorted(work.glob("*.jsonl")) if "-without-" not in log.stem}
    return {
        name: {"steps": end["step"], "seconds": round(end["seconds"]), "loss": round(end["loss"], 4)}
        for name, end in logs.items()
        if end
    }


def grid(images: Tensor, rows: int) -> Image.Image:
    """Return a picture of the first `rows` objects in every style."""
    n = len(STYLES)
    x = images[: rows * n].view(-1, n, 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(-1, n * 64, 3)
    return Image.fromarray((x.clamp(0, 1) * 255).round().byte().numpy().astype(np.uint8))


def percent(hits: int, n: int, aim: float | None = None) -> str:
    """Return a share as a percentage, by as many digits as it takes not to be rounded up to an aim that it misses."""
    shown = (f"{hits / n:.{digits}%}" for digits in range(1, 12))
    return next(s for s in shown if aim is None or hits / n >= aim or float(s[:-1]) / 100 < aim)


def share(hits: int, n: int, aim: float | None = None) -> str:
    """Return a share with its 95 % interval and its count."""
    low, high = wilson(hits, n) or (0.0, 1.0)
    return f"{percent(hits, n, aim)} [{low:.1%}, {high:.1%}], {hits} of {n}"


def met(value: float, aim: float) -> str:
    """Return whether the number itself, not what is shown of it, reaches an aim."""
    return "met" if value >= aim else "missed"


def measured(figures: dict[str, Any]) -> list[str]:
    """Return the rows of the table of figures, each with its aim where there is one."""
    n, seeds = figures["pictures"], figures["seeds"]
    each, count = n // seeds, "a picture" if seeds == 1 else f"{seeds} pictures"
    rows = [("objects drawn", str(figures["objects"]), f"{OBJECTS}: {met(figures['objects'], OBJECTS)}")]
    for head, aim in AIMS.items():
        hits = figures["hits"][head]
        how = (
            f"top-1 of judge b, `{PROMPT}`, {figures['asked']} objects, {count} of each in every style, all of "
            f"different seeds, n = {n}"
        )
        what = f"{head}, {how if head == 'object' else 'likewise'}"
        rows.append((what, share(hits, n, aim), f"{100 * aim:g}%: {met(hits / n, aim)}"))
        for i, found in enumerate(figures["rounds"] if seeds > 1 else ()):
            rows.append((f"{head}, seeds {i * each} to {(i + 1) * each - 1}", share(found[head], each, aim), ""))
    of_style = n // figures["styles"]
    rows += [(f"style, {s}", f"{percent(k, of_style)}, {k} of {of_style}", "")
             for s, k in figures["style_hits_by_style"].items()]  # fmt: skip
    rows.append(("autoencoder, PSNR on fresh augmentations", f"{figures['vae_psnr_db']:.2f} dB", ""))
    for which, accuracy in figures["judges"].items():
        found = [f"{head} {accuracy[head]:.2%} ({round(accuracy[head] * RENDERS)})" for head in AIMS]
        rows.append((f"judge {which} on fresh renders (n = {RENDERS})", ", ".join(found), ""))
    return [f"| {' | '.join(row)} |" for row in rows]


def text(figures: dict[str, Any], made: list[dict[str, str]], spent: dict[str, Any]) -> str:
    """Return the card as Markdown."""
    lines = [
        "# The `emoji` world",
        "",
        "A text-to-image latent diffusion model trained from scratch on openly licensed emoji, for measuring concept "
        "erasure.",
        f"It draws {figures['objects']} objects in {figures['styles']} drawing styles, 64x64 pixels. Made by the "
        "stages of",
        "`python -m expunge.zoo.emoji`, a stage in one run or in several: the table of trainings has a row for every "
        "run whose",
        "log was kept. Nothing in it was learned from photographs, people or the web.",
        "",
        f"Data: {figures['known']} objects in all {figures['styles']} styles, "
        f"{figures['known'] * figures['styles']} drawings: of {figures['candidates']} candidates (`candidates.txt`) "
        "those that exist in every",
        "style and whose drawings are easiest to tell apart, beside the targets of the bench and their relatives. "
        "One pose is",
        "drawn of each, upright, in the middle, of one size: pictures of two seeds differ in the background, where "
        "the prompt",
        "leaves it open.",
        "",
        "| measured | figure | aim |",
        "|---|---|---|",
        *measured(figures),
        "",
        *(INTERVALS if figures["seeds"] > 1 else ()),
        "| training | steps | seconds | last loss |",
        "|---|---|---|---|",
        *(f"| {k} | {v['steps']} | {v['seconds']} | {v['loss']} |" for k, v in spent.items()),
        "",
        "Seconds are wall time on two shared CPU cores.",
        "",
        "| style | package | author | licence |",
        "|---|---|---|---|",
        *(f"| {s['style']} | {s['package']} | {s['author']} | {s['licence']} |" for s in made),
        "",
        "Names, groups and tags: emojibase-data (MIT). The weights learned from the drawings above, and pictures made "
        "with",
        "them may resemble those drawings: attribute the authors, and mind that OpenMoji is share-alike.",
    ]
    return "\n".join(lines) + "\n"


def ship(work: Path, every: int = 1, seeds: int = 1) -> None:
    """Measure `work/pipeline`, and copy it with its card to the package; see `measure` for the arguments."""
    figures, images = measure(work, work / "pipeline", every, seeds)
    (work / "figures.json").write_text(json.dumps(figures, indent=1))
    new = WEIGHTS.with_name("weights.new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(work / "pipeline", new)
    for which in ("a", "b"):
        shutil.copy(work / f"judge-{which}.safetensors", new)
    (new / "card.md").write_text(text(figures, sets(work), cost(work)))
    grid(images, 16).save(new / "grid.png")
    shutil.copy(work / "objects.json", HERE)
    shutil.rmtree(WEIGHTS, ignore_errors=True)
    new.rename(WEIGHTS)
    size = sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) / 1e6
    found = (f"{head} {share(figures['hits'][head], len(images), aim)}" for head, aim in AIMS.items())
    tqdm.write(f"shipped {size:.1f} MB: {'; '.join(found)}")
