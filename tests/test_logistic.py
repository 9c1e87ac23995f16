"""Logistic regression: its optimum, its penalty, its calibration."""

from __future__ import annotations

import numpy as np
import pytest

from expunge.logistic import cross_entropy, logistic, platt, sigmoid


def data(n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    r = np.random.default_rng(seed)
    x = r.normal(size=(n, 4))
    return x, (r.random(n) < sigmoid(x @ [2.0, -1, 0, 0] + 0.5)).astype(float)


@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_is_zero_at_the_optimum_and_not_before(bias: bool) -> None:
    x, y = data()
    y = 0.9 * y + 0.05  # labels may be soft

    def gradient(w: np.ndarray, b: float) -> np.ndarray:
        return x.T @ (sigmoid(x @ w + b) - y) + 0.3 * w

    assert np.abs(gradient(np.zeros(4), 0)).max() > 10
    w, b = logistic(x, y, 0.3, bias=bias)
    assert np.abs(gradient(w, b)).max() < 1e-6
    assert (b != 0) == bias
    assert np.abs((sigmoid(x @ w + b) - y).sum()) < 1e-4 or not bias


def test_it_finds_what_made_the_labels() -> None:
    x, y = data(20_000)
    w, b = logistic(x, y, 1e-3, bias=True)
    np.testing.assert_allclose([*w, b], [2, -1, 0, 0, 0.5], atol=0.1)  # 4 standard errors


def test_a_penalty_shrinks_and_a_start_does_not_matter() -> None:
    x, y = data()
    sizes = [np.linalg.norm(logistic(x, y, penalty, bias=True)[0]) for penalty in (0.01, 1.0, 100.0)]
    assert sizes[0] > sizes[1] > 2 * sizes[2] > 0
    far = logistic(x, y, 1.0, bias=True, start=(np.full(4, 5.0), -3.0))
    np.testing.assert_allclose(far[0], logistic(x, y, 1.0, bias=True)[0], atol=1e-6)


def test_separable_labels_and_huge_logits_stay_finite() -> None:
    x = np.linspace(-1, 1, 20)[:, None]
    y = (x[:, 0] > 0).astype(float)
    w, b = logistic(x, y, 1e-6, bias=True)
    assert np.isfinite([*w, b]).all()
    assert np.isfinite(cross_entropy(np.array([1e4, -1e4]), np.array([1.0, 1.0])))
    np.testing.assert_array_equal(sigmoid(np.array([-1e4, 0, 1e4])), [0, 0.5, 1])


def test_platt_shrinks_logits_that_are_too_sure() -> None:
    r = np.random.default_rng(1)
    truth = r.normal(size=4000) * 1.5
    y = (r.random(4000) < sigmoid(truth)).astype(float)
    slope, shift = platt(4 * truth + 2, y, bias=True)
    assert slope == pytest.approx(0.25, rel=0.1)
    assert shift == pytest.approx(-0.5, abs=0.15)


def test_platt_gives_worthless_logits_no_weight() -> None:
    y = np.arange(40) % 4 == 0
    slope, shift = platt(np.where(y, -1.0, 1.0), y.astype(float), bias=True)
    assert slope == 0
    assert sigmoid(np.array(shift)) == pytest.approx(0.25, abs=0.05)
    assert platt(np.where(y, -1.0, 1.0), y.astype(float), bias=False) == (0.0, 0.0)
