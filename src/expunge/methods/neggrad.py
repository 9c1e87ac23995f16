"""NegGrad - gradient ascent on the pictures to forget, and NegGrad+.

The baseline that every other method is to beat: what training did for the concept's pictures is undone by training the
other way, while pictures to retain are trained as usual.

    L(theta) = alpha L_r(theta) - beta L_f(theta),   L_s = E || u - e_theta(x_t, t, c_s) ||^2 over the pictures of set s

alpha = 0 is NegGrad, plain ascent; both weights above 0 are NegGrad+; beta = 0 is fine-tuning on what is retained.
`smallest` trains only the smallest weights of each tensor (SaRA, arXiv:2409.06633); magnitude pruning may undo that.

Notation    e_theta: trained network · u: what a perfect network would output for x_t · c_r, c_f: conditions of pictures
            to retain, to forget
Erases      objects, styles, classes of which there are pictures, or which the base model draws; several at once
Limits      L_f has no upper bound: steps, lr and beta alone decide where the ascent ends, and too much of it destroys
            every picture; an anchor is not looked at; what no retained picture shows is not kept
Differs     the papers' networks are classifiers: their loss is a cross-entropy, and they descend by SGD. NegGrad+ has
            weights that sum to one; the ratio is all that Adam sees. Both sets are drawn in equal batches
Reference   NegGrad+: Kurmanji et al., Towards Unbounded Machine Unlearning, NeurIPS 2023. arXiv:2302.09880; NegGrad:
            Golatkar et al., Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks, CVPR 2020.
            arXiv:1911.04933
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Le

from ..concept import Targets
from ..edits import Edit, of
from ..errors import SettingError
from ..kernel.descent import GENTLE, Rate
from ..kernel.lessons import Lessons
from ..kernel.model import Model
from ..kernel.saliency import unlocked
from ..kernel.state import State, Step
from ..papers import Paper
from .base import Needs


@dataclass(frozen=True, kw_only=True)
class NegGrad:
    """Gradient ascent and NegGrad+; the module's docstring has the equation."""

    group: Annotated[str, "weights to train"] = "all"
    smallest: Annotated[float, Ge(0), Le(1), "train only this share of each tensor, the smallest weights; 0: all"] = 0.0
    alpha: Annotated[float, Ge(0), Le(1000), "weight of the pictures to retain; 0 for plain ascent"] = 1.0
    beta: Annotated[float, Ge(0), Le(1000), "weight of the ascent on the pictures to forget"] = 0.05
    steps: Annotated[int, Ge(0), Le(100_000), "optimiser updates"] = 100
    lr: Annotated[Rate, "Adam's learning rate; auto: 0.3 % of the weights' root mean square"] = "auto"
    batch: Annotated[int, Ge(1), Le(1024), "pictures an update, of each set"] = 8

    family: ClassVar[str] = "pictures"
    paper: ClassVar[Paper] = Paper(
        "kurmanji2023towards",
        "Towards Unbounded Machine Unlearning",
        "Kurmanji, Meghdad and Triantafillou, Peter and Hayes, Jamie and Triantafillou, Eleni",
        2023,
        "Advances in Neural Information Processing Systems",
        "2302.09880",
    )
    needs: ClassVar[Needs] = Needs(text=False, images=True, retained=True)

    def __post_init__(self) -> None:
        """Refuse settings that leave nothing to do, before any picture is drawn.

        Raises:
            SettingError: both weights are 0.
        """
        if not self.alpha + self.beta:
            raise SettingError("alpha=0 and beta=0 leave no loss to train on. Raise one of them.")

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Train the group; yields a Step an update, returns the edit."""
        student, opt, choice = unlocked(
            model.denoiser, state, self.group, self.lr, self.steps, self.smallest, relative=GENTLE
        )
        seen = Lessons(model, targets, state, self.batch)
        for i in state.steps(self.steps):
            # both are drawn whatever the weights: runs that differ in them see the same pictures, times and noises
            f, r = seen.forget.draw(), seen.retain.draw()
            terms = {}
            if self.beta:
                terms["forget"] = -self.beta * seen.forget.error(f, seen.c)
            if self.alpha:
                terms["retain"] = self.alpha * seen.retain.error(r, seen.r)
            losses = opt.step(**terms)
            choice.after(i)
            yield Step(i, self.steps, losses)
        return of(model, student)
