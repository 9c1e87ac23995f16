"""The seam between methods and the libraries that hold models: a denoiser, a text encoder, an autoencoder."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..concept import World
from .condition import Condition
from .denoiser import Denoiser


@dataclass(frozen=True)
class Sampling:
    """How a model is sampled unless told otherwise: steps, guidance scale, picture side in pixels."""

    steps: int
    guidance: float
    size: int


# a soft token: text encoder, by component name -> its vectors (k, d); k may differ between encoders
Vectors = Mapping[str, Tensor]


class Text(ABC):
    """Soft tokens: words that are vectors instead of entries of the vocabulary (textual inversion)."""

    @property
    @abstractmethod
    def widths(self) -> dict[str, int]:
        """Return the width d of a token's vector, by text encoder."""

    @abstractmethod
    def embedding(self, words: str = "") -> dict[str, Tensor]:
        """Return the vectors (n, d) of the tokens of some words, of the whole vocabulary for none, by text encoder."""

    @abstractmethod
    def tokens(self, soft: Mapping[str, Vectors]) -> AbstractContextManager[None]:
        """Let prompts hold placeholders that are read as these vectors; no weight changes, and no trace is left.

        While vectors require a gradient, `Model.encode` passes it on to them.

        Raises:
            ConceptError: a placeholder is a word of the vocabulary.
        """


class Model(ABC):
    """What every method, metric and attack sees.

    Attributes:
        name: what `expunge.load` was given.
        denoiser: the network that methods train.
        sampling: default sampling settings.
        text: soft tokens, where its text encoders can read them.
        world: what the model can draw, where that is known (the shipped ones).
        painter: hash of what else decides a picture and no edit touches: autoencoder, scheduler.
        reads_text: whether prompts mean anything to it (a class-conditional model reads labels).
    """

    name: str
    denoiser: Denoiser
    sampling: Sampling
    text: Text | None = None
    world: World | None = None
    reads_text: bool = True
    painter: str = ""
    _hash: str | None = None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @abstractmethod
    def encode(self, prompts: str | Sequence[str]) -> Condition:
        """Return the conditions of one prompt or several, without gradient but to soft tokens that require it."""

    @abstractmethod
    def clipped(self, prompts: Sequence[str]) -> list[tuple[str, str]]:
        """Return (prompt, the part that is cut off) for every prompt longer than the encoder's window."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        negative: str | None = None,
        batch: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return one picture per (prompt, seed) pair, (n, 3, h, w) in [0, 1], by the pipeline that users ship."""

    @abstractmethod
    def latents(self, images: Tensor) -> Tensor:
        """Return the scaled latents of pictures (n, 3, h, w) in [0, 1]."""

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """Return the networks an edit may touch, by diffusers' component name (`unet`, `text_encoder`)."""

    @property
    def hash(self) -> str:
        """SHA-256 of the weights an edit may touch, taken once; call it before any edit is applied."""
        if self._hash is None:
            self._hash = self.fingerprint()
        return self._hash

    def fingerprint(self) -> str:
        """Return the SHA-256 of the weights as they are now."""
        return digest(self.modules().items())

    def lock(self) -> None:
        """Undo whatever a method unlocked."""
        self.denoiser.lock()


def digest(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """Return the SHA-256 of modules' names and weights; a weight counts as float32, whatever it is stored as."""
    h = hashlib.sha256()
    for prefix, module in modules:
        for name, value in sorted(module.state_dict().items()):
            if value.is_floating_point():
                h.update(f"{prefix}.{name}{tuple(value.shape)}".encode())
                h.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return h.hexdigest()
