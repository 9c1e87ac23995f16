"""ESD - Erased Stable Diffusion.

Distils negative guidance into the weights: the prediction for the concept is trained to be what the original network
would predict when steered away from it.

    target(x_t, t, c) = e(x_t, t, a) - eta [e(x_t, t, c) - e(x_t, t, null)]                                (Eq. 7)

with a = null in the paper; an anchor concept in its place makes "erase c towards a". A linear combination whose weights
sum to one is the same in every parameterisation, so the equation holds for eps, x0, v and flow networks alike.

Two options come from a later paper (ANT, arXiv:2504.12782): with `split` below 1 only times t <= split * last are
erased, and target = e(x_t, t, c) at noisier ones; `anchor` adds || e_theta(x_t, t, null) - e(x_t, t, null) ||^2.
`smallest` trains only the smallest weights of each tensor (SaRA, arXiv:2409.06633); magnitude pruning may undo that.

Notation    e: original network · e_theta: trained network · c: concept · a: anchor · null: empty prompt · eta: strength
Erases      styles and names with group="cross-attention" (ESD-x); objects, nudity with "no-cross-attention" (ESD-u)
Limits      neighbours of the concept drift unless they are kept; prompt and fine-tuning attacks can bring it back
Differs     the authors' first code takes latents that are 39 to 58 timesteps cleaner than the t it tells the network;
            here each has its own. Their second takes them from the original network, and its target begins at
            e(x_t, t, c), so that its eta is ours plus 1: the 1 that it has for SDXL is our 0. `preserve` is ours.
            SaRA has one bound for the weights of all tensors, here each has a share of its own; the nuclear norm that
            SaRA adds to the loss, in whose code it never reaches what is trained, is left out
Reference   Gandikota et al., Erasing Concepts from Diffusion Models, ICCV 2023. arXiv:2303.07345
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
from ..kernel.terms import gated, held, is_late, some
from ..papers import Paper
from .base import Needs, conditions, kept, sizes


@dataclass(frozen=True, kw_only=True)
class ESD:
    """Erased Stable Diffusion; the module's docstring has the equation."""

    group: Annotated[str, "weights to train"] = "cross-attention"
    rank: Annotated[int, Ge(0), Le(256), "0 trains the weights themselves, else a low-rank update (LoRA)"] = 0
    smallest: Annotated[float, Ge(0), Le(1), "train only this share of each tensor, the smallest weights; 0: all"] = 0.0
    eta: Annotated[float, Ge(0), Le(20), "negative guidance eta"] = 1.0
    guidance: Annotated[float, Ge(1), Le(30), "guidance scale while sampling x_t"] = 3.0
    split: Annotated[float, Gt(0), Le(1), "share of the time axis, from no noise, that is erased; 1 for the paper"] = (
        1.0
    )
    anchor: Annotated[float, Ge(0), Le(100), "weight of the unconditional anchor; 0 for the paper's loss"] = 0.0
    preserve: Annotated[float, Ge(0), Le(100), "weight of the kept concepts' term; 0 for the paper's loss"] = 1.0
    steps: Annotated[int, Ge(0), Le(100_000), "optimiser updates"] = 100
    lr: Annotated[Rate, "Adam's learning rate; auto: 1 % of the weights' root mean square"] = "auto"
    batch: Annotated[int, Ge(1), Le(256), "latents an update"] = 8
    rollouts: Annotated[int, Ge(1), Le(256), "trajectories a refresh of the bank"] = 8
    sampling_steps: Annotated[int, Ge(1), Le(1000), "sampling steps a trajectory"] = 20
    reuse: Annotated[int, Ge(1), Le(100), "uses of each latent before a refresh"] = 2

    family: ClassVar[str] = "score distillation"
    paper: ClassVar[Paper] = Paper(
        "gandikota2023erasing",
        "Erasing Concepts from Diffusion Models",
        "Gandikota, Rohit and Materzynska, Joanna and Fiotto-Kaufman, Jaden and Bau, David",
        2023,
        "International Conference on Computer Vision",
        "2303.07345",
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
                e_theta, e_theta, c, null, state, sizes=sizes(targets),
                batch=self.batch, rollouts=self.rollouts, steps=self.sampling_steps, guidance=self.guidance,
                reuse=self.reuse,
            ),
        )  # fmt: skip
        for i in state.steps(self.steps):
            x_t, t, k = bank.draw()
            e_c = e(x_t, t, c[k])
            target = e(x_t, t, a[k]) - self.eta * (e_c - e(x_t, t, null))
            late = is_late(e_theta, t, self.split)
            terms = {"erase": mse(e_theta(x_t, t, c[k]), gated(late, target, e_c))}
            if self.anchor:
                terms["anchor"] = self.anchor * held(e_theta, x_t, t, null)
            if keep is not None and self.preserve:
                terms["keep"] = self.preserve * held(e_theta, x_t, t, some(keep, len(t), state.generator))
            losses = opt.step(**terms)
            choice.after(i)
            yield Step(i, self.steps, losses)
        return of(model, student)
