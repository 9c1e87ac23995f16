"""Looks that no prompt of the emoji world names, each a number computed from pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

APART = 0.12  # a pixel that differs more from the ground, in any channel, belongs to the figure
DARK = 0.4  # a pixel all of whose channels are below is dark; of red or blue ones, one is not
CLEAR = 0.15  # by how much a colour must exceed the other channels
PALE = 0.85  # a pixel all of whose channels are above is nearly white


@dataclass(frozen=True)
class Look:
    """A look: what it is, and how much of it each of n pictures (n, 3, h, w) in [0, 1] has, (n,)."""

    text: str
    measure: Callable[[Tensor], Tensor]


def figure(images: Tensor) -> Tensor:
    """Return where pictures differ from their ground, the median of their border, (n, h, w) in {0, 1}."""
    border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], -1)
    ground = border.median(-1).values[..., None, None]
    return ((images - ground).abs().amax(1) > APART).float()


def black(images: Tensor) -> Tensor:
    """Return where pictures are dark, (n, h, w) in {0, 1}."""
    return (images.amax(1) < DARK).float()


def red(images: Tensor) -> Tensor:
    """Return the share of clearly red pixels."""
    r, g, b = images.unbind(1)
    return ((r - torch.maximum(g, b)) > CLEAR).float().mean((1, 2))


def blue(images: Tensor) -> Tensor:
    """Return the share of clearly blue pixels."""
    r, g, b = images.unbind(1)
    return ((b - torch.maximum(r, g)) > CLEAR).float().mean((1, 2))


def yellow(images: Tensor) -> Tensor:
    """Return the share of clearly yellow pixels."""
    r, g, b = images.unbind(1)
    return ((torch.minimum(r, g) - b) > CLEAR).float().mean((1, 2))


def pale(images: Tensor) -> Tensor:
    """Return the share of nearly white pixels."""
    return (images.amin(1) > PALE).float().mean((1, 2))


def busy(images: Tensor) -> Tensor:
    """Return the mean difference of neighbouring pixels."""
    across, down = (images.diff(dim=d).abs().mean((1, 2, 3)) for d in (-1, -2))
    return across + down


def dark(images: Tensor) -> Tensor:
    """Return the share of dark pixels."""
    return black(images).mean((1, 2))


def lopsided(images: Tensor) -> Tensor:
    """Return the mean difference between picture and mirror image."""
    return (images - images.flip(-1)).abs().mean((1, 2, 3))


def places(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return area (n,) and coordinates y and x (n, h, w) from the centroid of masks (n, h, w)."""
    area = mask.sum((1, 2)).clamp(min=1)
    y, x = (torch.arange(n, dtype=mask.dtype) for n in mask.shape[1:])
    y, x = torch.meshgrid(y, x, indexing="ij")
    down, right = ((mask * c).sum((1, 2)) / area for c in (y, x))
    return area, y - down[:, None, None], x - right[:, None, None]


def disc(images: Tensor) -> Tensor:
    """Return the overlap (IoU) of the figure and the disc of its area around its centroid."""
    mask = figure(images)
    area, y, x = places(mask)
    round_ = ((y**2 + x**2) <= (area / torch.pi)[:, None, None]).float()
    return (mask * round_).sum((1, 2)) / torch.maximum(mask, round_).sum((1, 2)).clamp(min=1)


def diagonal(images: Tensor) -> Tensor:
    """Return the absolute correlation of x and y over the figure."""
    mask = figure(images)
    _, y, x = places(mask)
    xy, xx, yy = ((mask * c).sum((1, 2)) for c in (x * y, x * x, y * y))
    return (xy / (xx * yy).sqrt().clamp(min=1e-6)).abs()


def outlined(images: Tensor) -> Tensor:
    """Return the share of thin dark lines, times how colourful the rest of the figure is."""
    ink = black(images)[:, None]
    # what an opening by 5 x 5 pixels removes is thinner than that
    core = -F.max_pool2d(-ink, 5, 1, 2)
    thin = (ink - F.max_pool2d(core, 5, 1, 2)).clamp(min=0)[:, 0]
    rest = figure(images) * (1 - ink[:, 0])
    colour = ((images.amax(1) - images.amin(1)) * rest).sum((1, 2)) / rest.sum((1, 2)).clamp(min=1)
    return thin.mean((1, 2)) * colour


LOOKS: dict[str, Look] = {
    "red": Look("mostly red", red),
    "blue": Look("mostly blue", blue),
    "yellow": Look("mostly yellow", yellow),
    "dark": Look("dark", dark),
    "pale": Look("nearly white", pale),
    "busy": Look("many edges", busy),
    "lopsided": Look("left and right differ strongly", lopsided),
    "disc": Look("the silhouette is round", disc),
    "diagonal": Look("the figure lies on a diagonal", diagonal),
    "outlined": Look("thin dark lines around colour", outlined),
}
