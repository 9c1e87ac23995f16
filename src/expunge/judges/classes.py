"""Judges of labelled pictures: networks that read the class of a 32x32 picture, and one whose features distances use.

Three architectures with separate seeds, trained on real pictures only. Judge `a` may guide searches, judge `b` alone
scores, and `features` is the feature network of FID, KID, precision and recall: numbers carry its name and are never
comparable with Inception figures.

Limits      pictures of their own world; anything else is still read as one of its classes
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import BadModel
from ..storage import replacing
from .classifier import Bottleneck, Conv, best, finite

SIDE = 32
REAL = "real.safetensors"


def plain() -> tuple[list[nn.Module], int]:
    """Architecture `a`: a plain convolutional net, with its feature width."""
    widths = ((3, 16, 1), (16, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1), (96, 160, 2))
    return [*(Conv(cin, cout, 3, stride) for cin, cout, stride in widths), Mean()], 160


def residual() -> tuple[list[nn.Module], int]:
    """Architecture `b`: a residual net of bottlenecks between 2x2 strided patches, with its feature width."""
    return [
        Conv(3, 24, 3),
        Conv(24, 64, 2, 2), Bottleneck(64, 32),
        Conv(64, 128, 2, 2), Bottleneck(128, 64), Bottleneck(128, 64),
        Conv(128, 192, 2, 2), Bottleneck(192, 96),
        Mean(),
    ], 192  # fmt: skip


def features() -> tuple[list[nn.Module], int]:
    """Architecture `features`: places are kept until a linear layer of 64 features, so that shapes count."""
    widths = ((3, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 2))
    return [*(Conv(cin, cout, 3, stride) for cin, cout, stride in widths), nn.Flatten(), nn.Linear(64 * 16, 64)], 64


ARCHITECTURES = {"a": plain, "b": residual, "features": features}


class Mean(nn.Module):
    """The mean over places."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, c) of activations (n, c, h, w)."""
        return x.mean((2, 3))


class ClassJudge(nn.Module):
    """A classifier of 32x32 pictures.

    Args:
        arch: "a", "b" or "features".
        classes: names of the classes, by index.

    Attributes:
        name: what numbers call it, such as "fashion64".
        accuracy: on the real test pictures, measured when it was trained.
        hash: SHA-256 of its file.
    """

    def __init__(self, arch: str, classes: tuple[str, ...]) -> None:
        super().__init__()
        if arch not in ARCHITECTURES:
            raise BadModel(f"judge architecture {arch!r} is not known. Known: {', '.join(ARCHITECTURES)}.")
        layers, width = ARCHITECTURES[arch]()
        self.arch, self.classes, self.width = arch, classes, width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, len(classes))
        self.name, self.hash = arch, ""
        self.accuracy = 0.0

    def features(self, images: Tensor) -> Tensor:
        """Return features (n, width) of pictures (n, 3, 32, 32) in [0, 1]."""
        out: Tensor = self.body(images * 2 - 1)
        return out

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, classes) of pictures (n, 3, 32, 32) in [0, 1]."""
        out: Tensor = self.head(self.features(images))
        return out

    @torch.no_grad()
    def read(self, images: Tensor, batch: int = 256) -> Tensor:
        """Return probabilities (n, classes); the row of a picture that is not finite is nan.

        Raises:
            BadModel: the pictures are not (n, 3, 32, 32).
        """
        check(images)
        seen = [self(finite(part)).softmax(1) for part in torch.split(images.float(), batch)]
        return torch.cat(seen).where(readable(images), torch.nan)

    @torch.no_grad()
    def describe(self, images: Tensor, batch: int = 256) -> Tensor:
        """Return features (n, width); the row of a picture that is not finite is nan.

        Raises:
            BadModel: the pictures are not (n, 3, 32, 32).
        """
        check(images)
        seen = [self.features(finite(part)) for part in torch.split(images.float(), batch)]
        return torch.cat(seen).where(readable(images), torch.nan)


def check(images: Tensor) -> None:
    """Raise BadModel unless pictures are (n, 3, 32, 32)."""
    if images.ndim != 4 or images.shape[1:] != (3, SIDE, SIDE):
        raise BadModel(f"these judges read pictures of shape (n, 3, {SIDE}, {SIDE}), not {tuple(images.shape)}.")


def readable(images: Tensor) -> Tensor:
    """Return (n, 1): whether every value of a picture is finite."""
    return images.isfinite().flatten(1).all(1, keepdim=True)


@dataclass(frozen=True)
class Seen:
    """What is measured on n pictures; the row of a picture that could not be read is nan.

    Attributes:
        probabilities: of the scoring judge, (n, classes).
        features: of the feature network, (n, d).
    """

    probabilities: Tensor
    features: Tensor

    @property
    def label(self) -> Tensor:
        """Index of the best class (n,), -1 where the picture could not be read."""
        return best(self.probabilities)


@dataclass(frozen=True)
class ClassPanel:
    """The judges of a class-conditional world, and its real test pictures as the feature network sees them.

    Attributes:
        scorer: the judge that alone scores.
        network: the feature network.
        real: features (n, d) of the real test pictures.
        labels: their classes (n,).
    """

    scorer: ClassJudge
    network: ClassJudge
    real: Tensor
    labels: Tensor

    def judge(self, images: Tensor) -> Seen:
        """Judge pictures (n, 3, 32, 32) in [0, 1]."""
        return Seen(self.scorer.read(images), self.network.describe(images))


def save_judge(judge: ClassJudge, path: Path, extra: dict[str, Any] | None = None) -> None:
    """Write a judge as fp16 safetensors with its name, classes, architecture and measured accuracy."""
    told = {"arch": judge.arch, "name": judge.name, "classes": judge.classes, "accuracy": judge.accuracy}
    metadata = {k: json.dumps(v) for k, v in (told | (extra or {})).items()}
    with replacing(path) as temp:
        save_file({k: v.half().contiguous() for k, v in judge.state_dict().items()}, temp, metadata=metadata)


def load_judge(path: Path) -> ClassJudge:
    """Load a judge, ready to read (float32, evaluation mode).

    Raises:
        BadModel: the file is missing, damaged or no such judge.
    """
    weights, meta = read(path)
    try:
        judge = ClassJudge(json.loads(meta["arch"]), tuple(json.loads(meta["classes"])))
        judge.load_state_dict(weights)
        judge.name, judge.accuracy = json.loads(meta["name"]), json.loads(meta["accuracy"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise BadModel(f"{path} is not a judge of classes written by expunge: {error}") from error
    judge.hash = hashlib.sha256(path.read_bytes()).hexdigest()
    return judge.eval().requires_grad_(False)


def save_real(path: Path, features: Tensor, labels: Tensor, network: ClassJudge) -> None:
    """Write the features of the real test pictures, in fp16, with the name of the network that made them."""
    with replacing(path) as temp:
        tensors = {"features": features.half().contiguous(), "labels": labels.to(torch.uint8)}
        save_file(tensors, temp, metadata={"network": network.name})


def load_panel(folder: Path, scorer: str, network: str, hashes: tuple[tuple[str, str], ...] = ()) -> ClassPanel:
    """Load the judges and real features of a class-conditional model's folder.

    Args:
        folder: where `SCORER.safetensors`, `features.safetensors` and `real.safetensors` lie.
        scorer: name of the judge that scores.
        network: name that the feature network must have.
        hashes: (judge, SHA-256 of its file) pairs that are binding.

    Raises:
        BadModel: something is missing, damaged, or not what the protocol names.
    """
    judges = {name: load_judge(folder / f"{name}.safetensors") for name in (scorer, "features")}
    tensors, meta = read(folder / REAL)
    found = judges["features"].name
    if {found, meta.get("network")} != {network}:
        raise BadModel(
            f"the feature network in {folder} is {found!r}, its real features are of {meta.get('network')!r}; the "
            f"protocol's is {network!r}: distances would not be comparable."
        )
    for name, pinned in hashes:
        if name in judges and judges[name].hash != pinned:
            raise BadModel(
                f"{name} in {folder} has hash {judges[name].hash[:12]}, the protocol was made with {pinned[:12]}: "
                "numbers would not be comparable. Reinstall expunge, or give the protocol a new id."
            )
    return ClassPanel(judges[scorer], judges["features"], tensors["features"], tensors["labels"].long())


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors (as float32) and metadata of a file.

    Raises:
        BadModel: it is missing or damaged.
    """
    if not path.is_file():
        raise BadModel(
            f"{path} is missing. Reinstall expunge, or make it: python -m expunge.zoo.fashion judges (features, card)."
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k).float() for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadModel(f"{path} is damaged ({error}). Copy it again.") from error
