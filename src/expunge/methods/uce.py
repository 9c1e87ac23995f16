"""UCE - unified concept editing.

Rewrites every linear layer that reads the prompt encoding so that the concept's tokens are read as the anchor's, in
closed form; kept concepts and, by a ridge, everything else stay.

    W* = (lambda W + sum_i v_i c_i^T) (lambda I + sum_i c_i c_i^T)^-1                                       (Eq. 7)
    erase c -> a: v = W a      keep k: v = W k

The sums run over token encodings: position i of the concept's prompt is paired with position i of the same prompt about
the anchor. Encodings are weighted so that erased and kept ones have the same total weight, however many there are.

Notation    W: a text reader · c_i: token encoding · a: the anchor's · v_i: wanted output · lambda: ridge
Erases      objects, styles, names; hundreds at once, in seconds
Limits      kept concepts must be listed (or the world supplies them); paraphrases that share no token survive
Reference   Gandikota et al., Unified Concept Editing in Diffusion Models, WACV 2024. arXiv:2308.14761
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from ..concept import Targets
from ..edits import Edit, WeightEdit, component_of
from ..kernel.descent import mse
from ..kernel.model import Model
from ..kernel.state import State, Step
from .base import Needs, Paper, conditions, kept


@dataclass(frozen=True, kw_only=True)
class UCE:
    """Unified concept editing; the module's docstring has the equation."""

    ridge: Annotated[float, Gt(0), Le(1e6), "lambda: pull towards the original weights"] = 0.1
    preserve: Annotated[float, Ge(0), Le(1e6), "weight of the kept concepts against the erased ones"] = 1.0

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
        """Solve for every text reader; yields one Step, returns the edit."""
        c, a = conditions(model, targets)
        keep = kept(model, targets)
        readers = model.denoiser.text_readers(c[:1])
        erased, wanted = differing(c.tokens.double(), a.tokens.double())
        sources, goals, weights = [erased], [wanted], [share(erased)]
        if keep is not None and self.preserve:
            same = keep.tokens.double().flatten(0, 1)
            sources, goals, weights = [*sources, same], [*goals, same], [*weights, self.preserve * share(same)]
        x, y, w = torch.cat(sources), torch.cat(goals), torch.cat(weights)[:, None]
        gram, cross = x.T @ (w * x), y.T @ (w * x)
        component = component_of(model, model.denoiser.module)
        values, before, after = {}, 0.0, 0.0
        for name, layer in readers.items():
            weight = layer.weight.detach().double()
            solved = solve(weight, gram, cross, self.ridge)
            values[f"{component}.{name}.weight"] = solved.to(layer.weight.dtype)
            before += mse(erased @ weight.T, wanted @ weight.T).item()
            after += mse(erased @ solved.T, wanted @ weight.T).item()
        for i in state.steps(1):
            yield Step(i, 1, {"before": before / len(readers), "after": after / len(readers)})
        return WeightEdit(values)


def differing(c: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions (m, d) where two encodings (b, n, d) differ: before the concept's word none do."""
    changed = (c - a).abs().amax(-1) > 0
    return c[changed], a[changed]


def share(x: Tensor) -> Tensor:
    """Return equal weights that sum to one (0 of them for no rows)."""
    return x.new_full((len(x),), 1 / max(1, len(x)))


def solve(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Return W* of Eq. 7 in float64; with float32 and an explicit inverse the residual is visible in pictures.

    Args:
        weight: W, (out, d).
        gram: sum c c^T, (d, d).
        cross: sum a c^T, (d, d), so that `W cross` is the sum over v c^T.
        ridge: lambda, relative to the mean eigenvalue of `gram`.
    """
    lam = ridge * gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(gram + lam * eye, weight @ (cross + lam * eye), left=False)
    return solved
