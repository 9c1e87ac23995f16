"""FID and KID of generated pictures to a fixed set of real ones, with intervals.

    FID         |m - m_r|^2 + tr(S + S_r - 2 (S_r^(1/2) S S_r^(1/2))^(1/2)) ; biased upwards, less the larger n
    KID         unbiased squared MMD with the kernel (x.y / d + 1)^3, for sets of any two sizes
    interval    block jackknife: the distance without each of 50 blocks of generated pictures; the real set is fixed
    p           the same for the difference between edited and base, block by block: their pictures share seeds

A bootstrap would draw pictures twice, and both distances take that for a loss of variety.

Reference   Heusel et al. 2017, arXiv:1706.08500; Binkowski et al. 2018, arXiv:1801.01401; Quenouille 1956 (jackknife)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..records import Score
from .rates import Z95

BLOCKS = 50

# a distance of the pictures in the blocks that are kept (BLOCKS,) to the real ones
Statistic = Callable[[Tensor], float]


@dataclass(frozen=True)
class Real:
    """Features (n, d) of real pictures, in double precision, and what distances need of them."""

    features: Tensor

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (d,) and the square root of the covariance (d, d)."""
        values, vectors = torch.linalg.eigh(self.features.T.cov())
        return self.features.mean(0), vectors * values.clamp(min=0).sqrt() @ vectors.T

    @cached_property
    def alike(self) -> float:
        """Mean of the kernel over pairs of different pictures."""
        n, x = len(self.features), self.features
        total = sum(float(kernel(part, x).sum()) for part in torch.split(x, 1000)) - float(kernel_diagonal(x).sum())
        return total / (n * (n - 1))


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """Return the polynomial kernel (n, m) of features (n, d) and (m, d)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def kernel_diagonal(x: Tensor) -> Tensor:
    """Return the kernel (n,) of every row of (n, d) with itself."""
    return (x.square().sum(1) / x.shape[1] + 1) ** 3


def fid_to(real: Real, x: Tensor) -> Statistic:
    """Return the Frechet distance of features (n, d) to the real ones, as a function of the blocks kept."""
    parts = blocks(x)
    counts = torch.tensor([len(p) for p in parts], dtype=x.dtype)
    sums = torch.stack([p.sum(0) for p in parts])
    squares = torch.stack([p.T @ p for p in parts])
    mean_r, root_r = real.moments
    trace_r = root_r.square().sum()

    def distance(keep: Tensor) -> float:
        n = counts[keep].sum()
        mean = sums[keep].sum(0) / n
        cov = (squares[keep].sum(0) - n * torch.outer(mean, mean)) / (n - 1)
        overlap = torch.linalg.eigvalsh(root_r @ cov @ root_r).clamp(min=0).sqrt().sum()
        # rounding leaves -1e-8 for equal sets
        return max(0.0, float((mean - mean_r).square().sum() + cov.trace() + trace_r - 2 * overlap))

    return distance


def kid_to(real: Real, x: Tensor) -> Statistic:
    """Return the kernel distance of features (n, d) to the real ones, as a function of the blocks kept."""
    parts = blocks(x)
    counts = torch.tensor([len(p) for p in parts], dtype=x.dtype)
    owner = torch.arange(len(x)) % len(parts)
    among = torch.stack([torch.zeros_like(counts).index_add(0, owner, kernel(p, x).sum(0)) for p in parts])
    among -= torch.diag(torch.stack([kernel_diagonal(p).sum() for p in parts]))
    across = torch.stack([kernel(p, real.features).mean(1).sum() for p in parts])

    def distance(keep: Tensor) -> float:
        n = counts[keep].sum()
        return float(among[keep][:, keep].sum() / (n * (n - 1)) + real.alike - 2 * across[keep].sum() / n)

    return distance


def blocks(x: Tensor) -> list[Tensor]:
    """Return every BLOCKS-th row of (n, d), from each start; fewer blocks where there are fewer rows."""
    n = min(BLOCKS, len(x))
    return [x[i::n] for i in range(n)]


def everything(n: int) -> Tensor:
    """Return which blocks of n rows to keep for all of them."""
    return torch.ones(min(BLOCKS, n), dtype=torch.bool)


def jackknife(statistic: Statistic, n: int) -> Tensor:
    """Return the statistic of n rows without each block in turn, (blocks,)."""
    keep = ~torch.eye(min(BLOCKS, n), dtype=torch.bool)
    return torch.tensor([statistic(row) for row in keep], dtype=torch.float64)


def spread(left: Tensor) -> float:
    """Return the standard error that leave-one-block-out values (b,) tell of."""
    b = len(left)
    return math.sqrt((b - 1) / b * float((left - left.mean()).square().sum()))


def set_score(
    protocol: str,
    metric: str,
    to: Callable[[Real, Tensor], Statistic],
    real: Real,
    edited: Tensor,
    base: Tensor,
) -> Score:
    """Score a distance to the real set.

    Args:
        protocol: id of the protocol.
        metric: name of the number.
        to: `fid_to` or `kid_to`.
        real: the real pictures.
        edited: features (n, d) of the edited model's pictures; a pair with a row that is not finite is an error.
        base: features (n, d) of the base model's, same seeds.
    """
    good = edited.isfinite().all(1) & base.isfinite().all(1)
    n, errors = int(good.sum()), int((~good).sum())
    # without any block there must still be two pictures
    if n < 4:
        return Score(protocol=protocol, metric=metric, value=None, n=n, errors=errors)
    new, old = (to(real, x[good].double()) for x in (edited, base))
    value, was = (s(everything(n)) for s in (new, old))
    left, left_base = jackknife(new, n), jackknife(old, n)
    half, apart = Z95 * spread(left), spread(left - left_base)
    p = math.erfc(abs(value - was) / apart / math.sqrt(2)) if apart else float(value == was)
    return Score(
        protocol=protocol,
        metric=metric,
        value=value,
        low=value - half if to is kid_to else max(0.0, value - half),
        high=value + half,
        n=n,
        errors=errors,
        base=was,
        p=p,
    )
