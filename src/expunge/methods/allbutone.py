"""All-but-One - the guidance term alone is rewritten.

Our reconstruction: the authors published no code, and of the paper's method we know what its abstract says. It updates
the classifier-free guidance term, holds the unconditional score, and lets the user choose what the concept becomes.

    d_theta = e_theta(x_t, t, c) - e_theta(x_t, t, null),   d* = e(x_t, t, a) - e(x_t, t, null)
    L(theta) = || d_theta - d* ||^2 + lambda || e_theta(x_t, t, null) - e(x_t, t, null) ||^2                    (ours)

A guided prediction is e(null) + s d. Where both terms are zero, prompts of c draw what the original network draws from
prompts of a, at every guidance scale s; with a = null the guidance term vanishes. x_t lies on trajectories of the
original network.

With `split` below 1 the concept's own guidance term, d* = e(x_t, t, c) - e(x_t, t, null), is held at times
t > split * last, where the layout forms (from ANT, arXiv:2504.12782). `smallest` trains only the smallest weights of
each tensor (SaRA, arXiv:2409.06633); magnitude pruning may undo that.

Notation    e: original network · e_theta: trained network · c: concept · a: anchor · null: empty prompt
            · lambda: `anchor`
Erases      objects, styles, names, several at once; best with an anchor, which is what the concept becomes
Limits      without the paper's settings none of its numbers can be reproduced; neighbours of the concept drift unless
            they are kept
Differs     there is no code of the authors to differ from. The loss and `preserve` are ours; their way of inspecting
            a result by inverting pictures is left out
Reference   Hong, Lee and Woo, All but One: Surgical Concept Erasing with Model Preservation in Text-to-Image Diffusion
            Models, AAAI 2024. arXiv:2312.12807
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le

from ..concept import Targets
from ..edits import Edit, of
from ..kernel.bank import Bank
from ..kernel.descent import Rate, mse
from ..kernel.model import Model
from ..kernel.saliency import unlocked
from ..kernel.state import State, Step
from ..kernel.terms import held, phased, some
from ..papers import Paper
from .base import Needs, conditions, kept, sizes


@dataclass(frozen=True, kw_only=True)
class AllButOne:
    """All-but-One, reconstructed; the module's docstring has the equations."""

    group: Annotated[str, "weights to train"] = "cross-attention"
    rank: Annotated[int, Ge(0), Le(256), "0 trains the weights themselves, else a low-rank update (LoRA)"] = 0
    smallest: Annotated[float, Ge(0), Le(1), "train only this share of each tensor, the smallest weights; 0: all"] = 0.0
    split: Annotated[float, Gt(0), Le(1), "share of the time axis, from no noise, that is erased; 1: all"] = 1.0
    anchor: Annotated[float, Ge(0), Le(100), "lambda: weight of the unconditional score's term"] = 1.0
    guidance: Annotated[float, Ge(1), Le(30), "guidance scale while sampling x_t"] = 3.0
    preserve: Annotated[float, Ge(0), Le(100), "weight of the kept concepts' term; 0 for the paper's loss"] = 1.0
    steps: Annotated[int, Ge(0), Le(100_000), "optimiser updates"] = 200
    lr: Annotated[Rate, "Adam's learning rate; auto: 1 % of the weights' root mean square"] = "auto"
    batch: Annotated[int, Ge(1), Le(256), "latents an update"] = 8
    rollouts: Annotated[int, Ge(1), Le(256), "trajectories a refresh of the bank"] = 8
    sampling_steps: Annotated[int, Ge(1), Le(1000), "sampling steps a trajectory"] = 20
    reuse: Annotated[int, Ge(1), Le(100), "uses of each latent before a refresh"] = 2

    family: ClassVar[str] = "score distillation"
    paper: ClassVar[Paper] = Paper(
        "hong2024all",
        "All but One: Surgical Concept Erasing with Model Preservation in Text-to-Image Diffusion Models",
        "Hong, Seunghoo and Lee, Juhun and Woo, Simon S.",
        2024,
        "AAAI Conference on Artificial Intelligence",
        "2312.12807",
    )
    needs: ClassVar[Needs] = Needs(text=False)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Train the group; yields a Step an update, returns the edit."""
        c, a = conditions(model, targets)
        keep, null = kept(model, targets), model.encode("")
        e, e_theta = model.denoiser.teacher, model.denoiser
        student, opt, choice = unlocked(e_theta, state, self.group, self.lr, self.steps, self.smallest, self.rank)
        bank = state.keep(
            "bank",
            Bank(
                e_theta, e, c, null, state, sizes=sizes(targets),
                batch=self.batch, rollouts=self.rollouts, steps=self.sampling_steps, guidance=self.guidance,
                reuse=self.reuse,
            ),
        )  # fmt: skip
        for i in state.steps(self.steps):
            x_t, t, k = bank.draw()
            (c_theta, null_theta), e_0 = e_theta.pair(x_t, t, c[k], null), e(x_t, t, null)
            wanted = phased(e_theta, x_t, t, c[k], e(x_t, t, a[k]), self.split) - e_0
            terms = {"guidance": mse(c_theta - null_theta, wanted)}
            if self.anchor:
                terms["anchor"] = self.anchor * mse(null_theta, e_0)
            if keep is not None and self.preserve:
                terms["keep"] = self.preserve * held(e_theta, x_t, t, some(keep, len(t), state.generator))
            losses = opt.step(**terms)
            choice.after(i)
            yield Step(i, self.steps, losses)
        return of(model, student)
