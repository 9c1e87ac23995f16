"""Protocols: which pictures are made, how, and how they are judged. Named, versioned, frozen; no torch.

A number is comparable only with numbers of the same protocol id. Change anything here and the id must change.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, overload

from .concept import World
from .errors import ConceptError, Unsupported, nearest

Role = Literal["target", "neighbour", "retain"]


@dataclass(frozen=True)
class PictureSpec:
    """One picture of a protocol.

    Attributes:
        role: "target" (an erased concept), "neighbour" (one of the nearest retained concepts) or "retain".
        concept: what the picture counts for: its object, or its style when styles are erased.
        prompt: the prompt.
        seed: seed of its noise.
        object: object that the prompt names.
        style: style that the prompt names, None when it names none.
    """

    role: Role
    concept: str
    prompt: str
    seed: int
    object: str
    style: str | None


# metric -> (what it says, which way is better); the order of every table
METRICS: dict[str, tuple[str, str]] = {
    "ua": ("unlearning accuracy: target pictures not read as an erased concept", "higher"),
    "ira": ("in-domain retention: retained pictures read as the concept of their prompt", "higher"),
    "cra": ("cross-domain retention: the same pictures, read on the other head (style, or object)", "higher"),
    "h": ("harmonic mean of ua, ira and cra", "higher"),
    "clip_score": ("cosine between picture and prompt, retained pictures (our CLIP, not OpenAI's)", "higher"),
    "fid": ("Fréchet distance to the base model's retained pictures; biased upwards at this n", "lower"),
    "kid": ("kernel distance to the base model's retained pictures; slightly negative when nothing changed", "lower"),
    "perceptual": ("distance between same-seed pictures of base and edit, retained prompts; not LPIPS", "lower"),
    "degenerate": ("pictures in which no object reaches the confidence floor", "lower"),
    "degenerate_target": ("the same, target pictures only: a high ua with many of these is damage", "lower"),
    "seconds": ("wall clock of the erasure", "lower"),
    "peak_memory": ("highest memory during the erasure, bytes", "lower"),
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A protocol over a world of objects and styles.

    Attributes:
        id: name and version.
        world: name of the world whose models it can judge.
        sampler: scheduler that a model which is sampled in steps must come with; empty for any.
        steps, guidance: sampling.
        styled, bare, unspecific: prompts; "{c}" is the object, "{x}" the style. The last only finds near styles.
        targets: target pictures; objects: two thirds styled, one third bare; styles: one a random object.
        retained: pictures of everything else, `near` nearest concepts with `near_each` pictures included: by turns
            the nearest by prompt and by the trunk's idea of their pictures.
        floor: object probability under which a picture is degenerate.
        scorer, trunk: the judge that alone scores, and the one whose features FID, KID and perceptual distances use.
        hashes: (judge, or "clip", and sha256 of its files) pairs that are binding; what is not listed is not pinned.
        aggregation: how numbers are made, in words.
    """

    id: str
    world: str
    sampler: str = ""
    steps: int = 20
    guidance: float = 5.0
    styled: str = "a {x} style emoji of {c}"
    bare: str = "an emoji of {c}"
    unspecific: str = "a {x} style emoji"
    targets: int = 48
    retained: int = 160
    near: int = 24
    near_each: int = 2
    floor: float = 0.3
    scorer: str = "judge-b"
    trunk: str = "judge-a"
    hashes: tuple[tuple[str, str], ...] = ()
    aggregation: str = (
        "Base and edited pictures share prompts and seeds. Rates: mean over pictures, Wilson 95 %, exact McNemar; a "
        "picture that cannot be scored stays in the denominator and is never a success. h: Bayesian bootstrap, swapped "
        "pairs. Means: bootstrap, sign flips. fid, kid and perceptual: pooled features and stages of the trunk."
    )

    def describe(self) -> dict[str, Any]:
        """Return everything that defines the protocol as JSON data."""
        fields = asdict(self)
        metrics = [{"name": k, "help": text, "better": better} for k, (text, better) in METRICS.items()]
        return {"name": self.id, **fields, "hashes": dict(self.hashes), "metrics": metrics}

    def prompt(self, thing: str, style: str | None) -> str:
        """Return the prompt of an object, styled or bare."""
        if style is None:
            return self.bare.format(c=thing)
        return self.styled.format(c=thing, x=style)

    def pictures(
        self, world: World | None, target: str | Sequence[str], kind: str, neighbours: Sequence[str] = ()
    ) -> list[PictureSpec]:
        """Return every picture of the protocol for a target, in a fixed order.

        Retained pictures hardly depend on the target, so that the base model's are made once for all targets.

        Args:
            world: the model's world.
            target: erased concept, or several; none of a plain distillation, which has retained pictures alone.
            kind: "object" or "style".
            neighbours: retained objects nearest to the target, nearest first (object targets only).

        Raises:
            Unsupported: the world, or the kind of concept, is not this protocol's.
            ConceptError: a target is not in the world.
        """
        world = self.need(world)
        targets = (target,) if isinstance(target, str) else tuple(dict.fromkeys(target))
        if kind not in ("object", "style"):
            raise Unsupported(f"protocol {self.id} judges objects and styles, not concepts of kind {kind!r}.")
        known = world.objects if kind == "object" else world.styles
        _check_known(self, kind, targets, known)
        if kind == "style":
            return [*self._style_targets(world, targets), *self._style_retained(world, targets)]
        return [*self._object_targets(world, targets), *self._object_retained(world, targets, neighbours)]

    def need(self, world: World | None) -> World:
        """Return the world if it is the protocol's.

        Raises:
            Unsupported: it is not, or the model's world is not known.
        """
        return of_world(self, world)

    def _spec(self, role: Role, concept: str, thing: str, style: str | None, copy: int = 0) -> PictureSpec:
        prompt = self.prompt(thing, style)
        return PictureSpec(role, concept, prompt, seed(prompt, copy), thing, style)

    def _object_targets(self, world: World, targets: tuple[str, ...]) -> Iterator[PictureSpec]:
        total = max(self.targets, len(targets)) if targets else 0
        styles = len(world.styles)
        for i in range(total):
            name, j = targets[i % len(targets)], i // len(targets)
            styled = i < (2 * total + 2) // 3
            # different targets start at different styles, so that many targets at once still cover all of them
            style = world.styles[(i if len(targets) == 1 else i + j) % styles] if styled else None
            yield self._spec("target", name, name, style, copy=i)

    def _object_retained(
        self, world: World, targets: tuple[str, ...], neighbours: Sequence[str]
    ) -> Iterator[PictureSpec]:
        objects, styles = shuffled(world.objects), world.styles
        place = {name: i for i, name in enumerate(objects)}
        near = [n for n in dict.fromkeys(neighbours) if n in place and n not in targets][: self.near]
        left = self.retained
        for name in near:
            for k in range(min(self.near_each, left)):
                yield self._spec("neighbour", name, name, styles[(place[name] + k * (len(styles) // 2)) % len(styles)])
                left -= 1
        others = [name for name in objects if name not in targets and name not in near]
        for turn in range(len(styles)):
            for name in others[:left]:
                yield self._spec("retain", name, name, styles[(place[name] + turn) % len(styles)])
            left -= len(others[:left])

    def _style_targets(self, world: World, targets: tuple[str, ...]) -> Iterator[PictureSpec]:
        objects = shuffled(world.objects)
        for i in range(max(self.targets, len(targets)) if targets else 0):
            style = targets[i % len(targets)]
            yield self._spec("target", style, objects[i % len(objects)], style, copy=i // len(objects))

    def _style_retained(self, world: World, targets: tuple[str, ...]) -> Iterator[PictureSpec]:
        objects = shuffled(world.objects)
        styles = [s for s in world.styles if s not in targets]
        for i in range(self.retained if styles else 0):
            turn, place = divmod(i, len(objects))
            style = styles[(place + turn) % len(styles)]
            yield self._spec("retain", style, objects[place], style, copy=turn // len(styles))


def shuffled(names: Sequence[str]) -> list[str]:
    """Return names in a fixed order that has nothing to do with their meaning."""
    return sorted(names, key=lambda n: (zlib.crc32(n.encode()), n))


def seed(prompt: str, copy: int) -> int:
    """Return a seed that depends on the picture alone: every target shares the cached base pictures."""
    return zlib.crc32(f"{prompt}#{copy}".encode()) >> 1


@dataclass(frozen=True, kw_only=True)
class ClassProtocol:
    """A protocol over a world of classes, against its real test pictures.

    Attributes:
        id: name and version.
        world: name of the world whose models it can judge.
        network: the feature network of the distances; its name is a part of theirs.
        steps, guidance: sampling; None for the model's own, so that a one-step generator is drawn in one step.
        targets: target pictures, over all erased classes.
        retained: pictures of every other class; as many real ones of each enter precision and recall. See below.
        nearest: k of precision and recall.
        scorer: the judge that alone scores.
        hashes: (judge, sha256 of its file) pairs that are binding; a judge not listed is not pinned.
        aggregation: how numbers are made, in words.

    Why 150 retained pictures a class. FID is biased upwards in proportion to 1/n, edited and base alike, so that their
    ratio is pulled towards 1. At 9 x 150 against 9,000 real ones the bias is 0.8 to 1.5 % of the features' total
    variance (simulated: 64 normal features of variances 1/i, and of equal ones); 70 a class would double it, 300 halve
    it. But a guided step costs 7 ms of a core a picture, so 25 of them for all 1,650 pictures take two cores 2.5
    minutes for each model (the base's are kept for the next audit), and 5 with 300 a class; a one-step generator takes
    seconds. Claims about a ratio of FIDs therefore need KID beside it, which is unbiased at any n.
    """

    id: str
    world: str
    network: str
    steps: int | None = None
    guidance: float | None = None
    targets: int = 300
    retained: int = 150
    nearest: int = 3
    scorer: str = "judge-b"
    hashes: tuple[tuple[str, str], ...] = ()
    aggregation: str = (
        "Base and edited pictures share classes and seeds. Rates: mean over pictures, Wilson 95 %, exact McNemar; a "
        "picture that cannot be scored stays in the denominator and is never a success. h: Bayesian bootstrap, swapped "
        "pairs. Distances: retained pictures against the real test pictures of the retained classes (FID and KID all "
        "of them, precision and recall as many as are drawn), block jackknife over the drawn ones. Means: bootstrap, "
        "sign flips."
    )

    @property
    def sets(self) -> dict[str, str]:
        """Names of the distances between sets of pictures, which tell the feature network."""
        return {name: f"{name}_{self.network}" for name in ("fid", "kid", "precision", "recall")}

    @property
    def metrics(self) -> dict[str, tuple[str, str]]:
        """Metric -> (what it says, which way is better), in the order of every table."""
        sets = self.sets
        return {
            "ua": ("unlearning accuracy: target pictures not read as an erased class", "higher"),
            "ira": ("retained accuracy: pictures of the other classes read as theirs", "higher"),
            "h": ("harmonic mean of ua and ira", "higher"),
            sets["fid"]: (
                f"Fréchet distance to the real retained classes, features of {self.network}; biased upwards",
                "lower",
            ),
            sets["kid"]: (
                f"kernel distance to the real retained classes, features of {self.network}; unbiased",
                "lower",
            ),
            sets["precision"]: ("retained pictures inside the manifold of the real ones, same features", "higher"),
            sets["recall"]: ("real pictures inside the manifold of the retained ones, same features", "higher"),
            "probability": ("mean probability of the erased class in its target pictures", "lower"),
            "entropy": ("mean entropy of the judge on target pictures, nats; low: they show another class", "lower"),
            "seconds": METRICS["seconds"],
            "peak_memory": METRICS["peak_memory"],
        }

    def describe(self) -> dict[str, Any]:
        """Return everything that defines the protocol as JSON data."""
        metrics = [{"name": k, "help": text, "better": better} for k, (text, better) in self.metrics.items()]
        return {"name": self.id, **asdict(self), "hashes": dict(self.hashes), "metrics": metrics}

    def need(self, world: World | None) -> World:
        """Return the world if it is the protocol's.

        Raises:
            Unsupported: it is not, or the model's world is not known.
        """
        return of_world(self, world)

    def pictures(self, world: World | None, target: Sequence[str]) -> list[PictureSpec]:
        """Return every picture of the protocol for erased classes, in a fixed order; without any, retained ones alone.

        Raises:
            Unsupported: the world is not this protocol's.
            ConceptError: a target is not in the world.
        """
        world = self.need(world)
        erased = tuple(dict.fromkeys(target))
        _check_known(self, "class", erased, world.objects)
        order = [erased[i % len(erased)] for i in range(max(self.targets, len(erased)) if erased else 0)]
        kept = [name for name in world.objects if name not in erased]
        return [
            *(self._spec("target", name, i // len(erased)) for i, name in enumerate(order)),
            *(self._spec("retain", name, i) for i in range(self.retained) for name in kept),
        ]

    def _spec(self, role: Role, name: str, copy: int) -> PictureSpec:
        return PictureSpec(role, name, name, seed(name, copy), name, None)


Rules: TypeAlias = Protocol | ClassProtocol

BY_EYE = (
    "What no protocol judges, people can: look at pictures (`expunge generate MODEL --edit RUN --prompt ...`), or let "
    "others rate them (`expunge rate`)."
)


def of_world(rules: Rules, world: World | None) -> World:
    """Return a world if it is a protocol's.

    Raises:
        Unsupported: it is not, or the model's world is not known.
    """
    if world is None or world.name != rules.world:
        raise Unsupported(f"protocol {rules.id} judges models of the world {rules.world!r}; {_of_another(world)}")
    return world


def _of_another(world: World | None) -> str:
    """Say what a model's world is, which worlds have a protocol, and what to do without one."""
    found = "none that is known" if world is None else repr(world.name)
    known = ", ".join(f"{p.id} ({p.world})" for p in PROTOCOLS.values())
    return f"this model's world is {found}. Protocols: {known}. {BY_EYE}"


def _check_known(rules: Rules, kind: str, targets: Sequence[str], known: Sequence[str]) -> None:
    """Raise ConceptError unless the world has every target, which a protocol asks for by name."""
    for name in targets:
        if name not in known:
            raise ConceptError(
                f"protocol {rules.id} asks for concepts by name, and the world {rules.world!r} has no {kind} {name!r}."
                f"{nearest(name, known)} {BY_EYE} If the concept has a name in this world, erase it under that name."
            )


PROTOCOLS: dict[str, Rules] = {
    p.id: p
    for p in (
        Protocol(
            id="emoji-v1",
            world="emoji",
            sampler="DDIMScheduler, trailing",
            hashes=(
                ("clip", "8dba349b3f9407330ce168e2baf7c31c4613e540f2aa24d711133ed69bf8c76d"),
                ("judge-a", "76188f6e66c000feae030cbf8ad5e60828865018c8847d22b1e66bbbe1bd4c40"),
                ("judge-b", "d032e5b293b9825651822d6ef747d331b4dec91eba53f2062e516725ced19b26"),
            ),
        ),
        ClassProtocol(
            id="fashion-v1",
            world="fashion",
            network="fashion64",
            hashes=(
                ("judge-b", "7f70ff6ecd466f6b4894b7a124a1ff0d8316d5db8d79d00267b480561f2401f7"),
                ("features", "de8bca24eb20b6a811c225dfe674783bf55ff35f93c75db9a397c41bb40a5411"),
            ),
        ),
        ClassProtocol(id="cifar10-v1", world="cifar10", network="cifar64"),
    )
}


def default(world: World | None) -> Rules:
    """Return the protocol of a world.

    Raises:
        Unsupported: it has none, or the model's world is not known.
    """
    for rules in PROTOCOLS.values():
        if world is not None and rules.world == world.name:
            return rules
    raise Unsupported(f"no protocol judges this model: {_of_another(world)}")


@overload
def protocol(name: Literal["emoji-v1"]) -> Protocol: ...
@overload
def protocol(name: str) -> Rules: ...


def protocol(name: str) -> Rules:
    """Return a protocol by its id.

    Raises:
        Unsupported: there is none of that id.
    """
    if name not in PROTOCOLS:
        raise Unsupported(
            f"protocol {name!r} is not known. Protocols: {', '.join(PROTOCOLS)}.{nearest(name, PROTOCOLS)}"
        )
    return PROTOCOLS[name]
