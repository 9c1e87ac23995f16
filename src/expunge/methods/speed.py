"""SPEED - erasure in the null space of what is kept.

Edits every linear layer that reads the prompt encoding, in closed form, by an update that what is retained hardly sees:
its rows lie where encodings to retain have little energy.

    Delta = argmin sum_i || (W + Delta P) c_i - W a_i ||^2 + lambda || Delta P ||^2   with   Delta P s = 0
    P: projection on the eigenvectors of mean_k k k^T with eigenvalues below the threshold              (null space)

The more is retained, the smaller the null space; what is retained can be refined first, for each layer:

    filter      keep only those k that the erasure would move more than average without P               (IPF)
    augment     k + eps v, with v the direction to which W is most nearly blind                         (DPA)
    invariant   s: the start token and the main directions of the empty prompt, held exactly            (IEC)

The first two are off unless asked for: with some hundred prompts to retain they gained nothing. In a basis U of the
null space, orthogonal to all s, the update is Delta P = Z U^T with a small least-squares problem for Z.

Differs     Authors' code solves the equality by Lagrange multipliers, with explicit inverses in float32: the same
            update (a test compares). It draws the augmented encodings; here their expectation enters the mean. Its s
            are the start token and 3 centres of k-means with a random start, here 3 singular directions. It erases and
            retains the last token of bare names and edits values only; here every token that the word changes, all
            tokens of prompts to retain, and every text reader. Threshold and lambda are absolute there.
Notation    W: a text reader · c: token encoding of the concept · a: of the anchor's prompt · k: retained · s: invariant
Erases      objects, styles, names; many at once in seconds, though here ten are hardly erased (docs/bench.md)
Limits      as strong as the null space is large: where much is retained none is left, and the threshold lets some of
            it in, which pays with what is retained; a concept that nothing retained resembles gains nothing over UCE
Reference   Li et al., SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models, ICLR 2026.
            arXiv:2503.07392
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from ..concept import Targets
from ..edits import Edit, WeightEdit
from ..kernel.closedform import null_space, restricted
from ..kernel.descent import mse
from ..kernel.model import Model
from ..kernel.state import State, Step
from ..papers import Paper
from .base import Anchorless, Needs, kept, readers, readings

DIRECTIONS = 3  # of the empty prompt that are invariant, beside its start token


@dataclass(frozen=True, kw_only=True)
class SPEED:
    """Erasure in the null space of what is kept; the module's docstring has the equations."""

    anchorless: Annotated[Anchorless, "what prompts become without an anchor: blank, or the paper's empty"] = "blank"
    threshold: Annotated[float, Gt(0), Le(1e6), "eigenvalue, relative to the mean, below which space is null"] = 0.3
    ridge: Annotated[float, Gt(0), Le(1e6), "lambda: pull towards the original weights"] = 0.3
    filter: Annotated[bool, "retain only what the erasure would move more than average"] = False
    augment: Annotated[float, Ge(0), Le(1e6), "variance of augmented encodings, relative to the mean; 0 for none"] = 0.0
    sample: Annotated[int, Ge(1), Le(100_000), "erased prompts, and as many kept ones, to look at"] = 512

    family: ClassVar[str] = "closed form"
    paper: ClassVar[Paper] = Paper(
        "li2026speed",
        "SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models",
        "Li, Ouxiang and Wang, Yuan and Hu, Xinting and Jiang, Houcheng and Liang, Tao and Hao, Yanbin and Ma, Guojun "
        "and Feng, Fuli",
        2026,
        "International Conference on Learning Representations",
        "2503.07392",
    )
    needs: ClassVar[Needs] = Needs(text=True)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Solve for every text reader; yields one Step, returns the edit."""
        x, y = readings(model, targets, self.anchorless, self.sample, state.generator)
        keep, null = kept(model, targets, self.sample), model.encode("").tokens[0].double()
        retained = null if keep is None else keep.tokens.double().flatten(0, 1)
        main: Tensor = torch.linalg.svd(null[1:], full_matrices=False).Vh[:DIRECTIONS]
        invariant, layers = torch.cat([null[:1], main]), readers(model)
        weights = {name: w.detach().double() for name, w in layers.items()}
        solved = {name: self.edited(w, x, y, retained, invariant) for name, w in weights.items()}
        for i in state.steps(1):
            pairs = [(weights[name], solved[name]) for name in weights]
            before = sum(mse(x @ old.T, y @ old.T).item() for old, _ in pairs)
            after = sum(mse(x @ new.T, y @ old.T).item() for old, new in pairs)
            damage = sum(mse(retained @ new.T, retained @ old.T).item() for old, new in pairs)
            losses = {"before": before, "after": after, "damage": damage}
            yield Step(i, 1, {k: v / len(pairs) for k, v in losses.items()})
        return WeightEdit({name: solved[name].to(w.dtype) for name, w in layers.items()})

    def edited(self, weight: Tensor, x: Tensor, y: Tensor, retained: Tensor, invariant: Tensor) -> Tensor:
        """Return W + Delta P (out, d) for one layer.

        Args:
            weight: W, (out, d).
            x: encodings to erase (m, d).
            y: what they shall be read as (m, d).
            retained: encodings to retain (k, d).
            invariant: encodings that nothing may move (s, d).
        """
        if self.filter:
            everywhere = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            moved = (retained @ restricted(weight, x, y, everywhere, self.ridge).T).norm(dim=1)
            # at least the mean: where nothing is moved, everything stays
            retained = retained[moved >= moved.mean()]
        moment = retained.T @ retained / len(retained)
        mean = moment.diagonal().mean()
        if self.augment:
            blind = torch.linalg.svd(weight, full_matrices=False).Vh[-1]
            moment = moment + self.augment * mean * torch.outer(blind, blind)
        basis = null_space(moment, self.threshold * mean, invariant)
        return weight + restricted(weight, x, y, basis, self.ridge)
