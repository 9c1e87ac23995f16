"""How well scores tell two kinds of items apart, and how true stated probabilities are."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..feedback.agreement import Estimate
from .rates import RESAMPLES, SEED, Array

Index: TypeAlias = NDArray[np.int64]

BINS, PER_BIN = 10, 20  # of the calibration error: at most so many bins, of so many items


def auc(held: Array, y: Array, pictures: Index) -> Estimate:
    """Return the share of comparisons that scores (m,) get right; 95 % Bayesian bootstrap over pictures.

    Single pictures: every rejected one against every other (the area under the ROC curve). Pairs: as they were asked.
    As in `rates`, one right and one wrong comparison of weight Gamma(1/2) keep a perfect score from certainty.

    Args:
        held: scores; of a pair, by how much the first's exceeds the second's; nan leaves an item out.
        y: whether the item is of the first kind (of a pair, its first picture), above or below 0.5; 0.5 leaves it out.
        pictures: what each item shows, (m, 1), or (m, 2) where pairs are compared.
    """
    rng, seen = np.random.default_rng(SEED), ~np.isnan(held) & (y != 0.5)
    if pictures.shape[1] == 2:
        right = np.heaviside(np.where(y > 0.5, held, -held)[seen], 0.5)
        known, place = np.unique(pictures[seen], return_inverse=True)
        w = rng.exponential(size=(RESAMPLES, len(known)))
        first, second = place.reshape(-1, 2).T
        each = w[:, first] * w[:, second]
        hits, total, unit = each @ right, each.sum(1), 1
    else:
        high, low = held[seen & (y > 0.5)], held[seen & (y < 0.5)]
        right = np.heaviside(high[:, None] - low, 0.5)
        w, v = (rng.exponential(size=(RESAMPLES, len(side))) for side in (high, low))
        hits, total, unit = ((w @ right) * v).sum(1), w.sum(1) * v.sum(1), max(right.shape)
    if right.size == 0:
        return Estimate(None, None, None, int(seen.sum()))
    pseudo = unit * rng.gamma(0.5, size=(2, RESAMPLES))
    low_end, high_end = np.quantile((hits + pseudo[0]) / (total + pseudo.sum(0)), (0.025, 0.975))
    return Estimate(float(right.mean()), float(low_end), float(high_end), int(seen.sum()))


def calibration(stated: Array, y: Array) -> float | None:
    """Return the mean distance of stated probabilities (m,) from what is observed: ECE over bins of equal counts.

    Items whose probability is nan, or whose label y is 0.5, are left out; None without any.
    """
    seen = ~np.isnan(stated) & (y != 0.5)
    if not seen.any():
        return None
    p, said = stated[seen], (y[seen] > 0.5).astype(np.float64)
    bins = np.array_split(np.argsort(p, kind="stable"), max(1, min(BINS, len(p) // PER_BIN)))
    return float(sum(abs(p[b].sum() - said[b].sum()) for b in bins) / len(p))
