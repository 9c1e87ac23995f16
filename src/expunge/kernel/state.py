"""Everything a fit must remember to go on after a crash as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch


class Stateful(Protocol):
    """An object whose state can be taken and put back."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Put a state back."""


T = TypeVar("T", bound=Stateful)


@dataclass(frozen=True)
class Step:
    """One optimiser update: its index, how many there will be, the value of each loss term (or any other figure)."""

    i: int
    n: int
    losses: dict[str, float]


class State:
    """The random generator, the step counter and every registered object of one fit.

    `keep` loads a saved state the moment an object is registered, so a method's code is the same for a first and a
    resumed run. A state must be taken only while the fit is paused at its `yield`.
    """

    def __init__(self, seed: int, saved: dict[str, Any] | None = None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.index = -1
        self.saved = saved or {}
        self.objects: dict[str, Stateful] = {}
        if saved:
            self.index = int(saved["step"]) - 1
            self.generator.set_state(saved["generator"])

    def keep(self, name: str, obj: T) -> T:
        """Register an object under a name that is unique within the fit and return it."""
        if name in self.objects:
            raise ValueError(f"two objects of one fit are called {name!r}")
        self.objects[name] = obj
        if name in self.saved:
            obj.load_state_dict(self.saved[name])
        return obj

    def steps(self, n: int) -> Iterator[int]:
        """Yield the indices of the updates still to do, of n."""
        if self.saved:
            # a fit may draw while it builds its objects, before the first update
            self.generator.set_state(self.saved["generator"])
        for i in range(self.index + 1, n):
            self.index = i
            yield i

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the update the fit is paused at."""
        states = {name: obj.state_dict() for name, obj in self.objects.items()}
        return {**states, "step": self.index + 1, "generator": self.generator.get_state()}

    @classmethod
    def load(cls, saved: dict[str, Any]) -> State:
        """Return a state that continues from a saved one."""
        return cls(0, saved)
