"""Each method's central claim on the shipped world: a row a claim, with its intervals and a verdict.

An arm is a method with its settings, a cell an arm on one target with one seed: a run folder under `work`, audited by
the short protocol. Arms that several claims share are run once. What an audit does not say is measured once and kept in
the cell (measures.py).

A claim compares two arms, cell by cell, each with as many updates as the other, or holds one against a limit. Intervals
are 95 % bootstrap over cells: targets are resampled, then the seeds of each, and one target alone says nothing of
others. "won" and "lost" mean that the whole interval is on one side, anything else is "open".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..judges.panel import load_panel
from ..kernel.model import Model
from ..methods.allbutone import AllButOne
from ..methods.ant import ANT
from ..methods.ap import AP
from ..methods.erasediff import EraseDiff
from ..methods.esd import ESD
from ..methods.fewshot import FewShot
from ..methods.itd import ItD
from ..methods.neggrad import NegGrad
from ..methods.salun import SalUn
from ..methods.spm import SPM
from ..methods.ssd import SSD
from ..storage import write_json
from ..zoo.emoji.world import WEIGHTS
from .cells import MEASURES, REFUSED, SHORT, Interval, fill, finished, interval, refusals, share, told
from .measures import COMPOSED, FOUND, JOINED, SHARE, Cell, Scene, label, measured, value


@dataclass(frozen=True)
class Claim:
    """What a method promises.

    Attributes:
        name: of the method, or of the paper.
        text: the promise in words.
        arms: the method, and what it is compared with; alone where `limit` is given.
        measure: the number that decides.
        better: which way.
        limit: what a single arm's number is held against, itself included.
        beside: numbers that are stated and decide nothing.
        alike: by how much the arms' UA may differ in a cell that decides; None for any.
        least: mean UA of the first arm below which nothing is decided: what does not erase has nothing to lose.
        objects: its own targets, each with one seed; empty for the bench's.
    """

    name: str
    text: str
    arms: tuple[Any, ...]
    measure: str
    better: Literal["higher", "lower"]
    limit: float | None = None
    beside: tuple[str, ...] = ("ua",)
    alike: float | None = None
    least: float = 0.0
    objects: tuple[str, ...] = ()

    def keys(self, targets: Sequence[str], seeds: int) -> list[tuple[str, int]]:
        """Return target and seed of each of its cells, seed by seed."""
        return [(t, 0) for t in self.objects] or [(t, seed) for seed in range(seeds) for t in targets]


def esd(other: Any) -> ESD:
    """Return the paper's ESD, which has no preservation, with as many updates as what it is compared with."""
    return ESD(preserve=0.0, steps=other.steps)


ALIKE = 0.1  # UA
ESD_ALONE = ESD(preserve=0.0)
SARA = ESD(preserve=0.0, smallest=SHARE)
PRUNED = ("ua", "ua pruned", "accuracy of the pruned base")

CLAIMS = (
    Claim(
        "ap", "holds the nearest neighbours better at equal UA", (AP(preserve=0.0), esd(AP())), "neighbours", "higher",
        alike=ALIKE,
    ),
    Claim("erasediff", "damages pictures less than plain ascent", (EraseDiff(), NegGrad(alpha=0.0)), "fid", "lower"),
    Claim("salun", "a mask is better than none", (SalUn(density=0.5), SalUn(density=1.0)), "h", "higher"),
    Claim("spm", "leaves other objects alone", (SPM(), esd(SPM())), "ira / base", "higher"),
    Claim("spm", "leaves styles alone", (SPM(), esd(SPM())), "cra / base", "higher"),
    # 60 updates each: what they lose together is asked, not how much each can do
    Claim(
        "spm", f"composes {len(JOINED)} membranes", (SPM(steps=60),), "ua lost by composing", "lower", limit=0.1,
        beside=("ua", "ua composed", "others of the base", "others composed"), least=0.5, objects=JOINED,
    ),
    Claim(
        "spm", "erases on another fine-tune of its base", (SPM(),), "ua lost by moving", "lower", limit=0.1,
        beside=("ua", "ua moved", "target before", "others before", "others moved"), least=0.5,
    ),
    Claim("itd", "retained pictures are the base's, bit for bit", (ItD(),), "identical", "higher", limit=0.95),
    Claim("ant", "late reversal erases as much at less damage", (ANT(preserve=0.0), esd(ANT())), "h", "higher"),
    Claim(
        "allbutone", "holds the unconditional score", (AllButOne(preserve=0.0), esd(AllButOne())), "null change",
        "lower",
    ),
    Claim("fewshot", "seconds on two cores", (FewShot(),), "seconds", "lower", limit=20.0),
    Claim("ssd", "no update of an optimiser", (SSD(),), "updates", "lower", limit=0.0, beside=("seconds", "ua", "ira")),
    Claim("sara", "pruning undoes it", (SARA, ESD_ALONE), "ua lost by pruning", "higher", beside=PRUNED),
)  # fmt: skip


def grid(claims: Sequence[Claim], targets: Sequence[str], seeds: int) -> dict[Cell, set[str]]:
    """Return every cell with the measures it needs beside its audit; seed by seed, target by target."""
    wanted: dict[Cell, set[str]] = {}
    for key in dict.fromkeys(key for claim in claims for key in claim.keys(targets, seeds)):
        for claim in claims:
            for method in claim.arms if key in claim.keys(targets, seeds) else ():
                extra = wanted.setdefault(Cell(method, *key), set())
                extra |= FOUND.keys() & {claim.measure, *claim.beside}
    return wanted


def whole(cell: Cell, wanted: Collection[str], work: Path, base_hash: str) -> bool:
    """Tell whether a cell holds all that is wanted, or why not, of this model and the arm's settings."""
    folder = cell.folder(work)
    known = (folder / REFUSED).is_file() or set(wanted) <= measured(folder).keys()
    return known and finished(folder, cell.method, base_hash, SHORT)


def run(model: Model, todo: Mapping[Cell, set[str]], work: Path, progress: Callable[[str, int, int], None]) -> None:
    """Run cells, or go on with them, but for those that another process is at."""
    panel = load_panel(WEIGHTS, SHORT.scorer, SHORT.trunk, SHORT.hashes) if todo else None
    first = [(cell, wanted.difference(COMPOSED)) for cell, wanted in todo.items()]
    rounds = [*first, *((cell, wanted) for cell, wanted in todo.items() if wanted.intersection(COMPOSED))]
    share(
        rounds,
        progress,
        name=lambda r: f"{label(r[0].method)} on {r[0].target}, seed {r[0].seed}",
        folder=lambda r: r[0].folder(work),
        whole=lambda r: whole(*r, work, model.hash),
        make=lambda r: look(Scene(model, panel, r[0], r[0].folder(work)), r[1]),
    )


def look(scene: Scene, wanted: Collection[str]) -> None:
    """Erase and audit a cell, then measure whatever is wanted and not known yet."""
    cell, folder = scene.cell, scene.folder
    if not finished(folder, cell.method, scene.model.hash, SHORT):
        fill(scene.model, scene.panel, cell.method, scene.concept, folder, rules=SHORT, seed=cell.seed)
    for name in sorted(wanted):
        known = measured(folder)
        if name not in known and not (folder / REFUSED).is_file():
            found = {k: v if math.isfinite(v) else None for k, v in FOUND[name](scene).items()}
            write_json(folder / MEASURES, known | found)


# ------------------------------------------------------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Row:
    """A claim over its cells.

    Attributes:
        claim: the claim.
        n: cells that decide: each arm has the deciding number there.
        unlike: cells left out because the arms' UA differ.
        arms: of each arm, measure -> interval over those cells.
        difference: paired, first arm less second; None of a single arm.
        verdict: won, lost or open.
    """

    claim: Claim
    n: int
    unlike: int
    arms: tuple[dict[str, Interval], ...]
    difference: Interval | None
    verdict: str


def row(claim: Claim, targets: Sequence[str], seeds: int, work: Path) -> Row:
    """Summarise a claim."""
    keys = claim.keys(targets, seeds)

    def read(method: Any, name: str) -> dict[tuple[str, int], float]:
        found = {k: value(Cell(method, *k).folder(work), name) for k in keys}
        return {k: math.nan if x is None else x for k, x in found.items()}

    deciding = [read(m, claim.measure) for m in claim.arms]
    known = [k for k in keys if not any(math.isnan(x[k]) for x in deciding)]
    uas = [read(m, "ua") for m in claim.arms]
    paired = [k for k in known if claim.alike is None or abs(uas[0][k] - uas[1][k]) <= claim.alike]

    def over(found: Mapping[tuple[str, int], float]) -> Interval:
        grouped = [[found[k] for k in paired if k[0] == t and not math.isnan(found[k])] for t in dict(keys)]
        return interval([g for g in grouped if g])

    arms = tuple({name: over(read(m, name)) for name in (claim.measure, *claim.beside)} for m in claim.arms)
    difference = None
    if claim.limit is None:
        ours, theirs = deciding
        difference = over({k: ours[k] - theirs[k] for k in paired})
    erased = not claim.least or over(uas[0])[0] >= claim.least
    said = verdict(claim, difference or arms[0][claim.measure]) if erased else "open"
    return Row(claim, len(paired), len(known) - len(paired), arms, difference, said)


def verdict(claim: Claim, found: Interval) -> str:
    """Return won, lost or open for the difference, or for a single arm's number, which may touch its limit."""
    sign, alone = 1 if claim.better == "higher" else -1, claim.limit is not None
    low, high = sorted(sign * (end - (claim.limit or 0.0)) for end in found[1:])
    if low > 0 or (alone and low == 0):
        return "won"
    return "lost" if high < 0 else "open"


def table(found: Sequence[Row], refused: Sequence[str] = ()) -> str:
    """Return the rows as a Markdown table, and what was refused after it."""
    head = "| claim | decides | cells | method | compared with | difference | verdict |"
    return "\n".join([head, "|---" * 7 + "|", *(line(r) for r in found), *(f"\n{why}" for why in refused)]) + "\n"


def line(r: Row) -> str:
    """Return one line of the table."""
    claim = r.claim
    arms = [
        f"{label(m)}: " + ", ".join(f"{name} {told(x)}" for name, x in own.items())
        for m, own in zip(claim.arms, r.arms, strict=True)
    ]
    if claim.limit is not None:
        arms.append(f"{'at least' if claim.better == 'higher' else 'at most'} {claim.limit:g}")
    difference = "-" if r.difference is None else told(r.difference)
    if claim.least:
        arms[0] += f" (nothing is decided below ua {claim.least:g})"
    cells = f"{r.n}" if claim.alike is None else f"{r.n} ({r.unlike} left out: UA differs by more than {claim.alike:g})"
    parts = [f"{claim.name}: {claim.text}", f"{claim.measure}, {claim.better}", cells, *arms, difference, r.verdict]
    return "| " + " | ".join(parts) + " |"


def refused(cells: Collection[Cell], work: Path) -> list[str]:
    """Return a line for every reason that an arm gave for having no number."""
    return refusals((label(c.method), f"{c.target} (seed {c.seed})", c.folder(work)) for c in cells)
