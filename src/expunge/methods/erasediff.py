"""EraseDiff - erasing undesirable influence in diffusion models.

Keeps the loss of the pictures to retain low under the constraint that the pictures to forget are forgotten. The
gradients of both losses are taken apart, and a multiplier makes every step a descent of both, to first order.

    min_theta L_r(theta)  subject to  L_f(theta) - min_phi L_f(phi) <= 0
    L_r = E || eps - e_theta(x_t, t, c_r) ||^2                           pictures to retain
    L_f = E || e_theta(x_t, t, c) - sg[ e_theta(x_t, t, c_m) ] ||^2      pictures to forget, target "relabel", or
    L_f = E || eps_theta(x_t, t, c) - u ||^2, u ~ U(0, 1)                target "noise"
    step along grad L_r + lambda grad L_f,  lambda = max(0, eta - <grad L_f, grad L_r> / |grad L_f|^2)

Of all steps along which L_f falls by eta |grad L_f|^2 or more, that is the one nearest to grad L_r. With
`smallest` both are gradients by the smallest weights of each tensor, which alone are trained (SaRA, arXiv:2409.06633);
magnitude pruning may undo that.

Notation    e_theta: trained network · eps_theta: its output as noise · c, c_r: conditions of pictures to forget, to
            retain · c_m: the anchor's, or a random retained picture's · sg: stop-gradient · eta: wanted descent of L_f
Erases      objects, styles, classes of which there are pictures, or which the base model draws; several at once
Limits      lambda is exact for the gradient, and Adam rescales the step; what no retained picture shows is not kept,
            an anchor included; with the noise target the concept's prompts draw no picture at all
Differs     the released code divides by |grad L_f| |grad L_r| in lambda (multiplier="cosine"), or fixes lambda; spends
            most updates on an inner loop for min_phi, a constant of the outer loss, which has no gradient and is left
            out here; for text-to-image undoes it inside the loop over K, with all outer updates so far; and starts its
            loader afresh at every update, so that only the first batch is forgotten. Its DDPM keeps an average of the
            weights (0.99) and clips the gradient at norm 1, and its noise target was also the noise that formed x_t.
            Its c_m for text-to-image is always "a photo of a pokemon"
Reference   Wu et al., Erasing Undesirable Influence in Diffusion Models, CVPR 2025. arXiv:2401.05779
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from ..concept import Targets
from ..edits import Edit, of
from ..kernel.descent import GENTLE, Rate, mse
from ..kernel.lessons import Lessons
from ..kernel.model import Model
from ..kernel.path import x0_and_eps
from ..kernel.saliency import gradient, unlocked
from ..kernel.state import State, Step
from ..papers import Paper
from .base import Needs


@dataclass(frozen=True, kw_only=True)
class EraseDiff:
    """First-order constrained erasure; the module's docstring has the equations."""

    group: Annotated[str, "weights to train"] = "all"
    smallest: Annotated[float, Ge(0), Le(1), "train only this share of each tensor, the smallest weights; 0: all"] = 0.0
    target: Annotated[Literal["relabel", "noise"], "what the concept becomes: relabel (c_m) or noise"] = "relabel"
    multiplier: Annotated[Literal["ratio", "cosine"], "lambda of the paper (ratio) or of its code (cosine)"] = "ratio"
    eta: Annotated[float, Ge(0), Le(100), "how much the forgetting loss must fall, eta"] = 0.1
    steps: Annotated[int, Ge(0), Le(100_000), "optimiser updates"] = 100
    lr: Annotated[Rate, "Adam's learning rate; auto: 0.3 % of the weights' root mean square"] = "auto"
    batch: Annotated[int, Ge(1), Le(1024), "pictures an update, of each set"] = 8

    family: ClassVar[str] = "pictures"
    paper: ClassVar[Paper] = Paper(
        "wu2025erasing",
        "Erasing Undesirable Influence in Diffusion Models",
        "Wu, Jing and Le, Trung and Hayat, Munawar and Harandi, Mehrtash",
        2025,
        "Conference on Computer Vision and Pattern Recognition",
        "2401.05779",
    )
    needs: ClassVar[Needs] = Needs(text=False, images=True, retained=True)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Train the group; yields a Step an update, returns the edit."""
        e_theta = model.denoiser
        student, opt, choice = unlocked(e_theta, state, self.group, self.lr, self.steps, self.smallest, relative=GENTLE)
        seen = Lessons(model, targets, state, self.batch)

        def forget() -> Tensor:
            x_t, t, _, _, k = seen.forget.draw()
            out = e_theta(x_t, t, seen.c[k])
            if self.target == "relabel":
                with torch.no_grad():
                    goal = e_theta(x_t, t, seen.instead(k))
                return mse(out, goal)
            # in eps, whatever the network predicts: that is where the paper puts its noise
            _, eps = x0_and_eps(e_theta.kind, x_t, out, *e_theta.path.levels(t, x_t))
            return mse(eps, torch.rand(eps.shape, generator=state.generator).to(eps))

        def remain() -> Tensor:
            return seen.retain.error(seen.retain.draw(), seen.r)

        for i in state.steps(self.steps):
            l_f, l_r = forget(), remain()
            # lambda is that of the weights which move: those held have no part in either descent
            g_f, g_r = (opt.masked(gradient(x, student.weights)) for x in (l_f, l_r))
            lam = multiplier(g_f, g_r, self.eta, self.multiplier)
            for name, w in student.weights.items():
                w.grad = g_r[name] + lam * g_f[name]
            opt.apply()
            choice.after(i)
            yield Step(i, self.steps, {"forget": l_f.item(), "retain": l_r.item(), "lambda": lam})
        return of(model, student)


def multiplier(g_f: Mapping[str, Tensor], g_r: Mapping[str, Tensor], eta: float, form: str) -> float:
    """Return lambda from the gradients of both losses, by weight; 0 where the forgetting loss has no gradient left.

    Args:
        g_f: gradient of the forgetting loss.
        g_r: gradient of the retaining loss.
        eta: wanted descent of the forgetting loss, in units of its squared gradient (ratio).
        form: "ratio" is the paper's, "cosine" that of the authors' code; they differ by |g_r| / |g_f|.
    """
    dot, ff, rr = (sum((a[n].double() * b[n]).sum() for n in a) for a, b in ((g_f, g_r), (g_f, g_f), (g_r, g_r)))
    scale = float(ff) if form == "ratio" else (float(ff) * float(rr)) ** 0.5
    return max(0.0, eta - float(dot) / scale) if scale else 0.0
