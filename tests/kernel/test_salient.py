"""Saliency maps that must agree."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expunge.errors import SettingError
from expunge.kernel.saliency import top
from expunge.kernel.salient import Salient

G = torch.Generator().manual_seed(0)


def weights() -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.zeros(20, 30)), "b": nn.Parameter(torch.zeros(50))}


def loss(w: dict[str, nn.Parameter], gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss with a given gradient."""
    return sum((w[k] * v).sum() for k, v in gradient.items())  # type: ignore[return-value]


def maps(n: int) -> list[dict[str, torch.Tensor]]:
    return [{k: torch.randn(v.shape, generator=G) for k, v in weights().items()} for _ in range(n)]


def test_it_is_the_intersection_of_the_maps_masks() -> None:
    w, drawn = weights(), maps(4)
    salient = Salient(w)
    for m in drawn:
        salient.add(loss(w, m))
    kept = salient.mask(0.1)
    assert sum(int(m.sum()) for m in kept.values()) == 65
    flat = torch.stack([torch.cat([v.flatten() for v in m.values()]) for m in drawn]).abs()
    flat = flat / flat.square().mean(1, keepdim=True).sqrt()
    chosen = torch.cat([m.flatten() for m in kept.values()]).bool()
    threshold = flat[:, chosen].min()
    # before: each map alone has many more weights above that threshold
    assert (flat >= threshold).sum(1).min() > 2 * 65
    assert torch.equal((flat >= threshold).all(0), chosen)


def test_a_map_counts_by_its_shape_not_by_its_size() -> None:
    w, (one, two) = weights(), maps(2)
    masks = []
    for scale in (1.0, 1000.0):
        salient = Salient(w)
        salient.add(loss(w, one))
        salient.add(loss(w, {k: scale * v for k, v in two.items()}))
        masks.append(salient.mask(0.3))
    assert all(torch.equal(masks[0][k], masks[1][k]) for k in w)
    assert not torch.equal(top({"a": one["a"].abs()}, 0.3)["a"], masks[0]["a"])


def test_a_map_without_gradient_says_nothing() -> None:
    w, (one,) = weights(), maps(1)
    salient = Salient(w)
    with pytest.raises(SettingError, match="no saliency map has a gradient"):
        salient.mask(0.5)
    salient.add(loss(w, one))
    before = salient.mask(0.5)
    salient.add(0 * loss(w, one))
    assert all(torch.equal(before[k], v) for k, v in salient.mask(0.5).items())
