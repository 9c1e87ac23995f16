"""FID and KID to a fixed real set: parity with torchmetrics and numpy, and intervals that cover."""

import math

import numpy as np
import pytest
import torch

from expunge.metrics import sets
from expunge.metrics.fid import fid
from expunge.metrics.sets import BLOCKS, Real, everything, fid_to, jackknife, kid_to, set_score, spread


def cloud(n, seed, shift=0.0, scale=1.0, d=5):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, scale, (n, d)))


REAL = Real(cloud(400, 0))


def kid_numpy(x, y):
    def k(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    own = [k(a, a)[~np.eye(len(a), dtype=bool)].mean() for a in (x, y)]
    return sum(own) - 2 * k(x, y).mean()


def test_parity():
    x = cloud(130, 1, shift=0.3, scale=1.3)
    assert fid_to(REAL, x)(everything(130)) == pytest.approx(fid(x, REAL.features), rel=1e-6)
    assert kid_to(REAL, x)(everything(130)) == pytest.approx(kid_numpy(x.numpy(), REAL.features.numpy()), rel=1e-9)


@pytest.mark.parametrize("to", [fid_to, kid_to])
def test_leaving_a_block_out_is_measuring_without_it(to):
    x = cloud(120, 1, shift=0.3)
    left = jackknife(to(REAL, x), 120)
    assert len(left) == BLOCKS
    without = x[torch.arange(120) % BLOCKS != 7]
    again = to(REAL, without)(everything(len(without)))
    assert left[7] == pytest.approx(again, rel=1e-9)
    assert left[7] != left[8]


def test_equal_sets_are_at_distance_zero():
    assert fid_to(REAL, REAL.features)(everything(400)) == pytest.approx(0, abs=1e-6)
    assert fid_to(REAL, REAL.features + 1)(everything(400)) == pytest.approx(5, abs=1e-6)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = torch.from_numpy(np.random.default_rng(3).normal(size=BLOCKS))

    def mean(keep):
        return float(x[keep].mean())

    assert spread(jackknife(mean, BLOCKS)) == pytest.approx(float(x.std() / math.sqrt(BLOCKS)), rel=1e-9)


@pytest.mark.parametrize("to", [fid_to, kid_to])
def test_intervals_cover_what_more_pictures_would_say(to):
    """The distance of 200 pictures, over 40 draws: its 95 % interval holds the mean of all draws in most."""
    scores = [score(to, cloud(200, 100 + i, shift=0.3), cloud(200, 100 + i)) for i in range(40)]
    truth = np.mean([s.value for s in scores])
    covered = sum(s.low <= truth <= s.high for s in scores)
    assert covered >= 34
    assert max(s.high - s.low for s in scores) < 4 * truth


def score(to, edited, base):
    return set_score("p", "m", to, REAL, edited, base)


@pytest.mark.parametrize("to", [fid_to, kid_to])
def test_the_paired_test_sees_a_change_and_none_where_there_is_none(to):
    base = cloud(300, 5)
    same, worse = score(to, base, base), score(to, base + 0.5, base)
    assert (same.p, same.base) == (1.0, same.value)
    assert worse.p < 1e-6
    assert worse.value > worse.base
    # an unpaired difference of two samples of one distribution is no change
    assert score(to, cloud(300, 6), base).p > 0.01


def test_a_broken_picture_leaves_both_sets():
    base, edited = cloud(100, 5), cloud(100, 6)
    whole = score(fid_to, edited[1:], base[1:])
    edited[0] = math.nan
    broken = score(fid_to, edited, base)
    assert (broken.value, broken.base) == (whole.value, whole.base)
    assert (broken.n, broken.errors) == (99, 1)
    assert score(fid_to, edited * math.nan, base).value is None


def test_low_ends():
    """FID is no less than zero; KID may be, or its mean would not be right."""
    near = score(kid_to, cloud(300, 7), cloud(300, 8))
    assert near.low < 0
    assert score(fid_to, cloud(300, 7), cloud(300, 8)).low >= 0


def test_blocks_are_even():
    x = torch.arange(103.0)[:, None]
    parts = sets.blocks(x)
    assert {len(p) for p in parts} == {2, 3}
    assert torch.equal(torch.cat(parts).sort(0).values, x)
