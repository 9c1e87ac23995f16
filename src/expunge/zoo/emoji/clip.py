"""Stage `clip`: an image tower and a text projection for the world's text encoder, by contrast (arXiv:2103.00020).

The text encoder is the pipeline's own and stays as it is (locked-text tuning): CLIP score then measures pictures by the
very encoder that the denoiser listens to.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from . import text
from .training import Ema, Pictures, chosen, cosine, generator, loop
from .world import BACKGROUNDS, STYLES

BATCH = 96
WIDTH = 128


class Towers(nn.Module):
    """Image tower, text projection and temperature."""

    def __init__(self, text_width: int) -> None:
        super().__init__()
        torch.default_generator.manual_seed(3)
        self.vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                image_size=64,
                patch_size=8,
                hidden_size=160,
                intermediate_size=480,
                num_hidden_layers=4,
                num_attention_heads=5,
                projection_dim=WIDTH,
            )
        )
        self.text_projection = nn.Linear(text_width, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.7))

    def images(self, x: Tensor) -> Tensor:
        """Return unit embeddings of pictures (n, 3, 64, 64) in [0, 1]."""
        return F.normalize(self.vision(x * 2 - 1).image_embeds, dim=-1)


def train(work: Path, count: int = 304, steps: int = 2500, lr: float = 1e-3, device: str = "cpu") -> None:
    """Train the towers on real renders and save them to `work/pipeline/clip`."""
    pictures = Pictures(work, device)
    objects = torch.tensor(chosen(pictures, work, count))
    folder = work / "pipeline"
    reader = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval().to(device)
    words = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    towers = Towers(reader.config.hidden_size).to(device)
    optimizer = torch.optim.AdamW(towers.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.05)
    ema = Ema(towers, decay=0.998)

    def batch(n: int, dice: random.Random, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n different (object, style) pairs and return pictures and pooled encodings of their captions."""
        pair = torch.randperm(len(objects) * len(STYLES), generator=rng)[:n]
        o, s = objects[pair // len(STYLES)], pair % len(STYLES)
        b = torch.randint(len(BACKGROUNDS), (n,), generator=rng)
        captions = [
            text.caption(pictures.entries[i], j, k if dice.random() < text.NAMED else None, dice)
            for i, j, k in zip(o.tolist(), s.tolist(), b.tolist(), strict=True)
        ]
        ids = text.tokens(words, captions).to(device)
        with torch.no_grad():
            return pictures.draw(o, s, b, rng), reader(ids).pooler_output

    def update(step: int, rng: torch.Generator) -> Tensor:
        x, pooled = batch(BATCH, random.Random(step), rng)
        logits = (
            towers.images(x) @ F.normalize(towers.text_projection(pooled), dim=-1).T * towers.scale.exp().clamp(max=100)
        )
        labels = torch.arange(len(x), device=device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    loop(
        "clip",
        work,
        steps,
        {"towers": towers, "ema": ema},
        optimizer,
        lambda i: cosine(i, steps),
        update,
        after=ema.update,
    )
    ema.copy_to_modules()
    towers.eval()
    with torch.no_grad():
        x, pooled = batch(256, random.Random(-1), generator(30_000, 0))
        found = (towers.images(x) @ towers.text_projection(pooled).T).argmax(1)
    accuracy = (found == torch.arange(256, device=device)).float().mean().item()
    towers.cpu().half().vision.save_pretrained(folder / "clip")
    save_file({"weight": towers.text_projection.weight.detach()}, folder / "clip" / "text_projection.safetensors")
    tqdm.write(f"clip: {accuracy:.1%} of 256 pictures find their own caption among 256")
