"""What the commands show: plans, bars, sentences. Everything but results goes to standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .records import Card, Score

if TYPE_CHECKING:
    from .kernel.state import Step

console = Console(stderr=True, highlight=False, soft_wrap=True)
Tick = Callable[[str, int, int], None]


def say(*lines: str) -> None:
    """Show lines as they are; a user's words may hold what rich would take for markup."""
    for line in lines:
        console.print(line, markup=False)


@contextmanager
def bars() -> Iterator[Tick]:
    """Give a function `tick(label, done, total)` that keeps one bar a label."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def tick(label: str, done: int, total: int) -> None:
            name = label.partition(":")[0]
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done, total=total, description=label)

        yield tick


def steps(tick: Tick) -> Callable[[Step], None]:
    """Return a callback for `erase` that shows each update and its losses on one bar."""

    def show(step: Step) -> None:
        losses = "  ".join(f"{name} {value:.2e}" for name, value in step.losses.items())
        tick(f"erasing: {losses}", step.i + 1, step.n)

    return show


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
    needs = ", ".join(about["needs"])
    head = f"{about['name']:<8} {about['summary']}  [{about['family']}; arXiv:{about['arxiv']}; needs {needs}]"
    settings = [f"           {s['name']:<16} {s['default']!s:<18} {s['help']}" for s in about["settings"]]
    return [head, *settings, f"           limits: {about['limits']}"]


def plan(model: str, concepts: Sequence[str], method: Any, out: Path, seed: int) -> list[str]:
    """Return the lines that say what an erasure will do, before it does."""
    return [
        f"model    {model}",
        f"erase    {', '.join(concepts)}",
        f"method   {method}",
        f"seed     {seed}",
        f"run      {out}",
    ]


def outcome(card: Card) -> str:
    """Return the sentence after an erasure."""
    names = " and ".join(repr(c["name"]) for c in card.concepts)
    return f"Erased {names} by {card.method} in {card.steps} steps, {card.seconds:.1f} s ({card.kind})."


def verdict(name: str, scores: Sequence[Score]) -> str:
    """Return the sentence after an audit: what is gone, what is kept, against the base model."""
    found = {s.metric: s for s in scores}

    def share(metric: str) -> str:
        score = found.get(metric)
        if score is None or score.value is None:
            return "not measured"
        return f"{score.value:.1%}" + ("" if score.base is None else f" (base {score.base:.1%})")

    return (
        f"{name!r} is gone from {share('ua')} of the pictures that ask for it; "
        f"the rest is still right in {share('ira')}, in the other domain (style or object) in {share('cra')}."
    )


def table(scores: Sequence[Score]) -> list[str]:
    """Return one line a score."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    head = f"{'metric':<16}{'value':>9}{'low':>9}{'high':>9}{'base':>9}{'n':>6}{'errors':>8}"
    rows = [
        f"{s.metric:<16}{number(s.value):>9}{number(s.low):>9}{number(s.high):>9}{number(s.base):>9}{s.n:>6}{s.errors:>8}"
        for s in scores
    ]
    return [head, *rows]
