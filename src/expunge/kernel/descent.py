"""One optimiser update from named loss terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn

from .state import State
from .student import Student

Weights = Mapping[str, nn.Parameter]
Rate = Annotated[float, Gt(0), Le(1)] | Literal["auto"]
RELATIVE = 0.01  # of the weights' root mean square: the longest step of Adafactor (arXiv:1804.04235, section 8)
GENTLE = 0.003  # for methods that move the whole network: there that step costs what is retained (docs/dev/log.md)


class Descent:
    """Adam on a dictionary of weights.

    Args:
        weights: name -> parameter.
        lr: learning rate.
        betas: Adam's decays of the gradient's first and second moment.
        clip: largest norm of the whole gradient; 0 for no limit.
        mask: name -> 0/1 tensor; masked-out coordinates never move.
    """

    def __init__(
        self,
        weights: Weights,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float = 0.0,
        mask: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.weights, self.clip, self.mask = dict(weights), clip, mask
        self.adam = torch.optim.Adam(self.weights.values(), lr, betas)

    def step(self, **terms: Tensor) -> dict[str, float]:
        """Descend the sum of the terms once.

        Returns:
            The value of every term.

        Raises:
            ValueError: a term has no gradient (a dead loss, found in several published scripts).
        """
        for name, value in terms.items():
            if not value.requires_grad:
                raise ValueError(f"loss term {name!r} has no gradient: nothing that is trained enters it")
        self.adam.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        self.apply()
        return {name: value.item() for name, value in terms.items()}

    def apply(self) -> None:
        """Mask, clip and use the gradients that are there."""
        for name, mask in (self.mask or {}).items():
            grad = self.weights[name].grad
            if grad is not None:
                grad.mul_(mask)
        if self.clip:
            nn.utils.clip_grad_norm_(self.weights.values(), self.clip)
        self.adam.step()

    def masked(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a gradient by weight with zeros where nothing is trained."""
        return {name: g * self.mask[name] if self.mask else g for name, g in gradient.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return Adam's moments by weight name."""
        state = self.adam.state_dict()["state"]
        return {name: dict(state[i]) for i, name in enumerate(self.weights) if i in state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with saved moments."""
        full = self.adam.state_dict()
        full["state"] = {i: state[name] for i, name in enumerate(self.weights) if name in state}
        self.adam.load_state_dict(full)


def rate(lr: Rate, student: Student, state: State, relative: float = RELATIVE) -> float:
    """Return Adam's learning rate; "auto" is in proportion to the student's weights, and the run's card tells it.

    Adam moves each weight by about its learning rate an update, and weights differ in size from network to network.
    """
    return lr if lr != "auto" else state.chosen.setdefault("lr", relative * student.rms)


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared difference over every element, in float32."""
    return (a.float() - b.float()).square().mean()
