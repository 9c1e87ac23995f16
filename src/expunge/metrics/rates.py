"""Rates with intervals, paired tests, and the harmonic mean.

An outcome is 1 (success), 0 (failure) or nan (the picture could not be scored). A picture that could not be scored
stays in the denominator and is never a success.

    Wilson      (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    McNemar     exact: of the b + c pairs that changed, b went one way; two-sided binomial test against one half
    bootstrap   weights w_i ~ Exp(1) on pictures, and one success and one failure of weight Gamma(1/2): the marginal of
                every rate is then the Jeffreys posterior Beta(k + 1/2, n - k + 1/2), also at k = n, where the usual
                bootstrap claims certainty; rates over the same pictures keep their correlation
    swaps       base and edited picture of a pair change places at random: how often is the change as large as it was;
                for a single rate this is McNemar's test

Reference   Wilson 1927; McNemar 1947; Rubin 1981 (Bayesian bootstrap)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..records import Score

Array: TypeAlias = NDArray[np.float64]

Z95 = NormalDist().inv_cdf(0.975)
RESAMPLES = 2000
SEED = 20260101


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float] | None:
    """Return the Wilson interval of a rate, None for n = 0.

    Raises:
        ValueError: successes outside [0, n].
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: must lie between 0 and n")
    if n == 0:
        return None
    p, zz = successes / n, z * z / n
    centre, half = p + zz / 2, z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    # at 0 and n the end is exact; rounding would leave it a hair inside
    low = 0.0 if successes == 0 else max(0.0, (centre - half) / (1 + zz))
    high = 1.0 if successes == n else min(1.0, (centre + half) / (1 + zz))
    return low, high


def mcnemar(before: Array, after: Array) -> float | None:
    """Return the exact two-sided p-value of a change between paired outcomes (n,), None without pairs.

    Raises:
        ValueError: the two differ in length.
    """
    if len(before) != len(after):
        raise ValueError(f"outcomes are not paired: {len(before)} before, {len(after)} after")
    if len(before) == 0:
        return None
    x, y = before == 1, after == 1
    lost, won = int((x & ~y).sum()), int((~x & y).sum())
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1))
    return min(1.0, float(2 * tail / 2**n))


def rate(protocol: str, metric: str, after: Array, before: Array | None = None, *, error_is: int = 0) -> Score:
    """Score the share of successes.

    Args:
        protocol: id of the protocol.
        metric: name of the number.
        after: outcomes of the edited model, shape (n,).
        before: outcomes of the base model on the same prompts and seeds.
        error_is: what an unscored picture counts as: 0, or 1 where the "success" is a defect.
    """
    n, errors = len(after), int(np.isnan(after).sum())
    if n == 0:
        return Score(protocol=protocol, metric=metric, value=None)
    filled = np.nan_to_num(after, nan=error_is)
    k = int(filled.sum())
    low, high = wilson(k, n) or (None, None)
    base = p = None
    if before is not None:
        known = np.nan_to_num(before, nan=error_is)
        base, p = float(known.mean()), mcnemar(known, filled)
    return Score(
        protocol=protocol, metric=metric, value=k / n, low=low, high=high, n=n - errors, errors=errors, base=base, p=p
    )


def harmonic(values: Sequence[float]) -> float:
    """Return the harmonic mean; 0 as soon as one value is 0."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / v for v in values)


def harmonic_score(
    protocol: str, metric: str, after: Sequence[Sequence[Array]], before: Sequence[Sequence[Array]], seed: int = SEED
) -> Score:
    """Score the harmonic mean of several rates, with a bootstrap interval and a p-value by swapping pairs.

    Args:
        protocol: id of the protocol.
        metric: name of the number.
        after: groups of outcome vectors; vectors of one group are over the same pictures.
        before: the same of the base model.
        seed: seed of the resampling.
    """
    vectors = [v for group in after for v in group]
    if any(len(v) == 0 for v in vectors):
        return Score(protocol=protocol, metric=metric, value=None)
    rng = np.random.default_rng(seed)
    drawn, new, old = [], [], []
    for a, b in zip(after, before, strict=True):
        weights, pseudo = rng.exponential(size=(RESAMPLES, len(a[0]))), rng.gamma(0.5, size=(RESAMPLES, 2))
        drawn += [_weighted(v, weights, pseudo) for v in a]
        swapped = rng.integers(2, size=(RESAMPLES, len(a[0]))).astype(np.float64)
        for x, y in zip(map(np.nan_to_num, a), map(np.nan_to_num, b), strict=True):
            moved = swapped @ (y - x)
            new.append((x.sum() + moved) / len(x))
            old.append((y.sum() - moved) / len(x))
    value = harmonic([float(np.nan_to_num(v).mean()) for v in vectors])
    base = harmonic([float(np.nan_to_num(v).mean()) for g in before for v in g])
    low, high = (float(q) for q in np.quantile(_harmonic_rows(drawn), (0.025, 0.975)))
    # the slack makes "equal" robust against the order of summation
    extreme = np.abs(_harmonic_rows(new) - _harmonic_rows(old)) >= abs(value - base) - 1e-9
    errors = sum(int(np.isnan(np.stack(list(g))).any(0).sum()) for g in after)
    return Score(
        protocol=protocol,
        metric=metric,
        value=value,
        low=min(low, value),
        high=max(high, value),
        n=sum(len(g[0]) for g in after) - errors,
        errors=errors,
        base=base,
        p=float((extreme.sum() + 1) / (RESAMPLES + 1)),
    )


def mean_score(protocol: str, metric: str, after: Array, before: Array | None = None, seed: int = SEED) -> Score:
    """Score a mean over pictures: bootstrap interval, and a sign-flip test of the paired differences from the base.

    A value that is nan is an error and cannot enter a mean; `errors` counts them.
    """
    good = after[~np.isnan(after)]
    errors = len(after) - len(good)
    if len(good) == 0:
        return Score(protocol=protocol, metric=metric, value=None, errors=errors)
    rng = np.random.default_rng(seed)
    means = good[rng.integers(len(good), size=(RESAMPLES, len(good)))].mean(1)
    low, high = (float(q) for q in np.quantile(means, (0.025, 0.975)))
    base = p = None
    if before is not None and not np.isnan(before).all():
        base = float(np.nanmean(before))
        change = (after - before)[~np.isnan(after - before)]
        flips = rng.choice((-1.0, 1.0), size=(RESAMPLES, len(change)))
        # the slack makes "equal" robust against the order of summation
        extreme = np.abs((flips * change).mean(1)) >= abs(change.mean()) - 1e-12 if len(change) else np.ones(0)
        p = float((extreme.sum() + 1) / (RESAMPLES + 1)) if len(change) else None
    return Score(
        protocol=protocol,
        metric=metric,
        value=float(good.mean()),
        low=low,
        high=high,
        n=len(good),
        errors=errors,
        base=base,
        p=p,
    )


def _weighted(outcomes: Array, weights: Array, pseudo: Array) -> Array:
    hits = weights @ np.nan_to_num(outcomes) + pseudo[:, 0]
    return np.asarray(hits / (weights.sum(1) + pseudo.sum(1)), dtype=np.float64)


def _harmonic_rows(rates: Sequence[Array]) -> Array:
    inverse = 1 / np.maximum(np.stack(rates), 1e-12)
    return np.asarray(len(rates) / inverse.sum(0), dtype=np.float64)
