"""Probes: a judge looks at pictures while a fit goes on, and ends it when the concept is gone.

Give `expunge.erase` one: `probe=guide(concept, model.world, until=0.05)` by the shipped judge that may guide, or
`Probe(visible(judge, concept, model.world), until=0.05)` by a judge of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from .concept import Concept, World
from .errors import ConceptError, SettingError, Unsupported
from .judges.classifier import load_judge
from .kernel.state import Probe
from .protocols import Protocol as ObjectProtocol
from .protocols import default
from .zoo.emoji.world import WEIGHTS

if TYPE_CHECKING:
    from .kernel.model import Model

__all__ = ["Probe", "Reader", "guide", "visible"]


class Reader(Protocol):
    """The part of a judge that a probe uses."""

    def probability(self, images: Tensor, name: str) -> Tensor:
        """Return, for pictures (n, 3, h, w) in [0, 1], the probability (n,) that they show the concept of a name."""


def visible(
    judge: Reader, concept: Concept | Iterable[Concept], world: World | None, *, pictures: int = 16, seed: int = 10_000
) -> Callable[[Model], float]:
    """Return a measure for `Probe`: how likely pictures of the concept still show it, by the mean over pictures.

    Always the same prompts and seeds, so that two looks differ by the model alone. The judge that ends a fit must not
    be the one that scores it afterwards.

    Args:
        judge: reads pictures of the model's size.
        concept: what is erased; of several the most visible counts.
        world: the model's world, None when unknown.
        pictures: pictures of each concept a look.
        seed: of the first picture, the others follow.

    Raises:
        SettingError: there is nothing to look at.
    """
    concepts = [c.resolved(world) for c in ((concept,) if isinstance(concept, Concept) else concept)]
    if not concepts or pictures < 1:
        raise SettingError(f"a look at {pictures} pictures of {len(concepts)} concepts sees nothing. Give one or more.")
    prompts = {c.name: c.prompts(world) for c in concepts}
    seeds = range(seed, seed + pictures)

    def measure(model: Model) -> float:
        found = []
        for name, asked in prompts.items():
            chosen = [asked[i * max(1, len(asked) // pictures) % len(asked)] for i in range(pictures)]
            found.append(float(judge.probability(model.generate(chosen, seeds=seeds), name).mean()))
        return max(found)

    return measure


def guide(concept: Concept | Iterable[Concept], world: World | None, until: float, *, every: int = 25) -> Probe:
    """Return a probe by the judge of the world's protocol that may guide; it is not the one that scores.

    Args:
        concept: what is erased; of several the most visible counts.
        world: the model's world, None when unknown.
        until: mean probability, 0 to 1, that pictures of it show it; at this or below the fit ends.
        every: updates between two looks, of 16 pictures a concept.

    Raises:
        SettingError: `until` is no probability, or there is nothing to look at.
        Unsupported: the world has no judge of objects and styles.
        ConceptError: the judge has no name for a concept.
    """
    if not 0 <= until <= 1:
        raise SettingError(f"until={until:g} is no probability: give 0 to 1, for example 0.05.")
    rules = default(world)
    if not isinstance(rules, ObjectProtocol):
        raise Unsupported(f"the world {rules.world!r} has no judge that looks while a fit goes on. Leave until out.")
    judge = load_judge(WEIGHTS / f"{rules.trunk}.safetensors")
    concepts = [c.resolved(world) for c in ((concept,) if isinstance(concept, Concept) else concept)]
    for name in (c.name for c in concepts):
        if name not in (*judge.objects, *judge.styles):
            raise ConceptError(
                f"no judge of the world {rules.world!r} has a name for {name!r}, so none can say when it is gone. "
                "Leave until out, or give a concept of the world (`expunge erase` suggests near ones)."
            )
    return Probe(visible(judge, concepts, world), until, every)
