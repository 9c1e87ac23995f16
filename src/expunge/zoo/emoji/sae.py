"""Stage `sae`: the sparse autoencoder of the world's text encoder, which `expunge erase emoji --method itd` uses."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tqdm import tqdm

from ...backbones import adapt, pretrained
from ...kernel.model import digest
from ...kernel.state import Step
from ...sae import FILE, Dictionary, Training, train
from . import text
from .training import Pictures, chosen

CAPTIONS = 20_000  # drawn as the denoiser's are; the same one comes up more than once
SETTINGS = Training()  # 8 features a unit of width: 1.2 MB in half precision


def captions(pictures: Pictures, objects: list[int]) -> list[str]:
    """Return captions of random pictures."""
    dice, found = random.Random(5), dict[str, None]()
    for _ in range(CAPTIONS):
        o, s, _, told = text.scene(dice, objects)
        found[text.caption(pictures.entries[o], s, told, dice)] = None
    return list(found)


def build(work: Path, count: int, settings: Training = SETTINGS) -> Dictionary:
    """Train on `work/pipeline` and write the file beside its weights; a killed training goes on."""
    folder, pictures = work / "pipeline", Pictures(work)
    model = adapt(pretrained(str(folder), torch.float32, allow_pickle=False), "emoji", "cpu")
    if (folder / FILE).exists() and Dictionary.read(folder / FILE).base != digest(model.need_text().encoders.items()):
        (folder / FILE).unlink()  # of a text encoder that has been trained anew since
    with tqdm(total=settings.steps, desc="sae", mininterval=15) as bar:

        def show(step: Step) -> None:
            bar.update(step.i + 1 - bar.n)
            bar.set_postfix(error=f"{step.losses['error']:.4f}", refresh=False)

        prompts = captions(pictures, chosen(pictures, work, count))
        found = train(model, prompts, folder / FILE, settings, resume=True, progress=show)
    tqdm.write(f"sae: {found.figures}")
    return found
