"""Intervals that cover, tests that agree with scipy, errors that are never successes."""

import math

import numpy as np
import pytest
from scipy.stats import beta, binomtest

from expunge.metrics.rates import harmonic, harmonic_score, mcnemar, mean_score, rate, wilson

NAN = math.nan


@pytest.mark.parametrize(("k", "n"), [(0, 48), (1, 48), (24, 48), (47, 48), (48, 48), (150, 160)])
def test_wilson_agrees_with_scipy(k, n):
    known = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((known.low, known.high), abs=1e-12)


def test_wilson_covers_and_the_wald_interval_does_not():
    rng, n, p = np.random.default_rng(0), 48, 0.97
    draws = rng.binomial(n, p, 4000)

    def covered(interval):
        return np.mean([low <= p <= high for low, high in map(interval, draws)])

    def wald(k):
        half = 1.96 * math.sqrt(k / n * (1 - k / n) / n)
        return k / n - half, k / n + half

    assert covered(wald) < 0.85
    assert covered(lambda k: wilson(int(k), n)) > 0.93


def test_wilson_of_nothing_and_of_nonsense():
    assert wilson(0, 0) is None
    with pytest.raises(ValueError, match="between 0 and n"):
        wilson(5, 4)


@pytest.mark.parametrize(("lost", "won"), [(0, 1), (3, 0), (10, 2), (5, 5), (0, 48)])
def test_mcnemar_is_the_binomial_test_of_the_pairs_that_changed(lost, won):
    before = np.array([1.0] * lost + [0.0] * won + [1.0, 0.0, 1.0])
    after = np.array([0.0] * lost + [1.0] * won + [1.0, 0.0, 1.0])
    assert mcnemar(before, after) == pytest.approx(binomtest(lost, lost + won).pvalue)


def test_mcnemar_without_a_change_and_without_pairs():
    assert mcnemar(np.ones(4), np.ones(4)) == 1.0
    assert mcnemar(np.ones(0), np.ones(0)) is None
    with pytest.raises(ValueError, match="not paired"):
        mcnemar(np.ones(3), np.ones(4))


def test_an_unscored_picture_is_never_a_success_and_never_leaves_the_denominator():
    whole = rate("p", "ua", np.array([1.0, 1, 1, 0]))
    broken = rate("p", "ua", np.array([1.0, 1, NAN, 0]))
    assert (whole.value, whole.n, whole.errors) == (0.75, 4, 0)
    assert (broken.value, broken.n, broken.errors) == (0.5, 3, 1)
    assert broken.high < whole.high


def test_an_unscored_picture_counts_as_a_defect_where_defects_are_counted():
    assert rate("p", "degenerate", np.array([0.0, NAN]), error_is=1).value == 0.5


def test_a_rate_of_nothing_is_no_number():
    assert rate("p", "ua", np.ones(0)).value is None


def test_rate_reports_base_and_paired_p():
    score = rate("p", "ua", np.ones(48), np.zeros(48))
    assert (score.base, score.value) == (0.0, 1.0)
    assert score.p == pytest.approx(2 / 2**48)


def test_harmonic_mean_lies_below_the_mean_and_is_zero_at_zero():
    assert harmonic([0.5, 1.0]) == pytest.approx(2 / 3)
    assert harmonic([0.9, 0.9, 0.9]) == pytest.approx(0.9)
    assert harmonic([1.0, 1.0, 0.0]) == 0.0


def test_harmonic_interval_of_one_rate_is_the_jeffreys_interval():
    outcomes = np.array([1.0] * 45 + [0.0] * 3)
    score = harmonic_score("p", "h", [[outcomes]], [[outcomes]])
    low, high = beta.ppf((0.025, 0.975), 45.5, 3.5)
    assert (score.low, score.high) == pytest.approx((low, high), abs=0.012)


def test_harmonic_score_is_not_certain_when_all_succeed():
    ones = np.ones(48)
    score = harmonic_score("p", "h", [[ones], [ones, ones]], [[ones], [ones, ones]])
    assert score.value == score.high == 1.0
    assert score.low < 0.99
    assert (score.n, score.errors, score.p) == (96, 0, 1.0)


def test_harmonic_score_sees_a_difference_and_repeats_itself():
    after, before = [[np.ones(48)], [np.ones(160), np.ones(160)]], [[np.zeros(48)], [np.ones(160), np.ones(160)]]
    score = harmonic_score("p", "h", after, before)
    assert score.base == 0.0
    assert score.p < 0.01
    assert score == harmonic_score("p", "h", after, before)


@pytest.mark.parametrize(("lost", "won"), [(0, 1), (3, 0), (10, 2), (5, 5), (0, 48)])
def test_harmonic_score_of_one_rate_is_tested_as_the_rate_is(lost, won):
    before = np.array([1.0] * lost + [0.0] * won + [1.0, 0.0, 1.0])
    after = np.array([0.0] * lost + [1.0] * won + [1.0, 0.0, 1.0])
    assert harmonic_score("p", "h", [[after]], [[before]]).p == pytest.approx(mcnemar(before, after), abs=0.03)


def test_one_changed_picture_proves_nothing_of_the_harmonic_mean():
    before = [[np.array([1.0] * 47 + [0.0])], [np.ones(160), np.ones(160)]]
    after = [[np.ones(48)], [np.ones(160), np.ones(160)]]
    score = harmonic_score("p", "h", after, before)
    assert score.value > score.base
    assert score.p == 1.0


def test_harmonic_score_is_zero_and_unchanged_where_one_rate_is_zero():
    score = harmonic_score("p", "h", [[np.ones(9)], [np.zeros(9)]], [[np.zeros(9)], [np.zeros(9)]])
    assert (score.value, score.base, score.p) == (0.0, 0.0, 1.0)


def test_mean_score_interval_covers_the_mean():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        score = mean_score("p", "clip_score", rng.normal(0.3, 0.1, 60))
        hits += score.low <= 0.3 <= score.high
    assert hits > 180


def test_mean_score_paired_test_finds_a_shift_and_no_shift():
    rng = np.random.default_rng(2)
    x = rng.normal(0, 1, 80)
    assert mean_score("p", "m", x + 0.2 + rng.normal(0, 0.05, 80), x).p < 0.01
    assert mean_score("p", "m", x + rng.normal(0, 0.05, 80), x).p > 0.05
    assert mean_score("p", "m", x, x).p == 1.0


def test_mean_score_of_errors_alone_is_none_not_a_crash():
    score = mean_score("p", "clip_score", np.full(7, NAN), np.full(7, NAN))
    assert (score.value, score.n, score.errors) == (None, 0, 7)
