"""What a method is: a frozen dataclass of the paper's settings with a `fit` that yields one Step an update."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from ..concept import Targets
from ..edits import Edit, component_of
from ..errors import ConceptError
from ..kernel.closedform import matched
from ..kernel.condition import Condition
from ..kernel.model import Model
from ..kernel.neighbours import thinned
from ..kernel.state import State, Step
from ..papers import Paper

Anchorless = Literal["blank", "empty"]
FILE = object()
File = Annotated[str, FILE]  # a setting that names a file to learn from: what the file holds is then part of the run


@dataclass(frozen=True)
class Needs:
    """What a method must be given besides the words: checked before anything long starts.

    Attributes:
        text: a model that reads text; classes will not do.
        keeps: something to retain: explicitly, or a world that is known.
        images: pictures of the concept: a folder, or drawn from the base model (`make_images`).
        retained: pictures to retain, likewise.
        autoencoder: a model that can encode pictures.
        encoders: a model whose text encoders can be reached, to be hooked or trained.
        sae: a trained sparse autoencoder of them.
        concept: something to forget; a plain distillation forgets nothing.
        steps: a model that is sampled in steps; a one-step generator will not do.
    """

    text: bool = True
    keeps: bool = False
    images: bool = False
    retained: bool = False
    autoencoder: bool = False
    encoders: bool = False
    sae: bool = False
    concept: bool = True
    steps: bool = True


class Method(Protocol):
    """A method is a value; `fit` is the room behind the door of `expunge.erase`."""

    family: ClassVar[str]
    paper: ClassVar[Paper]
    needs: ClassVar[Needs]

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Yield a Step an update and return the Edit."""


def conditions(model: Model, targets: Sequence[Targets]) -> tuple[Condition, Condition]:
    """Encode the targets' prompts and, row for row, the anchor's."""
    prompts = [p for target in targets for p in target.prompts]
    anchors = [a for target in targets for a in target.anchors]
    return model.encode(prompts), model.encode(anchors)


def sizes(targets: Sequence[Targets]) -> list[int]:
    """Return how many of the prompts that `conditions` encodes each target has."""
    return [len(target.prompts) for target in targets]


def kept(model: Model, targets: Sequence[Targets], most: int | None = None) -> Condition | None:
    """Encode prompts to keep, at most so many: of named concepts, else of what a world holds; None without."""
    keeps = [k for target in targets for k in target.keeps]
    return model.encode(keeps if most is None else thinned(keeps, most)) if keeps else None


def goals(
    targets: Sequence[Targets], anchorless: Anchorless, most: int | None = None, rng: torch.Generator | None = None
) -> list[tuple[list[str], list[str]]]:
    """Return prompts of each target and, prompt for prompt, what they shall become.

    Args:
        targets: what to erase.
        anchorless: what prompts become without an anchor: the same without the concept ("blank"), or the empty prompt.
        most: prompts of all targets together, as many of each, drawn at random; None for all there are.
        rng: draws them.
    """
    share, pairs = None if most is None else -(-most // len(targets)), []
    for target in targets:
        wanted = target.anchors if target.concept.anchor or anchorless == "empty" else target.blanks
        n = len(target.prompts)
        drawn = range(n) if share is None or n <= share else torch.randperm(n, generator=rng)[:share].tolist()
        pairs.append(([target.prompts[i] for i in drawn], [wanted[i] for i in drawn]))
    return pairs


def readings(
    model: Model,
    targets: Sequence[Targets],
    anchorless: Anchorless,
    most: int | None = None,
    rng: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the tokens (m, d) of the targets' prompts, and what each shall be read as, in float64; see `goals`.

    That is the token of the same prompt about the anchor or, without one, of what the prompt shall become.

    Raises:
        ConceptError: a concept's prompts read the same without it.
    """
    sides = goals(targets, anchorless, most, rng)
    # the prompts of a hundred concepts become a handful of the same blanks
    unique = list(dict.fromkeys(p for pair in sides for side in pair for p in side))
    row = {p: i for i, p in enumerate(unique)}
    tokens, pairs = model.encode(unique).tokens, []
    for target, pair in zip(targets, sides, strict=True):
        told, wanted = (tokens[[row[p] for p in side]].double() for side in pair)
        long, short = (model.text.lengths(side) if model.text else [0] * len(side) for side in pair)
        x, y = matched(told, wanted, long, short)
        if not len(x):
            raise unheard(model, target)
        pairs.append((x, y))
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def unheard(model: Model, target: Targets) -> ConceptError:
    """Return the refusal of a concept that a model's prompts do not tell."""
    return ConceptError(
        f"the text encoder of {model.name!r} reads prompts of {target.concept.name!r} as it reads them without it: the "
        "word says nothing to it. Give another name, or synonyms."
    )


def readers(model: Model) -> dict[str, Tensor]:
    """Return the matrices that read the prompt encoding, by `component.parameter`."""
    component, found = component_of(model, model.denoiser.module), model.denoiser.text_readers(model.encode(""))
    return {f"{component}.{name}.weight": layer.weight for name, layer in found.items()}
