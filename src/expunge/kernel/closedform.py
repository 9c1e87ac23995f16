"""Closed-form edits of linear layers: what an input is read as, rewritten for some inputs and held for others.

    W* = argmin sum_i w_i || W* x_i - W y_i ||^2 + lambda || W* - W ||^2
       = W (sum_i w_i y_i x_i^T + lambda I) (sum_i w_i x_i x_i^T + lambda I)^-1

An input x_i is read as y_i was; y_i = x_i holds it. Everything is in float64 and solved, not inverted: with float32 and
an explicit inverse the residual is visible in pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Rewrite:
    """All that the solution needs to know of the pairs (x_i, y_i), however many there are.

    Attributes:
        gram: sum w x x^T, (d, d).
        cross: sum w y x^T, (d, d).
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross = torch.zeros_like(self.gram)

    def add(self, x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """Read the rows of x (m, d) as those of y; together they weigh `weight`, however many."""
        x, y = x.double(), y.double()
        share = weight / max(1, len(x))
        self.gram = self.gram + share * x.T @ x
        self.cross = self.cross + share * y.T @ x

    def solve(self, weight: Tensor, ridge: float) -> Tensor:
        """Return W* (out, d) in float64 for a layer's W; see `solve`."""
        return solve(weight.double(), self.gram, self.cross, ridge)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        return {"gram": self.gram, "cross": self.cross}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved sums."""
        self.gram, self.cross = (state[k].to(self.gram.device) for k in ("gram", "cross"))


def renamed(table: Tensor, x: Tensor, y: Tensor, keep: Tensor, preserve: float, ridge: float) -> Tensor:
    """Return `Rewrite`'s solution for a table of vectors, a layer whose inputs are one-hot: a mean, row by row.

    Args:
        table: vectors (v, d).
        x: rows (m,) to be read as others; together they weigh 1.
        y: the others (m,).
        keep: rows (k,) to be read as themselves.
        preserve: what those weigh together.
        ridge: lambda, relative to the mean weight of a row.
    """
    goals, weights = table.double(), table.new_zeros(len(table), dtype=torch.float64)
    total = torch.zeros_like(goals)
    for rows, wanted, share in ((x, y, 1.0), (keep, keep, preserve)):
        each = weights.new_full((len(rows),), share / max(1, len(rows)))
        weights = weights.index_add(0, rows, each)
        total = total.index_add(0, rows, each[:, None] * goals[wanted])
    lam = ridge * weights.mean()
    # a row that nobody asks about is not to change in its last bits
    asked = torch.zeros_like(weights, dtype=torch.bool).index_fill(0, x, True)
    found = (total + lam * goals) / (weights + lam)[:, None]
    return torch.where(asked[:, None], found, goals).to(table.dtype)


def solve(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Return W* (out, d).

    Args:
        weight: W, (out, d).
        gram: sum w x x^T, (d, d).
        cross: sum w y x^T, (d, d).
        ridge: lambda, relative to the mean eigenvalue of `gram`.
    """
    lam = ridge * gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(gram + lam * eye, weight @ (cross + lam * eye), left=False)
    return solved


def restricted(weight: Tensor, x: Tensor, y: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """Return the update Delta (out, d), with rows in the span of a basis, that makes W read x as y.

    Delta = argmin mean_i || (W + Delta) x_i - W y_i ||^2 + lambda || Delta ||^2

    Args:
        weight: W, (out, d).
        x: inputs (m, d).
        y: what they shall be read as (m, d).
        basis: orthonormal columns (d, q).
        ridge: lambda, relative to the mean eigenvalue of mean x x^T.
    """
    lam = ridge * x.square().mean()
    seen = x @ basis
    gram = seen.T @ seen / len(x) + lam * torch.eye(basis.shape[1], dtype=x.dtype, device=x.device)
    z: Tensor = torch.linalg.solve(gram, weight @ (y - x).T @ seen / len(x), left=False)
    return z @ basis.T


def null_space(moment: Tensor, threshold: Tensor, without: Tensor) -> Tensor:
    """Return an orthonormal basis (d, q) of where a second moment has little, orthogonal to some vectors exactly.

    Args:
        moment: second moment (d, d) of what shall not be touched.
        threshold: eigenvalues up to it count as none.
        without: vectors (s, d) to which the basis is orthogonal.
    """
    values, vectors = torch.linalg.eigh(moment)
    basis = vectors[:, values <= threshold]
    u, s, _ = torch.linalg.svd(basis.T @ without.T)
    rank = int((s > 1e-9 * without.norm()).sum())
    left: Tensor = basis @ u[:, rank:]
    return left


def matched(c: Tensor, a: Tensor, long: Sequence[int], short: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pair the tokens of prompts with those of the same prompts that differ in one word, or lack it.

    Args:
        c: encodings (b, n, d).
        a: encodings (b, n, d), row for row of the same prompts otherwise.
        long: tokens of each prompt of c, (b,).
        short: tokens of each prompt of a, (b,).

    Returns:
        The rows of c that differ, (m, d), and the rows of a that they correspond to.
    """
    goal = counterparts(c, a, long, short)[0]
    goal = a.gather(1, goal[..., None].expand_as(c))
    changed = (c - goal).abs().amax(-1) > 0
    return c[changed], goal[changed]


def counterparts(c: Tensor, a: Tensor, long: Sequence[int], short: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return which token of a prompt of `a` each token of one of `c` corresponds to, and where the two begin to differ.

    Before the word both are the same. Behind it a comma meets the comma, whatever the two words' lengths. Words are
    aligned at their last tokens: surplus ones of the longer meet the other's first, or stay alone. Padding meets the
    padding of its own place: a text encoder tells places apart, and may use them.

    Args:
        c: states or encodings (b, n, d), see `matched`.
        a: likewise.
        long: likewise.
        short: likewise.

    Returns:
        Indices (b, n) into the tokens of `a`, and whether a token is behind the first difference, (b, n).
    """
    n = c.shape[1]
    place = torch.arange(n, device=c.device)
    first = ((c - a).abs().amax(-1) == 0).cumprod(1).sum(1, keepdim=True)
    ends, others = (torch.tensor(list(x), device=c.device)[:, None] for x in (long, short))
    index = (place - (ends - others)).clamp(max=n - 1).maximum(first).clamp(max=n - 1)
    index = torch.where(place < ends, index, place.maximum(others - 1).clamp(max=n - 1))
    return torch.where(place < first, place, index), place >= first


def fitted(pairs: Sequence[tuple[Tensor, Tensor, float]], ridge: float) -> Tensor:
    """Return the least-squares map Delta (out, d) in float64.

    Delta = argmin sum_j w_j mean_i || Delta x_ji - y_ji ||^2 + lambda || Delta ||^2

    Args:
        pairs: inputs x_j (m, d), outputs y_j (m, out) and weight w_j of each group.
        ridge: lambda, relative to the mean eigenvalue of sum_j w_j mean_i x x^T.
    """
    gram = torch.stack([(w / max(1, len(x)) * (x.T @ x)).double() for x, _, w in pairs]).sum(0)
    cross = torch.stack([(w / max(1, len(x)) * (y.T @ x)).double() for x, y, w in pairs]).sum(0)
    lam = ridge * gram.diagonal().mean()
    delta: Tensor = torch.linalg.solve(gram + lam * torch.eye(len(gram)).to(gram), cross, left=False)
    return delta
