"""Which weights to train: those that a score singles out.

SalUn and ANT train where the gradient of forgetting is largest, SaRA where the weights themselves are smallest, SSD
dampens where one diagonal Fisher information exceeds another. Masks are dictionaries over the same names as the
weights; `Descent(mask=...)` holds whatever is masked out, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import Diverged, SettingError
from .denoiser import Denoiser
from .descent import RELATIVE, Descent, Rate, Weights, rate
from .state import State
from .student import Student


def top(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Return 0/1 masks with exactly `round(density * total)` ones, at the largest scores of all tensors together.

    Equal scores are taken in the order of the names, then of the positions, so that the same scores always give the
    same mask.

    Args:
        scores: name -> score of every weight, any shapes; infinity is allowed.
        density: share of ones, 0 to 1.

    Returns:
        Name -> float mask of the score's shape.

    Raises:
        Diverged: a score is NaN.
    """
    flat = torch.cat([s.flatten() for s in scores.values()])
    if bool(flat.isnan().any()):
        raise Diverged("a score that selects weights is NaN. Lower lr, or look at the model's dtype.", 0)
    k = round(density * len(flat))
    if k == 0:
        return {name: torch.zeros_like(s, dtype=torch.float32) for name, s in scores.items()}
    bar = flat.kthvalue(len(flat) - k + 1).values
    spare = k - int((flat > bar).sum())
    masks = {}
    for name, s in scores.items():
        tied = (s == bar).flatten()
        tied &= tied.cumsum(0) <= spare
        spare -= int(tied.sum())
        masks[name] = ((s > bar) | tied.view_as(s)).float()
    return masks


def gradient(loss: Tensor, weights: Weights) -> dict[str, Tensor]:
    """Return the gradient of a loss by weight, zeros where a weight does not enter it; `.grad` is left alone.

    Raises:
        ValueError: nothing that is trained enters the loss.
    """
    if not loss.requires_grad:
        raise ValueError("the loss has no gradient: nothing that is trained enters it")
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(weights, found, strict=True))


class MeanGradient:
    """Running mean over draws of a loss' gradient, or of the gradient's square: a diagonal Fisher information.

    One draw of time and noise says little about a weight, so pictures are drawn several times. A Fisher information
    takes draws of one sample: the square of a batch's mean gradient would depend on the batch's size.

    Args:
        weights: name -> parameter; must not move between draws.
        square: square each draw's gradient before the mean is taken.

    Attributes:
        mean: name -> mean so far, float32, shape of the weight.
    """

    def __init__(self, weights: Weights, *, square: bool = False) -> None:
        self.weights, self.square, self.n = dict(weights), square, 0
        self.mean = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}

    def add(self, loss: Tensor) -> float:
        """Take one more draw into the mean; return the loss' value."""
        self.n += 1
        for name, g in gradient(loss, self.weights).items():
            value = g.float().square() if self.square else g.float()
            self.mean[name] += (value - self.mean[name]) / self.n
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        """Return mean and count."""
        return {"n": self.n, "mean": dict(self.mean)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved mean."""
        self.n = state["n"]
        self.mean = {name: state["mean"][name].to(w.device) for name, w in self.weights.items()}


@torch.no_grad()
def shrink(student: Student, share: float) -> None:
    """Soft-threshold how far each weight has moved: `theta_o + S(theta - theta_o)`.

    S subtracts a threshold from every size and stops at zero (SalUn's proximal step, arXiv:2310.12508); the threshold
    is the size that a `share` (0 to 1) of all moves does not exceed, so that this share returns to its original, bit
    for bit.
    """
    moves = {name: w - student.original[name] for name, w in student.weights.items()}
    sizes = torch.cat([d.abs().flatten() for d in moves.values()])
    if (k := round(share * len(sizes))) == 0:
        return
    threshold = sizes.kthvalue(k).values
    for name, d in moves.items():
        kept = d.sign() * (d.abs() - threshold).clamp(min=0)
        student.weights[name].copy_(student.original[name] + kept)


def smallest(values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return 0/1 masks of the weights of smallest magnitude: `share` (0 to 1) of each tensor.

    Of each tensor, because layers differ in scale: one threshold for all takes most of some and nothing of others.
    """
    return {name: top({name: -v.abs()}, share)[name] for name, v in values.items()}


class Smallest:
    """SaRA's selection (arXiv:2409.06633): only the smallest weights of each tensor are trained.

    Halfway, weights that have outgrown the bound under which they were chosen keep their value and are trained no
    further (progressive adjustment); the optimiser's moments begin anew, since they would move what is masked out.

    Args:
        original: name -> value before training of every weight that is trained.
        opt: the optimiser of these weights.
        share: share of each tensor that is trained; 0 selects nothing and trains everything.
        steps: updates in all.
    """

    def __init__(self, original: Mapping[str, Tensor], opt: Descent, share: float, steps: int) -> None:
        self.opt, self.half = opt, steps // 2
        self.bounds: dict[str, Tensor] = {}
        if share:
            opt.mask = smallest(original, share)
            self.bounds = {n: (original[n].abs() * m).amax() for n, m in opt.mask.items()}

    def salient(self, scores: Mapping[str, Tensor], density: float) -> None:
        """Keep of what is selected (of everything, if nothing is) the share `density` with the largest scores."""
        if mask := self.opt.mask:
            density *= sum(int(m.count_nonzero()) for m in mask.values()) / sum(m.numel() for m in mask.values())
            scores = {n: s.masked_fill(mask[n] == 0, -torch.inf) for n, s in scores.items()}
        self.opt.mask = top(scores, density)

    @torch.no_grad()
    def after(self, i: int) -> None:
        """Adjust the selection after update `i` (from 0), if that was half of all."""
        if not self.bounds or not self.opt.mask or i + 1 != self.half:
            return
        inside = {n: (w.abs() <= self.bounds[n]).float() for n, w in self.opt.weights.items()}
        self.opt.mask = {n: m * inside[n] for n, m in self.opt.mask.items()}
        self.opt.adam.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the masks; one byte a weight."""
        return {n: m.bool() for n, m in (self.opt.mask or {}).items()} if self.bounds else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with saved masks."""
        if self.bounds:
            self.opt.mask = {n: state[n].to(w.device).float() for n, w in self.opt.weights.items()}


def unlocked(
    denoiser: Denoiser,
    state: State,
    group: str,
    lr: Rate,
    steps: int,
    share: float = 0.0,
    rank: int = 0,
    *,
    relative: float = RELATIVE,
    clip: float = 0.0,
) -> tuple[Student, Descent, Smallest]:
    """Make a group trainable; return it, its optimiser and SaRA's selection, all registered with the fit's state.

    Args:
        denoiser: the network.
        state: of the fit.
        group: name of the weights.
        lr: learning rate, or "auto"; see `rate`.
        steps: updates in all.
        share: of each tensor that is trained, the smallest weights; 0 trains everything.
        rank: 0 for the weights themselves, else of a low-rank update.
        relative: what "auto" is, in units of the weights' root mean square.
        clip: largest norm of the gradient; 0 for no limit.

    Raises:
        SettingError: low-rank factors are trained, which have no smallest weights.
    """
    if share and rank:
        raise SettingError(f"smallest={share:g} chooses among the weights themselves, so rank must be 0.")
    student = state.keep("student", denoiser.unlock(group, rank, state.generator))
    opt = state.keep("descent", Descent(student.weights, rate(lr, student, state, relative), clip=clip))
    return student, opt, state.keep("smallest", Smallest(student.original, opt, share, steps))
