"""What the claims of `bench claims` are decided by: numbers of an audit, and numbers that are measured beside it.

The latter are kept in a cell's measures.json, so that nothing is measured twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..auditing import base_pictures, draw
from ..concept import Concept
from ..door import erase
from ..edits import Edit, GatedEdit, WeightEdit, load_edit
from ..edits.io import parameters
from ..judges.panel import Panel
from ..kernel.model import Model
from ..kernel.saliency import smallest
from ..methods.neggrad import NegGrad
from ..protocols import PictureSpec, shuffled
from ..records import EDIT, Json, Run
from ..zoo.emoji.world import BENCH_TARGETS, world
from .cells import MEASURES, REFUSED, SEED, SHORT, drawn, scores_of

KEPT = 24  # retained pictures that are drawn again where an audit's scores do not suffice
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the time axis, where the unconditional score is looked at
SHARE = 0.1  # of each tensor: SaRA's smallest weights, and what pruning takes
TUNE = NegGrad(beta=0.0)  # ascends nothing: training as usual, on pictures to retain
# objects whose membranes are composed: the first of a shuffled order, bench targets left out, as in uce.py
JOINED = tuple(o for o in shuffled(world().objects) if o not in BENCH_TARGETS)[:20]


class Cell(NamedTuple):
    """One arm on one target with one seed."""

    method: Any
    target: str
    seed: int

    def folder(self, work: Path) -> Path:
        """Return its run folder."""
        return work / label(self.method).replace(" ", "-") / f"{self.target.replace(' ', '-')}-{self.seed}"


def label(method: Any) -> str:
    """Return a method's name and whatever it has not by default."""
    found = ((f.name, getattr(method, f.name), f.default) for f in fields(method))
    return " ".join([type(method).__name__.lower(), *(f"{k}={v}" for k, v, usual in found if v != usual)])


@dataclass(frozen=True)
class Scene:
    """A cell with what it is measured with.

    Attributes:
        model: the base.
        panel: the judges.
        cell: arm, target, seed.
        folder: its run folder.
    """

    model: Model
    panel: Panel | None
    cell: Cell
    folder: Path

    @property
    def concept(self) -> Concept:
        """What is erased."""
        return Concept(self.cell.target, kind="object")

    def specs(self) -> tuple[list[PictureSpec], list[PictureSpec]]:
        """Return the protocol's target pictures, and some retained ones."""
        found = SHORT.pictures(self.model.world, self.cell.target, "object")
        aimed = [s for s in found if s.role == "target"]
        return aimed, found[len(aimed) :][:KEPT]


def measured(folder: Path) -> Json:
    """Return what was measured of a cell beside its audit."""
    found: Json = json.loads((folder / MEASURES).read_text()) if (folder / MEASURES).is_file() else {}
    return found


@torch.no_grad()
def identical(scene: Scene) -> dict[str, float]:
    """Share of retained pictures that edit and base draw alike, to the last bit."""
    _, kept = scene.specs()

    def made(model: Model) -> Tensor:
        return model.generate(
            [s.prompt for s in kept], seeds=[s.seed for s in kept], steps=SHORT.steps, guidance=SHORT.guidance
        )

    base = made(scene.model)
    with load_edit(scene.folder).on(scene.model) as model:
        same = [torch.equal(a, b) for a, b in zip(base, made(model), strict=True)]
    return {"identical": fmean(same)}


def null_change(scene: Scene) -> dict[str, float]:
    """Relative change of the unconditional score, on noised pictures of the base."""
    _, kept = scene.specs()
    z = scene.model.latents(base_pictures(scene.model, SHORT, kept, lambda *_: None).to(scene.model.device))
    return {"null change": unconditional(scene.model, load_edit(scene.folder), z)}


@torch.no_grad()
def unconditional(model: Model, edit: Edit, z: Tensor) -> float:
    """Return the mean of |e_theta(x_t, t, null) - e(x_t, t, null)| / |e(x_t, t, null)| over latents (n, ...) and times.

    Predictions are native, and the noise is the same for every edit.
    """
    e, generator = model.denoiser, torch.Generator().manual_seed(SEED)
    changes = []
    for level in LEVELS:
        t = torch.full((len(z),), round(level * e.path.last), device=z.device)
        x_t = e.path.noised(z, torch.randn(z.shape, generator=generator).to(z), t)
        before = e(x_t, t, model.encode(""))
        with edit.on(model):
            after = e(x_t, t, model.encode(""))
        changes.append((after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1))
    return float(torch.cat(changes).mean())


def neighbours(scene: Scene) -> dict[str, float]:
    """Share of the nearest retained objects' pictures in which the object is still read."""
    rows = [r for r in Run(scene.folder).outcomes if r["part"] == "neighbour"]
    return {"neighbours": fmean(r["edited"]["object"] == r["object"] for r in rows) if rows else math.nan}


def updates(scene: Scene) -> dict[str, float]:
    """How often any optimiser steps in the cell's erasure, which is made once more for it."""
    n, method = [0], scene.cell.method

    def count(*_: Any) -> None:
        n[0] += 1

    hook = register_optimizer_step_post_hook(count)
    try:
        erase(scene.model, scene.concept, method, seed=scene.cell.seed, make_images=drawn(method))
    finally:
        hook.remove()
    return {"updates": float(n[0])}


def pruning(scene: Scene) -> dict[str, float]:
    """What an edit's UA becomes when the smallest of its weights are zeroed, and what the base's pictures do then."""
    edit, (aimed, kept) = load_edit(scene.folder), scene.specs()
    assert isinstance(edit, WeightEdit)
    base = {k: v.detach() for k, v in parameters(scene.model).items() if k in edit.values}
    with WeightEdit(pruned(edit.values, SHARE)).on(scene.model):
        # a picture that cannot be read is no success, as in an audit
        ua = fmean(r not in (None, s.object) for s, r in zip(aimed, readings(scene, aimed), strict=True))
    with WeightEdit(pruned(base, SHARE)).on(scene.model):
        both = [*aimed, *kept]
        right = fmean(r == s.object for s, r in zip(both, readings(scene, both), strict=True))
    whole = scores_of(scene.folder, SHORT)["ua"].value or 0.0
    return {"ua pruned": ua, "ua lost by pruning": whole - ua, "accuracy of the pruned base": right}


def pruned(values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return weights whose smallest are zero: a share (0 to 1) of each tensor."""
    return {k: values[k] * (1 - mask) for k, mask in smallest(values, share).items()}


def readings(scene: Scene, specs: Sequence[PictureSpec]) -> list[str | None]:
    """Return the object that the scoring judge sees in each picture of the model as it is now."""
    return read(scene, draw(scene.model, SHORT, specs, lambda _: None))


def read(scene: Scene, images: Tensor) -> list[str | None]:
    """Return the object that the scoring judge sees in each picture (n, 3, h, w)."""
    assert scene.panel is not None
    judge = scene.panel.scorer
    return [judge.objects[i] if i >= 0 else None for i in judge.read(images).object.tolist()]


def composing(scene: Scene) -> dict[str, float]:
    """What a membrane's UA becomes among those of all JOINED objects, and how other objects are read then.

    Pictures of the others are shared out: each of the objects' cells draws some of them.
    """
    cells = [scene.cell._replace(target=name) for name in JOINED]
    folders = {cell: scene.folder.parent / cell.folder(Path()).name for cell in cells}
    edit = GatedEdit.joined([membrane(scene.model, *at) for at in folders.items() if not (at[1] / REFUSED).is_file()])
    aimed, _ = scene.specs()
    others = [s for s in SHORT.pictures(scene.model.world, JOINED, "object") if s.role != "target"]
    others = others[JOINED.index(scene.cell.target) :: len(JOINED)]
    base = read(scene, base_pictures(scene.model, SHORT, others, lambda *_: None))
    with edit.on(scene.model):
        seen = readings(scene, [*aimed, *others])
    ua = fmean(r not in (None, s.object) for s, r in zip(aimed, seen, strict=False))
    before, after = (fmean(r == s.object for s, r in zip(others, x, strict=True)) for x in (base, seen[len(aimed) :]))
    lost = (scores_of(scene.folder, SHORT)["ua"].value or 0.0) - ua
    return {"ua composed": ua, "ua lost by composing": lost, "others composed": after, "others of the base": before}


def membrane(model: Model, cell: Cell, folder: Path) -> GatedEdit:
    """Return a cell's edit; where it lies on another machine, or is being made, the same is made here."""
    edit = load_edit(folder) if (folder / EDIT).is_file() else remade(model, cell)
    assert isinstance(edit, GatedEdit)
    return edit


@cache
def remade(model: Model, cell: Cell) -> Edit:
    """Return a cell's edit, made once in this process."""
    return erase(model, Concept(cell.target, kind="object"), cell.method, seed=cell.seed)


def moving(scene: Scene) -> dict[str, float]:
    """What a membrane's UA becomes on a fine-tune of its base, and how other objects are read there without it too."""
    edit, (aimed, kept) = membrane(scene.model, scene.cell, scene.folder), scene.specs()
    both = [*aimed, *kept]
    with tuned(scene.model).on(scene.model) as other:
        before = readings(scene, both)
        with edit.on(other, transfer=True):
            after = readings(scene, both)
    n = len(aimed)
    ua = fmean(r not in (None, s.object) for s, r in zip(aimed, after, strict=False))
    first, then = (fmean(r == s.object for s, r in zip(kept, x[n:], strict=True)) for x in (before, after))
    shown = fmean(r == s.object for s, r in zip(aimed, before, strict=False))
    lost = (scores_of(scene.folder, SHORT)["ua"].value or 0.0) - ua
    return {
        "ua moved": ua,
        "ua lost by moving": lost,
        "target before": shown,
        "others before": first,
        "others moved": then,
    }


@cache
def tuned(model: Model) -> Edit:
    """Return a fine-tune of a model, made once in this process: all its weights, by pictures of other objects."""
    return erase(model, Concept(JOINED[0], kind="object"), TUNE, seed=SEED, make_images=drawn(TUNE))


# found from the edits of other cells, so when these are there
COMPOSED = ("ua composed", "ua lost by composing", "others composed", "others of the base")
MOVED = ("ua moved", "ua lost by moving", "target before", "others before", "others moved")
# measure -> what finds it, and maybe others on the way; all other measures are read from the audit
FOUND: dict[str, Callable[[Scene], dict[str, float]]] = {
    "identical": identical,
    "neighbours": neighbours,
    "null change": null_change,
    "updates": updates,
    **dict.fromkeys(("ua pruned", "ua lost by pruning", "accuracy of the pruned base"), pruning),
    **dict.fromkeys(COMPOSED, composing),
    **dict.fromkeys(MOVED, moving),
}


def value(folder: Path, measure: str) -> float | None:
    """Return a measure of a cell; None where it has none.

    Measures are those of FOUND, "seconds", a metric of the protocol, or a metric "/ base".
    """
    scores = scores_of(folder, SHORT)
    if not scores:
        return None
    if measure in FOUND:
        found: float | None = measured(folder).get(measure)
        return found
    if measure == "seconds":
        return Run(folder).card.seconds
    score, (_, relative, _) = scores[measure.split(maxsplit=1)[0]], measure.partition(" / ")
    if score.value is None or not relative:
        return score.value
    return score.value / score.base if score.base else None
