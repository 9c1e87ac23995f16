"""UCE - unified concept editing.

Rewrites every linear layer that reads the prompt encoding so that the concept's tokens are read as the anchor's, in
closed form; kept concepts and, by a ridge, everything else stay.

    W* = (lambda W + sum_i v_i c_i^T) (lambda I + sum_i c_i c_i^T)^-1                                       (Eq. 7)
    erase c -> a: v = W a      keep k: v = W k

The sums run over token encodings: a token of the concept's prompt is paired with the corresponding one of the same
prompt about the anchor. Without an anchor that is the same prompt without the concept's word, so that what the rest of
the prompt says (a style, say) is read as before; anchorless="empty" pairs with the empty prompt, as the paper does.
Encodings are weighted so that erased and kept ones have the same total weight, however many there are; of the prompts
of hundreds of concepts, and of all that a world knows, a sample is looked at.

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
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le

from ..concept import Targets
from ..edits import Edit, WeightEdit
from ..kernel.closedform import Rewrite
from ..kernel.descent import mse
from ..kernel.model import Model
from ..kernel.state import State, Step
from ..papers import UNIFIED, Paper
from .base import Anchorless, Needs, kept, readers, readings

LOOKED_AT = 2048  # tokens, of which the record says how far they are from their goals


@dataclass(frozen=True, kw_only=True)
class UCE:
    """Unified concept editing; the module's docstring has the equation."""

    anchorless: Annotated[Anchorless, "what prompts become without an anchor: blank, or the paper's empty"] = "blank"
    ridge: Annotated[float, Gt(0), Le(1e6), "lambda: pull towards the original weights"] = 0.01
    preserve: Annotated[float, Ge(0), Le(1e6), "weight of the kept concepts against the erased ones"] = 3.0
    sample: Annotated[int, Ge(1), Le(100_000), "erased prompts, and as many kept ones, to look at"] = 512

    family: ClassVar[str] = "closed form"
    paper: ClassVar[Paper] = UNIFIED
    needs: ClassVar[Needs] = Needs(text=True)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Solve for every text reader; yields one Step, returns the edit."""
        x, y = readings(model, targets, self.anchorless, self.sample, state.generator)
        keep, weights = kept(model, targets, self.sample), readers(model)
        rewrite = Rewrite(x.shape[1], x.device)
        rewrite.add(x, y)
        if keep is not None:
            same = keep.tokens.flatten(0, 1)
            rewrite.add(same, same, self.preserve)
        solved = {name: rewrite.solve(w, self.ridge) for name, w in weights.items()}
        x, y = (side[:: 1 + len(side) // LOOKED_AT] for side in (x, y))
        for i in state.steps(1):
            wanted = {name: y @ w.double().T for name, w in weights.items()}
            before = sum(mse(x @ w.double().T, wanted[name]).item() for name, w in weights.items())
            after = sum(mse(x @ solved[name].T, wanted[name]).item() for name in weights)
            yield Step(i, 1, {"before": before / len(weights), "after": after / len(weights)})
        return WeightEdit({name: solved[name].to(w.dtype) for name, w in weights.items()})
