"""SDD - safe self-distillation diffusion.

The student's prediction for a concept is drawn to the student's own unconditional prediction; the result is the
exponential moving average of the student, which also samples the training latents.

    L(theta) = E || e_theta(x_t, t, c_i) - sg[ e_theta(x_t, t, a) ] ||^2                                    (Eq. 5)
    theta_ema <- m theta_ema + (1 - m) theta

with a = null in the paper. Several concepts take turns. The paper never ties the unconditional prediction to the
original network, and it drifts; `anchor` adds || e_theta(x_t, t, null) - e(x_t, t, null) ||^2 (ours, 0 is the paper).
With `split` below 1 the target is e(x_t, t, c_i) at times t > split * last (from ANT, arXiv:2504.12782).
`smallest` trains only the smallest weights of each tensor (SaRA, arXiv:2409.06633); magnitude pruning may undo that.

Notation    e: original network · e_theta: student · c_i: i-th concept · sg: stop-gradient · m: EMA decay
Erases      objects, styles, several concepts at once
Limits      over-erases what looks like the concept (people, for nudity) unless anchored or kept; strength depends on
            steps and decay together: a short run keeps much of the original in its average
Differs     the authors' code samples x_t under all concepts joined by commas and trains on one at a time; here each
            trajectory is of the concept that is trained on it. One update in fifty there takes a finished picture for
            pure noise, t = 980 to 999. Its weight decay of 1e-4 is left out. `preserve` is ours
Reference   Kim et al., Towards Safe Self-Distillation of Internet-Scale Text-to-Image Diffusion Models,
            ICML 2023 workshop. arXiv:2307.05977
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from ..concept import Targets
from ..edits import Edit, of
from ..kernel.bank import Bank
from ..kernel.condition import Condition
from ..kernel.descent import Rate, mse
from ..kernel.model import Model
from ..kernel.saliency import unlocked
from ..kernel.state import State, Step
from ..kernel.student import Ema
from ..kernel.terms import held, phased, some
from ..papers import Paper
from .base import Needs, conditions, kept, sizes


@dataclass(frozen=True, kw_only=True)
class SDD:
    """Safe self-distillation; the module's docstring has the equations."""

    group: Annotated[str, "weights to train"] = "cross-attention"
    rank: Annotated[int, Ge(0), Le(256), "0 trains the weights themselves, else a low-rank update (LoRA)"] = 0
    smallest: Annotated[float, Ge(0), Le(1), "train only this share of each tensor, the smallest weights; 0: all"] = 0.0
    decay: Annotated[float, Ge(0), Lt(1), "decay m of the moving average"] = 0.95
    split: Annotated[float, Gt(0), Le(1), "share of the time axis, from no noise, that is erased; 1: all"] = 1.0
    anchor: Annotated[float, Ge(0), Le(100), "weight of the unconditional anchor; 0 for the paper's loss"] = 0.0
    preserve: Annotated[float, Ge(0), Le(100), "weight of the kept concepts' term; 0 for the paper's loss"] = 1.0
    guidance: Annotated[float, Ge(1), Le(30), "guidance scale while sampling x_t"] = 3.0
    steps: Annotated[int, Ge(0), Le(100_000), "optimiser updates"] = 150
    lr: Annotated[Rate, "Adam's learning rate; auto: 1 % of the weights' root mean square"] = "auto"
    batch: Annotated[int, Ge(1), Le(256), "latents an update"] = 8
    rollouts: Annotated[int, Ge(1), Le(256), "trajectories a refresh of the bank"] = 8
    sampling_steps: Annotated[int, Ge(1), Le(1000), "sampling steps a trajectory"] = 20
    reuse: Annotated[int, Ge(1), Le(100), "uses of each latent before a refresh"] = 2

    family: ClassVar[str] = "score distillation"
    paper: ClassVar[Paper] = Paper(
        "kim2023towards",
        "Towards Safe Self-Distillation of Internet-Scale Text-to-Image Diffusion Models",
        "Kim, Sanghyun and Jung, Seohyeon and Kim, Balhae and Choi, Moonseok and Shin, Jinwoo and Lee, Juho",
        2023,
        "ICML Workshop on Challenges in Deployable Generative AI",
        "2307.05977",
    )
    needs: ClassVar[Needs] = Needs(text=False)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Train the group; yields a Step an update, returns the averaged weights as the edit."""
        c, a = conditions(model, targets)
        keep, null = kept(model, targets), model.encode("")
        e_theta = model.denoiser
        student, opt, choice = unlocked(
            e_theta, state, self.group, self.lr, self.steps, self.smallest, self.rank, clip=1.0
        )
        ema = state.keep("ema", Ema(student, self.decay))

        def average(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return e_theta.under(ema.shadow, x_t, t, condition)

        bank = state.keep(
            "bank",
            Bank(
                e_theta, average, c, null, state, sizes=sizes(targets),
                batch=self.batch, rollouts=self.rollouts, steps=self.sampling_steps, guidance=self.guidance,
                reuse=self.reuse,
            ),
        )  # fmt: skip
        for i in state.steps(self.steps):
            x_t, t, k = bank.draw()
            with torch.no_grad():
                goal = e_theta(x_t, t, a[k])
            target = phased(e_theta, x_t, t, c[k], goal, self.split)
            terms = {"distil": mse(e_theta(x_t, t, c[k]), target)}
            if self.anchor:
                terms["anchor"] = self.anchor * held(e_theta, x_t, t, null)
            if keep is not None and self.preserve:
                terms["keep"] = self.preserve * held(e_theta, x_t, t, some(keep, len(t), state.generator))
            losses = opt.step(**terms)
            choice.after(i)
            ema.update()
            yield Step(i, self.steps, losses)
        return of(model, student, ema.shadow)
