"""Low-rank updates that are open to some prompts only, and the gate that reads a prompt's encoding.

    y = W x + sum_k gamma_k(p) up_k(down_k(x))                                  (SPM, arXiv:2312.16145: membranes)
    gamma(p) = clip((s(p) - closed) / (open - closed), 0, 1),   s(p) = max_j max_r cos(p_j, r)

with p_j the tokens of a prompt's encoding and r the concept's telling tokens: those of its prompts that nothing neutral
resembles. What scores no more than neutral prompts do passes with a gate of exactly zero, and so unchanged bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConceptError, Unsupported
from .lowrank import through

SLACK = 1e-3  # in cosine: what rounding may add to a neutral prompt's score in another batch

Factors = Mapping[str, tuple[Tensor, Tensor]]
T = TypeVar("T", bound=Tensor)


@dataclass(frozen=True)
class Gate:
    """The permeability of one membrane.

    Attributes:
        tokens: the telling tokens r, of length one, (m, d).
        closed: scores up to this one close it; halfway from here to a perfect match it is fully open.
    """

    tokens: Tensor
    closed: float

    def score(self, c: Tensor) -> Tensor:
        """Return s (b,), at most 1, of encodings (b, n, d)."""
        return (F.normalize(c.float(), dim=-1) @ self.tokens.to(c.device).T).amax((1, 2))

    def __call__(self, c: Tensor) -> Tensor:
        """Return gamma (b,) in [0, 1] of encodings (b, n, d)."""
        return ((self.score(c) - self.closed) / ((1 - self.closed) / 2)).clamp(0, 1)

    @classmethod
    def between(cls, c: Tensor, neutral: Tensor) -> Gate:
        """Return the gate that is open to prompts of a concept and closed to neutral ones.

        Args:
            c: encodings of the concept's prompts (b, n, d).
            neutral: encodings of prompts that shall pass (m, n, d); the concept's own without its word are among them.

        Raises:
            ConceptError: no token of the concept's prompts stands out from the neutral ones.
        """
        others = F.normalize(neutral.float(), dim=-1).flatten(0, 1)
        telling, likeness = [], []
        for prompt in F.normalize(c.float(), dim=-1):
            alike = (prompt @ others.T).amax(1).masked_fill(prompt.norm(dim=-1) == 0, torch.inf)
            telling.append(prompt[alike.argmin()])
            likeness.append(alike.min())
        alike = torch.stack(likeness)
        # a prompt that loses its word, where the encoder's window ends, has nothing to tell
        tells = alike < 1 - 2 * SLACK
        if not bool(tells.any()):
            raise ConceptError(
                "the model's text encoder reads the concept's prompts as it reads those to retain, so no gate can tell "
                "them apart. Give another name or synonyms, or keep less."
            )
        return cls(torch.stack(telling)[tells].contiguous(), float(alike[tells].max()) + SLACK)


class Membranes:
    """K rank-one updates of each of many layers, added by forward hooks, each with its own gate for every sample.

    The gate is linear: it weighs an update once. Updates meet in the sum only, no membrane's down another's up.

    Args:
        module: the network.
        factors: matrix -> (down (K, in, ...), up (out, K, ...)).
        gates: K of them; they read the encoding that the network is called with.

    Attributes:
        rows: the gates of the present call, (b, K); None where all are closed.
    """

    def __init__(self, module: nn.Module, factors: Factors, gates: Sequence[Gate]) -> None:
        self.factors, self.gates = factors, gates
        self.width = gates[0].tokens.shape[1]
        self.rows: Tensor | None = None
        self.told = False
        layers = dict(module.named_modules())
        self.handles = [layers[n.rpartition(".")[0]].register_forward_hook(self.hook(n)) for n in factors]
        self.handles.append(module.register_forward_pre_hook(self.read, with_kwargs=True))

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the network: set every sample's gates by its prompt."""
        if self.told:
            return
        given = (*args, *kwargs.values())
        found = [v for v in given if isinstance(v, Tensor) and v.ndim == 3 and v.shape[-1] == self.width]
        if len(found) != 1:
            raise Unsupported(
                f"a membrane's gate must see the prompts' encodings (b, tokens, {self.width}), and {len(found)} "
                f"inputs of {type(module).__name__} look like it. Such an edit needs a network that is called with one."
            )
        self.set(torch.stack([gate(found[0]) for gate in self.gates], 1))

    def set(self, gate: Tensor | None) -> None:
        """Weigh the membranes by (b, K) in the next calls; all zeros, or None, leave the network as it is."""
        self.rows = gate if gate is not None and bool(gate.any()) else None

    @contextmanager
    def under(self, gate: Tensor | None) -> Iterator[None]:
        """Weigh the membranes by (b, K) whatever the prompts say; None closes all."""
        self.told = True
        self.set(gate)
        try:
            yield
        finally:
            self.told = False
            self.rows = None

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        """Return the forward hook of a layer."""
        down, up = self.factors[name]

        def add(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            if self.rows is None:
                return None
            return out + through(layer, args[0], down, up, self.rows.to(down.dtype)).to(out.dtype)

        return add

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the live values."""
        return {k: w.detach().clone() for k, w in named(self.factors).items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the live values."""
        for k, w in named(self.factors).items():
            w.copy_(state[k])


def named(factors: Mapping[str, tuple[T, T]]) -> dict[str, T]:
    """Return factors one by one, as `matrix.down` and `matrix.up`."""
    return {f"{n}.{k}": w for n, pair in factors.items() for k, w in zip(("down", "up"), pair, strict=True)}


def planted(
    module: nn.Module, names: Sequence[str], count: int, generator: torch.Generator
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Return trainable (down, up) of `count` membranes for every matrix among `names`; up is zero, vectors stay out."""
    layers = dict(module.named_modules())
    found = {}
    for name in names:
        layer = layers[name.rpartition(".")[0]]
        if name.endswith(".weight") and isinstance(layer, nn.Linear | nn.Conv2d):
            w = layer.weight
            down = torch.randn(count, *w.shape[1:], generator=generator) / w[0].numel() ** 0.5
            up = torch.zeros(w.shape[0], count, *(1,) * (w.ndim - 2), device=w.device)
            found[name] = (nn.Parameter(down.to(w.device)), nn.Parameter(up))
    return found
