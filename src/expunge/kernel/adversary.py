"""The condition that training has changed most: who a preservation term must hold.

    c_a = argmax_c D(c),   D(c) = || e_theta(x_t, t, c) - e(x_t, t, c) ||^2                           (arXiv:2410.15618)

in the space that the term which holds c_a is measured in. One adversary a concept, each among that concept's own
candidates: by comparing all of them, by ascending the logits of a Gumbel-softmax over them, or by ascending from one of
them through the space of encodings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .condition import Condition
from .denoiser import Denoiser
from .descent import Descent
from .terms import Space, errors, scale

Search = Literal["exact", "gumbel", "pgd"]
TOGETHER = 32  # samples in one call of the network while candidates are compared


class Adversary(Protocol):
    """What the three searches have in common; all are `Stateful`.

    Attributes:
        index: of every concept, the candidate that is its adversary, or from which its adversary was reached.
    """

    index: list[int]

    def search(self, i: int, x_t: Tensor, t: Tensor) -> None:
        """Seek the adversary of concept i on latents (b, ...) at times (b,)."""

    def condition(self, i: int) -> Condition:
        """Return the adversary (1) of concept i; its nearest candidate, the first, before any search."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with a saved state."""


@torch.no_grad()
def changes(denoiser: Denoiser, x_t: Tensor, t: Tensor, c: Condition, space: Space = "native") -> Tensor:
    """Return D of every condition (m,), all on the same latents (b, ...): their differences are the conditions'."""
    b, found, weights = len(x_t), [], scale(denoiser, t, space)
    size = max(1, TOGETHER // b)
    for start in range(0, len(c), size):
        part = c[start : start + size]
        x, s = x_t.repeat(len(part), *(1,) * (x_t.ndim - 1)), t.repeat(len(part))
        each = part[torch.arange(len(part), device=x_t.device).repeat_interleave(b)]
        changed = errors(denoiser(x, s, each), denoiser.teacher(x, s, each)).view(-1, b)
        found.append((weights * changed).mean(1))
    return torch.cat(found)


def ascent(denoiser: Denoiser, x_t: Tensor, t: Tensor, c: Condition, space: Space = "native") -> Tensor:
    """Return the gradient of D by the tokens of one condition, (1, n, d).

    Trained and original network both depend on c, `dD/dc = 2 (J_theta - J)^T (e_theta - e) / size`, and share one
    module: the original's part is taken while its values are in place. The authors' code leaves that part out.
    """
    student = denoiser.student
    assert student is not None, "an adversary is sought while something is trained"
    with torch.no_grad():
        weights = scale(denoiser, t, space).to(x_t).view(-1, *(1,) * (x_t.ndim - 1))
        residual = 2 * weights * (denoiser(x_t, t, c) - denoiser.teacher(x_t, t, c)) / x_t.numel()

    def pulled() -> Tensor:
        tokens = c.tokens.detach().requires_grad_()
        out = denoiser(x_t, t, Condition(tokens, c.extra))
        return torch.autograd.grad(out, tokens, residual)[0]

    trained, live = pulled(), student.snapshot()
    student.load(student.original)
    try:
        return trained - pulled()
    finally:
        student.load(live)


class Exact:
    """Compares all candidates."""

    def __init__(self, denoiser: Denoiser, candidates: Sequence[Condition], space: Space) -> None:
        self.denoiser, self.candidates, self.index = denoiser, candidates, [0] * len(candidates)
        self.space = space

    def search(self, i: int, x_t: Tensor, t: Tensor) -> None:
        """See `Adversary`."""
        self.index[i] = int(changes(self.denoiser, x_t, t, self.candidates[i], self.space).argmax())

    def condition(self, i: int) -> Condition:
        """See `Adversary`."""
        return self.candidates[i][self.index[i] : self.index[i] + 1]

    def state_dict(self) -> dict[str, Any]:
        """Return the choices."""
        return {"index": list(self.index)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the choices."""
        self.index = list(state["index"])


class Gumbel:
    """Ascends logits over the candidates, one drawn word's gradient at a time (straight-through, arXiv:1611.01144).

    Args:
        denoiser: what is trained.
        candidates: of every concept.
        generator: of every draw, on the CPU.
        lr: Adam's learning rate for the logits.
        tau: temperature of the softmax.
        steps: ascent steps a search.
        space: of D.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        candidates: Sequence[Condition],
        generator: torch.Generator,
        *,
        lr: float,
        tau: float,
        steps: int,
        space: Space,
    ) -> None:
        self.denoiser, self.candidates, self.index = denoiser, candidates, [0] * len(candidates)
        self.generator, self.tau, self.steps, self.space = generator, tau, steps, space
        self.logits = {str(i): nn.Parameter(torch.zeros(len(c))) for i, c in enumerate(candidates)}
        self.opt = Descent(self.logits, lr)

    def search(self, i: int, x_t: Tensor, t: Tensor) -> None:
        """See `Adversary`."""
        own, logits = self.candidates[i], self.logits[str(i)]
        for _ in range(self.steps):
            noise = -torch.empty(len(own)).exponential_(generator=self.generator).log()
            share = ((logits + noise) / self.tau).softmax(0)
            self.index[i] = int(share.argmax())
            pull = ascent(self.denoiser, x_t, t, self.condition(i), self.space)
            # forward the word drawn, backward the mixture: dD/dlogits = dD/dc . dc/dshare . dshare/dlogits
            gain = own.tokens.flatten(1).float() @ pull.flatten().float()
            self.opt.step(adversary=-(share @ gain.to(share.device)))

    def condition(self, i: int) -> Condition:
        """See `Adversary`."""
        return self.candidates[i][self.index[i] : self.index[i] + 1]

    def state_dict(self) -> dict[str, Any]:
        """Return choices, logits and their moments."""
        logits = {name: p.detach().clone() for name, p in self.logits.items()}
        return {"index": list(self.index), "logits": logits, "descent": self.opt.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set choices, logits and their moments."""
        self.index = list(state["index"])
        for name, p in self.logits.items():
            p.copy_(state["logits"][name])
        self.opt.load_state_dict(state["descent"])


class Ascent:
    """Walks from a random candidate through the space of encodings, which holds more than words (projected gradient).

    Args:
        denoiser: what is trained.
        candidates: of every concept.
        generator: of every draw, on the CPU.
        lr: length of a step, relative to the encoding's norm; all steps of a search stay within their sum.
        steps: ascent steps a search.
        space: of D.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        candidates: Sequence[Condition],
        generator: torch.Generator,
        *,
        lr: float,
        steps: int,
        space: Space,
    ) -> None:
        self.denoiser, self.candidates, self.index = denoiser, candidates, [0] * len(candidates)
        self.generator, self.lr, self.steps, self.space = generator, lr, steps, space
        self.tokens = [c.tokens[:1] for c in candidates]

    def search(self, i: int, x_t: Tensor, t: Tensor) -> None:
        """See `Adversary`."""
        self.index[i] = j = int(torch.randint(len(self.candidates[i]), (1,), generator=self.generator))
        start = self.candidates[i].tokens[j : j + 1]
        self.tokens[i], length = start, self.lr * start.norm()
        for _ in range(self.steps):
            pull = ascent(self.denoiser, x_t, t, self.condition(i), self.space)
            # where training has changed nothing there is no direction
            self.tokens[i] = self.tokens[i] + length * pull / pull.norm().clamp(min=torch.finfo(pull.dtype).tiny)

    def condition(self, i: int) -> Condition:
        """See `Adversary`."""
        j = self.index[i]
        return Condition(self.tokens[i], self.candidates[i][j : j + 1].extra)

    def state_dict(self) -> dict[str, Any]:
        """Return where the ascents began and ended."""
        return {"index": list(self.index), "tokens": list(self.tokens)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set where the ascents began and ended."""
        self.index = list(state["index"])
        self.tokens = [v.to(c.tokens) for v, c in zip(state["tokens"], self.candidates, strict=True)]


def adversary(
    search: Search,
    denoiser: Denoiser,
    candidates: Sequence[Condition],
    generator: torch.Generator,
    *,
    lr: float,
    tau: float,
    steps: int,
    space: Space = "native",
) -> Adversary:
    """Return the adversary that searches in one of three ways; see `Exact`, `Gumbel`, `Ascent` for what each uses."""
    if search == "exact":
        return Exact(denoiser, candidates, space)
    if search == "gumbel":
        return Gumbel(denoiser, candidates, generator, lr=lr, tau=tau, steps=steps, space=space)
    return Ascent(denoiser, candidates, generator, lr=lr, steps=steps, space=space)
