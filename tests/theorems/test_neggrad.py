"""NegGrad: the gradient is that of the weighted difference; ascent raises one loss, descent lowers the other."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from expunge.backbones import tiny, toy
from expunge.concept import Concept, Targets
from expunge.door import erase
from expunge.edits import Edit, WeightEdit
from expunge.errors import SettingError
from expunge.kernel.lessons import Lessons
from expunge.kernel.model import Model
from expunge.kernel.path import KINDS, Kind, native
from expunge.kernel.pool import Pool
from expunge.kernel.state import State, Step
from expunge.methods.base import Needs
from expunge.methods.neggrad import NegGrad

BOMB = Concept("bomb", templates=("{c}", "a {c}"), keep=("cat", "dog"))
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Looking:
    """Keeps the targets that the door hands over."""

    seen: ClassVar[list[Any]] = []
    family: ClassVar[str] = "fake"
    needs: ClassVar[Needs] = NegGrad.needs

    def fit(self, _model: Model, targets: Any, state: State) -> Generator[Step, None, Edit]:
        self.seen.append(targets)
        for i in state.steps(1):
            yield Step(i, 1, {})
        return WeightEdit({})


def shown(model: Model) -> tuple[Targets, ...]:
    """The concept with pictures that the model drew."""
    erase(model, BOMB, Looking(), make_images=6)
    found: tuple[Targets, ...] = Looking.seen.pop()
    return found


def error(model: Model, pool: Pool, c: Any) -> Tensor:
    """The denoising error of the next pictures, spelled out."""
    x_t, t, x0, eps, k = pool.draw()
    e = model.denoiser
    return (e(x_t, t, c[k]) - native(e.kind, x0, eps, *e.path.levels(t, x0))).square().mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_the_gradient_is_that_of_the_weighted_difference(kind: Kind, alpha: float, beta: float) -> None:
    model = toy.model(kind)
    targets = shown(model)
    fit = NegGrad(alpha=alpha, beta=beta, batch=BATCH).fit(model, targets, State(0))
    next(fit)
    assert model.denoiser.student is not None
    found = {n: w.grad.clone() for n, w in model.denoiser.student.weights.items() if w.grad is not None}
    fit.close()
    model.lock()

    seen = Lessons(model, targets, State(0), BATCH)
    weights = model.denoiser.unlock("all").weights
    l_f, l_r = error(model, seen.forget, seen.c), error(model, seen.retain, seen.r)
    g_f, g_r = (dict(zip(weights, torch.autograd.grad(x, list(weights.values())), strict=True)) for x in (l_f, l_r))
    model.lock()
    assert found.keys() == weights.keys()
    for n, g in found.items():
        assert g_f[n].any()
        assert not torch.allclose(g_f[n], g_r[n])
        # float32 sums in another order
        torch.testing.assert_close(g, alpha * g_r[n] - beta * g_f[n], rtol=1e-5, atol=1e-7)


def losses(model: Model, targets: tuple[Targets, ...]) -> tuple[float, float]:
    """Forgetting and retaining loss, over times and noises that no update has seen."""
    seen = Lessons(model, targets, State(99), 48)
    with torch.no_grad():
        return error(model, seen.forget, seen.c).item(), error(model, seen.retain, seen.r).item()


def test_one_step_of_ascent_raises_the_forgetting_loss_and_one_of_descent_lowers_the_other() -> None:
    """On a network that has learned nothing, so that neither loss is at its lowest."""
    model = tiny.model()
    targets = shown(model)
    l_f, l_r = losses(model, targets)
    # nothing changes by itself
    assert losses(model, targets) == (l_f, l_r)
    short: dict[str, Any] = {"steps": 1, "lr": 1e-3, "batch": 32}
    with erase(model, BOMB, NegGrad(alpha=0.0, beta=1.0, **short), make_images=6).on(model):
        assert losses(model, targets)[0] > l_f + 1e-3
    with erase(model, BOMB, NegGrad(alpha=1.0, beta=0.0, **short), make_images=6).on(model):
        assert losses(model, targets)[1] < l_r - 1e-3


def test_the_ascent_does_not_end() -> None:
    """What the docstring warns of: the loss of the pictures to forget goes on rising."""
    model = toy.model("v")
    targets = shown(model)
    reached = [losses(model, targets)[0]]
    for steps in (5, 20, 60):
        with erase(model, BOMB, NegGrad(alpha=0.0, beta=1.0, lr=0.1, steps=steps), make_images=6).on(model):
            reached.append(losses(model, targets)[0])
    assert all(b > 2 * a for a, b in pairwise(reached))


def test_no_weight_at_all_is_refused() -> None:
    with pytest.raises(SettingError, match="leave no loss"):
        NegGrad(alpha=0.0, beta=0.0)  # before pictures are drawn, which takes longest
