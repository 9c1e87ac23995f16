"""How a prediction is led away from what a critic rejects."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from expunge.backbones import toy
from expunge.kernel.condition import Condition
from expunge.kernel.critic import GRANTED, Critic, led_away, spread, unit
from expunge.kernel.denoiser import Denoiser
from expunge.kernel.path import KINDS, Kind, native, x0_and_eps

ROUNDING = {"atol": 1e-4, "rtol": 1e-4}  # float32; clean predictions at much noise are differences of large numbers


def case(kind: Kind) -> tuple[toy.ToyModel, Tensor, Tensor, Condition, Tensor]:
    """Model, x_t, t, what a prompt says, and the clean latents that the model predicts under it."""
    model, g = toy.model(kind), torch.Generator().manual_seed(0)
    t = torch.tensor([0.2, 0.4, 0.6, 0.8]) * model.denoiser.path.last
    t = t if kind == "flow" else t.long()
    x_t, c = torch.randn(4, 3, 4, 4, generator=g), model.encode(["red", "bright cat", "dog", ""])
    with torch.no_grad():
        x0, _ = x0_and_eps(kind, x_t, model.denoiser(x_t, t, c), *model.denoiser.path.levels(t, x_t))
    return model, x_t, t, c, x0


@pytest.mark.parametrize("kind", KINDS)
def test_an_open_gate_moves_the_clean_prediction_down_the_gradient(kind: Kind) -> None:
    """By strength times sigma, in root mean square; x_t stays on its noise level, whatever the network predicts."""
    model, x_t, t, c, x0 = case(kind)
    way = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1))
    sure = Critic(lambda y: 50 + 1e-3 * (y * way).sum((1, 2, 3)), 0.0, 0.5)
    target = led_away(model.denoiser, [sure], x_t, t, c, strength=0.7)
    alpha, sigma = model.denoiser.path.levels(t, x_t)
    y, eps = x0_and_eps(kind, x_t, target, alpha, sigma)
    torch.testing.assert_close(y, x0 - 0.7 * sigma * way / way.square().mean().sqrt(), **ROUNDING)
    torch.testing.assert_close(alpha * y + sigma * eps, x_t, **ROUNDING)
    assert not target.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_accepted_is_left_alone(kind: Kind) -> None:
    model, x_t, t, c, _ = case(kind)
    content = Critic(lambda y: -5 + 1e-3 * y.sum((1, 2, 3)), 0.1, 0.5)
    torch.testing.assert_close(
        led_away(model.denoiser, [content], x_t, t, c, strength=9.0), model.denoiser(x_t, t, c), **ROUNDING
    )


def test_the_gate_is_of_each_sample_and_opens_between_two_probabilities() -> None:
    y = torch.tensor([0.2, 0.4, 0.5, 0.9]).logit().view(4, 1, 1, 1).expand(4, 3, 4, 4)
    gate, slope = Critic(lambda y: y.mean((1, 2, 3)), 0.3, 0.5).judged(y)
    torch.testing.assert_close(gate, torch.tensor([0.0, 0.5, 1.0, 1.0]))
    torch.testing.assert_close(slope, torch.ones_like(slope))


def test_a_critic_that_sees_nothing_changes_nothing() -> None:
    model, x_t, t, c, _ = case("eps")
    flat = Critic(lambda y: 3 + 0 * y.sum((1, 2, 3)), 0.5, 0.5)
    torch.testing.assert_close(
        led_away(model.denoiser, [flat], x_t, t, c, strength=1.0), model.denoiser(x_t, t, c), **ROUNDING
    )


def test_the_gate_is_asked_once() -> None:
    """Where a third of the way is enough for the critic, the prediction still goes all of it."""
    model, x_t, t, c, x0 = case("eps")
    _, sigma = model.denoiser.path.levels(t, x_t)
    start = x0.mean((1, 2, 3))
    hasty = Critic(lambda y: 1e4 * (y.mean((1, 2, 3)) - start + 1e-3), 0.1, 0.9)
    assert (hasty.judged(x0)[0] == 1).all()
    assert (hasty.judged(x0 - 0.1)[0] == 0).all()
    target = led_away(model.denoiser, [hasty], x_t, t, c, strength=1.0)
    y, _ = x0_and_eps("eps", x_t, target, *model.denoiser.path.levels(t, x_t))
    torch.testing.assert_close(y, x0 - sigma, **ROUNDING)


def test_critics_take_turns() -> None:
    """Two that pull in opposite directions cancel; alone either moves the prediction."""
    model, x_t, t, c, _ = case("eps")
    pull = [Critic(lambda y, s=s: 9 + s * y.mean((1, 2, 3)) / 100, 0.0, 0.5) for s in (1, -1)]
    both, one = (led_away(model.denoiser, chosen, x_t, t, c, strength=1.0) for chosen in (pull, pull[:1]))
    e = model.denoiser(x_t, t, c)
    torch.testing.assert_close(both, e, **ROUNDING)
    assert (one - e).abs().max() > 0.1


def test_what_the_gate_holds_is_looked_at_once_and_left_where_it_was() -> None:
    model, x_t, t, c, x0 = case("eps")
    seen: list[int] = []

    def logit(y: Tensor) -> Tensor:
        seen.append(len(y))
        # of four samples the critic rejects the first and the third, and nothing that it has led away
        bad = torch.tensor([9.0, -9.0, 9.0, -9.0]) if len(y) == 4 else torch.full((len(y),), -9.0)
        return bad + 1e-3 * y.mean((1, 2, 3))

    target = led_away(model.denoiser, [Critic(logit, 0.1, 0.9)], x_t, t, c, strength=1.0)
    assert seen == [4, 2, 2]
    _, sigma = model.denoiser.path.levels(t, x_t)
    y, _ = x0_and_eps("eps", x_t, target, *model.denoiser.path.levels(t, x_t))
    moved = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(y, x0 - sigma * moved, **ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_is_the_gradient_times_the_covariance_of_what_the_picture_may_be(kind: Kind) -> None:
    """Latents N(0, S), for which that is S - alpha^2 S (alpha^2 S + sigma^2 I)^-1 S; of S one direction varies most."""
    path, g = toy.model(kind).denoiser.path, torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=g).double() @ torch.diag(torch.tensor([1, 0.3, 0.1, 0.03, 0.01, 0.0])).double()
    s, eye = root @ root.T, torch.eye(6).double()

    def gain(t: Tensor) -> tuple[float, float, Tensor]:
        alpha, sigma = (float(u) for u in path.at(t[0]))
        return alpha, sigma, alpha * s @ torch.linalg.inv(alpha**2 * s + sigma**2 * eye)

    def call(_: nn.Module, x_t: Tensor, t: Tensor, __: Condition) -> Tensor:
        alpha, sigma = path.levels(t, x_t)
        x0 = x_t @ gain(t)[2].T.to(x_t)
        return native(kind, x0, (x_t - alpha * x0) / sigma, alpha, sigma)

    network, c = Denoiser(nn.Identity(), path, kind, call, (6,), {}), Condition(torch.zeros(1, 1, 1))
    t = torch.full((1,), 0.5 * path.last)
    t = t if kind == "flow" else t.long()
    alpha, sigma, k = gain(t)
    left = s - alpha * k @ s
    found = torch.cat([spread(network, torch.randn(1, 6, generator=g), t, c)(v[None]) for v in eye.float()])
    torch.testing.assert_close(found, alpha * (left + GRANTED * eye).float(), atol=1e-4, rtol=1e-3)
    # a critic that asks as much for what no picture varies in is followed where pictures vary
    flat, most = torch.linalg.eigh(s).eigenvectors.float()[:, [0, -1]].unbind(1)
    x_t = torch.randn(1, 6, generator=g)
    sure = Critic(lambda y: 50 + 1e-3 * y @ (flat + most), 0.0, 0.5)
    y, _ = x0_and_eps(kind, x_t, led_away(network, [sure], x_t, t, c, 1.0), *path.levels(t, x_t))
    moved = (y - x_t @ k.T.float())[0]
    way = (left + GRANTED * eye).float() @ (flat + most)
    torch.testing.assert_close(moved, -sigma * unit(way[None])[0], **ROUNDING)
    assert abs(moved @ flat) < abs(moved @ most) / 5


def test_the_networks_weights_get_no_gradient() -> None:
    model, x_t, t, c, _ = case("v")
    model.network.requires_grad_(True)
    target = led_away(model.denoiser, [Critic(lambda y: 9 + y.mean((1, 2, 3)), 0.0, 0.5)], x_t, t, c, strength=1.0)
    assert not target.requires_grad
    assert all(p.grad is None for p in model.network.parameters())
