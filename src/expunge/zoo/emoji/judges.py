"""Stage `judges`: two classifiers of objects and drawing styles, of different architecture and seed.

They learn from real renders only, never from generated pictures, so that no model can please them by its own habits.
Half of the training pictures are softened, made noisy and recoloured: generated pictures are softer than renders.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from expunge.judges.classifier import Judge, save_judge

from .training import Ema, Pictures, chosen, cosine, generator, loop
from .world import BACKGROUNDS, STYLES

BATCH = 64
SMOOTHING = 0.05
SEEDS = {"a": 101, "b": 202}
UNSEEN = 77_000_000  # seed of the augmentations that measure; training uses the seeds of SEEDS
BLUR = 1.0  # largest standard deviation of the blur, in pixels of 64
NOISE = 0.04  # largest standard deviation of the noise, in units of [0, 1]
JITTER = 0.12  # largest change of contrast, brightness and each colour channel


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur every picture (b, c, h, w) by a Gaussian of its own standard deviation, sigma (b,) in pixels."""
    taps = torch.arange(-3, 4, dtype=images.dtype, device=images.device)
    weights = torch.exp(-taps.square() / (2 * sigma[:, None].clamp_min(1e-2).square()))
    weights = (weights / weights.sum(1, keepdim=True))[:, :, None, None, None]
    h, w = images.shape[2:]
    padded = F.pad(images, (0, 0, 3, 3), mode="replicate")
    rows = sum((padded[:, :, k : k + h] * weights[:, k] for k in range(7)), torch.zeros_like(images))
    padded = F.pad(rows, (3, 3, 0, 0), mode="replicate")
    return sum((padded[..., k : k + w] * weights[:, k] for k in range(7)), torch.zeros_like(images))


def soften(images: Tensor, rng: torch.Generator) -> Tensor:
    """Blur, recolour and add noise to pictures (b, 3, h, w) in [0, 1], each by its own random amount."""
    b = len(images)
    device = images.device
    images = blur(images, BLUR * torch.rand(b, generator=rng).to(device))
    jitter = (JITTER * (2 * torch.rand(b, 5, 1, 1, generator=rng) - 1)).to(device)
    centre = images.mean((1, 2, 3), keepdim=True)
    images = (images - centre) * (1 + jitter[:, :1]) + centre + 0.5 * jitter[:, 1:2] + 0.3 * jitter[:, 2:]
    sigma = NOISE * torch.rand(b, 1, 1, 1, generator=rng)
    return (images + (sigma * torch.randn(images.shape, generator=rng)).to(device)).clamp(0, 1)


def draw(pictures: Pictures, known: Tensor, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw n augmented renders at random, half of them on white: images, objects, styles."""
    o = torch.randint(len(known), (n,), generator=rng)
    s = torch.randint(len(STYLES), (n,), generator=rng)
    b = torch.randint(len(BACKGROUNDS), (n,), generator=rng) * (torch.rand(n, generator=rng) < 0.5)
    return pictures.draw(known[o], s, b, rng), o, s


def train(work: Path, which: str, steps: int = 6000, lr: float = 3e-3, count: int = 304, device: str = "cpu") -> None:
    """Train judge `which` ("a" or "b") and save it, with its measured accuracy, to `work/judge-WHICH.safetensors`."""
    pictures = Pictures(work, device)
    known = torch.tensor(chosen(pictures, work, count))
    torch.default_generator.manual_seed(SEEDS[which])
    judge = Judge(which, len(known), len(STYLES)).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    judge.objects, judge.styles = tuple(pictures.entries[i]["name"] for i in known), tuple(STYLES)
    optimizer = torch.optim.AdamW(judge.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.02)
    ema = Ema(judge, decay=0.998)

    def update(_: int, rng: torch.Generator) -> Tensor:
        clean, o, s = draw(pictures, known, BATCH, rng)
        half = BATCH // 2
        x = torch.cat([clean[:half], soften(clean[half:], rng)])
        objects, styles = judge(x.contiguous(memory_format=torch.channels_last))
        o, s = o.to(device), s.to(device)
        smoothed = [F.cross_entropy(p, y, label_smoothing=SMOOTHING) for p, y in ((objects, o), (styles, s))]
        return smoothed[0] + smoothed[1]

    seconds = loop(
        f"judge-{which}",
        work,
        steps,
        {"judge": judge, "ema": ema},
        optimizer,
        lambda i: cosine(i, steps, flat=0.2),
        update,
        seed=SEEDS[which],
        after=ema.update,
    )
    ema.copy_to_modules()
    judge.eval()
    judge.accuracy = measure(judge, pictures, known) | {
        f"soft_{k}": v for k, v in measure(judge, pictures, known, n=2048, soft=True).items()
    }
    save_judge(judge.cpu(), work / f"judge-{which}.safetensors", {"steps": steps, "seconds": round(seconds)})
    tqdm.write(f"judge {which}: {judge.accuracy} on fresh augmentations")


@torch.no_grad()
def measure(judge: Judge, pictures: Pictures, known: Tensor, n: int = 4096, *, soft: bool = False) -> dict[str, float]:
    """Return top-1 accuracy {"object", "style"} on n augmentations unseen in training (softened ones with `soft`)."""
    hits = torch.zeros(2)
    for i, begin in enumerate(range(0, n, 128)):
        rng = generator(UNSEEN, i)
        x, o, s = draw(pictures, known, min(128, n - begin), rng)
        reading = judge.read(soften(x, rng) if soft else x)
        hits += torch.tensor([(reading.object.cpu() == o).sum(), (reading.style.cpu() == s).sum()])
    return {"object": hits[0].item() / n, "style": hits[1].item() / n}
