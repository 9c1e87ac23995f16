"""Few-shot - text-encoder erasure from a few pictures.

A handful of pictures of the concept, and a handful of updates of the text encoders alone: the denoiser stays as it is.
The paper climbs the denoising error of the pictures under the concept's prompts, which has no upper bound,

    L = - || e(x_t, t, E_theta(p)) - eps ||^2                                            loss="ascent"

so how far the encoding drifts is a matter of step size and count alone. The default has an end: the pictures shall be
seen under the concept's prompt as they were under the anchor's, and other prompts shall be read as before.

    L = || e(x_t, t, E_theta(p)) - e(x_t, t, E(a)) ||^2 + w |E_theta(q) - E(q)|^2 / var E(q)     loss="redirect"

`smallest` trains only the smallest weights of each tensor (SaRA, arXiv:2409.06633); magnitude pruning may undo that.

Notation    e: denoiser, frozen · E: original text encoders · E_theta: trained · p: concept's prompt · a: the same about
            the anchor, empty without one · q: kept prompts and the empty one · x_t: noised pictures of the concept
Erases      objects, styles, names, as far as prompts go through the text encoder; in seconds
Limits      whoever puts the original text encoder back, or hands the denoiser an embedding, has the concept again. With
            "ascent" nothing holds other prompts, and steps and lr decide everything: the paper's are 8 and 1e-5
Differs     the bounded loss and its anchors are ours; every text encoder is trained, where the released code knows one.
            It also flips pictures at random once, when it reads them, and counts layers as of CLIP-L only
Reference   Fuchi and Takagi, Erasing Concepts from Text-to-Image Diffusion Models with Few-shot Unlearning, BMVC 2024.
            arXiv:2405.07288
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from ..concept import Targets
from ..edits import Edit, WeightEdit
from ..kernel.condition import Condition
from ..kernel.descent import Descent, mse
from ..kernel.model import Model
from ..kernel.neighbours import encoded
from ..kernel.pool import Pool
from ..kernel.saliency import Smallest
from ..kernel.state import State, Step
from ..papers import Paper
from .base import Needs

BETAS = (0.9, 0.98)  # the authors'


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """Few-shot erasure in the text encoders; the module's docstring has the equations."""

    loss: Annotated[Literal["redirect", "ascent"], "redirect is bounded and anchored, ascent is the paper's"] = (
        "redirect"
    )
    part: Annotated[str, "weights of the text encoders to train"] = "mlp-final-attention"
    smallest: Annotated[float, Ge(0), Le(1), "train only this share of each tensor, the smallest weights; 0: all"] = 0.0
    preserve: Annotated[float, Ge(0), Le(1e4), "w: weight of the other prompts' anchors; ascent has none"] = 10.0
    steps: Annotated[int, Ge(0), Le(100_000), "optimiser updates"] = 60
    lr: Annotated[float, Gt(0), Le(1), "Adam's learning rate"] = 5e-4
    batch: Annotated[int, Ge(1), Le(256), "noised pictures an update"] = 4
    others: Annotated[int, Ge(1), Le(4096), "anchored prompts an update"] = 32

    family: ClassVar[str] = "text encoder"
    paper: ClassVar[Paper] = Paper(
        "fuchi2024erasing",
        "Erasing Concepts from Text-to-Image Diffusion Models with Few-shot Unlearning",
        "Fuchi, Masane and Takagi, Tomohiro",
        2024,
        "British Machine Vision Conference",
        "2405.07288",
    )
    needs: ClassVar[Needs] = Needs(text=True, images=True, autoencoder=True, encoders=True)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Train a group of every text encoder; yields a Step an update, returns the edit."""
        e, text = model.denoiser, model.need_text()
        # before anything is unlocked, or resumed: what prompts mean to the original
        anchors = encoded(model, [a for t in targets for a in t.anchors])
        prompts = [p for t in targets for p in t.prompts]
        others = ["", *dict.fromkeys(k for t in targets for k in t.keeps)]
        still = encoded(model, others)
        students = text.unlock(self.part)
        for name, student in students.items():
            state.keep(name, student)
        weights = {f"{name}.{k}": p for name, s in students.items() for k, p in s.weights.items()}
        original = {f"{name}.{k}": v for name, s in students.items() for k, v in s.original.items()}
        opt = state.keep("descent", Descent(weights, self.lr, betas=BETAS))
        choice = state.keep("smallest", Smallest(original, opt, self.smallest, self.steps))
        pool, own = shots(model, targets, state, self.batch)
        for i in state.steps(self.steps):
            drawn = pool.draw()
            rows = [own[k][draw(len(own[k]), 1, state)[0]] for k in drawn.k.tolist()]
            c = model.encode([prompts[j] for j in rows])
            e_theta = e(drawn.x_t, drawn.t, c)
            if self.loss == "ascent":
                terms = {"ascent": -mse(e_theta, pool.truth(drawn))}
            else:
                terms = {"redirect": mse(e_theta, e(drawn.x_t, drawn.t, anchors[torch.tensor(rows)]))}
                if self.preserve:
                    q = draw(len(others), self.others, state)
                    terms["keep"] = self.preserve * drift(model.encode([others[j] for j in q]), still[torch.tensor(q)])
            losses = opt.step(**terms)
            choice.after(i)
            yield Step(i, self.steps, losses)
        return WeightEdit({f"{name}.{k}": v for name, s in students.items() for k, v in s.snapshot().items()})


def shots(model: Model, targets: Sequence[Targets], state: State, batch: int) -> tuple[Pool, list[range]]:
    """Return the pictures of all concepts as one pool, and by concept the rows of its prompts."""
    found = [t.pictures for t in targets if t.pictures is not None]
    z = torch.cat([p.latents for p in found])
    k = torch.cat([torch.full((len(p.latents),), i) for i, p in enumerate(found)]).to(z.device)
    ends = torch.tensor([0, *(len(t.prompts) for t in targets)]).cumsum(0).tolist()
    own = [range(a, b) for a, b in pairwise(ends)]
    return state.keep("pictures", Pool(model.denoiser, z, k, state, batch)), own


def draw(n: int, m: int, state: State) -> list[int]:
    """Return m random indices below n."""
    found: list[int] = torch.randint(n, (m,), generator=state.generator).tolist()
    return found


def drift(c: Condition, still: Condition) -> Tensor:
    """Return how far encodings have moved, relative to the variance of what they were: encoders differ in scale."""
    pairs = [(c.tokens, still.tokens), *((c.extra[k], still.extra[k]) for k in c.extra)]
    return torch.stack([mse(a, b) / b.float().var().clamp_min(1e-12) for a, b in pairs]).sum()
