"""HFI - human feedback inversion.

What people reject in the model's own pictures is condensed into a soft token, and the token is erased by
self-distillation. The token is learned before the fit (`study:FOLDER` as the concept; reward.py, kernel/inversion.py).

    r_psi     P(people reject x), on frozen embeddings: logistic on marks, Bradley-Terry on pairs
    v*        argmin_v E r_psi(x) || eps - e(x_t, t, c(v)) ||^2, an upper bound of E[ -r_psi(x) log p(x | v) ]
    L(theta)  E || e_theta(x_t, t, c(v*)) - sg[ e_theta(x_t, t, a) ] ||^2,  x_t at a share ~ Beta(alpha, beta) of its
              trajectory under the average of the students, a = null in the paper; cross-attention only

Our reconstruction: the authors published no code. Known, in part from summaries by others, are the three stages, r_psi
on CLIP embeddings, the weighting by r_psi of the pictures that it scores highest, that objective, Beta(3, 3) and
cross-attention. All else is ours: our r_psi (reward.py), that the pictures which count as rejected are inverted, and

    || e_theta(z_t, t, p) - e(z_t, t, p; x_0 -> y) ||^2
    y = x_0 - steer sigma_t g(x_0) C grad l(x_0) / rms(C grad l(x_0))

for the prompts p of the study, rejected and accepted ones by turns, z_t on their trajectories: the prediction with y in
place of its clean one, x_0. l is the logit of r_psi; the gate g is 0 where it accepts; C is the covariance of what the
picture may still become, by the network itself (`kernel/critic.py`, which goes the way in three parts). All weights
learn this: what reads a prompt does not see the picture. A token says what the rejected pictures have in common with
one another, not what parts them from the others: a look that a prompt's noise decides, such as a red ground, it misses.
Beside this term the token's own counts `token`, nothing by default: at 1 it undoes most of what steering does
(docs/dev/log.md). Without ratings, or where r_psi sees no pattern, it is all there is. Accepted prompts are kept
(`preserve`). With `split` below 1 both terms hold the original's prediction at times t > split * last (from ANT,
arXiv:2504.12782). `smallest` trains only the smallest weights of each tensor (SaRA, arXiv:2409.06633); magnitude
pruning may undo that.

Notation    e: original network · e_theta: student · v*: soft token · a: anchor · null: empty prompt · p: prompt of the
            study · sg: stop-gradient
Erases      looks that no word names, from 50 to 200 rated pictures; given words, these (SDD at other times)
Limits      no better than the ratings and the embedding (see the AUC); the token may hold more than was meant
Differs     neither code nor annotations were released, so no figure can be reproduced: what is not called known is
            reconstruction. Ours are `steer` and all weights, `anchor` and `preserve`; what is open is as in `sdd`
Reference   Kim et al. 2024, Safeguard Text-to-Image Diffusion Models with Human Feedback Inversion. arXiv:2407.21032
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from ..concept import Targets
from ..edits import Edit, of
from ..kernel.bank import Aimed, Bank
from ..kernel.condition import Condition
from ..kernel.critic import led_away
from ..kernel.descent import GENTLE, RELATIVE, Rate, mse
from ..kernel.model import Model
from ..kernel.saliency import unlocked
from ..kernel.state import State, Step
from ..kernel.student import Ema
from ..kernel.terms import held, phased, some
from ..papers import Paper
from .base import Needs, conditions, kept, sizes


@dataclass(frozen=True, kw_only=True)
class HFI:
    """Human feedback inversion, reconstructed; the module's docstring has the equations."""

    group: Annotated[str, "weights to train; auto: cross-attention, with ratings that say enough all"] = "auto"
    rank: Annotated[int, Ge(0), Le(256), "0 trains the weights themselves, else a low-rank update (LoRA)"] = 0
    smallest: Annotated[float, Ge(0), Le(1), "train only this share of each tensor, the smallest weights; 0: all"] = 0.0
    vectors: Annotated[int, Ge(1), Le(16), "vectors of the soft token"] = 2
    inversion: Annotated[int, Ge(0), Le(100_000), "updates that invert pictures into the soft token"] = 300
    alpha: Annotated[float, Gt(0), Le(100), "first parameter of the Beta distribution of times"] = 3.0
    beta: Annotated[float, Gt(0), Le(100), "second parameter of the Beta distribution of times"] = 3.0
    token: Annotated[float, Ge(0), Le(100), "weight of the soft token's term beside steering; 1: the paper's"] = 0.0
    steer: Annotated[float, Ge(0), Le(20), "how far the study's prompts are led away; 0 for the paper's loss"] = 0.7
    decay: Annotated[float, Ge(0), Lt(1), "decay of the moving average"] = 0.95
    split: Annotated[float, Gt(0), Le(1), "share of the time axis, from no noise, that is erased; 1: all"] = 1.0
    anchor: Annotated[float, Ge(0), Le(100), "weight of the unconditional anchor; 0 for the paper's loss"] = 0.0
    preserve: Annotated[float, Ge(0), Le(100), "weight of the kept prompts' term; 0 for the paper's loss"] = 1.0
    guidance: Annotated[float, Ge(1), Le(30), "guidance scale while sampling x_t"] = 3.0
    steps: Annotated[int, Ge(0), Le(100_000), "optimiser updates"] = 150
    lr: Annotated[Rate, "Adam's learning rate; auto: 1 % of the weights' root mean square, 0.3 % where all are"] = (
        "auto"
    )
    batch: Annotated[int, Ge(1), Le(256), "latents an update"] = 8
    rollouts: Annotated[int, Ge(1), Le(256), "trajectories a refresh of each bank"] = 8
    sampling_steps: Annotated[int, Ge(1), Le(1000), "sampling steps a trajectory"] = 20
    reuse: Annotated[int, Ge(1), Le(100), "mean uses of each latent before a refresh"] = 2

    family: ClassVar[str] = "score distillation"
    paper: ClassVar[Paper] = Paper(
        "kim2024safeguard",
        "Safeguard Text-to-Image Diffusion Models with Human Feedback Inversion",
        "Kim, Sanghyun and Jung, Seohyeon and Kim, Balhae and Choi, Moonseok and Shin, Jinwoo and Lee, Juho",
        2024,
        "European Conference on Computer Vision",
        "2407.21032",
    )
    needs: ClassVar[Needs] = Needs(text=True)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Train the group; yields a Step an update, returns the averaged weights as the edit."""
        led = [own for own in targets if own.critic and self.steer and own.rejected + own.accepted]
        named = [own for own in targets if self.token or not any(own is other for other in led)]
        keep, null = kept(model, targets), model.encode("")
        e_theta = model.denoiser
        group = self.group if self.group != "auto" else "all" if led else "cross-attention"
        e = e_theta.clone(e_theta.names(group)) if led else e_theta  # gradients pass through it
        student, opt, choice = unlocked(
            e_theta, state, group, self.lr, self.steps, self.smallest, self.rank, clip=1.0,
            relative=GENTLE if group == "all" else RELATIVE,
        )  # fmt: skip
        ema = state.keep("ema", Ema(student, self.decay))

        def average(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return e_theta.under(ema.shadow, x_t, t, condition)

        drawn: dict[str, Any] = {
            "null": null, "state": state, "batch": self.batch, "rollouts": self.rollouts, "steps": self.sampling_steps,
            "guidance": self.guidance, "reuse": self.reuse, "beta": (self.alpha, self.beta),
        }  # fmt: skip
        sides = [p for own in led for p in own.rejected], [p for own in led for p in own.accepted]
        weight = self.token if led and self.token else 1.0
        if named:
            c, a = conditions(model, named)
            bank = state.keep("bank", Bank(e_theta, average, c, sizes=sizes(named), **drawn))
        if any(sides):
            p = model.encode([*sides[0], *sides[1]])
            away = partial(led_away, e, [own.critic for own in led if own.critic], strength=self.steer)
            turns = [len(side) for side in sides if side]
            asked = state.keep("asked", Aimed(e_theta, average, p, sizes=turns, aim=away, **drawn))
        for i in state.steps(self.steps):
            terms = {}
            if named:
                x_t, t, k = bank.draw()
                target = phased(e_theta, x_t, t, c[k], e_theta.under(student.weights, x_t, t, a[k]), self.split)
                terms["distil"] = weight * mse(e_theta(x_t, t, c[k]), target)
            if any(sides):
                (x_t, t, j), y = asked.aimed()
                terms["steer"] = mse(e_theta(x_t, t, p[j]), phased(e_theta, x_t, t, p[j], y, self.split))
            if self.anchor:
                terms["anchor"] = self.anchor * held(e_theta, x_t, t, null)
            if keep is not None and self.preserve:
                terms["keep"] = self.preserve * held(e_theta, x_t, t, some(keep, len(t), state.generator))
            losses = opt.step(**terms)
            choice.after(i)
            ema.update()
            yield Step(i, self.steps, losses)
        return of(model, student, ema.shadow)
