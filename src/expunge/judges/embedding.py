"""Pictures -> vectors that ratings are learned on: frozen, and telling of looks as well as of things.

What people reject need not be a thing. So beside the CLIP image tower, where there is one, stand a thumbnail (colour,
brightness, layout) and every stage of judge `a` on a grid of 2 x 2 (edges, textures, parts, and where they are). Each
part has unit length, lest one drown the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..zoo.emoji.world import WEIGHTS
from .classifier import SIDE, Judge, load_judge
from .clip import Clip, load_clip

THUMBNAIL, GRID = 4, 2
BATCH = 64


@dataclass(frozen=True)
class Embedding:
    """The networks that look.

    Attributes:
        judge: its stages are used.
        clip: image tower, None where there is none.
        device: where both are.
    """

    judge: Judge
    clip: Clip | None = None
    device: str = "cpu"

    @property
    def name(self) -> str:
        """What the vectors are made of, for records."""
        return "judge-a and CLIP" if self.clip else "judge-a"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return vectors (n, d) of pictures (n, 3, h, w) in [0, 1]."""
        return torch.cat([self.seen(part.to(self.device)).cpu() for part in torch.split(images, BATCH)])

    def seen(self, images: Tensor) -> Tensor:
        """Return the same of a batch on the device, with gradient."""
        small = images
        if images.shape[-2:] != (SIDE, SIDE):
            small = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        looks = [F.adaptive_avg_pool2d(small * 2 - 1, THUMBNAIL)]
        looks += [F.adaptive_avg_pool2d(stage, GRID) for stage in self.judge.depths(small)]
        parts = [F.normalize(look.flatten(1), dim=1) for look in looks]
        return torch.cat([*parts, *([self.clip.seen(images)] if self.clip else [])], dim=1)


def embedding(folder: Path | None = None, device: str = "cpu") -> Embedding:
    """Return the embedding of a model's pictures.

    Args:
        folder: the model's; a CLIP tower in it is used, else the shipped one, if there is one.
        device: where to look.

    Raises:
        BadModel: a network is missing or damaged.
    """
    clip = (load_clip(folder) if folder else None) or load_clip(WEIGHTS)
    if clip:
        clip.vision.to(device)
    return Embedding(load_judge(WEIGHTS / "judge-a.safetensors").to(device), clip, device)
