"""Additive low-rank updates of linear and convolutional layers (LoRA, arXiv:2106.09685, Eq. 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """`layer(x) + up(down(x))`, added by a forward hook; `up` starts at zero, so attaching changes nothing.

    Attributes:
        down: (rank, in) or (rank, in, k, k).
        up: (out, rank) or (out, rank, 1, 1).
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        w = layer.weight
        rank = min(rank, w.shape[0], w[0].numel())
        down = torch.randn(rank, *w.shape[1:], generator=generator) / w[0].numel() ** 0.5
        self.down = nn.Parameter(down.to(w.device))
        self.up = nn.Parameter(torch.zeros(w.shape[0], rank, *(1,) * (w.ndim - 2), device=w.device))
        self.layer = [layer]  # in a list: the layer must not become a child of its own adapter
        self.hook = layer.register_forward_hook(self.add)

    def add(self, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Forward hook of the layer."""
        return out + through(layer, args[0], self.down, self.up).to(out.dtype)

    def detach_from_layer(self) -> None:
        """Remove the hook."""
        self.hook.remove()


def through(layer: nn.Module, x: Tensor, down: Tensor, up: Tensor, gate: Tensor | None = None) -> Tensor:
    """Return `up(gate * down(x))`, what a low-rank update adds to a layer's output.

    Args:
        layer: linear or convolutional.
        x: its input (b, ...).
        down: (rank, in, ...).
        up: (out, rank, ...).
        gate: weight of each rank for each sample, (b, rank); None for ones.
    """
    x = x.to(down.dtype)
    if isinstance(layer, nn.Conv2d):
        h = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
        return F.conv2d(h if gate is None else h * gate[:, :, None, None], up)
    h = F.linear(x, down)
    return F.linear(h if gate is None else h * gate.view(len(x), *(1,) * (x.ndim - 2), -1), up)


def product(down: Tensor, up: Tensor) -> Tensor:
    """Return the full-size update `up @ down`, shaped like the layer's weight."""
    return (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


def factor(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best (down, up) of a rank for a weight update (truncated singular value decomposition in float64)."""
    u, s, v = torch.linalg.svd(delta.double().flatten(1), full_matrices=False)
    r = min(rank, len(s))
    root = s[:r].sqrt()
    down = (root[:, None] * v[:r]).view(r, *delta.shape[1:])
    up = (u[:, :r] * root).view(delta.shape[0], r, *(1,) * (delta.ndim - 2))
    return down.to(delta.dtype).contiguous(), up.to(delta.dtype).contiguous()
