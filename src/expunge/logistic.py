"""Penalised logistic regression by Newton's method, and Platt's calibration of its logits. No torch.

    min_w,b  sum_i [ log(1 + exp f_i) - y_i f_i ] + lambda / 2 |w|^2,   f_i = w . x_i + b,   y_i in [0, 1]

Reference   Platt 1999, Probabilistic Outputs for Support Vector Machines
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

MOST, CLOSE = 100, 1e-6  # steps, and the change that ends them
FREE = 1e-6  # penalty of what goes free, lest a singular system stop the steps


def sigmoid(x: Array) -> Array:
    """Return the logistic function, without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(x / 2)), np.float64)


def logistic(
    rows: Array, y: Array, penalty: float, *, bias: bool, start: tuple[Array, float] | None = None
) -> tuple[Array, float]:
    """Return weights (k,) and bias of the penalised maximum likelihood, by Newton's method; the bias goes free.

    Args:
        rows: features (m, k).
        y: labels in [0, 1], (m,).
        penalty: lambda.
        bias: whether there is one; else it is 0.
        start: weights and bias to start from, zero without.
    """
    a = np.column_stack([rows, np.ones(len(rows))]) if bias else rows
    ridge = np.full(a.shape[1], penalty)
    ridge[-1] = FREE if bias else penalty
    w = np.zeros(a.shape[1]) if start is None else np.append(*start) if bias else start[0]

    def cost(w: Array) -> float:
        return len(y) * cross_entropy(a @ w, y) + float(ridge @ w**2) / 2

    for _ in range(MOST):
        p = sigmoid(a @ w)
        step = np.linalg.solve((a.T * (p * (1 - p))) @ a + np.diag(ridge), a.T @ (p - y) + ridge * w)
        while cost(w - step) > cost(w) and np.abs(step).max() > CLOSE:
            step /= 2
        w = w - step
        if np.abs(step).max() <= CLOSE:
            break
    return (w[:-1], float(w[-1])) if bias else (w, 0.0)


def platt(logits: Array, y: Array, *, bias: bool) -> tuple[float, float]:
    """Return slope and shift that turn held-out logits (m,) into calibrated ones.

    Labels are drawn in a little, as if one more item of each kind had been seen: separable ones would ask for an
    infinite slope. Logits that are worse than none get slope 0, and what is left is the share of rejected pictures.
    """
    yes, no = float((y > 0.5).sum()), float((y <= 0.5).sum())
    target = np.where(y > 0.5, (yes + 1) / (yes + 2), 1 / (no + 2))
    (slope,), shift = logistic(logits[:, None], target, FREE, bias=bias)
    if slope > 0:
        return float(slope), shift
    return 0.0, float(np.log(target.mean() / (1 - target.mean()))) if bias else 0.0


def cross_entropy(logits: Array, y: Array) -> float:
    """Return the mean loss of logits (m,) for labels in [0, 1]."""
    return float((np.logaddexp(0, logits) - y * logits).mean())
