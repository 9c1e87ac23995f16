"""Words beside the concepts that are erased: among them adversaries are sought, and neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from .concept import Concept, Targets, World
from .errors import SettingError
from .kernel.model import Model
from .kernel.neighbours import nearest, thinned

NOUNS = Path(__file__).with_name("nouns.txt")


def vocabulary(world: World | None, concept: Concept, erased: Iterable[str], file: str = "") -> tuple[str, ...]:
    """Return the words that can stand in a concept's place.

    Args:
        world: what the model can draw; without a file, its names of the concept's kind are the words.
        concept: the concept.
        erased: words that are left out, those of every concept that is erased.
        file: text file of words, one a line, lines with "#" left out; "" for none. Without file and world the words are
            the common nouns and styles shipped here.

    Returns:
        The words in their order, each once.

    Raises:
        SettingError: the file cannot be read, or fewer than two words are left to choose from.
    """
    source = file or (f"the world {world.name!r}" if world else str(NOUNS))
    if world is not None and not file:
        found = world.styles if concept.kind == "style" else world.objects
    else:
        try:
            lines = Path(file or NOUNS).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(
                f"the vocabulary {file} cannot be read: {error}. Give a text file of words, one a line."
            ) from error
        found = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    without = {w.casefold() for w in erased}
    words = tuple(dict.fromkeys(w for w in found if w.casefold() not in without))
    if len(words) < 2:
        raise SettingError(
            f"the vocabulary is too small: {source} has {len(words)} words beside what is erased, and an adversary "
            "needs two to choose from. Give a longer list: --set vocabulary=FILE, one word a line."
        )
    return words


def candidates(model: Model, targets: Sequence[Targets], file: str, near: int, n: int) -> list[list[str]]:
    """Return words among which every concept's adversary is sought, the nearest first.

    Args:
        model: its text encoder says what is near.
        targets: the concepts.
        file: see `vocabulary`.
        near: words nearest to the concept that are considered.
        n: words of a concept, spread evenly over those.
    """
    erased = [w for own in targets for w in own.concept.words(model.world)]
    known = [vocabulary(model.world, own.concept, erased, file) for own in targets]
    ranked = [nearest(model, all_, own.bare or own.prompts) for all_, own in zip(known, targets, strict=True)]
    return [thinned(own[:near], n) for own in ranked]


def instead(target: Targets, word: str, world: World | None) -> list[str]:
    """Return a concept's prompts with a word in its place; prompts of a soft token become the plain word."""
    concept = replace(target.concept, anchor=word)
    pairs = dict(zip(concept.prompts(world), concept.anchors(world), strict=True))
    return [pairs.get(p, word) for p in target.prompts]


def elsewhere(world: World | None, targets: Sequence[Targets], n: int) -> list[str]:
    """Return prompts of what is not erased, whatever the concepts say of what to keep.

    Args:
        world: what the model can draw: its objects and styles, in its templates.
        targets: the concepts; without a world, common nouns stand in the first one's place.
        n: nouns; prompts of a world are all returned.
    """
    erased = [w for target in targets for w in target.concept.words(world)]
    if world is not None:
        return list(replace(targets[0].concept, keep=()).keeps(world, erased))
    nouns = vocabulary(None, targets[0].concept, erased)
    words = [nouns[i * len(nouns) // n] for i in range(n)] if n < len(nouns) else nouns
    forms = [instead(targets[0], w, None) for w in words]
    return [form[i % len(form)] for i, form in enumerate(forms)]
