"""What to erase, what to become instead, and what to keep. Pure data, no torch.

A concept is words, and words stand for a *distribution of prompts*: names and synonyms, in templates, in contexts.
Erasing one keyword alone is brittle and forgets too much (arXiv 2603.18767).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from .errors import ConceptError, NearMiss, near

if TYPE_CHECKING:
    from torch import Tensor

    from .kernel.critic import Critic

Kind = Literal["object", "style", "person", "class"]
KINDS: tuple[str, ...] = get_args(Kind)
ALIKE = 0.8  # difflib's ratio from which on a word counts as a misspelled name
PICKLES = (".pt", ".pth", ".bin", ".ckpt")

# where no world gives templates: plain, then as people write prompts; "{c}" the concept, "{x}" a context
OBJECT_TEMPLATES = ("{c}", "a picture of {c}", "a photo of {c}", "{c}, a {x}", "a {x} of {c}")
OBJECT_CONTEXTS = ("photograph", "painting", "drawing", "close-up")
STYLE_TEMPLATES = ("{c}", "{x} in the style of {c}", "{x} by {c}", "{c} style, {x}")
STYLE_CONTEXTS = ("a landscape", "a portrait", "a city", "a still life")


@dataclass(frozen=True)
class World:
    """What a model can draw, as far as it is known.

    Attributes:
        name: name of the world, such as "emoji".
        objects: names of its objects.
        styles: names of its styles.
        synonyms: object or style -> its other names.
        object_templates: prompts of an object; "{c}" is the object, "{x}" a style.
        style_templates: prompts of a style; "{c}" is the style, "{x}" an object.
        labels: prompts are nothing but objects, by name or by index: a class-conditional model.
    """

    name: str
    objects: tuple[str, ...]
    styles: tuple[str, ...]
    synonyms: Mapping[str, tuple[str, ...]]
    object_templates: tuple[str, ...]
    style_templates: tuple[str, ...]
    labels: bool = False

    def canonical(self, word: str) -> str:
        """Return the object or style that `word` names (case and synonyms allowed), or "" for none."""
        folded = word.casefold()
        if self.labels and word.isdecimal() and int(word) < len(self.objects):
            return self.objects[int(word)]
        for name in (*self.objects, *self.styles):
            if name.casefold() == folded:
                return name
        owners = [n for n, others in self.synonyms.items() if folded in (o.casefold() for o in others)]
        # a synonym that several objects share names none of them
        return owners[0] if len(owners) == 1 else ""

    def near(self, word: str) -> list[str]:
        """Return the names most like `word`, synonyms followed to what they name."""
        spellings = {name: name for name in (*self.objects, *self.styles)}
        for name, others in self.synonyms.items():
            spellings |= {other: name for other in others if other not in spellings}
        return list(dict.fromkeys(spellings[w] for w in near(word, spellings, 5)))[:3]

    def slips(self, word: str) -> list[str]:
        """Return the names that `word` may be a slip of: misspelled, or cut to some of their words.

        Stricter than `near`, which looks for a name where there must be one: free phrases, which a text encoder reads
        as well as names, resemble something among hundreds of names and synonyms.
        """
        folded = word.casefold().strip()
        spelled = {name.casefold(): name for name in (*self.objects, *self.styles)}
        parts = [s for s in spelled if folded and f" {folded} " in f" {s} "]
        close = get_close_matches(folded, spelled, cutoff=ALIKE)
        return [spelled[s] for s in dict.fromkeys((*close, *parts))][:3]


@dataclass(frozen=True)
class Concept:
    """What to forget.

    Attributes:
        name: the word or words; the only positional field.
        kind: "object", "style", "person" or "class".
        names: all the names that stand for it (default: the name).
        anchor: what prompts of the concept shall draw instead; "" lets the method choose.
        keep: concepts to retain explicitly.
        images: folder of pictures of it. Prompts then hold a soft token found by inverting them instead of its words,
            unless the method learns from pictures itself; `name` may be any label.
        keep_images: folder of pictures to retain, for methods that learn from pictures.
        embedding: `.safetensors` file of a textual-inversion token, read in place of the words; wins over `images`.
        synonyms: further words, beside those that the model's world knows.
        templates: prompts with "{c}" for the concept and, if wanted, "{x}" for a context; default: the world's.
    """

    name: str
    kind: Kind = field(default="object", kw_only=True)
    names: tuple[str, ...] = field(default=(), kw_only=True)
    anchor: str = field(default="", kw_only=True)
    keep: tuple[str, ...] = field(default=(), kw_only=True)
    images: Path | None = field(default=None, kw_only=True)
    keep_images: Path | None = field(default=None, kw_only=True)
    embedding: Path | None = field(default=None, kw_only=True)
    synonyms: tuple[str, ...] = field(default=(), kw_only=True)
    templates: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        for name in ("names", "keep", "synonyms", "templates"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConceptError(
                    f"{name} must be a tuple of words, not the word {value!r}. Write {name}=({value!r},)."
                )
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "names", self.names or (self.name,))
        for name in ("images", "keep_images", "embedding"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(value))

    def words(self, world: World | None = None) -> tuple[str, ...]:
        """Return every word that stands for the concept: names, then synonyms, each once."""
        known = () if world is None else (s for n in self.names for s in world.synonyms.get(n, ()))
        return tuple(dict.fromkeys((*self.names, *self.synonyms, *known)))

    def prompts(self, world: World | None = None) -> tuple[str, ...]:
        """Return the distribution of prompts that the words stand for, in a fixed order."""
        return tuple(p for p, _ in self._pairs(world))

    def bare(self, world: World | None = None) -> tuple[str, ...]:
        """Return the prompts of the name that say nothing else: for pictures whose contexts are not known."""
        templates, _ = _forms(world, self.kind == "style")
        found = [_fill(t, self.name, "") for t in self.templates or templates if "{x}" not in t]
        return tuple(dict.fromkeys(found)) or (self.name,)

    def anchors(self, world: World | None = None) -> tuple[str, ...]:
        """Return, for each of `prompts`, the same prompt with the anchor in place of the concept ("" without one)."""
        return tuple(a for _, a in self._pairs(world))

    def blanks(self, world: World | None = None) -> tuple[str, ...]:
        """Return, for each of `prompts`, the same prompt with nothing in place of the concept."""
        return tuple(" ".join(b.split()) for b in replace(self, anchor=" ").anchors(world))

    def keeps(self, world: World | None = None, without: Iterable[str] = ()) -> tuple[str, ...]:
        """Return prompts of what to retain: of `keep` if given, else of everything else that the world knows.

        Args:
            world: the model's world.
            without: names that are erased as well and so must not be retained.
        """
        erased = {w.casefold() for w in (*self.words(world), *without)}
        names = self.keep or (() if world is None else (*world.objects, *world.styles))
        found: list[str] = []
        for i, name in enumerate(n for n in names if n.casefold() not in erased):
            style = (self.kind == "style") if world is None else name in world.styles
            templates, contexts = _forms(world, style)
            left = [c for c in contexts if c.casefold() not in erased] or [""]
            # contexts rotate: all of them with every name would be thousands of prompts
            found += [_fill(t, name, left[(i + j) % len(left)]) for j, t in enumerate(templates)]
        return tuple(dict.fromkeys(found))

    def resolved(self, world: World | None = None) -> Concept:
        """Return the concept under the names by which the world knows it (case and synonyms are followed)."""
        if world is None:
            return self
        known = world.canonical
        return replace(
            self,
            name=known(self.name) or self.name,
            names=tuple(known(n) or n for n in self.names),
            anchor=known(self.anchor) or self.anchor,
            keep=tuple(known(k) or k for k in self.keep),
        )

    def resolve(self, world: World | None = None, without: Iterable[str] = ()) -> Targets:
        """Return the prompts of the concept in `world`, after `check`; an anchor that may be a slip is warned of.

        Args:
            world: the model's world, None when unknown.
            without: names of other concepts that are erased together with this one.

        Raises:
            ConceptError: see `check`.
        """
        self.check(world)
        self._warn_slip(world)
        known = self.resolved(world)
        prompts, anchors, keeps = known.prompts(world), known.anchors(world), known.keeps(world, without)
        return Targets(known, prompts, anchors, keeps, known.bare(world), known.blanks(world))

    def check(self, world: World | None = None) -> None:
        """Check that the concept can be erased from a model of this world.

        Raises:
            ConceptError: empty; of an unknown kind; unknown to the world; kept or anchored to itself; files missing.
        """
        if not all(w.strip() for w in (self.name, *self.names)):
            raise ConceptError(
                "the concept is empty. Give the words to erase, such as Concept('bomb') or --concept bomb."
            )
        if self.kind not in KINDS:
            raise ConceptError(f"kind {self.kind!r} is not known. Kinds: {', '.join(KINDS)}.")
        if bad := [t for t in self.templates if "{c}" not in t]:
            raise ConceptError(f"template {bad[0]!r} lacks '{{c}}', the place of the concept.")
        files = {"images": self.images, "keep_images": self.keep_images, "embedding": self.embedding}
        for label, path in files.items():
            if path is not None and not path.exists():
                raise ConceptError(f"{label} of {self.name!r}: there is nothing at {path}.")
        if self.embedding is not None and self.embedding.suffix.lower() in PICKLES:
            raise ConceptError(
                f"{self.embedding} is a pickled embedding, which can run any code when it is read. Convert it to "
                ".safetensors."
            )
        known = self.resolved(world)
        if world is not None and (world.labels or (self.images is None and self.embedding is None)):
            known._check_known(world)
        own = {w.casefold() for w in known.words(world)}
        if kept := [k for k in known.keep if k.casefold() in own]:
            raise ConceptError(f"{kept[0]!r} is to be erased and to be kept. Take it out of keep={self.keep!r}.")
        if known.anchor.casefold() in own:
            raise ConceptError(f"the anchor {self.anchor!r} is the concept itself. Give another anchor, or none.")

    def to_json(self) -> dict[str, Any]:
        """Return the concept as plain JSON data."""
        data = asdict(self)
        return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in data.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Concept:
        """Read a concept.

        Raises:
            ConceptError: when a field is unknown or the name is missing.
        """
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        try:
            return cls(**values)
        except TypeError as error:
            raise ConceptError(f"not a concept: {error}.") from error

    def _pairs(self, world: World | None) -> Sequence[tuple[str, str]]:
        """Return (prompt, anchor prompt) pairs, no prompt twice."""
        templates, contexts = _forms(world, self.kind == "style")
        pairs: dict[str, str] = {}
        for template in self.templates or templates:
            for context in contexts if "{x}" in template else ("",):
                for word in self.words(world):
                    anchor = _fill(template, self.anchor, context) if self.anchor else ""
                    pairs.setdefault(_fill(template, word, context), anchor)
        return tuple(pairs.items())

    def _warn_slip(self, world: World | None) -> None:
        if world is None or world.canonical(self.anchor) or not (close := world.slips(self.anchor)):
            return
        warnings.warn(
            f"the anchor {self.anchor!r} of {self.name!r} is no name of the model {world.name!r}, and is taken for a "
            f"phrase. Near names: {', '.join(close)}. If one of them is meant, give it as the anchor.",
            NearMiss,
            stacklevel=3,
        )

    def _check_known(self, world: World) -> None:
        # a text encoder reads any phrase, a class-conditional model its classes only
        spoken = (*self.prompts(world), *filter(None, (self.anchor,))) if world.labels else ()
        for name in (*self.names, *self.keep, *spoken):
            if world.canonical(name):
                continue
            close = world.near(name)
            hint = f" Near ones: {', '.join(close)}." if close else f" For example: {', '.join(world.objects[:5])}."
            raise ConceptError(
                f"{name!r} is not a concept of the model {world.name!r} "
                f"({len(world.objects)} objects, {len(world.styles)} styles).{hint}"
            )
        styles = [n for n in self.names if n in world.styles]
        if self.kind == "object" and styles:
            raise ConceptError(
                f"{styles[0]!r} is a style of {world.name!r}, not an object. Say so: kind='style' (--kind style)."
            )
        if self.kind == "style" and (objects := [n for n in self.names if n not in world.styles]):
            raise ConceptError(f"{objects[0]!r} is no style of {world.name!r}. Styles: {', '.join(world.styles)}.")


@dataclass(frozen=True)
class Pictures:
    """Pictures that a method learns from, encoded once.

    Attributes:
        latents: what the model's denoiser would draw them from, (n, ...).
        prompts: what each of them shows; "" when that is not known.
    """

    latents: Tensor = field(repr=False)
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Targets:
    """A concept resolved against a model's world: what methods get.

    Attributes:
        concept: the concept, under the world's names.
        prompts: the distribution of prompts that it stands for.
        anchors: for each prompt, the same one with the anchor in place of the concept ("" without an anchor).
        keeps: prompts to retain.
        bare: those of the prompts that say nothing beside the name, for pictures whose contexts are not known.
        blanks: for each prompt, the same one with nothing in place of the concept.
        pictures: pictures of the concept, where the method needs them.
        retained: pictures to retain, where the method needs them; the first of several targets has them all.
        rejected: of a concept that people rated, prompts whose pictures they reject.
        accepted: likewise, the other prompts of their study.
        critic: tells what they reject, where it is known: see `kernel/critic.py`.
    """

    concept: Concept
    prompts: tuple[str, ...]
    anchors: tuple[str, ...]
    keeps: tuple[str, ...]
    bare: tuple[str, ...] = ()
    blanks: tuple[str, ...] = ()
    pictures: Pictures | None = field(default=None, compare=False)
    retained: Pictures | None = field(default=None, compare=False)
    rejected: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    critic: Critic | None = field(default=None, compare=False)


def _forms(world: World | None, style: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return templates and contexts of an object or a style."""
    if world is None:
        return (STYLE_TEMPLATES, STYLE_CONTEXTS) if style else (OBJECT_TEMPLATES, OBJECT_CONTEXTS)
    return (world.style_templates, world.objects) if style else (world.object_templates, world.styles)


def _fill(template: str, concept: str, context: str) -> str:
    """Fill a template; `str.format` would trip over braces in a user's words."""
    return template.replace("{x}", context).replace("{c}", concept)
