"""Stages `judges` and `features`: two classifiers of different architecture and seed, and the network of distances.

They learn from real pictures only. Half of the judges' pictures are softened a little, because generated ones are
softer than real ones. The feature network must also tell an 8x8 thumbnail from its features: what a classifier may
forget, where things are and how bright, then counts in distances.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ...judges.classes import REAL, ClassJudge, load_judge, save_judge, save_real
from ..emoji.judges import blur
from ..emoji.training import Ema, Stateful, cosine, generator, loop, mixed
from .data import Pictures
from .world import Source

BATCH = 128
RATE = 3e-3  # highest learning rate
SMOOTHING = 0.05
SEEDS = {"a": 101, "b": 202, "features": 303}
SHIFT = 2  # pixels that a picture is moved at most, either way
THUMBNAIL = 8  # pixels a side
BLUR = 0.5  # largest standard deviation of the blur, in pixels of 32: more takes the texture that tells shirt from coat
NOISE = 0.04  # largest standard deviation of the noise, in units of [0, 1]
JITTER = 0.12  # largest change of contrast, and twice that of brightness
WEIGHT = 10.0  # of the thumbnail's squared error beside the cross-entropy: both are then near one at the start


def augmented(pictures: Tensor, rng: torch.Generator, *, flip: bool = True) -> Tensor:
    """Move pictures (b, c, 32, 32) by a few pixels each and, if wanted, mirror half of them."""
    b, side = len(pictures), pictures.shape[-1]
    padded = F.pad(pictures, (SHIFT,) * 4, mode="replicate")
    top, left = torch.randint(2 * SHIFT + 1, (2, b, 1), generator=rng)
    rows, columns = top + torch.arange(side), left + torch.arange(side)
    if flip:
        mirror = torch.rand(b, 1, generator=rng) < 0.5
        columns = torch.where(mirror, columns.flip(1), columns)
    index = torch.arange(b)[:, None, None]
    moved: Tensor = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    return moved


def softened(pictures: Tensor, rng: torch.Generator) -> Tensor:
    """Blur pictures (b, c, 32, 32) in [0, 1], change contrast and brightness, add noise, each by its own random amount.

    Contrast and brightness change in all channels alike: a tint is no softness, and in CIFAR-10 colours tell classes.
    Gray pictures come with one channel and get no colour from the noise either.
    """
    b = len(pictures)
    x = blur(pictures, BLUR * torch.rand(b, generator=rng))
    contrast, brightness = JITTER * (2 * torch.rand(2, b, 1, 1, 1, generator=rng) - 1)
    centre = x.mean((1, 2, 3), keepdim=True)
    x = (x - centre) * (1 + contrast) + centre + 0.5 * brightness
    sigma = NOISE * torch.rand(b, 1, 1, 1, generator=rng)
    out: Tensor = (x + sigma * torch.randn(x.shape, generator=rng)).clamp(0, 1)
    return out


def three(pictures: Tensor) -> Tensor:
    """Return pictures (b, 3, h, w) of gray or coloured ones (b, c, h, w)."""
    return pictures.expand(-1, 3, -1, -1)


def train(
    work: Path,
    source: Source,
    which: str,
    steps: int,
    *,
    lr: float | None = None,
    device: str = "cpu",
    bf16: bool = False,
) -> None:
    """Train network `which` and save it with its accuracy on the real test pictures.

    Args:
        work: folder of the stage `data`; the checkpoint and the result go there too.
        source: what the pictures are.
        which: "a", "b" or "features".
        steps: optimiser updates.
        lr: highest learning rate; RATE where missing.
        device: where to train. What is learned from never depends on it: chance comes from the CPU's generators.
        bf16: compute forward and backward passes in bfloat16; weights and moments stay float32.

    Raises:
        Diverged: a loss or a weight became NaN or infinite; the last good checkpoint stays.
    """
    pictures = Pictures(work, "train")
    torch.default_generator.manual_seed(SEEDS[which])
    judge = ClassJudge(which, source.classes)
    judge.name = source.network if which == "features" else f"{source.world}-judge-{which}"
    thumbnail = nn.Linear(judge.width, 3 * THUMBNAIL**2)
    judge.to(device)
    thumbnail.to(device)
    trained = [*judge.parameters(), *(thumbnail.parameters() if which == "features" else ())]
    optimizer = torch.optim.AdamW(trained, lr or RATE, betas=(0.9, 0.99), weight_decay=0.02)
    ema = Ema(judge, decay=0.998)

    def update(step: int, rng: torch.Generator) -> Tensor:
        with mixed(device, bf16):
            return lesson(step, rng)

    def lesson(_: int, rng: torch.Generator) -> Tensor:
        i = torch.randint(len(pictures), (BATCH,), generator=rng)
        x, label = augmented(pictures.floats(i), rng, flip=which != "features"), pictures.labels[i].to(device)
        if which == "features":
            x = three(x).to(device)
            seen = judge.features(x)
            error: Tensor = (thumbnail(seen) - F.adaptive_avg_pool2d(x, THUMBNAIL).flatten(1)).square().mean()
            return F.cross_entropy(judge.head(seen), label) + WEIGHT * error
        half = BATCH // 2
        x = three(torch.cat([x[:half], softened(x[half:], rng)])).to(device)
        return F.cross_entropy(judge(x), label, label_smoothing=SMOOTHING)

    states: dict[str, Stateful] = {"judge": judge, "thumbnail": thumbnail, "ema": ema}
    name = file_of(which)
    seconds = loop(
        name, work, steps, states, optimizer, lambda i: cosine(i, steps, flat=0.2), update,
        seed=SEEDS[which], after=ema.update,
    )  # fmt: skip
    ema.copy_to_modules()
    judge.cpu().eval()
    judge.accuracy = measure(judge, Pictures(work, "test"))
    save_judge(judge, work / f"{name}.safetensors", {"steps": steps, "seconds": round(seconds)})
    tqdm.write(f"{judge.name}: {judge.accuracy:.2%} of the real test pictures")
    if which == "features":
        keep_real(work)


def file_of(which: str) -> str:
    """Return the stem of a network's file."""
    return which if which == "features" else f"judge-{which}"


@torch.no_grad()
def measure(judge: ClassJudge, test: Pictures) -> float:
    """Return the top-1 accuracy on real test pictures."""
    read = judge.read(three(test.floats(slice(None))))
    return (read.argmax(1) == test.labels).double().mean().item()


def keep_real(work: Path) -> None:
    """Write the features of the real test pictures, by the network as it will be loaded."""
    network, test = load_judge(work / "features.safetensors"), Pictures(work, "test")
    save_real(work / REAL, network.describe(three(test.floats(slice(None)))), test.labels, network)


def sample(work: Path, part: str, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return n pictures (n, 3, 32, 32) of a part at random, none twice, and their labels."""
    pictures = Pictures(work, part)
    index = torch.randperm(len(pictures), generator=generator(seed, 0))[:n]
    return three(pictures.floats(index)), pictures.labels[index]
