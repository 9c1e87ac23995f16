"""The emoji judges: small networks that read the object and the drawing style of a picture.

Two architectures with separate seeds, both trained on real renders only (never on generated pictures). Judge `a` may
guide searches and supplies the feature trunk of FID, KID and the perceptual distance; judge `b` alone scores.

Limits      64x64 pictures of the emoji world; anything else is still read as one of its objects, with low confidence.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import BadModel
from ..storage import replacing

SIDE = 64


@dataclass(frozen=True)
class Reading:
    """What a judge sees in n pictures; the row of a picture that could not be read is nan throughout.

    Attributes:
        objects, styles: softmax probabilities, shapes (n, objects) and (n, styles).
    """

    objects: Tensor
    styles: Tensor

    @property
    def object(self) -> Tensor:
        """Index of the best object, shape (n,); -1 where the picture could not be read."""
        return best(self.objects)

    @property
    def style(self) -> Tensor:
        """Index of the best style, shape (n,); -1 where the picture could not be read."""
        return best(self.styles)

    @property
    def confidence(self) -> Tensor:
        """Probability of the best object, shape (n,); nan where the picture could not be read."""
        return self.objects.amax(1)


def best(probabilities: Tensor) -> Tensor:
    """Return the most probable class of every row (n, classes), -1 for a row that holds a nan."""
    index = probabilities.argmax(1)
    return index.masked_fill(probabilities.isnan().any(1), -1)


class Conv(nn.Sequential):
    """Convolution, group normalisation, SiLU."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1) -> None:
        padding = (kernel - 1) // 2
        super().__init__(
            nn.Conv2d(cin, cout, kernel, stride, padding, bias=False), nn.GroupNorm(8, cout), nn.SiLU(inplace=True)
        )


class Bottleneck(nn.Module):
    """x + W3 conv3x3(W1 x): a residual block that mixes space only in a narrow middle."""

    def __init__(self, width: int, middle: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            Conv(width, middle, 1),
            Conv(middle, middle, 3),
            nn.Conv2d(middle, width, 1, bias=False),
            nn.GroupNorm(8, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x (n, c, h, w)."""
        return F.silu(x + self.body(x))


def strided() -> tuple[list[nn.Module], int]:
    """Architecture `a`: a plain strided convolutional net, with its feature width."""
    return [
        Conv(3, 32, 3, 2),
        Conv(32, 64, 3, 2),
        nn.Sequential(Conv(64, 128, 3, 2), Conv(128, 128, 3)),
        Conv(128, 192, 3, 2),
    ], 192


def residual() -> tuple[list[nn.Module], int]:
    """Architecture `b`: a residual net of bottlenecks between 2x2 strided patches, with its feature width."""
    return [
        Conv(3, 16, 5, 2),
        nn.Sequential(Conv(16, 96, 3, 2), Bottleneck(96, 32)),
        nn.Sequential(Conv(96, 160, 2, 2), Bottleneck(160, 80)),
        nn.Sequential(Conv(160, 224, 2, 2), Bottleneck(224, 112)),
    ], 224


ARCHITECTURES = {"a": strided, "b": residual}


class Judge(nn.Module):
    """A classifier with an object head and a style head.

    Args:
        arch: "a" or "b".
        objects, styles: number of classes of each head.
    """

    def __init__(self, arch: str, objects: int, styles: int) -> None:
        super().__init__()
        if arch not in ARCHITECTURES:
            raise BadModel(f"Judge architecture {arch!r} is not known. Known: {', '.join(ARCHITECTURES)}.")
        stages, width = ARCHITECTURES[arch]()
        self.arch, self.width = arch, width
        self.stages = nn.ModuleList(stages)
        self.object_head = nn.Linear(width, objects)
        self.style_head = nn.Linear(width, styles)
        self.objects: tuple[str, ...] = tuple(str(i) for i in range(objects))
        self.styles: tuple[str, ...] = tuple(str(i) for i in range(styles))
        self.hash = ""
        self.accuracy: dict[str, float] = {}

    def depths(self, images: Tensor) -> list[Tensor]:
        """Return the activations after every stage, shapes (n, c_i, 64 / 2^i, 64 / 2^i)."""
        x = images * 2 - 1
        out = []
        for stage in self.stages:
            x = stage(x)
            out.append(x)
        return out

    def features(self, images: Tensor) -> Tensor:
        """Return pooled features of pictures in [0, 1], shape (n, width)."""
        return self.depths(images)[-1].mean((2, 3))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return object and style logits, shapes (n, objects) and (n, styles), of pictures (n, 3, 64, 64) in [0, 1]."""
        pooled = self.features(images)
        return self.object_head(pooled), self.style_head(pooled)

    @torch.no_grad()
    def read(self, images: Tensor, batch: int = 128) -> Reading:
        """Read pictures; one that holds a value that is not finite is not read: its probabilities are nan.

        Raises:
            BadModel: the pictures are not (n, 3, 64, 64).
        """
        if images.ndim != 4 or images.shape[1:] != (3, SIDE, SIDE):
            raise BadModel(f"The judge reads pictures of shape (n, 3, {SIDE}, {SIDE}), not {tuple(images.shape)}.")
        logits = [self(finite(chunk)) for chunk in torch.split(images.float(), batch)]
        readable = images.isfinite().flatten(1).all(1, keepdim=True)
        objects, styles = (torch.cat(heads).softmax(1) for heads in zip(*logits, strict=True))
        return Reading(objects.where(readable, torch.nan), styles.where(readable, torch.nan))

    def prototypes(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return object -> direction (d,) in which the features of its real pictures differ from those of others."""
        return dict(zip(self.objects, self.object_head.weight.detach().cpu().double().numpy(), strict=True))

    def confidence(self, images: Tensor) -> Tensor:
        """Return the softmax probability of the best object, shape (n,); nan for a picture that is not finite."""
        return self.read(images).confidence

    @torch.no_grad()
    def probability(self, images: Tensor, name: str) -> Tensor:
        """Return the softmax probability, shape (n,), that the picture shows the object or style `name`.

        Raises:
            BadModel: the judge knows no such object or style.
        """
        object_logits, style_logits = self(images)
        if name in self.objects:
            return cast(Tensor, object_logits.softmax(-1)[:, self.objects.index(name)])
        if name in self.styles:
            return cast(Tensor, style_logits.softmax(-1)[:, self.styles.index(name)])
        raise BadModel(f"The judge knows no object or style {name!r}; see Judge.objects and Judge.styles.")


def finite(images: Tensor) -> Tensor:
    """Return pictures with 0 for what is not finite, so that one broken picture cannot spoil a batch."""
    return images.nan_to_num(0.0, 0.0, 0.0)


def save_judge(judge: Judge, path: Path, extra: dict[str, Any] | None = None) -> None:
    """Write a judge as fp16 safetensors with its names, architecture and measured accuracy."""
    metadata = {
        "arch": judge.arch,
        "objects": json.dumps(judge.objects),
        "styles": json.dumps(judge.styles),
        "accuracy": json.dumps(judge.accuracy),
        **{k: json.dumps(v) for k, v in (extra or {}).items()},
    }
    with replacing(path) as temp:
        save_file({k: v.half().contiguous() for k, v in judge.state_dict().items()}, temp, metadata=metadata)


def load_judge(path: Path | str) -> Judge:
    """Load a judge, ready to read (float32, evaluation mode); `.hash` is the sha256 of its file.

    Raises:
        BadModel: the file is missing, truncated or not a judge.
    """
    path = Path(path)
    if not path.is_file():
        raise BadModel(
            f"Judge weights {path} are missing. Reinstall expunge, or train: python -m expunge.zoo.emoji judges"
        )
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            weights = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118 (not a mapping)
        objects, styles = json.loads(meta["objects"]), json.loads(meta["styles"])
        judge = Judge(meta["arch"], len(objects), len(styles))
        judge.load_state_dict(weights)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise BadModel(f"{path} is not a judge written by expunge, or is damaged: {error}") from error
    judge.objects, judge.styles = tuple(objects), tuple(styles)
    judge.accuracy = json.loads(meta.get("accuracy", "{}"))
    judge.hash = hashlib.sha256(path.read_bytes()).hexdigest()
    return judge.eval().requires_grad_(False)
