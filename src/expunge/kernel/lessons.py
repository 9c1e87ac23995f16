"""What methods that learn from pictures are taught: pictures to forget and to retain, with what each shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..concept import Pictures, Targets
from .condition import Condition
from .model import Model
from .neighbours import encoded
from .pool import Pool
from .state import State


class Lessons:
    """Pictures to forget and pictures to retain, with the conditions that describe them.

    For methods that declare `Needs(images=True, retained=True)`.

    Args:
        model: the model.
        targets: with the pictures that the door has given them.
        state: of the fit.
        batch: pictures a draw.

    Attributes:
        forget, retain: pools of pictures; the `k` of what they draw are rows of `c` and of `r`.
        c: conditions of the pictures to forget, one row each distinct description.
        r: conditions of the pictures to retain.
    """

    def __init__(self, model: Model, targets: Sequence[Targets], state: State, batch: int) -> None:
        shown = [(target, target.pictures) for target in targets if target.pictures is not None]
        said = [pair for target, found in shown for pair in _paired(target, found.prompts)]
        kept = [found for target in targets if (found := target.retained) is not None]
        told = [p for found in kept for p in found.prompts]
        pairs, prompts = list(dict.fromkeys(said)), list(dict.fromkeys(told))
        self.c, self.r = encoded(model, [p for p, _ in pairs]), encoded(model, prompts)
        self.anchored = torch.tensor([bool(anchor) for _, anchor in pairs], device=model.device)
        self.others = Condition.cat([encoded(model, [anchor or p for p, anchor in pairs]), self.r])
        self.generator = state.generator

        def pool(pictures: Sequence[Pictures], rows: list[int]) -> Pool:
            z = torch.cat([found.latents for found in pictures]).to(self.c.tokens)
            return Pool(model.denoiser, z, torch.tensor(rows, device=z.device), state, batch)

        row, line = {pair: i for i, pair in enumerate(pairs)}, {p: i for i, p in enumerate(prompts)}
        self.forget = state.keep("forget", pool([found for _, found in shown], [row[pair] for pair in said]))
        self.retain = state.keep("retain", pool(kept, [line[p] for p in told]))

    def instead(self, k: Tensor) -> Condition:
        """Return what stands in for rows k (b,) of `c`: the anchor's prompt, or that of a random retained picture."""
        random = len(self.c) + torch.randint(len(self.r), (len(k),), generator=self.generator).to(k.device)
        return self.others[torch.where(self.anchored[k], k, random)]


def _paired(target: Targets, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """Pair what pictures show with the same about the anchor ("" without one)."""
    anchors = dict(zip(target.prompts, target.anchors, strict=True))
    return [(p, anchors.get(p, target.concept.anchor)) for p in prompts]
