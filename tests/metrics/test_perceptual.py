import math

import torch

from expunge.metrics.perceptual import perceptual


def depths(seed, n=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, c, s, s, generator=g) for c, s in ((4, 8), (8, 4))]


def test_distance_of_a_picture_to_itself_is_zero_and_symmetric_otherwise():
    a, b = depths(0), depths(1)
    assert perceptual(a, a).max() < 1e-12
    assert perceptual(a, b).min() > 0.1
    assert torch.allclose(perceptual(a, b), perceptual(b, a))


def test_scale_of_the_activations_does_not_matter_and_opposites_are_farthest():
    a, b = depths(0), depths(1)
    assert torch.allclose(perceptual(a, b), perceptual([3 * x for x in a], b), atol=1e-6)
    assert torch.allclose(perceptual(a, [-x for x in a]), torch.full((3,), 4.0), atol=1e-5)


def test_every_depth_counts_alike():
    a = depths(0)
    half = perceptual(a, [a[0], -a[1]])
    assert torch.allclose(half, torch.full((3,), 2.0), atol=1e-5)


def test_a_broken_picture_is_nan_alone():
    a, b = depths(0), depths(1)
    b[0][1] = math.nan
    assert perceptual(a, b).isnan().tolist() == [False, True, False]
