"""FID and KID between two sets of features, by torchmetrics.

The trunk is the caller's: a number is meaningful only with the trunk's name beside it, and these are never comparable
with Inception figures. Both compare *sets*; `base` and `edited` need not be paired.

    FID     |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) ; biased upwards when n is not far above the width d
    KID     unbiased squared MMD with the kernel (x.y / d + 1)^3, over all pictures at once; around 0, also negative,
            for equal distributions

Limits      FID with n <= d is computed from singular covariances: read it against other edits of one protocol only
Reference   Heusel et al. 2017, arXiv:1706.08500; Binkowski et al. 2018, arXiv:1801.01401
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

MIN_PICTURES = 2


class Given(nn.Module):
    """Feature network that returns the features it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        """Return (n, d) as it came."""
        return features


def usable(features: Tensor) -> Tensor:
    """Return the rows (n, d) that are finite, in double precision."""
    return features[features.isfinite().all(1)].double()


def fid(base: Tensor, edited: Tensor) -> float | None:
    """Return the Fréchet distance between feature sets (n, d) and (m, d); None with fewer than two usable rows."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # noqa: PLC0415 (slow to import)

    value = _compare(FrechetInceptionDistance(feature=Given(base.shape[1])), base, edited)
    return None if value is None else max(0.0, value)  # rounding leaves -1e-8 for equal sets


def kid(base: Tensor, edited: Tensor) -> float | None:
    """Return the kernel distance between feature sets (n, d) and (m, d); None with fewer than two usable rows."""
    from torchmetrics.image.kid import KernelInceptionDistance  # noqa: PLC0415

    size = min(len(usable(base)), len(usable(edited)))
    if size < MIN_PICTURES:
        return None
    # one subset of everything: the estimator is unbiased at any n, subsets would only add noise
    with warnings.catch_warnings():
        # features of a few hundred pictures are small
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        metric = KernelInceptionDistance(feature=Given(base.shape[1]), subsets=1, subset_size=size)
    return _compare(metric, base, edited)


def _compare(metric: Any, base: Tensor, edited: Tensor) -> float | None:
    base, edited = usable(base), usable(edited)
    if min(len(base), len(edited)) < MIN_PICTURES:
        return None
    metric.set_dtype(torch.float64)
    # torchmetrics permutes with the global generator: whoever calls us must not notice
    with torch.random.fork_rng(devices=[]):
        metric.update(base, real=True)
        metric.update(edited, real=False)
        value = metric.compute()
    return float(value[0] if isinstance(value, tuple) else value)
