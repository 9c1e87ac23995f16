"""Improved precision and recall: do generated pictures look real, and are all kinds of real pictures generated?

The manifold of a set is the union of balls around its members, each reaching to its k-th nearest other member.

    precision   share of generated features inside the real manifold                                          (Eq. 1)
    recall      share of real features inside the generated manifold

Both are means over pictures, so they have outcomes, intervals and paired tests like any rate, given the manifolds.

Limits      figures depend on the feature network, on k and on both sizes: compare within one protocol only; a
            generated outlier has a large ball, so noise can raise recall: read it beside precision
Reference   Kynkaanniemi et al. 2019, arXiv:1904.06991
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rates import Array

CHUNK = 1000  # rows of the distance matrix at a time


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Return Euclidean distances (n, m) of features (n, d) and (m, d) in double precision."""
    # the faster way through a matrix product loses the small distances, which decide here
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")


def radii(features: Tensor, k: int) -> Tensor:
    """Return the distance (n,) of every row of (n, d) to its k-th nearest other row.

    Raises:
        ValueError: there are not more than k rows.
    """
    if len(features) <= k:
        raise ValueError(f"{len(features)} features have no {k}-th nearest other: give more than {k}")
    # the nearest of all is the row itself
    return torch.cat([distances(part, features).kthvalue(k + 1, dim=1).values for part in torch.split(features, CHUNK)])


def inside(points: Tensor, centres: Tensor, reach: Tensor) -> Tensor:
    """Return (n,): whether a point of (n, d) lies in any ball around centres (m, d) of radii (m,)."""
    return torch.cat([(distances(part, centres) <= reach).any(1) for part in torch.split(points, CHUNK)])


def precision(generated: Tensor, real: Tensor, k: int) -> Array:
    """Return outcomes (n,) of generated features (n, d) against real ones (m, d); nan where a row is not finite."""
    good = generated.isfinite().all(1)
    hits = inside(generated.nan_to_num(0.0), real, radii(real, k)).double()
    return hits.masked_fill(~good, torch.nan).numpy()


def recall(generated: Tensor, real: Tensor, k: int) -> Array:
    """Return outcomes (m,) of real features (m, d) against generated ones (n, d); rows not finite are left out."""
    good = generated[generated.isfinite().all(1)]
    if len(good) <= k:
        return torch.zeros(len(real), dtype=torch.float64).numpy()
    return inside(real, good, radii(good, k)).double().numpy()
