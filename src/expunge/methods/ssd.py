"""SSD - selective synaptic dampening.

Shrinks, without any training, the weights that matter more to the concept than to what is retained.

    I(theta; C) = E_(x_t, t, c in C) ( grad || e_theta(x_t, t, c) - e_theta(x_t, t, null) ||^2 )^2
    r = I(theta; erased) / I(theta; retained)
    theta <- min(lambda / r, 1) theta   where r is among the largest 1 - quantile of its layer

With a probe the quantile is searched for between the setting and 1: the fewest weights with which the probe is content.

Notation    e: original network · c: conditions of the concept, or of what is retained · null: the empty condition ·
            I: importance, a diagonal Fisher information · r: their ratio · lambda: strength
Erases      objects, styles, classes; several at once, in seconds
Limits      weights are shared, so that the concept's neighbours fade with it; too low a quantile ends in noise
Differs     ours is an adaptation, the paper erases from classifiers. Its importances are of the loss, which here would
            be of denoising itself: guidance is what a condition does. Both are taken at the same x_t and t, and squared
            for each sample, where the released code squares the mean over a batch. The paper damps where r exceeds one
            alpha in any layer; here each layer has a quantile, since scales differ
Reference   Foster et al., Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening, AAAI 2024.
            arXiv:2308.07707
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor

from ..concept import Targets
from ..edits import Edit, of
from ..kernel.bank import Bank
from ..kernel.condition import Condition
from ..kernel.descent import mse
from ..kernel.model import Model
from ..kernel.saliency import MeanGradient, top
from ..kernel.state import State, Step
from ..papers import Paper
from .base import Needs, conditions, kept, sizes


@dataclass(frozen=True, kw_only=True)
class SSD:
    """Selective synaptic dampening; the module's docstring has the equations."""

    group: Annotated[str, "weights to choose from"] = "text-readers"
    quantile: Annotated[float, Ge(0), Le(1), "share of each layer that stays; a probe searches above it"] = 0.5
    strength: Annotated[float, Ge(0), Le(1000), "lambda: weights scale by min(lambda / r, 1); the paper has 1"] = 0.1
    draws: Annotated[int, Ge(1), Le(100_000), "latents on which the importances are measured"] = 128
    search: Annotated[int, Ge(1), Le(30), "bisections of the quantile, with a probe"] = 6
    guidance: Annotated[float, Ge(1), Le(30), "guidance scale while sampling x_t"] = 3.0
    rollouts: Annotated[int, Ge(1), Le(256), "trajectories a refresh of the bank"] = 8
    sampling_steps: Annotated[int, Ge(1), Le(1000), "sampling steps a trajectory"] = 20

    family: ClassVar[str] = "dampening"
    paper: ClassVar[Paper] = Paper(
        "foster2024fast",
        "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening",
        "Foster, Jack and Schoepf, Stefan and Brintrup, Alexandra",
        2024,
        "AAAI Conference on Artificial Intelligence",
        "2308.07707",
    )
    needs: ClassVar[Needs] = Needs(text=False, keeps=True)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Measure importances, then dampen; yields a Step a latent and a Step a bisection, returns the edit."""
        c, _ = conditions(model, targets)
        r, null, e = kept(model, targets), model.encode(""), model.denoiser
        assert r is not None  # needs.keeps
        student = state.keep("student", e.unlock(self.group))
        erased = state.keep("erased", MeanGradient(student.weights, square=True))
        retained = state.keep("retained", MeanGradient(student.weights, square=True))
        bank = state.keep(
            "bank",
            Bank(
                e, e.teacher, c, null, state, sizes=sizes(targets),
                batch=1, rollouts=self.rollouts, steps=self.sampling_steps, guidance=self.guidance, reuse=1,
            ),
        )  # fmt: skip
        bracket = state.keep("bracket", Bracket(self.quantile))
        n = self.draws + (self.search if state.probe else 0)

        def energy(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return mse(*e.pair(x_t, t, condition, null))

        for i in state.steps(n, probed=False):
            if i < self.draws:
                x_t, t, k = bank.draw()
                j = torch.randint(len(r), (1,), generator=state.generator).to(t.device)
                energies = erased.add(energy(x_t, t, c[k])), retained.add(energy(x_t, t, r[j]))
                yield Step(i, n, dict(zip(("erased", "retained"), energies, strict=True)))
                continue
            quantile = bracket.middle
            student.load(dampened(student.original, erased.mean, retained.mean, quantile, self.strength))
            bracket.halve(state.enough())
            yield Step(i, n, {"quantile": quantile})
        student.load(dampened(student.original, erased.mean, retained.mean, bracket.low, self.strength))
        return of(model, student)


def dampened(
    weights: Mapping[str, Tensor],
    erased: Mapping[str, Tensor],
    retained: Mapping[str, Tensor],
    quantile: float,
    strength: float,
) -> dict[str, Tensor]:
    """Return weights with the most concept-specific `1 - quantile` of each tensor scaled by `min(strength / r, 1)`."""
    out = {}
    for name, w in weights.items():
        r = erased[name] / retained[name]
        r = r.nan_to_num(nan=0.0, posinf=torch.inf)  # 0 / 0: a weight that matters to neither
        chosen = top({name: r}, 1 - quantile)[name].bool()
        out[name] = torch.where(chosen, (strength / r).clamp(max=1).to(w.dtype) * w, w)
    return out


class Bracket:
    """The quantiles between which a search goes on: with the lower one the concept is gone, if with any."""

    def __init__(self, low: float) -> None:
        self.low, self.high = low, 1.0

    @property
    def middle(self) -> float:
        """The quantile to try next."""
        return (self.low + self.high) / 2

    def halve(self, gone: bool) -> None:
        """Take notice of whether the concept was gone with the middle one."""
        if gone:
            self.low = self.middle
        else:
            self.high = self.middle

    def state_dict(self) -> dict[str, Any]:
        """Return both ends."""
        return {"low": self.low, "high": self.high}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a search."""
        self.low, self.high = state["low"], state["high"]
