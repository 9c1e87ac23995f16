"""UCE - unified concept editing.

Rewrites every linear layer that reads the prompt encoding so that the concept's tokens are read as the anchor's, in
closed form; kept concepts and, by a ridge, everything else stay.

    W* = (lambda W + sum_i v_i c_i^T) (lambda I + sum_i c_i c_i^T)^-1                                       (Eq. 7)
    erase c -> a: v = W a      keep k: v = W k

The sums run over token encodings: a token of the concept's prompt is paired with the corresponding one of the same
prompt about the anchor. Without an anchor that is the same prompt without the concept's word, so that what the rest of
the prompt says (a style, say) is read as before; anchorless="empty" pairs with the empty prompt, as the paper does.
Encodings are weighted so that erased and kept ones have the same total weight, however many there are.

Differs     The authors erase and keep bare names and begin at the name's last token; here whole prompts, from the
            first token on that the word changes. Their lambda is absolute and their inverse in float32; here lambda is
            relative to the mean eigenvalue of sum c c^T, and the system is solved in float64.
Notation    W: a text reader · c_i: token encoding · a: the anchor's · v_i: wanted output · lambda: ridge
Erases      objects, styles, names; hundreds at once, in seconds
Limits      kept concepts must be listed (or the world supplies them); paraphrases that share no token survive
Reference   Gandikota et al., Unified Concept Editing in Diffusion Models, WACV 2024. arXiv:2308.14761
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from ..concept import Targets
from ..edits import Edit, WeightEdit
from ..kernel.closedform import Rewrite
from ..kernel.descent import mse
from ..kernel.model import Model
from ..kernel.neighbours import thinned
from ..kernel.residual import rewritten
from ..kernel.state import State, Step
from .base import Anchorless, Needs, Paper, kept, readers, readings


@dataclass(frozen=True, kw_only=True)
class UCE:
    """Unified concept editing; the module's docstring has the equation."""

    anchorless: Annotated[Anchorless, "what prompts become without an anchor: blank, or the paper's empty"] = "blank"
    ridge: Annotated[float, Gt(0), Le(1e6), "lambda: pull towards the original weights"] = 0.01
    preserve: Annotated[float, Ge(0), Le(1e6), "weight of the kept concepts against the erased ones"] = 3.0
    where: Annotated[Literal["readers", "encoder"], "matrices to solve for: the paper's, or the text encoders'"] = (
        "readers"
    )
    sample: Annotated[int, Ge(1), Le(100_000), "where=encoder: erased prompts, and as many kept ones, to look at"] = 256

    family: ClassVar[str] = "closed form"
    paper: ClassVar[Paper] = Paper(
        "gandikota2024unified",
        "Unified Concept Editing in Diffusion Models",
        "Gandikota, Rohit and Orgad, Hadas and Belinkov, Yonatan and Materzynska, Joanna and Bau, David",
        2024,
        "Winter Conference on Applications of Computer Vision",
        "2308.14761",
    )
    needs: ClassVar[Needs] = Needs(text=True)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Solve for every matrix; yields one Step, returns the edit."""
        solve = self.denoiser if self.where == "readers" else self.encoders
        solved, figures = solve(model, targets, state)
        for i in state.steps(1):
            yield Step(i, 1, figures)
        return WeightEdit(solved)

    def denoiser(
        self, model: Model, targets: Sequence[Targets], _: State
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return new text readers, and how far they were and are from what is wanted of them."""
        x, y = readings(model, targets, self.anchorless)
        keep, weights = kept(model, targets), readers(model)
        rewrite = Rewrite(x.shape[1], x.device)
        rewrite.add(x, y)
        if keep is not None:
            same = keep.tokens.flatten(0, 1)
            rewrite.add(same, same, self.preserve)
        solved = {name: rewrite.solve(w, self.ridge) for name, w in weights.items()}
        wanted = {name: y @ w.double().T for name, w in weights.items()}
        before = sum(mse(x @ w.double().T, wanted[name]).item() for name, w in weights.items())
        after = sum(mse(x @ w.T, wanted[name]).item() for name, w in solved.items())
        figures = {"before": before / len(weights), "after": after / len(weights)}
        return {name: solved[name].to(w.dtype) for name, w in weights.items()}, figures

    def encoders(
        self, model: Model, targets: Sequence[Targets], state: State
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return new matrices of the text encoders, and what is left of the distance to the anchors."""
        text = model.need_text()
        share = -(-self.sample // len(targets))
        prompts, anchors = [], []
        for target in targets:
            stands = target.anchors if target.concept.anchor or self.anchorless == "empty" else target.blanks
            chosen = torch.randperm(len(target.prompts), generator=state.generator)[:share].tolist()
            prompts += [target.prompts[i] for i in chosen]
            anchors += [stands[i] for i in chosen]
        keeps = thinned(list(dict.fromkeys(["", *(k for t in targets for k in t.keeps)])), self.sample)
        solved, left = {}, 0.0
        for name in text.encoders:
            found, rest = rewritten(
                model, name, prompts, anchors, keeps, ridge=self.ridge, preserve=self.preserve
            )
            solved |= {f"{name}.{k}": w for k, w in found.items()}
            left += rest / len(text.encoders)
        return solved, {"after": left}
