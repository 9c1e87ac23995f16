"""Everything a fit must remember to go on after a crash as if nothing had happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from ..errors import SettingError


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


@dataclass(frozen=True)
class Probe:
    """A look at the model while a fit goes on: losses of erasure say little about when to stop.

    Attributes:
        measure: model -> how visible the concepts still are; the lower, the more they are erased. Its pictures must
            have seeds of their own. It sees the weights that are trained, of a method with an average not the average.
        until: at this value or below the fit ends.
        every: updates between two looks.
    """

    measure: Callable[[Any], float]
    until: float
    every: int = 50

    def __post_init__(self) -> None:
        if self.every < 1 or not math.isfinite(self.until):
            raise SettingError(
                f"a probe needs a bound and looks every 1 update or more: until={self.until}, every={self.every}."
            )


class State:
    """The random generator, the step counter and every registered object of one fit.

    `keep` loads a saved state the moment an object is registered, so a method's code is the same for a first and a
    resumed run. A state must be taken only while the fit is paused at its `yield`.

    Attributes:
        probe: ends the fit early; None for none.
        model: what the probe looks at.
        measured: what the probe last said, None once that has been noted.
        applied: for a fit that trains a copy: puts what it has made into the model while the probe looks.
        chosen: settings that were left to the model, and what it chose; for the card.
    """

    def __init__(self, seed: int, saved: dict[str, Any] | None = None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.index = -1
        self.saved = saved or {}
        self.objects: dict[str, Stateful] = {}
        self.probe: Probe | None = None
        self.model: Any = None
        self.measured: float | None = None
        self.applied: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.chosen: dict[str, float] = {}
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

    def observe(self, probe: Probe, model: Any) -> None:
        """Let a probe look at the model between updates."""
        self.probe, self.model = probe, model

    @torch.no_grad()
    def enough(self) -> bool:
        """Ask the probe, if there is one, whether the concepts are erased."""
        if self.probe is None:
            return False
        with self.applied():
            self.measured = float(self.probe.measure(self.model))
        return self.measured <= self.probe.until

    def noted(self) -> dict[str, float]:
        """Return what the probe has said since this was last asked, as a figure of a Step."""
        found = {} if self.measured is None else {"probe": self.measured}
        self.measured = None
        return found

    def steps(self, n: int, *, probed: bool = True, first: int = 0) -> Iterator[int]:
        """Yield the indices of the updates still to do, of n.

        Args:
            n: updates in all; a probe can end them early.
            probed: whether the probe looks by itself; a method that searches asks it by `enough`.
            first: the first that changes anything: those before it gather what to change, and are not looked at.
        """
        if self.index >= 0:
            # a fit may draw while it builds its objects, before the first update
            self.generator.set_state(self.saved["generator"])
        every = self.probe.every if self.probe and probed else n
        for i in range(self.index + 1, n):
            # before an update and not after one: a fit that is resumed here looks again, as the undisturbed one did
            if i > first and (i - first) % every == 0 and self.enough():
                return
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
