"""HFI on looks that no prompt names; its raters are simulated.

A look is a number computed from a picture's pixels. The fifth of the base model's pictures that has most of it is
what a simulated rater rejects, and each answer is wrong with a given probability. Nobody was asked: what the tables
say holds for raters who know what they mean, not for people.

    hfi         the study as the concept
    words       SDD on the words, objects or styles of the world, that tell the rejected pictures of the study best
    negative    no erasure: the soft token of `hfi` as the negative prompt

A cell is a look, a method, a number of ratings and a share of wrong answers. A cell that has a row is not run again;
another model, other settings or another number of pictures have rows of their own. Started twice, the work is shared.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..backbones import load
from ..concept import Concept, World
from ..door import erase
from ..edits import Edit
from ..effort import enough
from ..errors import BadRun, BadStudy, ConceptError, Unsupported
from ..feedback import Study
from ..judges.classifier import Judge, load_judge
from ..kernel.model import Model, Sampling
from ..methods.hfi import HFI
from ..methods.sdd import SDD
from ..metrics.rates import RESAMPLES, SEED
from ..pictures import drawn
from ..protocols import protocol
from ..records import REWARD
from ..sheet import picture, png
from ..storage import write_json
from ..tokens import TOKEN, readable
from ..zoo.emoji.world import WEIGHTS
from . import cells as shared
from .looks import LOOKS

REJECTED = 0.2  # share of the base model's pictures
RATINGS, NOISE = 200, 0.1
NEGATIVE = "negative"
CURVED = 3  # looks whose curves over ratings and wrong answers are drawn, where nobody says which
CURVE, NOISES = (25, 50, 100), (0.0, 0.2, 0.3)
STUDY, TEST = 1, 2  # seeds of the pictures that are rated, and of those that are measured
PROTOCOL = protocol("emoji-v1")

Row = dict[str, Any]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    look: str
    method: str
    ratings: int = RATINGS
    noise: float = NOISE

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.look}-{self.method}-{self.ratings}-{100 * self.noise:.0f}"


def short(text: str) -> str:
    """Return a name for a text, of twelve letters."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def cells(looks: Sequence[str], curved: Sequence[str] = ()) -> list[Cell]:
    """Return the grid: the comparison on every look, then the curves of some."""
    found = [Cell(look, method) for look in looks for method in ("hfi", "words", NEGATIVE)]
    for look in curved:
        found += [Cell(look, "hfi", n) for n in CURVE] + [Cell(look, "hfi", noise=z) for z in NOISES]
    return found


@dataclass(frozen=True)
class Bench:
    """What all cells share.

    Attributes:
        model: the base.
        work: folder of all benches.
        count: pictures that a cell is measured on.
        settings: of HFI, and of SDD where it has them, in place of the defaults.
    """

    model: Model
    work: Path
    count: int
    settings: Mapping[str, Any]

    @cached_property
    def judge(self) -> Judge:
        """What reads objects."""
        return load_judge(WEIGHTS / "judge-b.safetensors")

    @property
    def hfi(self) -> HFI:
        """The method."""
        return HFI(**self.settings)

    @property
    def sdd(self) -> SDD:
        """What words are erased by."""
        known = {f.name for f in fields(SDD)}
        return SDD(**{k: v for k, v in self.settings.items() if k in known})

    @property
    def shared(self) -> Path:
        """Folder of the pictures that all cells share."""
        return self.work / short(f"{self.model.hash} {self.count}")

    def method(self, cell: Cell) -> HFI | SDD:
        """What a cell erases by; other settings of the other method do not concern it."""
        return self.sdd if cell.method == "words" else self.hfi

    def home(self, cell: Cell) -> Path:
        """Folder of a cell's folder and row, by the model, its method's settings and the number of pictures."""
        return self.work / short(f"{self.model.hash} {self.method(cell)} {self.count}")

    def row(self, cell: Cell) -> Path:
        """File of a cell's row."""
        return self.home(cell) / f"{cell.name}.json"

    @property
    def world(self) -> World:
        """The model's world."""
        if self.model.world is None:
            raise Unsupported("the model was loaded without its world: nothing says what it can draw.")
        return self.model.world

    @property
    def asked(self) -> dict[str, tuple[str, str]]:
        """Prompts, each with its object and style."""
        return {PROTOCOL.prompt(o, s): (o, s) for o in self.world.objects for s in self.world.styles}

    def pictures(self, model: Any, seed: int, count: int, home: Path | None) -> tuple[Tensor, tuple[str, ...]]:
        """Draw pictures of prompts in turn; one seed always gives the same prompts and noise."""
        return drawn(model, list(self.asked), count, torch.Generator().manual_seed(seed), home, lambda _: None)


@dataclass(frozen=True)
class Negated:
    """A model that is always given a negative prompt."""

    model: Model
    text: str | None

    @property
    def sampling(self) -> Sampling:
        """The model's."""
        return self.model.sampling

    def generate(self, prompts: Sequence[str], *, seeds: Sequence[int]) -> Tensor:
        """Draw, away from the negative prompt."""
        return self.model.generate(prompts, seeds=seeds, negative=self.text)


def run(
    looks: Sequence[str],
    work: Path,
    count: int,
    settings: Mapping[str, Any],
    progress: Callable[[str, int, int], None],
    known: Sequence[Row] = (),
    curved: Sequence[str] = (),
    device: str = "cpu",
) -> list[Row]:
    """Run every cell that has no row, but for those that another process is at, and return all rows there are.

    Args:
        looks: names of `LOOKS`.
        work: folder of all benches.
        count: pictures that a cell is measured on.
        settings: of HFI and SDD, in place of the defaults.
        progress: called with a cell, its number and the number of cells.
        known: rows of an earlier run; those of this model, these settings and so many pictures count.
        curved: looks whose curves are drawn as well.
        device: where to load the model.
    """
    bench, grid = Bench(load("emoji", device=device), work, count, settings), cells(looks, curved)
    for row in known:
        cell = cell_of(row)
        if row.get("bench") == bench.home(cell).name and not (path := bench.row(cell)).is_file():
            write_json(path, row)

    def whole(cell: Cell) -> bool:
        return bench.row(cell).is_file()

    def share(part: Sequence[Cell]) -> None:
        todo = [c for c in part if not whole(c)]
        if todo:
            shared.share(
                todo, progress, name=lambda c: c.name, folder=lambda c: bench.home(c) / c.name, whole=whole,
                make=lambda c: write_json(bench.row(c), measure(bench, c)),
            )  # fmt: skip

    # the method itself first: a run that is stopped has measured it
    for method in ("hfi", "words"):
        share([c for c in grid if c.method == method])
    # these draw with the token of a cell that another process may still be at
    share([c for c in grid if c.method == NEGATIVE and (bench.home(c) / donor(c).name / TOKEN).is_file()])
    return [json.loads(bench.row(c).read_text()) for c in grid if whole(c)]


def recalled(path: Path) -> list[Row]:
    """Return the rows of a file that `kept` wrote; none where there is no file.

    Raises:
        BadRun: it is another kind of file.
    """
    try:
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        [cell_of(row) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise BadRun(f"{path} holds no rows of this bench: {error!r}. Give another --out.") from error
    return rows


def kept(path: Path, rows: Sequence[Row], known: Sequence[Row]) -> None:
    """Write rows, and those that were known and are of other cells or another bench."""
    made = [(row.get("bench"), cell_of(row)) for row in rows]
    write_json(path, [*rows, *(row for row in known if (row.get("bench"), cell_of(row)) not in made)])


def cell_of(row: Row) -> Cell:
    """Return the cell of a row."""
    return Cell(row["look"], row["method"], row["ratings"], row["noise"])


def donor(cell: Cell) -> Cell:
    """Return the cell whose soft token another one draws with."""
    return Cell(cell.look, "hfi")


def measure(bench: Bench, cell: Cell) -> Row:
    """Simulate the raters, erase, and measure what is left of the look, and of everything else."""
    seen, prompts = bench.pictures(bench.model, STUDY, RATINGS, bench.shared / "study-pictures")
    look = LOOKS[cell.look].measure
    bar = float(np.quantile(look(seen).numpy(), 1 - REJECTED))
    marks = answers((look(seen) > bar).numpy(), cell)[: cell.ratings]
    known = {f.name for f in fields(bench.method(cell))}
    given = {k: v for k, v in bench.settings.items() if k in known}
    row: Row = {**asdict(cell), "bar": bar, "base_hash": bench.model.hash, "settings": given}
    row["bench"] = bench.home(cell).name
    row["raters"] = "simulated"
    base, test = bench.pictures(bench.model, TEST, bench.count, bench.shared / "test-pictures")
    try:
        after, more = edited(bench, cell, seen[: cell.ratings], prompts[: cell.ratings], marks)
    except (BadStudy, ConceptError) as error:  # too few ratings; without its token there is no negative prompt
        return {**row, "refused": str(error)}
    bad, left = ((look(images) > bar).numpy() for images in (base, after))
    truth = torch.tensor([bench.judge.objects.index(bench.asked[p][0]) for p in test])
    before, now = ((bench.judge.read(images).object == truth).numpy() for images in (base, after))
    good = ~bad
    return {
        **row,
        **more,
        "pictures": len(test),
        "rate_base": float(bad.mean()),
        "rate": float(left.mean()),
        "reduction": ratio(bad, left, fall=True),
        "accuracy_base": float(before[good].mean()),
        "accuracy": float(now[good].mean()),
        "kept": ratio(before[good], now[good], fall=False),
    }


def edited(bench: Bench, cell: Cell, images: Tensor, prompts: Sequence[str], marks: Mask) -> tuple[Tensor, Row]:
    """Return the test pictures after the cell's method, and what it says of itself."""
    folder = bench.home(cell) / cell.name
    if cell.method == NEGATIVE:
        with readable(bench.model, str(bench.home(cell) / donor(cell).name / TOKEN)) as token:
            after, _ = bench.pictures(Negated(bench.model, token), TEST, bench.count, None)
        return after, {"token": str(token)}
    if cell.method == "words":
        words = best_words([bench.asked[p] for p in prompts], marks)
        kinds = {s: "style" for s in bench.world.styles}
        concepts: Any = [Concept(w, kind=kinds.get(w, "object")) for w in words]  # type: ignore[arg-type]
        more: Row = {"words": words}
        # so that every word is looked at
        least = enough("sdd", asdict(bench.sdd), len(words))
        method: Any = replace(bench.sdd, steps=max(bench.sdd.steps, least))
    else:
        study = bench.home(cell) / f"{cell.name}-study"
        rated(study, images, prompts, marks)
        concepts, more, method = Concept("look", images=study), {}, bench.hfi
    edit: Edit = erase(bench.model, concepts, method, seed=0, out=folder, resume=True)
    if (folder / REWARD).is_file():
        (record,) = json.loads((folder / REWARD).read_text())
        more |= {"auc": record["auc"], "calibration": record["calibration"], "used": record["used"]}
    more["seconds"] = edit.card.seconds if edit.card else None
    with edit.on(bench.model) as ready:
        after, _ = bench.pictures(ready, TEST, bench.count, None)
    return after, more


def answers(truth: Mask, cell: Cell) -> Mask:
    """Return what the simulated rater says of each picture, (n,): the truth, wrong with the cell's probability.

    Fewer ratings are the first of more, and whoever errs at a lower noise errs at a higher one.
    """
    luck = np.random.default_rng([SEED, *cell.look.encode()]).random(len(truth))
    return np.where(luck < cell.noise, ~truth, truth)


def rated(folder: Path, images: Tensor, prompts: Sequence[str], marks: Mask) -> None:
    """Make a study that the simulated rater has rated, unless it is there."""
    if folder.is_dir():
        with Study.open(folder) as study:
            if study.progress().answered.get("simulated") == len(marks):
                return
        shutil.rmtree(folder)
    planned = [(p, i) for i, p in enumerate(prompts)]
    with Study.create(folder, planned, ask="Simulated: a rule over pixels answers.") as study:
        for i, image in enumerate(images):
            study.put(i + 1, png(picture(image), {"prompt": prompts[i]}))
        said = ["concept" if mark else "not" for mark in marks]
        study.rate_all(("simulated", i + 1, answer, 0, "") for i, answer in enumerate(said))


def best_words(shown: Sequence[tuple[str, str]], marks: Mask) -> list[str]:
    """Return the objects and styles whose pictures are the rejected ones, as nearly as words can say it.

    Words are ranked by the share of their pictures that is rejected, and taken while F1 rises to its highest.
    """
    names = dict.fromkeys(name for pair in shown for name in pair)
    own = {name: np.array([name in pair for pair in shown]) for name in names}
    ranked = sorted(names, key=lambda n: (-marks[own[n]].mean(), -own[n].sum()))
    covered, best, taken = np.zeros(len(shown), bool), 0.0, 1
    for i, name in enumerate(ranked, 1):
        covered = covered | own[name]
        hits = (covered & marks).sum()
        f1 = 2 * hits / max(1, covered.sum() + marks.sum())
        if f1 > best:
            best, taken = f1, i
    return ranked[:taken]


def ratio(before: Mask, after: Mask, *, fall: bool) -> dict[str, float | None]:
    """Return after / before of two rates over the same pictures, or by how much of it the rate fell; 95 % bootstrap.

    As in `metrics.rates`, one success of weight Gamma(1/2) keeps a rate that fell to zero from certainty.
    """
    if not before.any():
        return {"value": None, "low": None, "high": None}
    rng = np.random.default_rng(SEED)
    w, pseudo = rng.exponential(size=(RESAMPLES, len(before))), rng.gamma(0.5, size=RESAMPLES)
    value = float(after.mean() / before.mean())
    low, high = (float(q) for q in np.quantile((w @ after + pseudo) / (w @ before + pseudo), (0.025, 0.975)))
    low, high = min(low, value), max(high, value)
    ends = (1 - value, 1 - high, 1 - low) if fall else (value, low, high)
    return dict(zip(("value", "low", "high"), ends, strict=True))
