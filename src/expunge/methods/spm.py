"""SPM - concept semi-permeable membranes.

A membrane is a rank-one update of every linear and convolutional layer of the transformer blocks, trained to erase one
concept and to let everything else pass. The network itself stays as it is.

    y = W x + gamma_c(p) up_c(down_c(x))                                                                 (membrane)
    L_erase  = || e_M(x_t, t, c) - [e(x_t, t, a) - eta (e(x_t, t, c) - e(x_t, t, a))] ||^2
    L_anchor = || e_M(x_t, t, k) - e(x_t, t, k) ||^2,   k ~ P(k | c) prop. to 1 - cos(k, c)       (latent anchoring)
    L = L_erase + lambda L_anchor
    gamma_c(p) in [0, 1]: how much a prompt p speaks of c                                    (facilitated transport)

with a = null in the paper, or an anchor. A linear combination whose weights sum to one is the same in every
parameterisation. Several concepts get a membrane each, side by side: every latent trains that of its own concept, and
outputs add up, so that no membrane's down meets another's up. With `split` below 1 the target is e(x_t, t, c) at times
t > split * last, where the layout forms (from ANT, arXiv:2504.12782).

Differs     Authors' code: gamma scales both factors and so counts squared, and summed membranes have cross terms. Its
            anchors are Gaussian noise of 59,136 dimensions, orthogonal to every prompt; half of their batch is the
            empty prompt. The network is told a time 33 to 42 steps above that of its latents. Here gamma counts once,
            anchors are prompts to retain, every latent has its own time. Its gamma is the larger of the cosine of
            whole encodings and the share of common tokens, and never zero; here it compares tokens' encodings, and is
            zero for all that is no more like c than what is retained. The null row of guidance has a gate of its own.
Notation    e: original network · e_M: with the membrane open · c: concept · a: surrogate · k: anchor · eta: strength
Erases      objects, styles, names; membranes of different runs combine, and fit other fine-tunes of the same base
Limits      the gate can be evaded: a paraphrase or adversarial prompt that shares no token with the concept passes;
            the edit needs this runtime, and exported as a LoRA it is open to every prompt. No anchor of the
            unconditional prediction: its gate is shut, and latent anchoring has the empty prompt among its k. No
            selection of small weights either: a membrane has none of the network's
Reference   Lyu et al., One-dimensional Adapter to Rule Them All: Concepts, Diffusion Models and Erasing Applications,
            CVPR 2024. arXiv:2312.16145
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor

from ..concept import Targets
from ..edits import Edit, GatedEdit, Membrane, component_of
from ..edits.gated import gates, neighbourhood
from ..kernel.bank import Bank
from ..kernel.condition import Condition
from ..kernel.descent import Descent, mse
from ..kernel.gate import Membranes, named, planted
from ..kernel.model import Model
from ..kernel.state import State, Step
from ..kernel.terms import gated, is_late
from ..papers import Paper
from .base import Needs, conditions, sizes

GROUP = "transformer-blocks"


@dataclass(frozen=True, kw_only=True)
class SPM:
    """Semi-permeable membranes; the module's docstring has the equations."""

    eta: Annotated[float, Ge(0), Le(20), "negative guidance eta"] = 1.0
    anchoring: Annotated[float, Ge(0), Le(1e6), "lambda: weight of latent anchoring"] = 10.0
    split: Annotated[float, Gt(0), Le(1), "share of the time axis, from no noise, that is erased; 1: all"] = 1.0
    guidance: Annotated[float, Ge(1), Le(30), "guidance scale while sampling x_t"] = 3.0
    steps: Annotated[int, Ge(0), Le(100_000), "optimiser updates"] = 100
    lr: Annotated[float, Gt(0), Le(1), "Adam's learning rate"] = 3e-3
    batch: Annotated[int, Ge(1), Le(256), "latents an update"] = 8
    rollouts: Annotated[int, Ge(1), Le(256), "trajectories a refresh of the bank"] = 8
    sampling_steps: Annotated[int, Ge(1), Le(1000), "sampling steps a trajectory"] = 20
    reuse: Annotated[int, Ge(1), Le(100), "uses of each latent before a refresh"] = 2

    family: ClassVar[str] = "adapters"
    paper: ClassVar[Paper] = Paper(
        "lyu2024one",
        "One-dimensional Adapter to Rule Them All: Concepts, Diffusion Models and Erasing Applications",
        "Lyu, Mengyao and Yang, Yuhong and Hong, Haiwen and Chen, Hui and Jin, Xuan and He, Yuan and Xue, Hui and "
        "Han, Jungong and Ding, Guiguang",
        2024,
        "Conference on Computer Vision and Pattern Recognition",
        "2312.16145",
    )
    needs: ClassVar[Needs] = Needs(text=True)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Train a membrane a concept; yields a Step an update, returns the membranes with their gates."""
        c, a = conditions(model, targets)
        null, anchors = model.encode(""), model.encode(neighbourhood(targets))
        owner = torch.tensor([i for i, target in enumerate(targets) for _ in target.prompts], device=model.device)
        likely, own = likelihood(c, anchors), F.one_hot(owner).to(c.tokens.dtype)
        e_m, measured = model.denoiser, gates(model, targets)
        factors = planted(e_m.module, e_m.names(GROUP), len(targets), state.generator)
        membranes = state.keep("membranes", Membranes(e_m.module, factors, measured))
        try:
            opt = state.keep("descent", Descent(named(factors), self.lr))
            bank = state.keep(
                "bank",
                Bank(
                    e_m, e_m, c, null, state, sizes=sizes(targets),
                    batch=self.batch, rollouts=self.rollouts, steps=self.sampling_steps, guidance=self.guidance,
                    reuse=self.reuse,
                ),
            )  # fmt: skip

            @torch.no_grad()
            def e(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
                with membranes.under(None):
                    return e_m(x_t, t, condition)

            for i in state.steps(self.steps):
                x_t, t, k = bank.draw()
                e_a, e_c, late = e(x_t, t, a[k]), e(x_t, t, c[k]), is_late(e_m, t, self.split)
                target = e_a - self.eta * (e_c - e_a)
                near = anchors[torch.multinomial(likely[k.cpu()], 1, generator=state.generator)[:, 0].to(t.device)]
                with membranes.under(own[k]):
                    terms = {"erase": mse(e_m(x_t, t, c[k]), gated(late, target, e_c))}
                    if self.anchoring:
                        terms["anchor"] = self.anchoring * mse(e_m(x_t, t, near), e(x_t, t, near))
                yield Step(i, self.steps, opt.step(**terms))
        finally:
            membranes.close()
        values, component = membranes.state_dict(), component_of(model, e_m.module)
        return GatedEdit(
            tuple(
                Membrane(
                    {f"{component}.{n}": (values[f"{n}.down"][[j]], values[f"{n}.up"][:, [j]]) for n in factors}, gate
                )
                for j, gate in enumerate(measured)
            )
        )


def likelihood(c: Condition, anchors: Condition) -> Tensor:
    """Return the unnormalised probability of each anchor for each prompt, (prompts, anchors): 1 - cos of encodings."""
    cosine = F.normalize(c.tokens.float().flatten(1), dim=1) @ F.normalize(anchors.tokens.float().flatten(1), dim=1).T
    return (1 - cosine).clamp(min=1e-6).cpu()
