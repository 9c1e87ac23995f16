"""Top-k sparse autoencoders of a residual stream, and the ablation of some of their features.

    z = ReLU(TopK(W (x - b)))      xhat = D^T z + b                                  (arXiv:2406.04093, section 2.3)
    L = |x - xhat|^2 / var x  +  1/32 |e - ehat|^2 / |e|^2      e = x - xhat         (appendix A.2, "AuxK")

ehat is what the strongest dead features alone, those that have not fired for long, make of the error: the only gradient
that reaches them. Rows of D have length one, else the penalty-free scale of z would be arbitrary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .descent import Descent
from .state import State, Step

REVIVE = 1 / 32  # weight of AuxK


class SAE(nn.Module):
    """A top-k sparse autoencoder of states d wide.

    Attributes:
        encoder: W, (n, d); starts as D, which is what keeps most features alive.
        decoder: D, (n, d), rows of length one.
        bias: b, (d,); set it to `geometric_median` of some states before training.
        idle: updates since each feature last fired, (n,).
        k: active features a state.
    """

    idle: Tensor

    def __init__(self, width: int, features: int, k: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.k = min(k, features)
        self.decoder = nn.Parameter(F.normalize(torch.randn(features, width, generator=generator), dim=1))
        self.encoder = nn.Parameter(self.decoder.detach().clone())
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("idle", torch.zeros(features, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of states (..., d)."""
        return mixed(*active(x, self.encoder, self.bias, self.k), self.decoder) + self.bias

    def losses(self, x: Tensor, patience: int) -> dict[str, Tensor]:
        """Return the loss terms on states (m, d): "error" and, while features are dead, "revive".

        Args:
            x: states; at least two, or there is no variance to measure the error by.
            patience: updates without firing after which a feature counts as dead.
        """
        values, index = active(x, self.encoder, self.bias, self.k)
        error = x - self.bias - mixed(values, index, self.decoder)
        terms = {"error": error.square().mean() / (x - x.mean(0)).square().mean()}
        self.idle += 1
        self.idle[index[values > 0]] = 0
        dead = (self.idle > patience).nonzero()[:, 0]
        if len(dead):
            # about half as many as the states are wide (appendix A.2)
            values, index = active(x, self.encoder[dead], self.bias, max(1, x.shape[1] // 2))
            wanted = error.detach()
            missed = (wanted - mixed(values, index, self.decoder[dead])).square().mean()
            terms["revive"] = REVIVE * missed / wanted.square().mean().clamp_min(torch.finfo(wanted.dtype).tiny)
        return terms

    @torch.no_grad()
    def normalise(self) -> None:
        """Give the rows of D length one again."""
        self.decoder.copy_(F.normalize(self.decoder, dim=1))


def active(x: Tensor, encoder: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return values and indices of the k strongest features of states (..., d), both (..., k)."""
    values, index = F.linear(x - bias, encoder).topk(min(k, len(encoder)), dim=-1)
    return values.relu(), index


def mixed(values: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Return sums of rows (n, d) at `index` weighted by `values`, both (..., k): k rows are read, not n."""
    flat = index.reshape(-1, index.shape[-1])
    out = F.embedding_bag(flat, rows, per_sample_weights=values.reshape(flat.shape), mode="sum")
    return out.view(*index.shape[:-1], -1)


def geometric_median(x: Tensor, rounds: int = 50) -> Tensor:
    """Return the point of least summed distance to states (m, d), by Weiszfeld's iteration.

    A mean would be drawn towards the few states that are many times longer than the rest.
    """
    median = x.mean(0)
    for _ in range(rounds):
        weight = 1 / (x - median).norm(dim=1).clamp_min(1e-8)
        median = (weight[:, None] * x).sum(0) / weight.sum()
    return median


def train(
    saes: Mapping[str, SAE],
    draw: Callable[[], Mapping[str, Tensor]],
    state: State,
    *,
    steps: int,
    lr: float,
    patience: int,
) -> Generator[Step, None, None]:
    """Train autoencoders side by side; yield a Step an update, with each term's mean over them and the share of dead.

    Args:
        saes: one a text encoder; they are trained in place.
        draw: gives states (m, d) by the same names.
        state: of the training, so that it can be resumed.
        steps: optimiser updates.
        lr: Adam's learning rate.
        patience: updates without firing after which a feature counts as dead.
    """
    net = state.keep("sae", nn.ModuleDict(saes))
    opt = state.keep("descent", Descent(dict(net.named_parameters()), lr))
    # only the part of a gradient along the sphere: `normalise` undoes the rest, but Adam's moments would keep it
    hooks = [
        s.decoder.register_hook(lambda g, d=s.decoder: g - (g * d).sum(1, keepdim=True) * d)  # type: ignore[no-untyped-call]
        for s in saes.values()
    ]
    try:
        for i in state.steps(steps):
            terms: dict[str, Tensor] = {}
            for name, x in draw().items():
                for term, value in saes[name].losses(x, patience).items():
                    terms[term] = terms.get(term, torch.zeros_like(value)) + value / len(saes)
            figures = opt.step(**terms)
            for sae in saes.values():
                sae.normalise()
            dead = torch.stack([(s.idle > patience).float().mean() for s in saes.values()]).mean().item()
            yield Step(i, steps, {**figures, "dead": dead})
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Ablation:
    """Features of an autoencoder multiplied by a number in the prompts that show enough of them.

        h' = h + sum_f (scale - 1) z_f d_f   over the chosen features f

    The reconstruction's error stays in h', so that choosing no feature changes nothing. A prompt whose change, its mean
    square over tokens and width, does not exceed the threshold is not touched at all: its states are the same tensor.

    Attributes:
        encoder: W, (n, d).
        bias: b, (d,).
        features: the chosen ones, (m,).
        decoder: their rows of D, (m, d).
        k: active features a state.
        layer: index of the layer whose output it changes.
        scale: 0 removes a feature, a negative number turns it around.
        threshold: of the mean square change.
        first: first token that is changed and counted; what is before is the same in every prompt.
    """

    encoder: Tensor
    bias: Tensor
    features: Tensor
    decoder: Tensor
    k: int
    layer: int
    scale: float
    threshold: float
    first: int

    def change(self, h: Tensor) -> Tensor:
        """Return h' - h of states (b, t, d), in float32, before any threshold."""
        x = h[:, self.first :].float()
        delta = torch.zeros_like(h, dtype=torch.float32)
        if len(self.features):
            values, index = active(x, self.encoder, self.bias, self.k)
            slot = torch.full((len(self.encoder),), -1, device=h.device)
            slot[self.features] = torch.arange(len(self.features), device=h.device)
            row = slot[index]
            delta[:, self.first :] = mixed((self.scale - 1) * values * (row >= 0), row.clamp_min(0), self.decoder)
        return delta

    def strength(self, change: Tensor) -> Tensor:
        """Return the mean square of a change (b, t, d) by prompt, (b,): what the threshold is compared with."""
        return change[:, self.first :].square().mean((1, 2))

    def __call__(self, h: Tensor) -> Tensor | None:
        """Return h' (b, t, d), or None where no prompt is changed."""
        change = self.change(h)
        hit = self.strength(change) > self.threshold
        if not bool(hit.any()):
            return None
        return h.index_put((hit,), h[hit] + change[hit].to(h.dtype))

    def to(self, device: torch.device) -> Ablation:
        """Return the same ablation on a device."""
        encoder, bias, features, decoder = (
            t.to(device) for t in (self.encoder, self.bias, self.features, self.decoder)
        )
        return replace(self, encoder=encoder, bias=bias, features=features, decoder=decoder)


@contextmanager
def hooked(layer: nn.Module, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Pass a layer's output through a function; None leaves it as it is."""
    # before every other hook: the states that SDXL reads are recorded by hooks of transformers' own
    handle = layer.register_forward_hook(lambda _, __, out: function(out), prepend=True)
    try:
        yield
    finally:
        handle.remove()
