"""What a method is: a frozen dataclass of the paper's settings with a `fit` that yields one Step an update."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from ..concept import Pictures, Targets
from ..edits import Edit, component_of
from ..errors import ConceptError
from ..kernel.closedform import matched
from ..kernel.condition import Condition
from ..kernel.model import Model
from ..kernel.neighbours import encoded
from ..kernel.pool import Pool
from ..kernel.state import State, Step

Anchorless = Literal["blank", "empty"]


@dataclass(frozen=True)
class Paper:
    """The publication a method comes from."""

    key: str
    title: str
    authors: str
    year: int
    venue: str
    arxiv: str

    def bibtex(self) -> str:
        """Return the entry for a bibliography."""
        fields = {"title": self.title, "author": self.authors, "year": self.year, "booktitle": self.venue}
        body = "".join(f"  {k} = {{{v}}},\n" for k, v in fields.items())
        return f"@inproceedings{{{self.key},\n{body}  eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}}\n}}"


@dataclass(frozen=True)
class Needs:
    """What a method must be given besides the words: checked before anything long starts.

    Attributes:
        text: a model with a text encoder.
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
        ...


def conditions(model: Model, targets: Sequence[Targets]) -> tuple[Condition, Condition]:
    """Encode the targets' prompts and, row for row, the anchor's."""
    prompts = [p for target in targets for p in target.prompts]
    anchors = [a for target in targets for a in target.anchors]
    return model.encode(prompts), model.encode(anchors)


def kept(model: Model, targets: Sequence[Targets]) -> Condition | None:
    """Encode the prompts of explicitly kept concepts; None when there are none."""
    keeps = [k for target in targets for k in target.keeps]
    return model.encode(keeps) if keeps else None


def readings(model: Model, targets: Sequence[Targets], anchorless: Anchorless) -> tuple[Tensor, Tensor]:
    """Return the tokens (m, d) of the targets' prompts, and what each shall be read as, in float64.

    That is the token of the same prompt about the anchor; without an anchor, of the same prompt without the concept
    ("blank") or of the empty prompt ("empty").

    Raises:
        ConceptError: a concept's prompts read the same without it.
    """
    pairs = []
    for target in targets:
        prompts = target.anchors if target.concept.anchor or anchorless == "empty" else target.blanks
        long, short = (model.text.lengths(p) if model.text else [0] * len(p) for p in (target.prompts, prompts))
        longer = [i - j for i, j in zip(long, short, strict=True)]
        x, y = matched(model.encode(target.prompts).tokens.double(), model.encode(prompts).tokens.double(), longer)
        if not len(x):
            raise ConceptError(
                f"the text encoder of {model.name!r} reads prompts of {target.concept.name!r} as it reads them without "
                "it: the word says nothing to it. Give another name, or synonyms."
            )
        pairs.append((x, y))
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def readers(model: Model) -> dict[str, Tensor]:
    """Return the matrices that read the prompt encoding, by `component.parameter`."""
    component = component_of(model, model.denoiser.module)
    found = model.denoiser.text_readers(model.encode(""))
    return {f"{component}.{name}.weight": layer.weight for name, layer in found.items()}


class Lessons:
    """Pictures to forget and pictures to retain, with the conditions that describe them.

    For methods that declare `Needs(images=True, retained=True)`.

    Args:
        model: the model.
        targets: with the pictures that the door has given them.
        state: of the fit.
        batch: pictures a draw.

    Attributes:
        forget, retain: pools of pictures; the `k` of what they draw are rows of `c` and of `r`.
        c: conditions of the pictures to forget, one row each distinct description.
        r: conditions of the pictures to retain.
    """

    def __init__(self, model: Model, targets: Sequence[Targets], state: State, batch: int) -> None:
        shown = [(target, target.pictures) for target in targets if target.pictures is not None]
        said = [pair for target, found in shown for pair in _paired(target, found.prompts)]
        kept = [found for target in targets if (found := target.retained) is not None]
        told = [p for found in kept for p in found.prompts]
        pairs, prompts = list(dict.fromkeys(said)), list(dict.fromkeys(told))
        self.c, self.r = encoded(model, [p for p, _ in pairs]), encoded(model, prompts)
        self.anchored = torch.tensor([bool(anchor) for _, anchor in pairs], device=model.device)
        self.others = Condition.cat([encoded(model, [anchor or p for p, anchor in pairs]), self.r])
        self.generator = state.generator

        def pool(pictures: Sequence[Pictures], rows: list[int]) -> Pool:
            z = torch.cat([found.latents for found in pictures]).to(self.c.tokens)
            return Pool(model.denoiser, z, torch.tensor(rows, device=z.device), state, batch)

        row, line = {pair: i for i, pair in enumerate(pairs)}, {p: i for i, p in enumerate(prompts)}
        self.forget = state.keep("forget", pool([found for _, found in shown], [row[pair] for pair in said]))
        self.retain = state.keep("retain", pool(kept, [line[p] for p in told]))

    def instead(self, k: Tensor) -> Condition:
        """Return what stands in for rows k (b,) of `c`: the anchor's prompt, or that of a random retained picture."""
        random = len(self.c) + torch.randint(len(self.r), (len(k),), generator=self.generator).to(k.device)
        return self.others[torch.where(self.anchored[k], k, random)]


def _paired(target: Targets, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """Pair what pictures show with the same about the anchor ("" without one)."""
    anchors = dict(zip(target.prompts, target.anchors, strict=True))
    return [(p, anchors.get(p, target.concept.anchor)) for p in prompts]
