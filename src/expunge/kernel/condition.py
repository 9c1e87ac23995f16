"""What a denoiser is conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """A batch of conditions.

    Attributes:
        tokens: prompt encodings, shape (b, n, d).
        extra: further tensors with the same first axis, by the name the network knows them by (SDXL: pooled text,
            sizes).
    """

    tokens: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Tensor | slice) -> Condition:
        return Condition(self.tokens[index], {k: v[index] for k, v in self.extra.items()})

    def batch(self, n: int) -> Condition:
        """Repeat a single condition n times; a batch of n is returned as it is."""
        if len(self) == n:
            return self
        if len(self) != 1:
            raise ValueError(f"cannot make {len(self)} conditions into a batch of {n}: give 1 or {n}")
        return Condition(self.tokens.expand(n, -1, -1), {k: v.expand(n, *v.shape[1:]) for k, v in self.extra.items()})

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Join batches along the first axis."""
        return Condition(
            torch.cat([p.tokens for p in parts]),
            {k: torch.cat([p.extra[k] for p in parts]) for k in parts[0].extra},
        )
