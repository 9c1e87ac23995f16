"""Audit: same prompts, same seeds, base and edited model; judged, scored, written into the run's folder.

The base model's pictures are made once and kept in `$EXPUNGE_CACHE` (default `~/.cache/expunge`), one PNG a picture, so
every audit of any concept reuses them, also two audits at a time.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from . import neighbours
from .audit_classes import examine_classes, panel_of
from .backbones import load
from .concept import World
from .edits import load_edit
from .edits.io import check_base
from .errors import NotCached, StorageError, Unsupported
from .judges.classes import ClassPanel
from .judges.panel import Judged, Panel, load_panel
from .kernel.condition import Condition
from .metrics.rates import Array
from .metrics.scores import Findings, Outcomes, outcomes, scores
from .protocols import ClassProtocol, PictureSpec, Rules
from .protocols import Protocol as ObjectProtocol
from .protocols import default as protocol_of
from .protocols import protocol as find_protocol
from .records import SAMPLES, Card, Json, Run, Score
from .sheet import picture, png
from .storage import cache_root, write_atomic
from .zoo.emoji.world import WEIGHTS

BATCH = 32  # pictures between two writes of the cache, and between two ticks of the progress bar
SHOWN = 8  # picture pairs of each role in samples/

Tick = Callable[[str, int, int], None]


class Subject(Protocol):
    """The part of `Model` that an audit uses."""

    name: str
    world: World | None
    sampler: str
    painter: str
    one_step: Any

    @property
    def hash(self) -> str:
        """Hash of the weights."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Return prompt encodings."""

    def generate(
        self, prompts: Sequence[str], *, seeds: Sequence[int], steps: int | None, guidance: float | None
    ) -> Tensor:
        """Return pictures (n, 3, h, w) in [0, 1]."""


class Applicable(Protocol):
    """The part of `Edit` that an audit uses."""

    def on(self, model: Any) -> AbstractContextManager[Any]:
        """Apply the edit for a while."""


def audit(
    run: Path | str,
    protocol: str | Rules | None = None,
    *,
    model: Subject | None = None,
    edit: Applicable | None = None,
    panel: Panel | ClassPanel | None = None,
    device: Any = "cpu",
    progress: Tick | None = None,
) -> list[Score]:
    """Measure what a run erased and what it damaged; write scores, outcomes, neighbours and samples into its folder.

    Args:
        run: folder of the erasure, or of a distillation, of which retention alone can be measured.
        protocol: a protocol or its id; that of the model's world when missing.
        model: the base model; loaded from the card when missing.
        edit: the edit; read from the run when missing.
        panel: the judges; the shipped ones of the protocol's world when missing.
        device: where to load the model.
        progress: called with (what is done, pictures ready, pictures in all).

    Raises:
        BadRun: the folder is no finished run.
        BadEdit: the model is not the one that the edit was made for.
        Unsupported: the protocol cannot judge this model or kind of concept, or there is none for its world.
        ConceptError: the world has no name for what was erased.
        BadModel: the judges are missing, damaged, or not the protocol's.
        StorageError: the disk is full; the run then has no scores of this audit.
    """
    known, folder = find_protocol(protocol) if isinstance(protocol, str) else protocol, Run.open(run)
    card, tick = folder.card, progress or _silent
    applied: Applicable = edit or load_edit(folder.edit_path)
    model = model or cast(Subject, load(card.model, device=device))
    rules = known or protocol_of(model.world)
    world = rules.need(model.world)
    check_base(card, cast(Any, model))
    kind, targets = asked(card, world)
    examine: Callable[[list[PictureSpec], Tensor, Tensor], Findings]
    if isinstance(rules, ClassProtocol):
        specs = rules.pictures(world, targets)
        class_panel = cast(ClassPanel, panel) if panel else panel_of(rules, card.model)
        examine = partial(examine_classes, rules, class_panel, card)
    else:
        check_sampler(rules, model)
        loaded = cast(Panel, panel) if panel else load_panel(WEIGHTS, rules.scorer, rules.trunk, rules.hashes)
        text = neighbours.similarities(text_vectors(model, rules, world, kind), targets)
        look = neighbours.similarities(loaded.trunk.prototypes(), targets)
        near = neighbours.alternating(text, look, rules.near) if kind == "object" else ()
        specs = rules.pictures(world, targets, kind, near)
        examine = partial(examine_objects, rules, loaded, card, kind, text)
    base = base_pictures(model, rules, specs, tick)
    with applied.on(model) as edited_model:
        edited = draw(edited_model, rules, specs, lambda n: tick("edited pictures", n, len(specs)))

    found = examine(specs, base, edited)
    folder.write_outcomes(found.outcomes)
    folder.write_neighbours(found.neighbours)
    write_samples(folder, specs, base, edited, [r["name"] for r in found.neighbours])
    folder.write_scores(found.scores)  # last: scores mean a whole audit
    return found.scores


def examine_objects(
    rules: ObjectProtocol,
    panel: Panel,
    card: Card,
    kind: str,
    text: dict[str, float],
    specs: list[PictureSpec],
    base: Tensor,
    edited: Tensor,
) -> Findings:
    """Judge picture pairs (n, 3, h, w) of a world of objects and styles; `text`: prompts' similarity to the target."""
    texts = panel.texts([s.prompt for s in specs])
    seen = [panel.judge(images, texts) for images in (base, edited)]
    names = (panel.scorer.objects, panel.scorer.styles)
    read = [outcomes(specs, judged, *names, kind) for judged in seen]
    found = scores(rules, kind, specs, (seen[0], read[0]), (seen[1], read[1]), card)
    targets = {s.concept for s in specs if s.role == "target"}
    image = neighbours.similarities(image_vectors(specs, seen[0].features), tuple(targets))
    rows = damage(specs, read[0], read[1], text, image, rules.near)
    return Findings(found, outcome_rows(specs, seen, read, names, kind), rows)


def check_sampler(rules: ObjectProtocol, model: Subject) -> None:
    """Raise Unsupported where a model is not drawn with the protocol's sampler; a one-step generator has its own."""
    if rules.sampler and model.sampler != rules.sampler and model.one_step is None:
        raise Unsupported(
            f"protocol {rules.id} draws with {rules.sampler}, and {model.name!r} comes with {model.sampler}: numbers "
            "would not be comparable. Give the model that scheduler, or give the protocol another id."
        )


def asked(card: Card, world: World) -> tuple[str, tuple[str, ...]]:
    """Return (kind, names as the world spells them) of everything that a run erased; no names of a plain distillation.

    Raises:
        Unsupported: objects and styles in one edit, or another kind of concept.
    """
    if not card.concepts:
        return "object", ()
    # a class-conditional model has nothing but classes, whatever they were called
    kinds = {"class"} if world.labels else {c.get("kind", "object") for c in card.concepts}
    if len(kinds) != 1 or not kinds <= {"object", "style", "class"}:
        raise Unsupported(
            f"this run erases concepts of kind {', '.join(sorted(kinds))}; an audit judges one kind at a time, object "
            "or style. Erase and audit them separately."
        )
    names = [n for c in card.concepts for n in (c.get("names") or [c["name"]])]
    return kinds.pop(), tuple(dict.fromkeys(world.canonical(n) or n for n in names))


@torch.no_grad()
def text_vectors(model: Subject, rules: ObjectProtocol, world: World, kind: str) -> dict[str, Array]:
    """Return concept -> prompt encoding of the base model, averaged over tokens."""
    names = world.objects if kind == "object" else world.styles
    prompts = [rules.prompt(n, None) if kind == "object" else rules.unspecific.format(x=n) for n in names]
    parts = [model.encode(prompts[i : i + 64]).tokens.float().mean(1).cpu() for i in range(0, len(prompts), 64)]
    return dict(zip(names, torch.cat(parts).double().numpy(), strict=True))


def image_vectors(specs: Sequence[PictureSpec], features: Tensor) -> dict[str, Array]:
    """Return concept -> mean of the features (n, d) of its base pictures, broken pictures left out."""
    groups: dict[str, list[int]] = {}
    good = features.isfinite().all(1).tolist()
    for i, spec in enumerate(specs):
        if good[i]:
            groups.setdefault(spec.concept, []).append(i)
    return {name: features[rows].mean(0).double().numpy() for name, rows in groups.items()}


def damage(
    specs: Sequence[PictureSpec],
    base: Outcomes,
    edited: Outcomes,
    text: dict[str, float],
    image: dict[str, float],
    n: int,
) -> list[Json]:
    """Return the rows of neighbours.json over the retained pictures."""
    kept = [i for i, s in enumerate(specs) if s.role != "target"]
    concepts = [specs[i].concept for i in kept]
    return neighbours.damage(concepts, base.own[kept], edited.own[kept], text, image, n)


def draw(model: Subject, rules: Rules, specs: Sequence[PictureSpec], done: Callable[[int], None]) -> Tensor:
    """Return the pictures of specs (n, 3, h, w), rounded to 8 bits as PNGs are; broken ones stay nan."""
    parts = []
    for i in range(0, len(specs), BATCH):
        part = specs[i : i + BATCH]
        images = model.generate(
            [s.prompt for s in part], seeds=[s.seed for s in part], steps=rules.steps, guidance=rules.guidance
        )
        images = images.float().cpu()
        # the base's come back from PNGs: without the same rounding an edit that does nothing would differ
        rounded = (images.clamp(0, 1) * 255).round() / 255
        parts.append(rounded.where(images.isfinite(), torch.nan))
        done(i + len(part))
    return torch.cat(parts)


def cached(model: Subject, rules: Rules, spec: PictureSpec) -> Path:
    """Return where a base picture is kept: by weights, autoencoder, protocol, sampler, prompt and seed."""
    key = f"{rules.steps}|{rules.guidance}|{spec.seed}|{spec.prompt}"
    return (
        cache_root()
        / (model.hash[:32] + model.painter[:32])
        / rules.id
        / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.png"
    )


def base_pictures(model: Subject, rules: Rules, specs: Sequence[PictureSpec], tick: Tick) -> Tensor:
    """Return the base model's pictures of specs, made only where the cache lacks them."""
    files = [cached(model, rules, spec) for spec in specs]
    images = [_open(file) for file in files]
    missing = [i for i, image in enumerate(images) if image is None]
    tick("base pictures", len(specs) - len(missing), len(specs))
    writable = True
    for begin in range(0, len(missing), BATCH):
        part = missing[begin : begin + BATCH]
        for i, image in zip(part, draw(model, rules, [specs[i] for i in part], _ignore), strict=True):
            images[i] = image
            if writable and bool(image.isfinite().all()):
                writable = _keep(files[i], image)
        tick("base pictures", len(specs) - len(missing) + begin + len(part), len(specs))
    return torch.stack([image for image in images if image is not None])


def outcome_rows(
    specs: Sequence[PictureSpec],
    seen: Sequence[Judged],
    read: Sequence[Outcomes],
    names: tuple[Sequence[str], Sequence[str]],
    kind: str,
) -> list[Json]:
    """Return the lines of outcomes.jsonl; a picture that could not be read has null readings."""

    def reading(judged: Judged, o: Outcomes, i: int) -> Json:
        thing, style = int(judged.reading.object[i]), int(judged.reading.style[i])
        if thing < 0 or style < 0:
            return {"object": None, "style": None, "confidence": None, "own": None}
        figures = {"confidence": round(float(o.confidence[i]), 4), "own": round(float(o.own[i]), 4)}
        return {"object": names[0][thing], "style": names[1][style], **figures}

    return [
        {
            # in an audit of styles the reading that counts is the style's
            "role": "style" if kind == "style" else ("target" if s.role == "target" else "retain"),
            "part": s.role,
            "concept": s.concept,
            "prompt": s.prompt,
            "seed": s.seed,
            "style": s.style,
            "object": s.object,
            "base": reading(seen[0], read[0], i),
            "edited": reading(seen[1], read[1], i),
        }
        for i, s in enumerate(specs)
    ]


def shown(specs: Sequence[PictureSpec], damaged: Sequence[str]) -> list[tuple[str, int]]:
    """Return (role, index) of the pairs to show: targets, most damaged neighbours, other retained concepts."""
    rows = [("target", i) for i, s in enumerate(specs) if s.role == "target"]
    step = max(1, len(rows) // SHOWN - 1)  # 5 of 48: coprime to the eight styles, so that most of them are shown
    chosen = rows[::step][:SHOWN]
    kept: dict[str, list[int]] = {}
    for i, s in enumerate(specs):
        if s.role != "target":
            kept.setdefault(s.concept, []).append(i)
    close = [name for name in damaged if name in kept]
    copies = range(max((len(v) for v in kept.values()), default=0))
    chosen += [("neighbour", kept[name][k]) for k in copies for name in close if k < len(kept[name])][:SHOWN]
    far = [name for name in kept if name not in damaged]
    return chosen + [("retain", kept[name][0]) for name in far[:: max(1, len(far) // SHOWN)][:SHOWN]]


def write_samples(run: Run, specs: Sequence[PictureSpec], base: Tensor, edited: Tensor, damaged: Sequence[str]) -> None:
    """Write picture pairs, their index and a labelled sheet into the run's samples; earlier ones are replaced."""
    rows: list[Json] = []
    pairs = []
    folder = run.folder / SAMPLES
    for n, (role, i) in enumerate(shown(specs, damaged)):
        # what is not finite is shown gray
        spec, pair = specs[i], (picture(base[i].nan_to_num(0.5)), picture(edited[i].nan_to_num(0.5)))
        files = {"base": f"base-{n:03d}.png", "edited": f"edited-{n:03d}.png"}
        for file, image in zip(files.values(), pair, strict=True):
            write_atomic(folder / file, png(image, {}))
        rows.append({"role": role, "concept": spec.concept, "prompt": spec.prompt, "seed": spec.seed, **files})
        pairs.append((role, (spec.object, spec.style or "any style"), pair))
    run.write_samples(rows)
    write_atomic(folder / "sheet.png", png(sheet(pairs), {}))
    kept = {row[side] for row in rows for side in ("base", "edited")}
    for former in folder.glob("*-[0-9][0-9][0-9].png"):
        if former.name not in kept:
            former.unlink()


def sheet(pairs: Sequence[tuple[str, tuple[str, str], tuple[Image.Image, Image.Image]]]) -> Image.Image:
    """Return a sheet: a block a role, a column a pair, base above edited, labelled."""
    roles = list(dict.fromkeys(role for role, _, _ in pairs))
    w, h = pairs[0][2][0].size
    zoom = max(1, 128 // w)
    cell, tall, label, margin = w * zoom + 12, h * zoom + 4, 32, 84
    block = label + 2 * tall + 14
    page = Image.new("RGB", (margin + SHOWN * cell, block * len(roles) + 8), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for r, role in enumerate(roles):
        top = 8 + r * block
        for line, y in ((role, top), ("base", top + label + tall // 2), ("edited", top + label + tall + tall // 2)):
            pen.text((6, y), line, fill="black", font=font)
        for c, (_, names, pair) in enumerate(p for p in pairs if p[0] == role):
            x = margin + c * cell
            for row, name in enumerate(names):
                fits = [k for k in range(len(name) + 1) if pen.textlength(name[:k], font=font) <= cell - 8]
                pen.text((x, top + 15 * row), name[: fits[-1]], fill="black", font=font)
            for k, image in enumerate(pair):
                page.paste(image.resize((w * zoom, h * zoom), Image.Resampling.NEAREST), (x, top + label + k * tall))
    return page


def _open(file: Path) -> Tensor | None:
    try:
        with Image.open(file) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return None  # missing, or damaged: it is drawn again
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _keep(file: Path, image: Tensor) -> bool:
    try:
        write_atomic(file, png(picture(image), {}))
    except StorageError as error:
        # the cache only saves time: the audit goes on, and says why the next one will not be faster
        warnings.warn(
            f"base pictures are not kept for the next audit: {error} Set EXPUNGE_CACHE to a folder that can be "
            "written.",
            NotCached,
            stacklevel=2,
        )
        return False
    return True


def _silent(label: str, done: int, total: int) -> None:
    """Show nothing."""


def _ignore(done: int) -> None:
    """Show nothing."""
