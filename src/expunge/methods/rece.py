"""RECE - reliable and efficient concept erasure.

After a closed-form edit other encodings still produce the concept. RECE finds them, in closed form as well, erases them
too, and repeats.

    W* = argmin sum_i || W* c_i - W a_i ||^2 + lambda_2 sum_k || W* k - W k ||^2 + lambda_1 || W* - W ||^2  (Eq. 3)
    c' = argmin sum_W || W* c' - W c ||^2 + lambda || c' ||^2
       = (sum_W W*^T W* + lambda I)^-1 (sum_W W*^T W) c
    erase c' -> a as well, and so on

The sums over W run over every text reader at once: c' must fool all of them. The shorter c', the less its erasure takes
from other concepts, which is what lambda is for.

Differs     Authors' code: each round starts from the weights of the last and erases c' alone, so that what was erased
            before may come back; its goal a is read by weights already edited, and it also moves the start token, which
            every prompt shares. Here a round adds its c', and what is kept once more, to one sum over all rounds; goals
            are read by the original weights, and only tokens that the concept's word changes are erased. lambda and
            lambda_1 are absolute there (0.1 or less), here relative to the mean eigenvalue of what they are added to:
            0.1 of that shortens c' until it points away from the concept.
Notation    W: a text reader · W*: edited · c: token encoding of the concept · a: of the anchor's prompt · k: kept
Erases      objects, styles, names, nudity; many at once in seconds, though here ten are hardly erased (docs/bench.md)
Limits      every round takes more from what is near the concept: kept concepts must be listed (or the world supplies
            them); what still produces the concept is sought in token encodings, not in prompts that people can write
Reference   Gong et al., Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models, ECCV 2024.
            arXiv:2407.12383
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from ..concept import Targets
from ..edits import Edit, WeightEdit
from ..kernel.closedform import Rewrite
from ..kernel.descent import mse
from ..kernel.model import Model
from ..kernel.state import State, Step
from ..papers import Paper
from .base import Anchorless, Needs, kept, readers, readings


class Start:
    """Puts a resumed fit's generator back to where it was before a sample was drawn: every round is of the same one."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.start = generator, generator.get_state()

    def state_dict(self) -> dict[str, Any]:
        """Return where the generator was."""
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back there."""
        self.start = state["start"]
        self.generator.set_state(self.start)


@dataclass(frozen=True, kw_only=True)
class RECE:
    """Reliable and efficient concept erasure; the module's docstring has the equations."""

    anchorless: Annotated[Anchorless, "what prompts become without an anchor: blank, or the paper's empty"] = "blank"
    rounds: Annotated[int, Ge(0), Le(100), "how often new encodings are derived and erased; 0 is UCE"] = 3
    shrink: Annotated[float, Gt(0), Le(1e6), "lambda: pull of derived encodings towards zero"] = 1e-3
    ridge: Annotated[float, Gt(0), Le(1e6), "lambda_1: pull towards the original weights"] = 0.01
    preserve: Annotated[float, Ge(0), Le(1e6), "lambda_2: weight of the kept concepts against the erased ones"] = 10.0
    sample: Annotated[int, Ge(1), Le(100_000), "erased prompts, and as many kept ones, to look at"] = 512

    family: ClassVar[str] = "closed form"
    paper: ClassVar[Paper] = Paper(
        "gong2024reliable",
        "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models",
        "Gong, Chao and Chen, Kai and Wei, Zhipeng and Chen, Jingjing and Jiang, Yu-Gang",
        2024,
        "European Conference on Computer Vision",
        "2407.12383",
    )
    needs: ClassVar[Needs] = Needs(text=True)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Erase, then find what is left and erase that; yields a Step a round, returns the edit."""
        state.keep("start", Start(state.generator))
        x, y = readings(model, targets, self.anchorless, self.sample, state.generator)
        keep, layers = kept(model, targets, self.sample), readers(model)
        weights = [w.detach().double() for w in layers.values()]
        rewrite = state.keep("rewrite", Rewrite(x.shape[1], x.device))

        def made() -> WeightEdit:
            return WeightEdit({name: rewrite.solve(w.detach(), self.ridge).to(w.dtype) for name, w in layers.items()})

        # no weight of the model changes before the end
        state.applied = lambda: made().on(model)
        for i in state.steps(1 + self.rounds):
            edited = [rewrite.solve(w, self.ridge) for w in weights] if i else weights
            still = derived(weights, edited, x, self.shrink) if i else x
            # how far the best encoding stays from what the concept was read as: grows from round to round
            missed = sum(mse(still @ w.T, x @ old.T).item() for w, old in zip(edited, weights, strict=True))
            rewrite.add(still, y)
            if keep is not None:
                # as often as anything is erased, or every round would weigh less on what is kept
                rewrite.add(keep.tokens.flatten(0, 1), keep.tokens.flatten(0, 1), self.preserve)
            yield Step(i, 1 + self.rounds, {"missed": missed / len(weights)})
        return made()


def derived(weights: Iterable[Tensor], edited: Iterable[Tensor], c: Tensor, shrink: float) -> Tensor:
    """Return the encodings c' (m, d) that edited weights read most nearly as the original weights read c (m, d).

    Args:
        weights: W of every reader, (out, d).
        edited: W* of every reader.
        c: encodings.
        shrink: lambda, relative to the mean eigenvalue of sum W*^T W*.
    """
    pairs = list(zip(edited, weights, strict=True))
    gram = sum((new.T @ new for new, _ in pairs), torch.zeros_like(pairs[0][0].T @ pairs[0][0]))
    cross = sum((new.T @ old for new, old in pairs), torch.zeros_like(gram))
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    found: Tensor = torch.linalg.solve(gram + shrink * gram.diagonal().mean() * eye, cross @ c.T).T
    return found
