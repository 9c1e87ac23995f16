"""TUCE - unified concept editing inside the text encoders; ours, after UCE.

UCE solves for the layers that read the finished encoding, and those see every concept through the d directions of a
token: where many concepts share them, one cannot be rewritten without its neighbours. The last matrix W of a text
encoder's layer, which closes its MLP, reads the 4 d features h in front of it, and there concepts lie apart. Layer by
layer, first to last,

    W* = W + argmin_D mean_e |D h_e - (r_a - r_e)|^2 + w mean_k |D h_k - (r_k0 - r_k)|^2 + lambda |D|^2

so that erased prompts e leave the layer as their anchors a leave the untouched encoder, and kept prompts k as they did
themselves (k0), given what the layers before have changed already. It is UCE's Eq. 7 with outputs for goals. Without an
anchor the goal is the same prompt without the concept's word.

Notation    r: residual stream behind the layer, a row a token from the word on · h: inputs of W there · w: preserve ·
            lambda: ridge, relative to the mean eigenvalue of the h's second moment
Erases      objects, styles, names; several at once. The denoiser stays as it is
Limits      whoever puts the original text encoder back, or hands the denoiser an embedding, has the concept again.
            Retained is what is sampled: kept concepts, all that a world knows, or else common nouns
Differs     no paper of its own. That a text encoder can be edited in closed form: arXiv:2306.00738, which optimises one
            fact's value in one layer, and arXiv:2310.13730, which rewrites one attention layer; both at the subject's
            last token, where we found (docs/dev/log.md) that what a prompt draws is read behind the word as well
Reference   Gandikota et al., Unified Concept Editing in Diffusion Models, WACV 2024. arXiv:2308.14761 (Eq. 7)
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le
from torch import Tensor

from ..concept import Targets
from ..edits import Edit, WeightEdit
from ..kernel.model import Model
from ..kernel.neighbours import thinned
from ..kernel.residual import rewritten
from ..kernel.state import State, Step
from ..papers import UNIFIED, Paper
from ..vocabulary import elsewhere
from .base import Anchorless, Needs, goals


@dataclass(frozen=True, kw_only=True)
class TUCE:
    """Unified concept editing inside the text encoders; the module's docstring has the equation."""

    anchorless: Annotated[Anchorless, "what prompts become without an anchor: blank, or empty"] = "blank"
    ridge: Annotated[float, Gt(0), Le(1e6), "lambda: pull towards the original weights"] = 1e-4
    preserve: Annotated[float, Ge(0), Le(1e6), "w: weight of the kept prompts against the erased ones"] = 20.0
    sample: Annotated[int, Ge(1), Le(100_000), "erased prompts, and as many kept ones, to look at"] = 256

    family: ClassVar[str] = "closed form"
    paper: ClassVar[Paper] = UNIFIED
    needs: ClassVar[Needs] = Needs(text=True, encoders=True)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Solve for every text encoder; yields one Step, returns the edit."""
        pairs = goals(targets, self.anchorless, self.sample, state.generator)
        prompts, anchors = ([p for pair in pairs for p in pair[side]] for side in (0, 1))
        said = [k for target in targets for k in target.keeps if target.concept.keep]
        keeps = list(dict.fromkeys(["", *said, *thinned(elsewhere(model.world, targets, self.sample), self.sample)]))
        solved: dict[str, Tensor] = {}
        left: dict[str, float] = {}
        for name in model.need_text().encoders:
            found, left[name] = rewritten(
                model, name, prompts, anchors, keeps, ridge=self.ridge, preserve=self.preserve
            )
            solved |= {f"{name}.{k}": w for k, w in found.items()}
        for i in state.steps(1):
            yield Step(i, 1, {"left": sum(left.values()) / len(left)})
        return WeightEdit(solved)
