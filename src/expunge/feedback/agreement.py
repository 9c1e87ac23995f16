"""How far raters agree, and how well a detector agrees with them.

    Cohen         kappa = (p_o - p_e) / (1 - p_e), two raters; p_e from each one's own shares of answers
    Fleiss        the same, any number of raters who all answered; p_e from the shares of all answers together
    Krippendorff  alpha = 1 - D_o / D_e, nominal; any number of raters, answers may be missing

1 is perfect agreement, 0 what chance gives. Where every answer is the same, chance agrees as well and none of them is
defined. Intervals: 95 %, percentile bootstrap over items; none where no two answers differ, since resampling would then
claim certainty.

Reference   Cohen 1960; Fleiss 1971; Krippendorff 2011 (Computing Krippendorff's alpha-reliability)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..metrics.rates import RESAMPLES, SEED, wilson
from .data import UNSURE, Rating

Array: TypeAlias = NDArray[np.float64]
# item -> rater -> answer
Table: TypeAlias = Mapping[int, Mapping[str, str]]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; None where it is not defined.

    Attributes:
        n: items it rests on.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Detection:
    """A detector against people: how many of the pictures that people agreed on it marks rightly and wrongly."""

    hits: int
    false_alarms: int
    misses: int
    passes: int

    @property
    def precision(self) -> Estimate:
        """Share of the marked pictures that people mark as well."""
        return _share(self.hits, self.hits + self.false_alarms)

    @property
    def recall(self) -> Estimate:
        """Share of the pictures that people mark which are marked."""
        return _share(self.hits, self.hits + self.misses)


def table(ratings: Iterable[Rating]) -> dict[int, dict[str, str]]:
    """Return who answered what, by item, in the order of items: intervals shall not depend on who was first."""
    found: dict[int, dict[str, str]] = {}
    for r in ratings:
        found.setdefault(r.item, {})[r.rater] = r.answer
    return dict(sorted(found.items()))


def cohen(answers: Table, one: str, two: str) -> Estimate:
    """Return Cohen's kappa of two raters over the items that both answered."""
    both = [(row[one], row[two]) for row in answers.values() if one in row and two in row]
    left, right = _counts([[a] for a, _ in both], both), _counts([[b] for _, b in both], both)

    def kappa(w: Array) -> Array:
        n = w.sum(1)
        observed = w @ (left * right).sum(1) / n
        expected = ((w @ left) * (w @ right)).sum(1) / n**2
        return _ratio(observed - expected, 1 - expected)

    return _estimate(kappa, both)


def fleiss(answers: Table) -> Estimate:
    """Return Fleiss' kappa over the items that every rater answered."""
    raters = {r for row in answers.values() for r in row}
    rows = [list(row.values()) for row in answers.values() if len(row) == len(raters) > 1]
    counts, m = _counts(rows, rows), len(raters)

    def kappa(w: Array) -> Array:
        n = w.sum(1)
        observed = w @ ((counts**2).sum(1) - m) / (n * m * (m - 1))
        expected = ((w @ counts / (n * m)[:, None]) ** 2).sum(1)
        return _ratio(observed - expected, 1 - expected)

    return _estimate(kappa, rows)


def krippendorff(answers: Table, *, interval: bool = True) -> Estimate:
    """Return Krippendorff's nominal alpha over the items with two answers or more.

    Args:
        answers: who answered what.
        interval: whether to estimate one, which takes far longer than the value.
    """
    rows = [list(row.values()) for row in answers.values() if len(row) > 1]
    counts = _counts(rows, rows)
    m = counts.sum(1)
    # pairs of unlike answers within an item, each item weighted as the coincidence matrix has it
    unlike = (m**2 - (counts**2).sum(1)) / (m - 1)

    def alpha(w: Array) -> Array:
        totals = w @ counts
        n = totals.sum(1)
        return 1 - _ratio((n - 1) * (w @ unlike), n**2 - (totals**2).sum(1))

    return _estimate(alpha, rows, interval)


def pairwise(answers: Table, raters: Sequence[str]) -> dict[tuple[str, str], Estimate]:
    """Return Cohen's kappa of every two raters."""
    return {(a, b): cohen(answers, a, b) for a, b in combinations(raters, 2)}


def consensus(answers: Table) -> dict[int, str | None]:
    """Return the answer that most raters of an item gave, "unsure" left out; None where there is no such answer."""
    found: dict[int, str | None] = {}
    for item, row in answers.items():
        ranked = Counter(a for a in row.values() if a != UNSURE).most_common(2)
        tied = len(ranked) == 2 and ranked[0][1] == ranked[1][1]
        found[item] = None if tied or not ranked else ranked[0][0]
    return found


def detection(people: Mapping[int, str | None], scores: Mapping[int, float], threshold: float) -> Detection:
    """Compare a detector with people on the pictures that both judged: it marks what scores `threshold` or more."""
    seen = [(people[i] == "concept", scores[i] >= threshold) for i in people if people[i] is not None and i in scores]
    return Detection(*(seen.count(pair) for pair in ((True, True), (False, True), (True, False), (False, False))))


def _share(k: int, n: int) -> Estimate:
    low, high = wilson(k, n) or (None, None)
    return Estimate(k / n if n else None, low, high, n)


def _counts(rows: Sequence[Sequence[str]], everything: Sequence[Sequence[str]]) -> Array:
    """Return how often each answer was given in each row, (rows, kinds of answers in everything)."""
    kinds = sorted({a for row in everything for a in row})
    found = [[row.count(k) for k in kinds] for row in map(list, rows)]
    return np.array(found, dtype=np.float64).reshape(len(rows), len(kinds))


def _ratio(top: Array, bottom: Array) -> Array:
    """Return top / bottom, nan where nothing varies."""
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 1e-12)


def _estimate(statistic: Callable[[Array], Array], rows: Sequence[Sequence[str]], interval: bool = True) -> Estimate:
    """Evaluate a statistic of item weights (resamples, items) on the items as they are and on resampled ones."""
    n = len(rows)
    if n == 0:
        return Estimate(None, None, None, 0)
    value = float(statistic(np.ones((1, n)))[0])
    if np.isnan(value):
        return Estimate(None, None, None, n)
    if not interval or all(len(set(row)) == 1 for row in rows):
        return Estimate(value, None, None, n)
    weights = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)
    low, high = (float(q) for q in np.nanquantile(statistic(weights), (0.025, 0.975)))
    return Estimate(value, low, high, n)
