"""ANT - auto-steering denoising trajectories.

Guidance is reversed only in the mid-to-late phase of a trajectory; in the early one, where a picture's layout forms,
the concept's own prediction is held. The unconditional prediction is held in both: guidance is measured from it.

    L_late  = || e_theta(x_t, t, c) - [e(x_t, t, a) - eta (e(x_t, t, c) - e(x_t, t, null))] ||^2    t <= split * last
    L_early = || e_theta(x_t, t, c) - e(x_t, t, c) ||^2                                             t >  split * last
    L_null  = || e_theta(x_t, t, null) - e(x_t, t, null) ||^2                                       in either phase
    L = L_late + beta L_null_late + alpha (L_early + beta L_null_early)

with a = null in the paper; each term is the mean over its own phase. Only the most salient weights are trained: those
whose gradient is large in every one of several maps, drawn with other prompts and seeds (augmented saliency map).

    score = min over maps of |g_m| / rms(g_m),   mask = largest scores, `density` of all weights

With `smallest` the mask is drawn among the smallest weights of each tensor, `density` of them (SaRA, arXiv:2409.06633);
magnitude pruning may undo such an erasure.

Notation    e: original network · e_theta: trained network · c: concept · a: anchor · null: empty prompt · eta: strength
            · alpha: `early` · beta: `anchor` · g_m: gradient of L_late on one batch
Erases      objects, styles, names, nudity; several concepts take turns
Limits      a layout that itself gives the concept away stays; a long early phase leaves the concept in
Differs     the authors' code for one concept computes L_null without gradient, swaps the phases, and keeps the smallest
            gradients, of a network that steps at lr 1e-2 meanwhile. Here L_null is alive, the noisy phase is early, and
            maps of the untouched network keep the largest. Its 0/1 masks of half the weights intersect in whatever
            density remains; the minimum over maps is an intersection whose threshold gives `density`. For many concepts
            it trains low-rank updates by guided predictions (scale 7.5, which makes the same target and a loss 56 times
            as large) and fuses them in MACE's closed form; here one group is trained for all, by plain ones. Latents
            are 39 to 58 timesteps cleaner than the t that the network is told, for many concepts 19; here each has its
            own. `preserve` is ours
Reference   Li et al., Set You Straight: Auto-Steering Denoising Trajectories to Sidestep Unwanted Concepts, ACM
            Multimedia 2025. arXiv:2504.12782
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le

from ..concept import Targets
from ..edits import Edit, of
from ..kernel.bank import Bank
from ..kernel.descent import Rate
from ..kernel.model import Model
from ..kernel.saliency import unlocked
from ..kernel.salient import Salient
from ..kernel.state import State, Step
from ..kernel.terms import errors, held, is_late, over, some
from ..papers import Paper
from .base import Needs, conditions, kept, sizes


@dataclass(frozen=True, kw_only=True)
class ANT:
    """Auto-steering denoising trajectories; the module's docstring has the equations."""

    group: Annotated[str, "weights that may be trained"] = "cross-attention"
    density: Annotated[float, Gt(0), Le(1), "share of them that is: the most salient; 1 trains all"] = 0.5
    smallest: Annotated[float, Ge(0), Le(1), "train only this share of each tensor, the smallest weights; 0: all"] = 0.0
    maps: Annotated[int, Ge(1), Le(1000), "saliency maps, each one batch; none are drawn for density=1"] = 10
    split: Annotated[
        float, Gt(0), Le(1), "share of the time axis, from no noise, that is late; the paper's t' / 50"
    ] = 0.8
    eta: Annotated[float, Ge(0), Le(20), "negative guidance eta"] = 1.0
    early: Annotated[float, Ge(0), Le(100), "alpha: weight of the early phase"] = 0.5
    anchor: Annotated[float, Ge(0), Le(100), "beta: weight of the unconditional anchors"] = 1.0
    guidance: Annotated[float, Ge(1), Le(30), "guidance scale while sampling x_t"] = 3.0
    preserve: Annotated[float, Ge(0), Le(100), "weight of the kept concepts' term; 0 for the paper's loss"] = 1.0
    steps: Annotated[int, Ge(0), Le(100_000), "optimiser updates"] = 150
    lr: Annotated[Rate, "Adam's learning rate; auto: 1 % of the weights' root mean square"] = "auto"
    batch: Annotated[int, Ge(1), Le(256), "latents an update"] = 8
    rollouts: Annotated[int, Ge(1), Le(256), "trajectories a refresh of the bank"] = 8
    sampling_steps: Annotated[int, Ge(1), Le(1000), "sampling steps a trajectory"] = 20
    reuse: Annotated[int, Ge(1), Le(100), "uses of each latent before a refresh"] = 2

    family: ClassVar[str] = "score distillation"
    paper: ClassVar[Paper] = Paper(
        "li2025set",
        "Set You Straight: Auto-Steering Denoising Trajectories to Sidestep Unwanted Concepts",
        "Li, Leyang and Lu, Shilin and Ren, Yan and Kong, Adams Wai-Kin",
        2025,
        "ACM International Conference on Multimedia",
        "2504.12782",
    )
    needs: ClassVar[Needs] = Needs(text=False)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Draw the saliency maps, train the group; yields a Step a map and an update, returns the edit."""
        c, a = conditions(model, targets)
        keep, null = kept(model, targets), model.encode("")
        e, e_theta = model.denoiser.teacher, model.denoiser
        student, opt, choice = unlocked(e_theta, state, self.group, self.lr, self.steps, self.smallest)
        salient = state.keep("salient", Salient(student.weights))
        bank = state.keep(
            "bank",
            Bank(
                e_theta, e_theta, c, null, state, sizes=sizes(targets),
                batch=self.batch, rollouts=self.rollouts, steps=self.sampling_steps, guidance=self.guidance,
                reuse=self.reuse,
            ),
        )  # fmt: skip
        maps = self.maps if self.density < 1 else 0
        for i in state.steps(maps + self.steps, first=maps):
            x_t, t, k = bank.draw()
            late, e_c, e_0 = is_late(e_theta, t, self.split), e(x_t, t, c[k]), e(x_t, t, null)
            out, reversed_ = e_theta(x_t, t, c[k]), e(x_t, t, a[k]) - self.eta * (e_c - e_0)
            terms = {"late": over(errors(out, reversed_), late)}
            if i < maps:
                yield Step(i, maps + self.steps, {"late": salient.add(terms["late"])})
                continue
            # a resumed fit with a selection has the mask that the selection keeps
            if maps and (i == maps or opt.mask is None):
                choice.salient(salient.scores(), self.density)
            if self.early:
                terms["early"] = self.early * over(errors(out, e_c), ~late)
            if self.anchor:
                null_errors = errors(e_theta(x_t, t, null), e_0)
                terms["anchor"] = self.anchor * (over(null_errors, late) + self.early * over(null_errors, ~late))
            if keep is not None and self.preserve:
                terms["keep"] = self.preserve * held(e_theta, x_t, t, some(keep, len(t), state.generator))
            losses = opt.step(**terms)
            choice.after(i - maps)
            yield Step(i, maps + self.steps, losses)
        return of(model, student)
