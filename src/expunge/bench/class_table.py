"""What `bench classes` says of its cells: a row an arm, a row a cell, and where the gold standard stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from ..protocols import ClassProtocol
from ..records import Json, Score
from .cells import Interval, interval, pooled, refusals, told
from .classes import RETRAIN, Bench, Found, Scores
from .methods import grid, mean

FASTER = 20  # times, what was asked of one-step sampling
ALONE = "open: fewer than two classes that both have"


@dataclass(frozen=True)
class Row:
    """One arm over its classes.

    Attributes:
        arm: its name.
        base: name of what it starts from.
        n: classes measured.
        ua: unlearning accuracy over all their pictures, with its Wilson interval.
        worst: lowest UA of a class, and which.
        retained: retained accuracy less the base's, percentage points, interval by bootstrap over classes.
        fid: FID / the base's, likewise.
        means: mean over classes of other metrics.
    """

    arm: str
    base: str
    n: int
    ua: Interval
    worst: tuple[float, str]
    retained: Interval
    fid: Interval
    means: Mapping[str, float | None]


def points(s: Score) -> float | None:
    """Return a rate less the base's, in percentage points."""
    return None if s.value is None or s.base is None else 100 * (s.value - s.base)


def less(s: Score) -> float | None:
    """Return a score less the base's."""
    return None if s.value is None or s.base is None else s.value - s.base


def ratio(s: Score) -> float | None:
    """Return a score divided by the base's."""
    return None if s.value is None or not s.base else s.value / s.base


def own(s: Score) -> float | None:
    """Return a score as it is."""
    return s.value


def over(scores: Sequence[Scores], metric: str, of: Callable[[Score], float | None]) -> Interval:
    """Return what a metric says over classes: UA pooled over pictures, anything else as a mean with a bootstrap."""
    found = [s[metric] for s in scores if metric in s]
    if metric == "ua":
        return pooled(found) if found else (math.nan, -math.inf, math.inf)
    return interval([[x] for s in found if (x := of(s)) is not None])


def reach(scores: Sequence[Scores], metric: str, of: Callable[[Score], float | None]) -> Interval:
    """Return `over`, of retained accuracy at least as wide as its pictures allow: gold standards are few."""
    value, low, high = over(scores, metric, of)
    if metric == "ira" and (found := [s["ira"] for s in scores if "ira" in s]):
        rate, least, most = (100 * x for x in pooled(found))
        low, high = min(low, value - rate + least), max(high, value + most - rate)
    return value, low, high


def row(arm: str, base: str, cells: Mapping[str, Scores], rules: ClassProtocol) -> Row:
    """Summarise one arm; `cells`: its classes' scores, of one class at least."""
    found, sets = list(cells.values()), rules.sets
    others = (sets["kid"], sets["precision"], sets["recall"], "entropy", "probability", "seconds")
    return Row(
        arm,
        base,
        len(cells),
        over(found, "ua", own),
        min((s["ua"].value or 0.0, name) for name, s in cells.items()),
        over(found, "ira", points),
        over(found, sets["fid"], ratio),
        {m: mean(found, m) for m in others},
    )


def rows(found: Found, bases: Mapping[str, str], rules: ClassProtocol) -> list[Row]:
    """Return a row an arm that has cells, and before them one of each base itself, over the same classes.

    Args:
        found: the cells.
        bases: arm -> name of what it starts from.
        rules: the protocol.
    """
    before: dict[str, dict[str, Scores]] = {}
    for arm, cells in found.items():
        for name, scores in cells.items():
            as_base = {m: replace(s, value=s.base) for m, s in scores.items()}
            before.setdefault(bases[arm], {}).setdefault(name, as_base)
    start = [row("(base)", base, cells, rules) for base, cells in before.items()]
    return start + [row(arm, bases[arm], cells, rules) for arm, cells in found.items() if cells]


def number(x: float | None) -> str:
    """Return a number as the tables have it."""
    return "-" if x is None or math.isnan(x) else f"{x:.4g}"


def line(r: Row) -> str:
    """Return one line of the table."""
    said = [r.arm, r.base, str(r.n), told(r.ua), f"{r.worst[0]:.3f} {r.worst[1]}", told(r.retained), told(r.fid)]
    return "| " + " | ".join([*said, *(number(x) for x in r.means.values())]) + " |"


def by_class(found: Found, classes: Sequence[str], rules: ClassProtocol) -> list[str]:
    """Return a line of a Markdown table for every cell, class by class."""

    def said(s: Score | None) -> str:
        if s is None or s.value is None:
            return "-"
        reach = f" [{number(s.low)}, {number(s.high)}]" if s.low is not None else ""
        return number(s.value) + reach + (f" ({number(s.base)})" if s.base is not None else "")

    shown = ("ua", "ira", rules.sets["fid"], rules.sets["kid"], "entropy", "probability", "seconds")
    return [
        "| " + " | ".join([name, arm, *(said(cells[name].get(m)) for m in shown)]) + " |"
        for name in classes
        for arm, cells in found.items()
        if name in cells
    ]


# ---------------------------------------------------------------------------------------------------- the gold standard


def compared(rules: ClassProtocol) -> dict[str, tuple[str, Callable[[Score], float | None]]]:
    """Return metric -> (its words, the number that is compared): relative to the base where arms start from several."""
    sets = rules.sets
    return {
        "ua": ("UA", own),
        "ira": ("retained accuracy less the base's, points", points),
        sets["fid"]: ("FID / base", ratio),
        **{sets[m]: (f"{m} less the base's", less) for m in ("kid", "precision", "recall")},
        "entropy": ("entropy", own),
        "probability": ("probability", own),
    }


def standing(found: Found, rules: ClassProtocol) -> list[str]:
    """Return, as lines of Markdown, whether the gold standard is at the top of every metric.

    It is compared with the arm that beats it by most, on the classes that both have. "within its interval" means that
    the other's value lies in the gold standard's own interval. By what it is beaten in, nothing is ranked.
    """
    gold = found.get(RETRAIN, {})
    if not gold:
        return [
            "The gold standard was not checked: there is no retrained model of any class here (--gold FOLDER; "
            "docs/howto/classes.md makes them)."
        ]
    lines = ["| metric | retrain | best other | the gold standard is |", "|---" * 4 + "|"]
    beaten = []
    for metric, (words, of) in compared(rules).items():
        sign = 1 if rules.metrics[metric][1] == "higher" else -1
        best: tuple[float, str, Interval, bool] | None = None
        for arm, cells in found.items():
            both = [name for name in cells if name in gold]
            if arm == RETRAIN or len(both) < 2:  # an interval over one class says nothing
                continue
            ours, theirs = (reach([x[name] for name in both], metric, of) for x in (gold, cells))
            lead = sign * (theirs[0] - ours[0])
            if not math.isnan(lead) and (best is None or lead > best[0]):
                best = lead, f"{arm} {theirs[0]:.3f}", ours, ours[1] <= theirs[0] <= ours[2]
        if best is None:
            lines.append(f"| {words} | - | - | {ALONE} |")
            continue
        lead, other, ours, inside = best
        where = "at the top" if lead <= 0 else "within its interval" if inside else "beaten"
        beaten += [words] if where == "beaten" else []
        lines.append(f"| {words} | {told(ours)} | {other} | {where} |")
    if beaten:
        no = ", ".join(beaten)
        lines += ["", f"Where a method can beat never having seen the class, more is not better. No ranks by {no}."]
    return lines


# ------------------------------------------------------------------------------------------------------------- the text


def faster(timed: Json) -> str:
    """Return what the sampling times say; `timed`: of `onestep.speed`."""
    if not timed:
        return "Sampling speed is not measured: no --generator is given, or another process is at it."
    ratios = [base / one for base, one in timed["seconds"]]
    return (
        f"One-step sampling is {median(ratios):.1f} times as fast as the base's {timed['steps']} steps at guidance "
        f"{timed['guidance']:g}: median of {len(ratios)} repeats by turns, {min(ratios):.1f} to {max(ratios):.1f}, in "
        f"batches of {timed['batch']}, {timed['device']}, {timed['threads']} threads. Asked for: at least {FASTER}."
    )


def text(bench: Bench, arms: Sequence[str], classes: Sequence[str], timed: Json) -> str:
    """Return everything as Markdown: the tables, the gold standard's standing, what is missing, and the speed.

    Args:
        bench: the models and the cells.
        arms: of the table.
        classes: what was asked for.
        timed: of `onestep.speed`.
    """
    rules, found = bench.rules, bench.found(arms, classes)
    head = "| method | base | classes | UA | worst UA | retained, points | FID / base | KID | precision | recall "
    bases = {arm: bench.base(arm).name for arm in arms}
    parts = [head + "| entropy | probability | s |", "|---" * 13 + "|", *map(line, rows(found, bases, rules))]
    if singles := by_class(found, classes, rules):
        head = "| class | method | UA (base) | retained (base) | FID (base) | KID (base) | entropy (base) "
        parts += ["", head + "| probability (base) | s |", "|---" * 9 + "|", *singles]
    parts += ["", *standing(found, rules)]
    missing = [name for name in classes if name not in found.get(RETRAIN, {})]
    if RETRAIN in arms and missing:
        parts += ["", f"{RETRAIN}: no model that was retrained without {', '.join(missing)}."]
    refused = refusals((*cell, bench.folder(*cell)) for cell in grid(arms, classes))
    return "\n".join([*parts, *(f"\n{why}" for why in refused), "", faster(timed)]) + "\n"
