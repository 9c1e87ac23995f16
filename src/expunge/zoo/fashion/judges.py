"""Stages `judges` and `features`: two classifiers of different architecture and seed, and the network of distances.

They learn from real pictures only. Half of the judges' pictures are softened, because generated ones are softer than
real ones. The feature network must also tell an 8x8 thumbnail from its features: what a classifier may forget, where
things are and how bright, then counts in distances.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ...judges.classes import REAL, ClassJudge, load_judge, save_judge, save_real
from ..emoji.judges import soften
from ..emoji.training import Ema, Stateful, cosine, generator, loop
from .data import Pictures
from .world import Source

BATCH = 128
SMOOTHING = 0.05
SEEDS = {"a": 101, "b": 202, "features": 303}
SHIFT = 2  # pixels that a picture is moved at most, either way
THUMBNAIL = 8  # pixels a side
WEIGHT = 10.0  # of the thumbnail's squared error beside the cross-entropy: both are then near one at the start


def augmented(pictures: Tensor, rng: torch.Generator, *, flip: bool = True) -> Tensor:
    """Move pictures (b, c, 32, 32) by a few pixels each and, if wanted, mirror half of them; three channels."""
    b, side = len(pictures), pictures.shape[-1]
    padded = F.pad(pictures, (SHIFT,) * 4, mode="replicate")
    top, left = torch.randint(2 * SHIFT + 1, (2, b, 1), generator=rng)
    rows, columns = top + torch.arange(side), left + torch.arange(side)
    if flip:
        mirror = torch.rand(b, 1, generator=rng) < 0.5
        columns = torch.where(mirror, columns.flip(1), columns)
    index = torch.arange(b)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    return moved.expand(-1, 3, -1, -1)


def train(work: Path, source: Source, which: str, steps: int, lr: float = 3e-3) -> None:
    """Train network `which` ("a", "b" or "features") and save it with its accuracy on the real test pictures."""
    pictures = Pictures(work, "train")
    torch.default_generator.manual_seed(SEEDS[which])
    judge = ClassJudge(which, source.classes)
    judge.name = source.network if which == "features" else f"{source.world}-judge-{which}"
    thumbnail = nn.Linear(judge.width, 3 * THUMBNAIL**2)
    trained = [*judge.parameters(), *(thumbnail.parameters() if which == "features" else ())]
    optimizer = torch.optim.AdamW(trained, lr, betas=(0.9, 0.99), weight_decay=0.02)
    ema = Ema(judge, decay=0.998)

    def update(_: int, rng: torch.Generator) -> Tensor:
        i = torch.randint(len(pictures), (BATCH,), generator=rng)
        clean = augmented(pictures.floats(i), rng, flip=which != "features")
        if which == "features":
            seen = judge.features(clean)
            error: Tensor = (thumbnail(seen) - F.adaptive_avg_pool2d(clean, THUMBNAIL).flatten(1)).square().mean()
            return F.cross_entropy(judge.head(seen), pictures.labels[i]) + WEIGHT * error
        half = BATCH // 2
        x = torch.cat([clean[:half], soften(clean[half:], rng)])
        return F.cross_entropy(judge(x), pictures.labels[i], label_smoothing=SMOOTHING)

    states: dict[str, Stateful] = {"judge": judge, "thumbnail": thumbnail, "ema": ema}
    name = file_of(which)
    seconds = loop(
        name, work, steps, states, optimizer, lambda i: cosine(i, steps, flat=0.2), update,
        seed=SEEDS[which], after=ema.update,
    )  # fmt: skip
    ema.copy_to_modules()
    judge.eval()
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
    read = judge.read(test.floats(slice(None)).expand(-1, 3, -1, -1))
    return (read.argmax(1) == test.labels).double().mean().item()


def keep_real(work: Path) -> None:
    """Write the features of the real test pictures, by the network as it will be loaded."""
    network, test = load_judge(work / "features.safetensors"), Pictures(work, "test")
    save_real(work / REAL, network.describe(test.floats(slice(None)).expand(-1, 3, -1, -1)), test.labels, network)


def sample(work: Path, part: str, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return n pictures (n, 3, 32, 32) of a part at random, none twice, and their labels."""
    pictures = Pictures(work, part)
    index = torch.randperm(len(pictures), generator=generator(seed, 0))[:n]
    return pictures.floats(index).expand(-1, 3, -1, -1), pictures.labels[index]
