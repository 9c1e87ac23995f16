"""UCE - unified concept editing.

Rewrites every linear layer that reads the prompt encoding so that the concept's tokens are read as the anchor's, in
closed form; kept concepts and, by a ridge, everything else stay.

    W* = (lambda W + sum_i v_i c_i^T) (lambda I + sum_i c_i c_i^T)^-1                                       (Eq. 7)
    erase c -> a: v = W a      keep k: v = W k

The sums run over token encodings: a token of the concept's prompt is paired with the corresponding one of the same
prompt about the anchor. Without an anchor that is the same prompt without the concept's word, so that what the rest of
the prompt says (a style, say) is read as before; anchorless="empty" pairs with the empty prompt, as the paper does.
Erased encodings have one total weight and kept ones `preserve` times as much, however many there are; of the prompts
of hundreds of concepts, and of all that a world knows, a sample is looked at.

reads="tokens" solves the same equation one layer earlier, for the text encoder's table of vectors, which reads a token
of the prompt as a one-hot c: every row becomes a weighted mean, and concepts that share the d directions of an encoding
still have rows of their own. It parts a hundred objects where the denoiser's readers cannot (docs/bench.md).

Differs     The authors erase and keep bare names and begin at the name's last token; here whole prompts, from the
            first token on that the word changes. Their lambda is absolute and their inverse in float32; here lambda is
            relative to the mean eigenvalue of sum c c^T, and the system is solved in float64. reads="tokens" is ours.
Notation    W: a text reader · c_i: token encoding · a: the anchor's · v_i: wanted output · lambda: ridge
Erases      objects, styles, names; hundreds at once in seconds, here with reads="tokens" only (docs/bench.md)
Limits      kept concepts must be listed (or the world supplies them); paraphrases that share no token survive. With
            reads="tokens" the words are unlearned and nothing behind them: whoever names it otherwise, hands the
            encoder a vector, or puts the table back, has the concept again
Reference   Gandikota et al., Unified Concept Editing in Diffusion Models, WACV 2024. arXiv:2308.14761
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from ..concept import Targets
from ..edits import Edit, WeightEdit
from ..errors import ConceptError
from ..kernel.closedform import Rewrite, matched, renamed
from ..kernel.descent import mse
from ..kernel.model import Model
from ..kernel.state import State, Step
from ..papers import UNIFIED, Paper
from ..vocabulary import elsewhere
from .base import Anchorless, Needs, goals, kept, readers, readings

Reads = Literal["encodings", "tokens"]
Solved = tuple[dict[str, Tensor], float, float]  # new values by name; the goals' mean squared distance before, after
LOOKED_AT = 2048  # tokens, of which the record says how far they are from their goals


@dataclass(frozen=True, kw_only=True)
class UCE:
    """Unified concept editing; the module's docstring has the equation."""

    anchorless: Annotated[Anchorless, "what prompts become without an anchor: blank, or the paper's empty"] = "blank"
    ridge: Annotated[float, Gt(0), Le(1e6), "lambda: pull towards the original weights"] = 0.01
    preserve: Annotated[float, Ge(0), Le(1e6), "weight of the kept concepts against the erased ones"] = 3.0
    sample: Annotated[int, Ge(1), Le(100_000), "erased prompts, and as many kept ones, to look at"] = 512
    reads: Annotated[Reads, "what is rewritten: the readers of encodings, or the encoder's table of tokens"] = (
        "encodings"
    )

    family: ClassVar[str] = "closed form"
    paper: ClassVar[Paper] = UNIFIED
    needs: ClassVar[Needs] = Needs(text=True)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Solve for every text reader; yields one Step, returns the edit.

        Raises:
            ConceptError: a concept's prompts read the same without it; reads="tokens" and a concept that is no word.
            NeedsError: reads="tokens" and a model whose text encoders cannot be reached.
        """
        solved = self.tokens(model, targets) if self.reads == "tokens" else self.encodings(model, targets, state)
        values, before, after = solved
        for i in state.steps(1):
            yield Step(i, 1, {"before": before, "after": after})
        return WeightEdit(values)

    def encodings(self, model: Model, targets: Sequence[Targets], state: State) -> Solved:
        """Solve for the denoiser's readers of encodings."""
        x, y = readings(model, targets, self.anchorless, self.sample, state.generator)
        keep, weights = kept(model, targets, self.sample), readers(model)
        rewrite = Rewrite(x.shape[1], x.device)
        rewrite.add(x, y)
        if keep is not None:
            same = keep.tokens.flatten(0, 1)
            rewrite.add(same, same, self.preserve)
        solved = {name: rewrite.solve(w, self.ridge) for name, w in weights.items()}
        x, y = (side[:: 1 + len(side) // LOOKED_AT] for side in (x, y))
        wanted = {name: y @ w.double().T for name, w in weights.items()}
        before = fmean(mse(x @ w.double().T, wanted[name]).item() for name, w in weights.items())
        after = fmean(mse(x @ solved[name].T, wanted[name]).item() for name in weights)
        return {name: solved[name].to(w.dtype) for name, w in weights.items()}, before, after

    def tokens(self, model: Model, targets: Sequence[Targets]) -> Solved:
        """Solve for the text encoders' tables of vectors; every prompt is looked at, it costs no encoding."""
        text, before, after = model.need_text(), list[float](), list[float]()
        sides = goals(targets, self.anchorless)
        lengths = [[text.lengths(side) for side in pair] for pair in sides]
        told = [[text.ids(side) for side in pair] for pair in sides]
        said = [k for target in targets for k in target.keeps if target.concept.keep]
        rest = text.ids(list(dict.fromkeys(["", *said, *elsewhere(model.world, targets, self.sample)])))
        solved = {}
        for name, table in text.embedding().items():
            pairs = []
            for target, (long, short), (c, a) in zip(targets, lengths, told, strict=True):
                x, y = (rows[:, 0] for rows in matched(c[name][..., None], a[name][..., None], long, short))
                if not len(x) or max(x.max(), y.max()) >= len(table):
                    raise ConceptError(
                        f"{target.concept.name!r} is no word to the vocabulary of {model.name!r}, which reads='tokens' "
                        "rewrites. Give a word, or leave reads at 'encodings'."
                    )
                pairs.append((x, y))
            x, y = (torch.cat(side).to(table.device) for side in zip(*pairs, strict=True))
            same = rest[name].flatten().to(table.device)
            new = renamed(table, x, y, same, self.preserve, self.ridge)
            before.append(mse(table[x], table[y]).item())
            after.append(mse(new[x], table[y]).item())
            solved[f"{name}.{text.vocabularies[name]}"] = new
        return solved, fmean(before), fmean(after)
