"""A trainable view of a named group of a module's weights; teacher and student share one network.

The live module holds what is trained. The original values of the group alone are kept aside and swapped in, without
gradient, when the teacher is asked. Memory is base + group instead of two networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from .lowrank import LowRank

Rule = Callable[[str], bool]


class Student:
    """Trainable tensors of one group.

    Attributes:
        module: the network they belong to.
        weights: name -> the live parameter (float32 or finer); low-rank factors when `rank` is positive.
        original: name -> the value it had when unlocked; what the teacher runs with.
        rms: root mean square of the network's own weights of the group, when unlocked.
        rank: 0 for the weights themselves, else the rank of an additive factorisation of every matrix.

    Raises:
        Unsupported: the weights themselves are in half precision, in which a step of training is rounded away.
    """

    def __init__(
        self, module: nn.Module, names: list[str], rank: int = 0, generator: torch.Generator | None = None
    ) -> None:
        self.module, self.names, self.rank = module, names, rank
        self.adapters: dict[str, LowRank] = {}
        found = dict(module.named_parameters())
        self.rms = rms([found[n] for n in names])
        if rank:
            self.adapters = attach(module, names, rank, generator)
            self.weights = {f"{n}.{k}": p for n, a in self.adapters.items() for k, p in a.named_parameters()}
        else:
            self.weights = {n: found[n] for n in names}
            if half := [n for n, p in self.weights.items() if p.dtype.itemsize < torch.float32.itemsize]:
                raise Unsupported(
                    f"{half[0]} is {found[half[0]].dtype}, in which a step of training is rounded away. Load the model "
                    "with dtype=torch.float32, or train a low-rank update, where the method has a rank."
                )
        for p in self.weights.values():
            p.requires_grad_(True)
        self.original = self.snapshot()
        norms = [m for m in module.modules() if isinstance(m, nn.GroupNorm)]
        self.hooks = [m.register_forward_pre_hook(asking) for m in norms if is_asked(m)]

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of the present values."""
        return {k: p.detach().clone() for k, p in self.weights.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the live weights."""
        for k, p in self.weights.items():
            p.copy_(values[k])

    @contextmanager
    def using(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the network with other values of the group. Only without gradient.

        Gradients through swapped weights are silently wrong for convolutions and norms, so this refuses to be asked for
        them.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("weights can be swapped only under torch.no_grad()")
        live = {k: p.data for k, p in self.weights.items()}
        for k, p in self.weights.items():
            p.data = values[k]
        try:
            yield
        finally:
            for k, p in self.weights.items():
                p.data = live[k]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let gradients of what runs in here pass through the network to its input, and none reach its weights."""
        for p in self.weights.values():
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in self.weights.values():
                p.requires_grad_(True)

    def close(self) -> None:
        """Put the original values back, bit for bit, and freeze them."""
        self.load(self.original)
        for p in self.weights.values():
            p.requires_grad_(False)
            p.grad = None
        for adapter in self.adapters.values():
            adapter.detach_from_layer()
        for hook in self.hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the live values."""
        return self.snapshot()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the live values."""
        self.load(state)


def is_asked(layer: nn.Module) -> bool:
    """Tell whether a parameter of a layer's own is trained."""
    return any(p.requires_grad for p in layer.parameters(recurse=False))


def asking(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Let the input of a normalisation ask for a gradient.

    On the CPU torch (2.13) crashes in the backward pass of a GroupNorm whose weights want a gradient and whose input,
    in channels-last order, wants none: the first trained layer of some groups.
    """
    if not args or args[0].requires_grad or not torch.is_grad_enabled():
        return None
    return args[0].detach().requires_grad_(True), *args[1:]


@torch.no_grad()
def rms(weights: Sequence[Tensor]) -> float:
    """Return the root mean square over every element of some tensors."""
    squares = sum(float(w.double().square().sum()) for w in weights)
    return float((squares / sum(w.numel() for w in weights)) ** 0.5)


def attach(module: nn.Module, names: list[str], rank: int, generator: torch.Generator | None) -> dict[str, LowRank]:
    """Add a zero low-rank update to every selected linear or convolutional layer.

    Vectors (biases, norms) and tables of embeddings are left alone.
    """
    layers = dict(module.named_modules())
    out = {}
    for name in names:
        layer = layers[name.rpartition(".")[0]]
        if name.endswith(".weight") and isinstance(layer, nn.Linear | nn.Conv2d):
            out[name] = LowRank(layer, rank, generator)
    return out


class Ema:
    """Exponential moving average of a student's weights.

    Attributes:
        shadow: name -> averaged value.
    """

    def __init__(self, student: Student, decay: float) -> None:
        self.student, self.decay = student, decay
        self.shadow = student.snapshot()

    @torch.no_grad()
    def update(self, i: int | None = None) -> None:
        """Move the average towards the live weights: `m <- decay m + (1 - decay) theta`.

        Args:
            i: which update this is, from 0: the decay is then at most (1 + i) / (10 + i). Without this warm-up an
                average of a long decay keeps the first weights for 1 / (1 - decay) updates and more.
        """
        decay = self.decay if i is None else min(self.decay, (1 + i) / (10 + i))
        for k, p in self.student.weights.items():
            self.shadow[k].lerp_(p.to(self.shadow[k].dtype), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Return the average."""
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the average."""
        for k, v in self.shadow.items():
            v.copy_(state[k])
