"""The pieces of a score method's loss, each against an independent transcription."""

from __future__ import annotations

import pytest
import torch

from expunge.backbones import toy
from expunge.kernel.path import KINDS, Kind, x0_and_eps
from expunge.kernel.terms import distance, errors, gated, held, is_late, over, phased, some

ROUNDING = {"atol": 1e-6, "rtol": 1e-5}  # float32, values of order 1


def draw(model: toy.ToyModel, n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    t = torch.linspace(0.1, 1, n) * model.denoiser.path.last
    return torch.randn(n, 3, 4, 4, generator=g), t if model.denoiser.kind == "flow" else t.long()


def test_early_is_noisy() -> None:
    """Released code has the phases swapped: its early ones are the clean times."""
    model = toy.model("eps")
    x_t, t = draw(model)
    late = is_late(model.denoiser, t, 0.5)
    _, sigma = model.denoiser.path.levels(t, x_t)
    assert late.tolist() == [True, True, True, False, False, False]
    assert sigma.flatten()[late].max() < sigma.flatten()[~late].min()
    for kind in KINDS:
        other = toy.model(kind)
        assert is_late(other.denoiser, draw(other)[1], 1.0).all()


def test_gate_chooses_by_sample() -> None:
    yes, no = torch.ones(3, 2, 2), torch.zeros(3, 2, 2)
    assert gated(torch.tensor([True, False, True]), yes, no)[:, 0, 0].tolist() == [1, 0, 1]


def test_a_phased_target_is_the_originals_own_prediction_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the weights are by then; with a single phase the original is not asked at all."""
    model = toy.model("eps")
    (x_t, t), c = draw(model), model.encode("cat")
    before, student = model.denoiser(x_t, t, c), model.denoiser.unlock("all")
    with torch.no_grad():
        student.weights["to_mean.bias"].add_(0.1)
    late = torch.zeros_like(x_t)
    found = phased(model.denoiser, x_t, t, c, late, 0.5)
    assert torch.equal(found, torch.cat([late[:3], before[3:]]))
    assert not torch.equal(model.denoiser(x_t, t, c), before)
    monkeypatch.setattr(model.denoiser, "teacher", None)
    assert phased(model.denoiser, x_t, t, c, late, 1.0) is late


def test_mean_over_a_phase() -> None:
    values = torch.tensor([1.0, 2.0, 6.0])
    assert over(values, torch.tensor([True, False, True])).item() == 3.5
    assert over(values, torch.tensor([False, False, False])).item() == 0


def test_errors_average_to_the_mean_squared_difference() -> None:
    a, b = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(errors(a, b).mean(), torch.nn.functional.mse_loss(a, b))


def test_held_is_zero_before_training_and_has_a_gradient_after() -> None:
    model = toy.model("eps")
    x_t, t = draw(model)
    c, student = model.encode("cat"), model.denoiser.unlock("all")
    assert held(model.denoiser, x_t, t, c).item() == 0
    with torch.no_grad():
        student.weights["to_mean.bias"].add_(0.1)
    loss = held(model.denoiser, x_t, t, c)
    loss.backward()
    assert student.weights["to_mean.bias"].grad.abs().sum() > 0


def test_some_draws_rows_of_the_batch() -> None:
    c = toy.model().encode(["cat", "dog", "house"])
    drawn = some(c, 50, torch.Generator().manual_seed(0))
    assert {int(row.argmax()) for row in drawn.tokens[:, 0]} == {int(row.argmax()) for row in c.tokens[:, 0]}


@pytest.mark.parametrize("kind", KINDS)
def test_distance_in_x0_is_the_same_for_every_parameterisation(kind: Kind) -> None:
    """Native distances are not: they differ by a weight of each time."""
    model = toy.model(kind)
    x_t, t = draw(model)
    a, b = (model.denoiser(x_t, t, model.encode(w)) for w in ("cat", "dog"))
    mu = [model.network.to_mean(model.encode(w).tokens).sum(1) for w in ("cat", "dog")]
    alpha, sigma = model.denoiser.path.levels(t, x_t)
    # the exact denoiser's x0 moves by (1 - gain alpha) of the mean's move
    gain = alpha * toy.SPREAD**2 / (alpha**2 * toy.SPREAD**2 + sigma**2)
    wanted = ((1 - gain * alpha) * (mu[0] - mu[1])[:, :, None, None]).square().expand_as(x_t).mean()
    # alpha is small at the noisiest time, by which x0 of an eps network is divided
    torch.testing.assert_close(distance(model.denoiser, t, a, b, "x0"), wanted, atol=0, rtol=1e-3)
    native = distance(model.denoiser, t, a, b, "native")
    assert (abs(native / wanted - 1) > 0.1) == (kind != "x0")
    assert x0_and_eps(kind, x_t, a, alpha, sigma)[0].shape == x_t.shape
