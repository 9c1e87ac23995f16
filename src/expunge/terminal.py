"""What the commands show: plans, bars, sentences. Everything but results goes to standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .records import Card, Score

if TYPE_CHECKING:
    from .concept import Concept
    from .kernel.state import Step

console = Console(stderr=True, highlight=False, soft_wrap=True)
Tick = Callable[[str, int, int], None]
# what a bar is called while a loss of this name falls
LABELS = {"inversion": "learning the token", "drawn": "drawing pictures", "dead": "training"}
MOST_NAMES = 4  # that a sentence holds
MEASURED = 3  # ticks that a written estimate rests on, after the first one, which often takes longer than others
LONG = 60.0  # seconds that remain, from which on it is worth a line


def say(*lines: str) -> None:
    """Show lines as they are; a user's words may hold what rich would take for markup."""
    for line in lines:
        console.print(line, markup=False)


@contextmanager
def bars() -> Iterator[Tick]:
    """Give a function `tick(label, done, total)` that keeps one bar a label, with the time that remains.

    Where nobody sees a bar (a log file), a line says once how long it will take.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # by default the estimate rests on the last 30 s: updates slower than that would never have one
    with Progress(*columns, console=console, speed_estimate_period=3600) as progress:
        tasks: dict[str, Any] = {}
        ticks: dict[str, list[tuple[int, float]]] = {}

        def tick(label: str, done: int, total: int) -> None:
            name = label.partition(":")[0]
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done, total=total, description=label)
            seen = ticks.setdefault(name, [])
            if console.is_terminal or len(seen) > MEASURED:
                return
            seen.append((done, time.monotonic()))
            (first, began), (last, now) = seen[0], seen[-1]
            if (
                len(seen) > MEASURED
                and last > first
                and (left := (now - began) / (last - first) * (total - last)) > LONG
            ):
                say(f"{name}: {done} of {total}, about {clock(left)} left")

        yield tick


def steps(tick: Tick) -> Callable[[Step], None]:
    """Return a callback for `erase` that shows each update and its losses, one bar for each thing that is done."""

    def show(step: Step) -> None:
        label = next((LABELS[name] for name in step.losses if name in LABELS), "erasing")
        losses = "  ".join(f"{name} {value:.2e}" for name, value in step.losses.items())
        tick(f"{label}: {losses}", step.i + 1, step.n)

    return show


def clock(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds, as the bars show it."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def counter(tick: Tick, label: str, total: int) -> Callable[[int], None]:
    """Return a callback that is told how many more are done, and keeps one bar."""
    done = 0

    def more(n: int) -> None:
        nonlocal done
        done += n
        tick(label, done, total)

    return more


def method(about: dict[str, Any]) -> list[str]:
    """Return the lines on one method of `methods.describe`."""
    needs = ", ".join(about["needs"]) or "nothing more"
    head = f"{about['name']:<9} {about['summary']}  [{about['family']}; arXiv:{about['arxiv']}; needs {needs}]"
    settings = [f"           {s['name']:<16} {s['default']!s:<18} {s['help']}" for s in about["settings"]]
    notes = [f"           {k}: {about[k]}" for k in ("cost", "limits")]
    return [head, *settings, *notes]


def plan(model: str, concepts: Sequence[Concept], method: Any, out: Path, seed: int) -> list[str]:
    """Return the lines that say what an erasure will do, before it does: model, method, steps, group and the rest."""
    read = [f"token    {c.embedding}" for c in concepts if c.embedding]
    if not method.needs.images:
        read += [f"token    first learned from {c.images}" for c in concepts if c.images and not c.embedding]
    return [
        f"model    {model}",
        f"erase    {', '.join(c.name for c in concepts)}",
        *read,
        f"method   {method}",
        f"seed     {seed}",
        f"run      {out}",
    ]


def listing(row: dict[str, Any]) -> list[str]:
    """Return the lines on one protocol of `Protocol.describe`: its name, its fields, its metrics."""
    wide = max(len(m["name"]) for m in row["metrics"])
    fields = [f"  {k:<{wide}} {v}" for k, v in row.items() if k not in ("name", "id", "metrics")]
    metrics = [f"  {m['name']:<{wide}} {m['help']} [{m['better']} is better]" for m in row["metrics"]]
    return [row["name"], *fields, "  metrics", *metrics]


def outcome(card: Card) -> str:
    """Return the sentence after an erasure."""
    return f"Erased {_erased(card)} by {card.method} in {card.steps} steps, {card.seconds:.1f} s ({card.kind})."


def verdict(card: Card, scores: Sequence[Score]) -> str:
    """Return what is said after an audit: what is gone, what is kept, against the base model, and what measured it."""
    found = {s.metric: s for s in scores}

    def share(metric: str) -> str:
        score = found.get(metric)
        if score is None or score.value is None:
            return "not measured"
        return f"{score.value:.1%}" + ("" if score.base is None else f" (base {score.base:.1%})")

    other = f", in the other domain (style or object) in {share('cra')}" if "cra" in found else ""
    kept = f"is still right in {share('ira')}{other}."
    measured = f"Measured by {protocol(scores)}."
    if not card.concepts:
        return f"What {card.model!r} draws {kept} {measured}"
    one = len(card.concepts) == 1
    gone = f"{_erased(card)} {'is' if one else 'are'} gone from {share('ua')} of the pictures that ask for"
    return f"{gone} {'it' if one else 'them'}; the rest {kept} {measured}"


def protocol(scores: Sequence[Score]) -> str:
    """Return what the numbers of an audit were measured by: the protocol's id, and of how many pictures its rates are.

    Pictures that could not be scored are counted: they count against the edit.
    """
    shown = {s.metric: s.n + s.errors for s in scores}
    parts = {"ua": "of what is erased", "ira": "of the rest"}  # `cra` reads the pictures of `ira`
    counts = ", ".join(f"{shown[metric]} pictures {words}" for metric, words in parts.items() if metric in shown)
    return " · ".join(filter(None, [f"protocol {', '.join(dict.fromkeys(s.protocol for s in scores))}", counts]))


def table(scores: Sequence[Score]) -> list[str]:
    """Return a line on the protocol, the head, and one line a score."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    wide = max((len(s.metric) for s in scores), default=0)
    head = f"{'metric':<{wide}}{'value':>11}{'low':>10}{'high':>10}{'base':>10}{'p':>10}{'n':>6}{'errors':>8}"
    rows = [
        f"{s.metric:<{wide}}{number(s.value):>11}{number(s.low):>10}{number(s.high):>10}{number(s.base):>10}"
        f"{number(s.p):>10}{s.n:>6}{s.errors:>8}"
        for s in scores
    ]
    return [protocol(scores), head, *rows]


def _erased(card: Card) -> str:
    """Return the erased concepts' names; of many the first few."""
    names = [repr(c["name"]) for c in card.concepts]
    return " and ".join([*names[:MOST_NAMES], *([f"{len(names) - MOST_NAMES} more"] if names[MOST_NAMES:] else [])])
