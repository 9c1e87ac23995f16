"""What a method is: a frozen dataclass of the paper's settings with a `fit` that yields one Step an update."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from ..concept import Targets
from ..edits import Edit
from ..kernel.condition import Condition
from ..kernel.model import Model
from ..kernel.state import State, Step


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
    """What a method must be given besides the words: checked before anything long starts."""

    text: bool = True
    images: bool = False
    autoencoder: bool = False
    sae: bool = False


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
