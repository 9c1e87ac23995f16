"""Perceptual distance of picture pairs, in the manner of LPIPS, over any trunk's activations.

    d(x, y) = mean over depths of mean over positions of | f/|f| - g/|g| |^2      f, g: channels of one position

Zero for equal pictures, at most 4. LPIPS learns weights per channel from human ratings; here all channels count alike,
so figures are not comparable with LPIPS: name the trunk.

Reference   Zhang et al. 2018, arXiv:1801.03924, Eq. 1 with unit weights
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def perceptual(base: Sequence[Tensor], edited: Sequence[Tensor]) -> Tensor:
    """Return the distance of every pair, shape (n,), nan where an activation is not finite.

    Args:
        base: activations at several depths, each (n, c, h, w).
        edited: the same of the paired pictures.
    """
    distances = [
        (F.normalize(f, dim=1) - F.normalize(g, dim=1)).square().sum(1).mean((1, 2))
        for f, g in zip(base, edited, strict=True)
    ]
    return torch.stack(distances).mean(0)
