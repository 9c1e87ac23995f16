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


def draw_all(model: Model, objects: list[str]) -> Tensor:
    """Return one picture an object and style, (objects * styles, 3, 64, 64), each of a seed of its own.

    Pictures of one seed share noise and background: their errors go together, and n of them tell less than n.
    """
    prompts = [PROMPT.format(s=s, o=o) for o in objects for s in STYLES]
    with tqdm(total=len(prompts), desc="draw", mininterval=15) as bar:
        return model.generate(prompts, seeds=range(len(prompts)), progress=bar.update)


def measure(work: Path, folder: Path, every: int = 1) -> tuple[dict[str, Any], Tensor]:
    """Measure the pipeline in `folder` by the second judge, and the autoencoder; return figures and pictures.

    Args:
        work: the recipe's work folder.
        folder: the pipeline.
        every: draw every object (1), or every second, third, ... one.
    """
    pictures = Pictures(work)
    drawn = json.loads((folder / "drawn.json").read_text())
    model = adapt(
        pretrained(str(folder), torch.float32, allow_pickle=False), "emoji", "cpu", sampling=Sampling(20, 5.0, 64)
    )
    asked = drawn[::every]
    images = draw_all(model, asked)
    judge = load_judge(work / "judge-b.safetensors")
    reading = judge.read(images)
    wanted = torch.tensor([judge.objects.index(o) for o in asked for _ in STYLES])
    style = torch.arange(len(STYLES)).repeat(len(asked))
    n = len(images)
    figures: dict[str, Any] = {"objects": len(drawn), "asked": len(asked), "styles": len(STYLES), "pictures": n}
    for name, hits in (("object", reading.object == wanted), ("style", reading.style == style)):
        k = int(hits.sum())
        figures[f"{name}_top1"] = [k / n, *(wilson(k, n) or ())]
    figures["style_top1_by_style"] = {
        s: ((reading.style == style)[style == i]).float().mean().item() for i, s in enumerate(STYLES)
    }
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


def text(figures: dict[str, Any], made: list[dict[str, str]], spent: dict[str, Any]) -> str:
    """Return the card as Markdown."""
    top = {k: "{:.1%} [{:.1%}, {:.1%}]".format(*figures[f"{k}_top1"]) for k in ("object", "style")}
    lines = [
        "# The `emoji` world",
        "",
        "A text-to-image latent diffusion model trained from scratch on openly licensed emoji, for measuring concept "
        "erasure.",
        f"It draws {figures['objects']} objects in {figures['styles']} drawing styles, 64x64 pixels. Made by",
        "`python -m expunge.zoo.emoji all`; nothing in it was learned from photographs, people or the web.",
        "",
        "| measured | figure |",
        "|---|---|",
        f"| object, top-1 of judge b, `{PROMPT}`, {figures['asked']} objects, a seed each, "
        f"n = {figures['pictures']} | {top['object']} |",
        f"| style, likewise | {top['style']} |",
        *(f"| style, {s} | {v:.1%} |" for s, v in figures["style_top1_by_style"].items()),
        f"| autoencoder, PSNR on fresh augmentations | {figures['vae_psnr_db']:.2f} dB |",
        *(
            f"| judge {w} on fresh renders (n = 4096) | object {a['object']:.2%}, style {a['style']:.2%} |"
            for w, a in figures["judges"].items()
        ),
        "",
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


def ship(work: Path, every: int = 1) -> None:
    """Measure `work/pipeline` (every object of it, or every second, ...), and copy it with its card to the package."""
    figures, images = measure(work, work / "pipeline", every)
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
    tqdm.write(f"shipped {size:.1f} MB: object {figures['object_top1'][0]:.1%}, style {figures['style_top1'][0]:.1%}")
