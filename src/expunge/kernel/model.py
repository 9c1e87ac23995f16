"""The seam between methods and the libraries that hold models: a denoiser, a text encoder, an autoencoder."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..concept import World
from ..errors import EmptySelection, NeedsError, Unsupported, nearest
from .condition import Condition
from .denoiser import Denoiser
from .student import Rule, Student


@dataclass(frozen=True)
class Sampling:
    """How a model is sampled unless told otherwise: steps, guidance scale, picture side in pixels."""

    steps: int
    guidance: float
    size: int


# a soft token: text encoder, by component name -> its vectors (k, d); k may differ between encoders
Vectors = Mapping[str, Tensor]


class Text(ABC):
    """The text encoders: soft tokens, layers to hook, groups of weights to train.

    A soft token is a word that is vectors instead of an entry of the vocabulary (textual inversion).

    Attributes:
        encoders: the networks, by component name.
        layers: those layers (b, n, d) -> (b, n, d) of each that a prompt's tokens pass through, first to last.
        first: first token that depends on the prompt; a start token does not.
        groups: name of a group of weights -> by encoder, the rule on parameter names.
        students: what is trainable now, by encoder.
    """

    encoders: dict[str, nn.Module]
    layers: dict[str, list[nn.Module]]
    first: int
    groups: dict[str, dict[str, Rule]]
    students: dict[str, Student]

    def names(self, group: str) -> dict[str, list[str]]:
        """Return the parameters of a group, by encoder.

        Raises:
            EmptySelection: unknown group, or one that selects nothing in one of them.
        """
        if group not in self.groups:
            known = ", ".join(self.groups)
            raise EmptySelection(
                f"group {group!r} is not known for text encoders. Groups: {known}.{nearest(group, self.groups)}"
            )
        chosen = {e: [n for n, _ in m.named_parameters() if self.groups[group][e](n)] for e, m in self.encoders.items()}
        if empty := [e for e, names in chosen.items() if not names]:
            raise EmptySelection(f"group {group!r} selects no weight of the {empty[0]}. Use another group.")
        return chosen

    def unlock(self, group: str) -> dict[str, Student]:
        """Make a group trainable in every encoder; `Model.encode` then has a gradient, and `lock` puts everything back.

        Raises:
            EmptySelection: unknown group, or one that selects nothing in one of them.
        """
        if self.students:
            raise RuntimeError("a group of the text encoders is unlocked already")
        self.students = {e: Student(self.encoders[e], names) for e, names in self.names(group).items()}
        return self.students

    def lock(self) -> None:
        """Restore the unlocked group bit for bit and freeze it."""
        for student in self.students.values():
            student.close()
        self.students = {}

    @property
    @abstractmethod
    def widths(self) -> dict[str, int]:
        """Return the width d of a token's vector, by text encoder."""

    @abstractmethod
    def embedding(self, words: str = "") -> dict[str, Tensor]:
        """Return the vectors (n, d) of the tokens of some words, of the whole vocabulary for none, by text encoder."""

    @property
    @abstractmethod
    def vocabularies(self) -> dict[str, str]:
        """Return the parameter that holds the vocabulary's vectors (v, d), by text encoder."""

    @abstractmethod
    def ids(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return which rows of the vocabulary prompts are read by, (b, n), padding included, by text encoder.

        A soft token is in no vocabulary: its rows are beyond the last.
        """

    @abstractmethod
    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens each prompt is made of."""

    @abstractmethod
    def tokens(self, soft: Mapping[str, Vectors]) -> AbstractContextManager[None]:
        """Let prompts hold placeholders that are read as these vectors; no weight changes, and no trace is left.

        While vectors require a gradient, `Model.encode` passes it on to them.

        Raises:
            ConceptError: a placeholder is a word of the vocabulary.
        """


@dataclass(frozen=True)
class OneStep:
    """What makes a model a one-step generator: it draws by one network call.

    Attributes:
        t: time of the call.
        teacher: the network that it was distilled from, which is sampled in steps; None where that is not known.
        fake: reads in which weights, by parameter, the fake score that watched its distillation differs from the
            teacher; None where that was not kept. Asked for only where it is used: it is as large as the network.
    """

    t: int
    teacher: Denoiser | None = None
    fake: Callable[[], dict[str, Tensor]] | None = None


class Model(ABC):
    """What every method, metric and attack sees.

    Attributes:
        name: what `expunge.load` was given.
        denoiser: the network that methods train.
        sampling: default sampling settings.
        text: its text encoders, where they can be reached.
        world: what the model can draw, where that is known (the shipped ones).
        sampler: kind and spacing of the scheduler that draws, such as "DDIMScheduler, trailing".
        painter: hash of what else decides a picture and no edit touches: autoencoder, scheduler.
        folder: where its files lie, None when they are in no folder.
        one_step: of a one-step generator, None of a model that is sampled in steps; `generate` then makes one network
            call, whatever steps and guidance it is asked for: what it was distilled with is in its weights.
        reads_text: whether prompts are text to it; a class-conditional model takes the names of its classes alone.
    """

    name: str
    denoiser: Denoiser
    sampling: Sampling
    text: Text | None = None
    world: World | None = None
    reads_text: bool = True
    sampler: str = ""
    painter: str = ""
    folder: Path | None = None
    one_step: OneStep | None = None
    _hash: str | None = None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @abstractmethod
    def encode(self, prompts: str | Sequence[str]) -> Condition:
        """Return the conditions of one prompt or several, without gradient but to what is trained of its `text`."""

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
    def pictures(self, latents: Tensor) -> Tensor:
        """Return the pictures (n, 3, h, w) of scaled latents, about [0, 1]: not clamped, gradients would end there."""

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
        """Return the SHA-256 of the weights as they are now; of a generator, of its time as well."""
        found = digest(self.modules().items())
        if self.one_step is None:
            return found
        return hashlib.sha256(f"{found} in one step at {self.one_step.t}".encode()).hexdigest()

    def become(self, one_step: OneStep | None, known: str | None = None) -> None:
        """Make this a one-step generator, or a model that is sampled in steps; its weights are those already.

        Args:
            one_step: see the attribute.
            known: the hash of these weights, if it has been taken.
        """
        self.one_step, self._hash = one_step, known

    @property
    def teacher(self) -> Denoiser:
        """The network that is sampled in steps: the model's own, or the one that this generator was distilled from.

        Raises:
            NeedsError: a generator that does not say which.
        """
        if self.one_step is None:
            return self.denoiser
        if self.one_step.teacher is None:
            raise NeedsError(
                f"{self.name!r} is a one-step generator that does not say what it was distilled from. Give the run of "
                "its distillation (`expunge distill`) instead, or the multi-step model."
            )
        return self.one_step.teacher

    def save(self, folder: Path) -> None:
        """Write the model as it is now as a pipeline that diffusers loads.

        Raises:
            Unsupported: it is none.
        """
        raise Unsupported(f"{self.name!r} is no diffusers pipeline, so there is nothing to write to {folder}.")

    def need_text(self) -> Text:
        """Return the text encoders.

        Raises:
            NeedsError: it has none that can be reached.
        """
        if self.text is None:
            raise NeedsError(f"{self.name!r} has no text encoder that can be reached. Choose a text-to-image model.")
        return self.text

    def lock(self) -> None:
        """Undo whatever a method unlocked."""
        self.denoiser.lock()
        if self.text is not None:
            self.text.lock()


def component_of(model: Model, module: nn.Module) -> str:
    """Return the name under which a model holds a network."""
    return next(name for name, candidate in model.modules().items() if candidate is module)


def digest(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """Return the SHA-256 of modules' names and weights; a weight counts as float32, whatever it is stored as."""
    h = hashlib.sha256()
    for prefix, module in modules:
        for name, value in sorted(module.state_dict().items()):
            if value.is_floating_point():
                h.update(f"{prefix}.{name}{tuple(value.shape)}".encode())
                h.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return h.hexdigest()
