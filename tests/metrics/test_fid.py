"""Parity with independent numpy transcriptions, closed forms, honesty at low n."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from expunge.metrics.fid import fid, kid


def sample(n, d, seed, shift=0.0, scale=1.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, scale, (n, d)))


def fid_numpy(x, y):
    s = sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * s)


def kid_numpy(x, y):
    def k(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = len(x)
    off = ~np.eye(n, dtype=bool)
    return k(x, x)[off].mean() + k(y, y)[off].mean() - 2 * k(x, y).mean()


def test_parity_with_numpy():
    x, y = sample(80, 6, 0), sample(80, 6, 1, shift=0.3, scale=1.4)
    assert fid(x, y) == pytest.approx(fid_numpy(x.numpy(), y.numpy()), rel=1e-6)
    assert kid(x, y) == pytest.approx(kid_numpy(x.numpy(), y.numpy()), rel=1e-9)


def test_fid_of_equal_sets_is_zero_also_with_fewer_pictures_than_features():
    x = sample(20, 32, 0)
    assert fid(x, x) == pytest.approx(0, abs=1e-3)
    assert fid(x, x + 1) == pytest.approx(32, rel=1e-3)


def test_fid_of_gaussians_is_the_closed_form():
    d = 4
    x, y = sample(20000, d, 0), sample(20000, d, 1, shift=1.0, scale=2.0)
    assert fid(x, y) == pytest.approx(d * 1.0 + d * (2.0 - 1.0) ** 2, rel=0.03)


def test_kid_is_unbiased_at_low_n_where_fid_is_not():
    pairs = [(sample(20, 8, 2 * i), sample(20, 8, 2 * i + 1)) for i in range(60)]
    kids = np.array([kid(x, y) for x, y in pairs])
    assert abs(kids.mean()) < 3 * kids.std() / np.sqrt(len(kids))
    assert np.mean([fid(x, y) for x, y in pairs[:10]]) > 1
    assert kid(pairs[0][0], pairs[0][1] + 1) > 10 * abs(kids.mean())


def test_broken_rows_are_left_out_and_one_row_is_no_set():
    x, y = sample(30, 4, 0), sample(30, 4, 1)
    broken = torch.cat([y, torch.full((2, 4), torch.nan, dtype=y.dtype)])
    assert fid(x, broken) == fid(x, y)
    assert fid(x[:1], y) is None
    assert kid(x, y[:1]) is None


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    kid(sample(10, 4, 0), sample(10, 4, 1))
    assert torch.equal(before, torch.get_rng_state())
