"""Runs -> one HTML page. A pure function of the run folders: the same folders give the same bytes."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from ..errors import BadRun
from ..records import Run, Score
from . import plots, words
from .read import Contents, Pair, read, value_text

HERE = Path(__file__).parent
RETRAIN = "retrain"  # the method of a gold standard's run: no erasure, but a stage of a world's recipe

# kinds of concept whose pictures are veiled until the reader asks for them
SENSITIVE_KINDS = frozenset({"person"})
# what a reader can take in; the rest is counted, and lies in the run folder
MOST_PAIRS, MOST_NEIGHBOURS, MOST_SENTENCES = 24, 24, 12


@dataclass(frozen=True)
class Group:
    """Picture pairs under one heading."""

    title: str
    note: str
    pairs: list[Pair]


@dataclass(frozen=True)
class Section:
    """One run, ready for the template."""

    id: str
    number: int
    run: Contents
    subject: str
    title: str
    sentence: str
    verdict: words.Verdict
    protocol: str
    by: dict[str, Score]
    groups: list[Group]
    tables: dict[str, list[Score]]
    veiled: bool
    curve: Markup
    curves: dict[str, float]
    commands: list[str]
    limits: str
    reference: str


def build(runs: Sequence[Run], *, sensitive: bool | None = None) -> str:
    """Write the report of one or several runs as one HTML page that needs neither network nor scripts.

    Args:
        runs: the runs, in the order of the report.
        sensitive: veil every picture until it is clicked; None: where the concept's kind asks for it.

    Returns:
        The page. The same run folders give the same bytes.

    Raises:
        BadRun: no run at all, or a broken file in one; the message names it.
    """
    if not runs:
        raise BadRun("a report needs at least one run folder: expunge report RUN... -o report.html")
    sections = [_section(i, read(run, MOST_PAIRS), sensitive) for i, run in enumerate(runs, 1)]
    points = [p for p in map(_point, sections) if p is not None]
    return _page().render(
        css=Markup((HERE / "style.css").read_text()),  # noqa: S704  (our own file)
        sections=sections,
        plane=_trusted(plots.plane(points, "plane")) if points else "",
        plotted=[s for s in sections if _point(s) is not None],
        versions=sorted({s.run.card.version for s in sections}),
        most_neighbours=MOST_NEIGHBOURS,
        most_sentences=MOST_SENTENCES,
        w=words,
    )


@cache
def _page() -> Template:
    """Return the template. Kept: compiling it takes as long as filling it in."""
    env = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return env.get_template("page.html.j2")


def _section(number: int, run: Contents, sensitive: bool | None) -> Section:
    card = run.card
    protocol = words.headline_protocol(run.scores)
    kind = str(card.concept.get("kind", "object"))
    name = f"run-{number}"
    curves = {k: v for k, v in card.losses.items() if v}
    limits, reference = _about(card.method)
    return Section(
        id=name,
        number=number,
        run=run,
        subject=words.subject(card),
        title=words.title(card),
        sentence=words.sentence(run),
        verdict=words.verdict(run),
        protocol=protocol,
        by=words.of_protocol(run.scores, protocol),
        groups=_groups(run),
        tables={p: [s for s in run.scores if s.protocol == p] for p in dict.fromkeys(s.protocol for s in run.scores)},
        veiled=kind in SENSITIVE_KINDS if sensitive is None else sensitive,
        curve=_trusted(plots.losses(curves, card.steps, name)) if curves else Markup(),
        curves={k: v[-1] for k, v in curves.items()},
        commands=_commands(run),
        limits=limits,
        reference=reference,
    )


def _trusted(svg: str) -> Markup:
    # drawn by us from numbers alone
    return Markup(svg)  # noqa: S704


def _point(section: Section) -> plots.Point | None:
    ua, ira = section.by.get("ua"), section.by.get("ira")
    if ua is None or ira is None or ua.value is None or ira.value is None:
        return None
    return plots.Point(
        label=str(section.number),
        x=ua.value,
        y=ira.value,
        x_interval=_interval(ua),
        y_interval=_interval(ira),
        base=None if ua.base is None or ira.base is None else (ua.base, ira.base),
    )


def _interval(score: Score) -> tuple[float, float] | None:
    return None if score.low is None or score.high is None else (score.low, score.high)


def _groups(run: Contents) -> list[Group]:
    """Sort the pairs: targets, neighbours, retained, and whatever other role a protocol has."""
    near = {n.name for n in run.neighbours}
    titles = {
        "target": ("Target", "What was to be forgotten."),
        "neighbour": ("Neighbours", "Retained concepts that are nearest to the target."),
        "retain": ("Retained", "Everything else should look as it did."),
        "style": ("Retained styles", "The other domain should look as it did."),
    }
    found: dict[str, list[Pair]] = {role: [] for role in titles}
    for pair in run.pairs:
        role = "neighbour" if pair.role == "retain" and pair.concept in near else pair.role
        found.setdefault(role, []).append(pair)
    return [Group(*titles.get(role, (role, "")), pairs) for role, pairs in found.items() if pairs]


def _commands(run: Contents) -> list[str]:
    """Spell the commands that repeat the run, audit it and write this page."""
    audits = [["expunge", "audit", run.path, "--protocol", p] for p in dict.fromkeys(s.protocol for s in run.scores)]
    return [
        *(_retraining(run) if run.card.method == RETRAIN else [_making(run)]),
        *(_shell(a) for a in audits or [["expunge", "audit", run.path]]),
        _shell(["expunge", "report", run.path, "-o", "report.html"]),
    ]


def _retraining(run: Contents) -> list[str]:
    """Spell the commands of the recipe that make a model which has never seen the concepts."""
    world, stage = ("fashion", "ddpm") if run.card.concept.get("kind") == "class" else ("emoji", "unet")
    recipe, card = ["python", "-m", f"expunge.zoo.{world}"], run.card
    common = [["--without", c["name"]] for c in card.concepts] + [[f"--{k}", v] for k, v in card.settings.items()]
    steps = [["--steps", card.steps]] if card.steps else []
    # the recipe of classes finds its base by itself
    base = [["--base", card.model]] if world == "emoji" and card.model != world else []
    return [
        _wrapped([[*recipe, stage], *common, *steps]),
        _wrapped([[*recipe, "gold"], *common, *base, ["--out", run.path]]),
    ]


def _making(run: Contents) -> str:
    """Spell the command of an erasure or distillation with everything that it was given."""
    card = run.card
    parts = [["expunge", "erase" if card.concepts else "distill", card.model]]
    studies = {r.study for r in run.ratings}
    parts += [["--concept", f"study:{c['images']}" if c.get("images") in studies else c["name"]] for c in card.concepts]
    if card.concept.get("anchor"):
        parts.append(["--anchor", card.concept["anchor"]])
    parts += [["--keep", k] for k in card.concept.get("keep") or ()]
    if kind := str(card.concept.get("kind") or ""):
        parts.append(["--kind", kind])
    for key in ("images", "keep_images", "embedding"):
        if card.concept.get(key) and card.concept[key] not in studies:
            parts.append([f"--{key.replace('_', '-')}", card.concept[key]])
    if card.make_images:
        parts.append(["--make-images", str(card.make_images)])
    if card.concepts:
        parts.append(["--method", card.method])
    parts.append(["--seed", str(card.seed)])
    parts += [["--set", f"{k}={value_text(v)}"] for k, v in card.settings.items() if v not in (None, "")]
    parts.append(["--out", run.path])
    return _wrapped(parts)


def _shell(words: Iterable[Any]) -> str:
    return shlex.join(str(w) for w in words)


def _wrapped(parts: list[list[Any]], width: int = 76) -> str:
    """Join options to lines of a readable width, each continued by a backslash."""
    lines = [_shell(parts[0])]
    for part in map(_shell, parts[1:]):
        if len(lines[-1]) + len(part) + 1 > width:
            lines.append("    " + part)
        else:
            lines[-1] += " " + part
    return " \\\n".join(lines)


def _about(method: str) -> tuple[str, str]:
    """Return limits and reference from the method's docstring, read as text: importing it would import torch."""
    path = HERE.parent / "methods" / f"{method}.py"
    if not method.isidentifier() or not path.is_file():
        return "", ""
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    return _entry(doc, "Limits"), _entry(doc, "Reference")


def _entry(doc: str, title: str) -> str:
    """Return an entry such as `Limits      over-erases ...` with its indented continuation, on one line."""
    found: list[str] = []
    inside = False
    for line in doc.splitlines():
        if line[:1].strip():
            inside = line.startswith(f"{title} ")
        if inside:
            found.append(line.removeprefix(title).strip())
    return " ".join(found).strip()
