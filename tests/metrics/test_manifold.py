"""Improved precision and recall: against an independent transcription, and on sets whose answer is known."""

import math

import numpy as np
import pytest
import torch

from expunge.metrics.manifold import inside, precision, radii, recall

K = 3


def cloud(n, seed, shift=0.0, scale=1.0, d=4):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, scale, (n, d)))


def share(points, centres, k):
    """Eq. 1 and Algorithm 1 of arXiv:1904.06991, one point at a time."""
    hits = 0
    for x in points:
        found = False
        for i, c in enumerate(centres):
            others = sorted(np.linalg.norm(c - o) for j, o in enumerate(centres) if j != i)
            found = found or np.linalg.norm(x - c) <= others[k - 1]
        hits += found
    return hits / len(points)


def test_parity_with_a_transcription():
    real, made = cloud(30, 0), cloud(25, 1, shift=0.8, scale=0.7)
    assert 0 < share(made.numpy(), real.numpy(), K) < 1
    assert precision(made, real, K).mean() == share(made.numpy(), real.numpy(), K)
    assert recall(made, real, K).mean() == share(real.numpy(), made.numpy(), K)


def test_a_set_has_full_precision_and_recall_of_itself_and_none_of_a_far_one():
    x = cloud(50, 0)
    assert precision(x, x, K).mean() == recall(x, x, K).mean() == 1
    assert precision(x + 100, x, K).mean() == recall(x + 100, x, K).mean() == 0


def test_collapse_costs_recall_and_noise_costs_precision():
    real = cloud(200, 0)
    collapsed, noisy = real[:1] + cloud(200, 1, scale=0.05), cloud(200, 2, scale=4.0)
    assert precision(collapsed, real, K).mean() > 0.9
    assert recall(collapsed, real, K).mean() < 0.1
    assert precision(noisy, real, K).mean() < 0.2


def test_half_of_the_kinds_is_half_of_the_recall():
    real = torch.cat([cloud(100, 0), cloud(100, 1, shift=50.0)])
    half = cloud(200, 2)
    assert recall(torch.cat([half, cloud(200, 3, shift=50.0)]), real, K).mean() > 0.9
    assert recall(half, real, K).mean() == pytest.approx(0.5, abs=0.05)


def test_chunks_do_not_matter(monkeypatch):
    real, made = cloud(60, 0), cloud(50, 1, shift=0.5)
    whole = precision(made, real, K)
    monkeypatch.setattr("expunge.metrics.manifold.CHUNK", 7)
    assert np.array_equal(precision(made, real, K), whole)


def test_a_broken_picture_is_an_error_in_precision_and_no_part_of_the_manifold():
    real, made = cloud(40, 0), cloud(40, 1)
    without = recall(made[1:], real, K)
    made[0, 2] = math.nan
    seen = precision(made, real, K)
    assert np.isnan(seen).tolist() == [True, *[False] * 39]
    assert np.array_equal(recall(made, real, K), without)
    assert recall(made * math.nan, real, K).sum() == 0


def test_a_ball_reaches_to_its_kth_other_member():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert radii(line, 1).tolist() == [1, 1, 2, 4]
    assert radii(line, 3).tolist() == [7, 6, 4, 7]
    assert inside(torch.tensor([[-1.0], [-1.1], [11.0], [11.5]]), line, radii(line, 1)).tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="more than 4"):
        radii(line, 4)
