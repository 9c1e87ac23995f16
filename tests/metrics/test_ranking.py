"""Ranking: the area under the curve, its interval, the calibration error."""

from __future__ import annotations

import numpy as np
import pytest

from expunge.metrics.ranking import auc, calibration


def rows(n: int) -> np.ndarray:
    return np.arange(n)[:, None]


def test_auc_equals_the_rank_statistic() -> None:
    """Against scipy's Mann-Whitney U, an independent transcription."""
    stats = pytest.importorskip("scipy.stats")
    r = np.random.default_rng(3)
    y, s = (r.random(60) < 0.4).astype(float), r.normal(size=60).round(1)  # rounded: ties occur
    u = stats.mannwhitneyu(s[y == 1], s[y == 0]).statistic
    found = auc(s, y, rows(60))
    assert found.value == pytest.approx(u / ((y == 1).sum() * (y == 0).sum()))
    assert (found.low or 1) < (found.value or 0) < (found.high or 0)


def test_a_perfect_auc_is_not_certain() -> None:
    few, many = (auc(np.arange(n) % 2.0, np.arange(n) % 2.0, rows(n)) for n in (20, 200))
    assert few.value == many.value == 1
    assert 0.6 < (few.low or 0) < (many.low or 0) < 1


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Scores of two normal classes 1 apart: the true AUC is Phi(1 / sqrt 2) = 0.760."""
    hits = 0
    for seed in range(60):
        r = np.random.default_rng(seed)
        y = (np.arange(60) < 20).astype(float)
        found = auc(r.normal(size=60) + y, y, rows(60))
        hits += (found.low or 1) < 0.760 < (found.high or 0)
    assert hits >= 51  # of 60 at 95 %: fewer than 51 come once in 2,000 times


def test_one_kind_only_has_no_auc() -> None:
    found = auc(np.arange(5.0), np.ones(5), rows(5))
    assert (found.value, found.low, found.high, found.n) == (None, None, None, 5)
    assert auc(np.full(5, np.nan), np.arange(5) % 2.0, rows(5)).value is None


def test_pairs_are_counted_as_they_were_asked() -> None:
    pictures = np.array([[0, 1], [1, 2], [2, 0], [3, 0]])
    assert auc(np.array([1.0, -1, 2, 0]), np.array([1.0, 0, 0, 1]), pictures).value == (1 + 1 + 0 + 0.5) / 4


def test_calibration_error_of_true_and_of_overstated_probabilities() -> None:
    r = np.random.default_rng(0)
    p = r.random(4000)
    y = (r.random(4000) < p).astype(float)
    true, overstated = calibration(p, y), calibration(np.where(p > 0.5, 0.99, 0.01), y)
    assert true is not None
    assert true < 0.03
    assert overstated == pytest.approx(0.24, abs=0.02)  # of p in [1/2, 1] three quarters come true, 0.99 is said
    assert calibration(np.full(3, np.nan), np.ones(3)) is None
