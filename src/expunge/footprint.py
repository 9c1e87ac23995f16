"""How much disk a run takes, estimated before it starts: rather too much than a run that stops for want of room."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from . import sae

if TYPE_CHECKING:
    from .kernel.model import Model
    from .methods.base import Method

MARGIN = 1.1  # times and indices beside latents, gates beside membranes
SLACK = 2**20  # bytes: settings, losses, names
FLOAT = 4  # bytes of a number, whatever the model is stored in


def needed(model: Model, method: Method, request: dict[str, Any]) -> int:
    """Return about how many bytes a run's folder takes at its fullest.

    Then it holds two checkpoints, the new one beside the old, the edit with its LoRA files, and the pictures that were
    drawn for the method.

    Args:
        model: the model.
        method: the method.
        request: see `rerun.request_of`.

    Raises:
        EmptySelection: the method trains a group that the model has not, or that selects nothing.
    """
    settings, concepts = dict(request["settings"]), len(request["concepts"])
    if settings.get("group") == "auto":
        # HFI's: ratings, which may lead all weights, come as pictures, and nobody has read them yet
        settings["group"] = "all" if any(c.get("images") for c in request["concepts"]) else "cross-attention"
    trained = numbers(model, settings, concepts)
    networks = 2 if "fake_lr" in settings else 1  # a generator and its fake score
    # of each network its weights and two moments; an average of one, or importances; a mask, one byte a weight
    checkpoint = trained * (3 * networks + 1.25)
    if "rollouts" in settings:
        # no method has more than two banks, and one of them targets besides
        checkpoint += 3 * settings["rollouts"] * settings["sampling_steps"] * math.prod(model.denoiser.shape)
    edit = trained * (3 if settings.get("rank") else 1)
    if method.needs.sae:
        found = sae.find(model, settings["sae"])
        edit += sum(p.numel() for own in found.saes.values() for p in own.parameters())
    drawn = 2 * concepts * request.get("make_images", 0) * 3 * model.sampling.size**2
    return int(MARGIN * FLOAT * (2 * checkpoint + edit) + drawn) + SLACK


def numbers(model: Model, settings: dict[str, Any], concepts: int) -> int:
    """Return how many numbers a method with these settings trains, or rewrites."""
    if "part" in settings:
        text = model.need_text()
        found = text.names(settings["part"])
        return sum(text.encoders[e].get_parameter(n).numel() for e, names in found.items() for n in names)
    if "group" in settings:
        return size(model, settings["group"], settings.get("rank", 0))
    # closed forms rewrite the text readers, SPM adds a rank to every matrix of the transformer blocks for each concept
    whole = {"text-readers": 0, "transformer-blocks": concepts}
    return max((size(model, g, rank) for g, rank in whole.items() if g in model.denoiser.groups), default=0)


def size(model: Model, group: str, rank: int) -> int:
    """Return how many numbers a group of the denoiser has, or its low-rank update."""
    found = [model.denoiser.module.get_parameter(name) for name in model.denoiser.names(group)]
    if not rank:
        return sum(p.numel() for p in found)
    return sum(rank * (len(p) + p.numel() // len(p)) for p in found if p.ndim > 1)
