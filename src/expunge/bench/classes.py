"""Forgetting a class of a class-conditional model: every arm on every class, each against what it started from.

An arm is a method, alone or with settings ("erasediff target=noise"), a cell an arm on one class: a run folder under
`work`, as in `bench methods`. Methods that also run on a one-step generator (SFD) start from the one that was distilled
from the model, which is their second stage; all others start from the model itself. `retrain` is no method: its cells
are audits of models that never saw the class (`zoo/gold.py`).

Every concept has the anchor of `ANCHORS`; methods that take none do not look at it. A method that trains what reads a
text by default trains what reads the class here (group "conditioning").
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import flags
from ..audit_classes import panel_of
from ..auditing import audit
from ..backbones import load
from ..backbones.classcond import GROUPS
from ..concept import Concept, World
from ..edits import component_of, load_edit
from ..errors import BadRun, SettingError, Unsupported, nearest
from ..kernel.model import Model, digest
from ..protocols import ClassProtocol, default
from ..records import CARD, Run, Score
from ..zoo.fashion.world import FASHION, GENERATOR, ONE_STEP
from . import cells, methods
from .cells import Progress, scores_of

RETRAIN = "retrain"
ARMS = (
    "erasediff", "erasediff target=noise", "salun", "ssd", "neggrad alpha=0", "neggrad beta=0", "neggrad", "esd", "sfd",
    "sfd group=class-embedding lr=2e-2 fake_lr=2e-2 steps=80",
    "sfd group=conditioning lr=1e-3 fake_lr=3e-3 preserve=10 steps=100", RETRAIN,
)  # fmt: skip
READERS = "conditioning"  # of a class-conditional network, what cross-attention is elsewhere

# A class and what it shall become, the same both ways, so that no class has to stand in more often than another. Each
# pair is unlike: a garment for the upper body or a dress, and none. Among T-shirts, shirts, pullovers and coats, or
# sandals, sneakers and boots, a judge takes a spoiled picture of one for another, and damage would count as forgetting.
# Of CIFAR-10: an animal and a vehicle, and the two animals that are left.
PAIRS = {
    "fashion": (
        ("T-shirt/top", "Ankle boot"), ("Pullover", "Trouser"), ("Dress", "Bag"), ("Coat", "Sandal"),
        ("Shirt", "Sneaker"),
    ),
    "cifar10": (("airplane", "dog"), ("automobile", "deer"), ("ship", "horse"), ("truck", "cat"), ("bird", "frog")),
}  # fmt: skip
ANCHORS = {world: dict(pairs) | {b: a for a, b in pairs} for world, pairs in PAIRS.items()}

Cell = tuple[str, str]  # arm, class
Scores = Mapping[str, Score]
Found = dict[str, dict[str, Scores]]  # arm -> class -> metric -> score


def arms(named: Sequence[str], gold: Path | None) -> list[str]:
    """Return the arms of a table: those that are named, else all; where there are retrained models, these as well.

    Raises:
        SettingError: an unknown method or setting.
    """
    chosen = list(named or ARMS)
    for arm in chosen:
        if arm != RETRAIN:
            built(arm)
    return chosen if gold is None or RETRAIN in chosen else [*chosen, RETRAIN]


def built(arm: str) -> Any:
    """Return the method of an arm.

    Raises:
        SettingError: an unknown method or setting.
    """
    method = methods.built(arm)
    if getattr(method, "group", READERS) in GROUPS or "group" in flags.parse(arm.split()[1:]):
        return method
    return replace(method, group=READERS)


def starts_in_steps(arm: str) -> bool:
    """Tell whether an arm starts from the model that is sampled in steps, not from the generator."""
    return arm == RETRAIN or bool(built(arm).needs.steps)


@dataclass(frozen=True)
class Bench:
    """What cells are made with.

    Attributes:
        model: class-conditional, sampled in steps.
        generator: the one-step generator that was distilled from it, None where none was given.
        rules: the protocol of their world.
        work: folder of the cells.
        gold: class -> run of the model that was retrained without it.
    """

    model: Model
    generator: Model | None
    rules: ClassProtocol
    work: Path
    gold: Mapping[str, Run]

    @property
    def world(self) -> World:
        """What is drawn."""
        return self.rules.need(self.model.world)

    def base(self, arm: str) -> Model:
        """Return what an arm starts from."""
        if starts_in_steps(arm):
            return self.model
        assert self.generator is not None  # `opened` saw to it
        return self.generator

    def folder(self, arm: str, name: str) -> Path:
        """Return the run folder of a cell."""
        return methods.folder_of(self.work, arm, name)

    def whole(self, arm: str, name: str) -> bool:
        """Tell whether a cell holds scores, or why it has none, of these models and the arm's settings."""
        folder = self.folder(arm, name)
        if arm != RETRAIN:
            return cells.finished(folder, built(arm), self.base(arm).hash, self.rules)
        if not (folder / CARD).is_file() or not scores_of(folder, self.rules):
            return False
        made = Run(folder).card
        # found elsewhere, it counts as long as it is of this model
        return made.base_hash == self.model.hash and (name not in self.gold or made == self.gold[name].card)

    def todo(self, arms: Sequence[str], classes: Sequence[str]) -> list[Cell]:
        """Return the cells to make, class by class; classes without a retrained model have no such cell."""
        there = [(a, c) for a, c in methods.grid(arms, classes) if a != RETRAIN or c in self.gold]
        return [cell for cell in there if not self.whole(*cell)]

    def found(self, arms: Sequence[str], classes: Sequence[str]) -> Found:
        """Return the scores of all cells that are whole and were not refused."""
        return {
            arm: {c: s for c in classes if self.whole(arm, c) and (s := scores_of(self.folder(arm, c), self.rules))}
            for arm in arms
        }

    def asked(self, words: Sequence[str]) -> list[str]:
        """Return classes by their names or numbers, the first so many for one number, all for none.

        Raises:
            SettingError: there is no such class, or there are not so many.
        """
        known = self.world.objects
        if len(words) == 1 and words[0].isdecimal():
            if not 1 <= int(words[0]) <= len(known):
                raise SettingError(f"--classes {words[0]}: {self.model.name!r} has {len(known)}. Give 1 to that many.")
            return list(known[: int(words[0])])
        if unknown := [w for w in words if not self.world.canonical(w)]:
            raise SettingError(
                f"--classes has {unknown[0]!r}, which is no class of {self.model.name!r}. Classes, by name or number: "
                f"{', '.join(f'{i} {c}' for i, c in enumerate(known))}.{nearest(unknown[0], known)}"
            )
        return list(dict.fromkeys(self.world.canonical(w) for w in words)) or list(known)


# ----------------------------------------------------------------------------------------------------------- the models


def opened(name: str, generator: str, gold: Path | None, arms: Sequence[str], work: Path, device: str) -> Bench:
    """Load the models and look at everything that can be wrong before any long work.

    Args:
        name: the model that is sampled in steps, as `expunge.load` takes it.
        generator: run of the one-step generator, or the shipped one's name; "" for the shipped one of a model that has
            one, else none.
        gold: folder of runs of retrained models, a folder each.
        arms: what will run.
        work: folder of the cells.
        device: where to load the models.

    Raises:
        BadModel: a model is not there, or not whole.
        Unsupported: the model is not class-conditional, or no protocol judges it.
        SettingError: a generator in the model's place, or the reverse; one of another model; none where one is needed.
        NeedsError: the generator does not say what it was distilled from.
        BadRun: see `golds`.
    """
    model = load(name, device=device)
    if model.world is not None and not model.world.labels:
        raise Unsupported(
            f"{name!r} draws from texts, and this bench forgets classes. Give --model a class-conditional model, such "
            "as fashion, or use `expunge bench methods`."
        )
    if model.one_step is not None:
        raise SettingError(
            f"--model {name} is a one-step generator, and what it is compared with is sampled in steps. Give the model "
            f"that it was distilled from, and this one as --generator {name}."
        )
    rules = default(model.world)
    assert isinstance(rules, ClassProtocol)  # as every protocol of a world of labels
    if name == FASHION.world and not generator and (GENERATOR / CARD).is_file():
        generator = ONE_STEP
    wanting = [arm for arm in arms if not starts_in_steps(arm)]
    if wanting and not generator:
        raise SettingError(
            f"{wanting[0]!r} starts from a one-step generator here, and no --generator is given. Distil one, `expunge "
            f"distill {name} --out RUN`, and give its run; or leave the arm out: --methods."
        )
    distilled = one_step(generator, model, device) if generator else None
    return Bench(model, distilled, rules, work, golds(gold, model) if gold else {})


def one_step(run: str, model: Model, device: str) -> Model:
    """Load the generator that was distilled from a model; see `opened`."""
    found, way = load(run, device=device), f"Distil one: `expunge distill {model.name} --out RUN`."
    if found.one_step is None:
        raise SettingError(f"--generator {run} is sampled in steps, and no one-step generator. {way}")
    component = component_of(model, model.denoiser.module)
    card = Run.open(GENERATOR if run == ONE_STEP else run).card
    if digest([(component, found.teacher.module)]) != model.hash:
        raise SettingError(
            f"--generator {run} was distilled from {card.model!r}, whose weights are not those of "
            f"--model {model.name}, and the table compares the two. {way}"
        )
    if forgot := [c["name"] for c in card.concepts]:
        raise SettingError(f"--generator {run} has forgotten {forgot[0]!r} already: it is no base. {way}")
    return found


def golds(folder: Path, model: Model) -> dict[str, Run]:
    """Return class -> run of the model that was retrained without it, and it alone.

    Args:
        folder: holds the runs, a folder each; other runs may lie beside them.
        model: what they are compared with.

    Raises:
        BadRun: no such folder; two runs of one class; a run whose base is another model.
    """
    if not folder.is_dir():
        raise BadRun(
            f"--gold {folder}: there is no such folder. Give one that holds runs which `python -m expunge.zoo.fashion "
            "gold` made, a folder each."
        )
    found: dict[str, Run] = {}
    for run in (Run(path.parent) for path in sorted(folder.glob(f"*/{CARD}"))):
        names = [c["name"] for c in run.card.concepts]
        if run.card.method != RETRAIN or len(names) != 1:
            continue
        if run.card.base_hash != model.hash:
            raise BadRun(
                f"{run.folder} is compared with {run.card.model!r} of weights {run.card.base_hash[:12]}, and "
                f"{model.name!r} has {model.hash[:12]}. Take it out of {folder}, or make it again."
            )
        if names[0] in found:
            raise BadRun(f"{found[names[0]].folder} and {run.folder} are both without {names[0]!r}. Take one out.")
        found[names[0]] = run
    return found


# ------------------------------------------------------------------------------------------------------------- the work


def run(bench: Bench, todo: Sequence[Cell], progress: Progress) -> None:
    """Make cells, but for those that another process is at.

    Raises:
        BadModel: the judges are missing, damaged, or not the protocol's.
    """
    panel = panel_of(bench.rules, bench.model.name) if todo else None
    anchors = ANCHORS.get(bench.world.name, {})

    def make(cell: Cell) -> None:
        (arm, name), folder = cell, bench.folder(*cell)
        if arm != RETRAIN:
            concept = Concept(name, kind="class", anchor=anchors.get(name, ""))
            cells.fill(bench.base(arm), panel, built(arm), concept, folder, rules=bench.rules)
            return
        shutil.rmtree(folder, ignore_errors=True)  # of another retraining
        Run(folder).write_card(bench.gold[name].card)
        edit = load_edit(bench.gold[name].edit_path)
        audit(folder, bench.rules, model=bench.model, edit=edit, panel=panel)

    cells.share(
        todo,
        progress,
        name=" on ".join,
        folder=lambda cell: bench.folder(*cell),
        whole=lambda cell: bench.whole(*cell),
        make=make,
    )
