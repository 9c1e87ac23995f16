"""A network, its noise path and its parameterisation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from ..errors import EmptySelection, nearest
from .condition import Condition
from .path import Kind, Path
from .student import Rule, Student

Call = Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]


class Denoiser:
    """What every method trains against.

    Args:
        module: the network, frozen.
        path: its noise path.
        kind: what it predicts.
        call: how to run it, `call(module, x_t (b, ...), t (b,), condition (b))`; the only line that knows the backbone.
        shape: shape of one latent.
        groups: name of a group of weights -> rule on parameter names.
    """

    def __init__(
        self, module: nn.Module, path: Path, kind: Kind, call: Call, shape: tuple[int, ...], groups: Mapping[str, Rule]
    ) -> None:
        self.module, self.path, self.kind, self.call = module, path, kind, call
        self.shape, self.groups = shape, dict(groups)
        self.student: Student | None = None
        module.requires_grad_(False)

    def __call__(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """Return the native prediction, shape of x_t, with gradient where the weights have one."""
        return self.call(self.module, x_t, t, c.batch(len(x_t)))

    def pair(self, x_t: Tensor, t: Tensor, c: Condition, null: Condition) -> tuple[Tensor, Tensor]:
        """Return the predictions under two conditions in one call."""
        n = len(x_t)
        both = Condition.cat([c.batch(n), null.batch(n)])
        e_c, e_0 = self(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return e_c, e_0

    def names(self, group: str) -> list[str]:
        """Return the parameters of a group.

        Raises:
            EmptySelection: unknown group, or one that selects nothing in this network.
        """
        if group not in self.groups:
            allowed = ", ".join(self.groups)
            kind = type(self.module).__name__
            raise EmptySelection(
                f"group {group!r} is not known for {kind}. Groups here: {allowed}.{nearest(group, self.groups)}"
            )
        names = [n for n, _ in self.module.named_parameters() if self.groups[group](n)]
        if not names:
            raise EmptySelection(
                f"group {group!r} selects no weight of this {type(self.module).__name__}. Use another group."
            )
        return names

    def unlock(self, group: str, rank: int = 0, generator: torch.Generator | None = None) -> Student:
        """Make a group trainable and return it. One group at a time; `lock` puts everything back.

        Args:
            group: its name.
            rank: 0 for the weights themselves, else the rank of an update of every linear or convolutional layer.
            generator: of what a low-rank update starts from.

        Raises:
            EmptySelection: unknown group, or one that holds nothing that could be trained.
            Unsupported: the weights themselves, in half precision.
        """
        if self.student is not None:
            raise RuntimeError("a group is unlocked already")
        student = Student(self.module, self.names(group), rank, generator)
        if not student.weights:
            raise EmptySelection(
                f"rank={rank} trains updates of linear and convolutional layers, and group {group!r} of this "
                f"{type(self.module).__name__} has none. Set rank=0, or use another group."
            )
        self.student = student
        return student

    def lock(self) -> None:
        """Restore the unlocked group bit for bit and freeze it."""
        if self.student is not None:
            self.student.close()
            self.student = None

    def clone(self, own: Collection[str] = ()) -> Denoiser:
        """Return a second network, for gradients that must flow through more than one.

        Args:
            own: parameters that it has for itself; all others are this network's own tensors and cost no memory.
        """
        if self.student is not None:
            raise RuntimeError("a network can be cloned only while no group of it is unlocked")
        memo = {id(p): p for name, p in self.module.named_parameters() if name not in own}
        module = copy.deepcopy(self.module, memo)
        return Denoiser(module, self.path, self.kind, self.call, self.shape, self.groups)

    @torch.no_grad()
    def under(self, values: Mapping[str, Tensor], x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """Return the prediction with other values of the unlocked group, without gradient."""
        if self.student is None:
            return self(x_t, t, c)
        with self.student.using(values):
            return self(x_t, t, c)

    def teacher(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """Return the original network's prediction, without gradient."""
        return self.under(self.student.original if self.student else {}, x_t, t, c)

    @torch.no_grad()
    def text_readers(self, c: Condition) -> dict[str, nn.Linear]:
        """Return the linear layers whose input is the prompt encoding itself, found by watching one forward pass.

        Raises:
            EmptySelection: no layer reads the encoding directly.
        """
        found: dict[str, nn.Linear] = {}

        def watch(name: str, layer: nn.Linear) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
                if args[0].data_ptr() == c.tokens.data_ptr() and args[0].shape == c.tokens.shape:
                    found[name] = layer

            return hook

        layers = [(n, m) for n, m in self.module.named_modules() if isinstance(m, nn.Linear)]
        handles = [m.register_forward_hook(watch(n, m)) for n, m in layers]
        device = c.tokens.device
        try:
            x = torch.zeros(len(c), *self.shape, device=device, dtype=c.tokens.dtype)
            self.call(self.module, x, torch.full((len(c),), self.path.last, device=device).long(), c)
        finally:
            for h in handles:
                h.remove()
        if not found:
            raise EmptySelection(f"no layer of {type(self.module).__name__} reads the prompt encoding directly")
        return found
