"""Closed-form edits inside a text encoder: what prompts leave in its residual stream, rewritten layer by layer.

A layer that reads the finished encoding sees every concept through the d directions of a token, and hundreds of
concepts need more. The last matrix of a text encoder's layer, which closes its MLP, reads the 4 d features in front of
it: there concepts lie apart. Every layer is changed so that erased prompts leave it as their anchors do, given what the
layers before it have achieved already, and kept prompts as they ever did (cf. arXiv:2306.00738, which rewrites one
fact in one layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConceptError
from .closedform import counterparts, fitted
from .model import Model

TOGETHER = 64  # prompts that pass a layer at once


class Stream:
    """The residual stream of some prompts on its way through one text encoder.

    Args:
        model: the model.
        name: of the text encoder.
        prompts: the prompts; the stream starts where they enter the first layer.
    """

    def __init__(self, model: Model, name: str, prompts: Sequence[str]) -> None:
        self.parts: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.parts.append((args[0], args[1:], kwargs))

        handle = model.need_text().layers[name][0].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            for i in range(0, len(prompts), TOGETHER):
                model.encode(list(prompts[i : i + TOGETHER]))
        finally:
            handle.remove()

    @property
    def states(self) -> Tensor:
        """The states of all prompts, (b, n, d) in float32."""
        return torch.cat([h.float() for h, _, _ in self.parts])

    @torch.no_grad()
    def through(self, layer: nn.Module) -> Tensor:
        """Pass the layer; return what its last matrix read, (b, n, features) in float32."""
        read: list[Tensor] = []
        handle = closing(layer).register_forward_pre_hook(lambda _, args: read.append(args[0].float()))
        try:
            self.parts = [(layer(h, *args, **kwargs), args, kwargs) for h, args, kwargs in self.parts]
        finally:
            handle.remove()
        return torch.cat(read)

    def add(self, change: Tensor) -> None:
        """Add a change (b, n, d) to the states."""
        changes = torch.split(change, [len(h) for h, _, _ in self.parts])
        self.parts = [(p[0] + c.to(p[0].dtype), *p[1:]) for p, c in zip(self.parts, changes, strict=True)]


def closing(layer: nn.Module) -> nn.Linear:
    """Return the last matrix of a residual layer."""
    return [m for m in layer.modules() if isinstance(m, nn.Linear)][-1]


def rewritten(
    model: Model,
    name: str,
    prompts: Sequence[str],
    anchors: Sequence[str],
    keeps: Sequence[str],
    *,
    ridge: float,
    preserve: float,
) -> tuple[dict[str, Tensor], float]:
    """Return the new closing matrices of a text encoder by parameter name, and what is left to be done.

    Args:
        model: the model.
        name: of the text encoder.
        prompts: what is to be read as `anchors`.
        anchors: row for row, the same prompts without the concept or about another one.
        keeps: what is to be read as before.
        ridge: see `fitted`.
        preserve: weight of `keeps` against `prompts`.

    Returns:
        The matrices, and the squared distance between erased prompts and their anchors behind the last layer, relative
        to the anchors' variance.

    Raises:
        ConceptError: the prompts are the anchors.
    """
    text = model.need_text()
    once = list(dict.fromkeys(anchors))
    rows = torch.tensor([once.index(a) for a in anchors], device=model.device)
    # the goals pass the layers as they were, the others as they will be
    erased, goals, kept, before = (Stream(model, name, p) for p in (prompts, once, keeps, keeps))
    index, changed = counterparts(erased.states, goals.states[rows], text.lengths(prompts), text.lengths(anchors))
    if not bool(changed.any()):
        raise ConceptError("the text encoder reads the concept's prompts as it reads their anchors. Give another name.")
    index = index[..., None].expand(-1, -1, erased.states.shape[-1])
    names = {id(p): n for n, p in text.encoders[name].named_parameters()}
    found = {}
    for layer in text.layers[name]:
        goals.through(layer)
        before.through(layer)
        x, same = erased.through(layer), kept.through(layer)
        goal = goals.states[rows].gather(1, index)
        pairs = [(x[changed], (goal - erased.states)[changed], 1.0)]
        if keeps:
            pairs.append((same.flatten(0, 1), (before.states - kept.states).flatten(0, 1), preserve))
        delta = fitted(pairs, ridge).float()
        erased.add(x @ delta.T)
        kept.add(same @ delta.T)
        weight = closing(layer).weight
        found[names[id(weight)]] = (weight.detach().float() + delta).to(weight.dtype)
    left = (goal - erased.states)[changed].square().mean() / goal[changed].var()
    return found, left.item()
