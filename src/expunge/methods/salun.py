"""SalUn - saliency unlearning.

Trains only the weights on which forgetting depends most: those where the gradient of the pictures' own loss is largest.

    m = 1[ |grad l(theta_o)| >= gamma ],  l = E || eps - e_theta(x_t, t, c) ||^2 over pictures to forget
    theta = theta_o + m * delta,  gamma such that m keeps a share `density` of the group
    L(theta) = E || e_theta(x_t, t, c) - sg[ e_theta(x_t, t, c') ] ||^2 + alpha E || eps - e_theta(x_t, t, c_r) ||^2

The first sum is over pictures to forget, the second over pictures to retain. The mask's gradient is the mean over
`draws` times and noises of every picture. "soft" has no mask: every update is followed by a soft threshold on
theta - theta_o (the proximal step of an l1 penalty), under which the share of weights that return to theta_o falls
linearly from 1 to 1 - density. With `smallest` the mask is drawn among the smallest weights of each tensor, a share
`density` of them (SaRA, arXiv:2409.06633); magnitude pruning may undo such an erasure.

Notation    e_theta: trained network · theta_o: original weights · c, c_r: conditions of pictures to forget, to retain ·
            c': the anchor's, or a random retained picture's · sg: stop-gradient · alpha: weight of what is retained
Erases      objects, styles, classes of which there are pictures, or which the base model draws; several at once
Limits      what no retained picture shows is not kept, an anchor included; the target is the model's own output, which
            drifts as it is trained; the soft threshold, which moves weights back, and `smallest`, which halfway
            holds some where they are, exclude each other
Differs     the released code takes the mask's gradient from one time and noise a picture, and from the guided
            prediction; starts its loader afresh at every update, so that only the first batch is forgotten
            (until February 2026); relabels class k as k + 1; sums the retaining error of its DDPM over the picture, so
            that its alpha of 0.001 is 3.07 of ours at 3 x 32 x 32; lets the soft threshold end at 0 instead of density.
            For text-to-image it noises two samples of the autoencoder's posterior, one for each side of the forgetting
            loss; its DDPM clips every batch's gradient at norm 1, before they add up to the mask's and, in training,
            before the mask. Here both sides see one latent, and nothing is clipped
Reference   Fan et al., SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image
            Classification and Generation, ICLR 2024. arXiv:2310.12508
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from ..concept import Targets
from ..edits import Edit, of
from ..errors import SettingError
from ..kernel.condition import Condition
from ..kernel.descent import GENTLE, Rate, mse
from ..kernel.lessons import Lessons
from ..kernel.model import Model
from ..kernel.pool import Pool
from ..kernel.saliency import MeanGradient, shrink, unlocked
from ..kernel.state import State, Step
from ..papers import Paper
from .base import Needs


@dataclass(frozen=True, kw_only=True)
class SalUn:
    """Saliency unlearning; the module's docstring has the equations."""

    group: Annotated[str, "weights to choose from"] = "all"
    threshold: Annotated[Literal["hard", "soft"], "hard: a mask; soft: a soft threshold after each update"] = "hard"
    density: Annotated[float, Ge(0), Le(1), "share of the group that is trained; 1 for no mask"] = 0.5
    smallest: Annotated[float, Ge(0), Le(1), "train only this share of each tensor, the smallest weights; 0: all"] = 0.0
    draws: Annotated[int, Ge(1), Le(1000), "times and noises of each picture in the mask's gradient"] = 4
    alpha: Annotated[float, Ge(0), Le(1000), "weight of the pictures to retain"] = 5.0
    steps: Annotated[int, Ge(0), Le(100_000), "optimiser updates"] = 100
    lr: Annotated[Rate, "Adam's learning rate; auto: 0.3 % of the weights' root mean square"] = "auto"
    batch: Annotated[int, Ge(1), Le(1024), "pictures an update, of each set"] = 8

    family: ClassVar[str] = "pictures"
    paper: ClassVar[Paper] = Paper(
        "fan2024salun",
        "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image Classification and "
        "Generation",
        "Fan, Chongyu and Liu, Jiancheng and Zhang, Yihua and Wong, Eric and Wei, Dennis and Liu, Sijia",
        2024,
        "International Conference on Learning Representations",
        "2310.12508",
    )
    needs: ClassVar[Needs] = Needs(text=False, images=True, retained=True)

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other, before any picture is drawn.

        Raises:
            SettingError: a selection of small weights under the soft threshold.
        """
        if self.smallest and self.threshold == "soft":
            raise SettingError(
                f"smallest={self.smallest:g} needs threshold='hard': the soft threshold moves weights that the "
                "selection holds where they are."
            )

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Find the mask, then train; yields a Step a draw and a Step an update, returns the edit."""
        e_theta = model.denoiser
        student, opt, choice = unlocked(e_theta, state, self.group, self.lr, self.steps, self.smallest, relative=GENTLE)
        masked = self.threshold == "hard" and self.density < 1
        slope = state.keep("saliency", MeanGradient(student.weights if masked else {}))
        seen = Lessons(model, targets, state, self.batch)

        def matching(pool: Pool, c: Condition) -> Tensor:
            return pool.error(pool.draw(), c)

        first = -(-self.draws * len(seen.forget.z) // self.batch) if masked else 0
        n = first + self.steps
        for i in state.steps(n, first=first):
            if i < first:
                yield Step(i, n, {"saliency": slope.add(matching(seen.forget, seen.c))})
                continue
            # a resumed fit with a selection has the mask that the selection keeps
            if masked and (i == first or opt.mask is None):
                choice.salient({name: g.abs() for name, g in slope.mean.items()}, self.density)
            x_t, t, _, _, k = seen.forget.draw()
            with torch.no_grad():
                goal = e_theta(x_t, t, seen.instead(k))
            terms = {"forget": mse(e_theta(x_t, t, seen.c[k]), goal)}
            if self.alpha:
                terms["retain"] = self.alpha * matching(seen.retain, seen.r)
            losses = opt.step(**terms)
            choice.after(i - first)
            if self.threshold == "soft":
                shrink(student, 1 - self.density * (i + 1) / n)
            yield Step(i, n, losses)
        return of(model, student)
