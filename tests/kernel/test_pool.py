"""Pictures to train on: each once a pass, at the noise level of its own time."""

from __future__ import annotations

import pytest
import torch

from expunge.backbones import toy
from expunge.kernel.path import KINDS, Kind
from expunge.kernel.pool import Pool, times
from expunge.kernel.state import State


def pool(model: toy.ToyModel, state: State, n: int, batch: int) -> Pool:
    # every picture has a colour of its own, so that it can be told which one was drawn
    z = torch.arange(n).float()[:, None, None, None].expand(n, 3, 4, 4)
    return Pool(model.denoiser, z, torch.arange(n) % 2, state, batch)


@pytest.mark.parametrize(("n", "batch"), [(7, 3), (4, 4), (3, 8)])
def test_every_picture_once_a_pass(n: int, batch: int) -> None:
    """Published loops see the first batch of an unshuffled loader at every update."""
    source = pool(toy.model(), State(0), n, batch)
    drawn = [source.draw() for _ in range(3 * n)]
    seen = torch.cat([d.x0[:, 0, 0, 0] for d in drawn]).long()
    passes = seen.view(-1, n)
    assert len(passes) == 3 * batch
    assert all(torch.equal(p.sort().values, torch.arange(n)) for p in passes)
    assert len({tuple(p.tolist()) for p in passes}) > 1
    assert all(torch.equal(d.k, d.x0[:, 0, 0, 0].long() % 2) for d in drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_level_and_truth(kind: Kind) -> None:
    model = toy.model(kind)
    source = pool(model, State(0), 5, 64)
    d = source.draw()
    alpha, sigma = model.denoiser.path.levels(d.t, d.x0)
    torch.testing.assert_close(d.x_t, alpha * d.x0 + sigma * d.eps)
    want = {"eps": d.eps, "x0": d.x0, "v": alpha * d.eps - sigma * d.x0, "flow": d.eps - d.x0}[kind]
    torch.testing.assert_close(source.truth(d), want)


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_one_time_from_every_span_and_never_one_without_noise(kind: Kind) -> None:
    path = toy.model(kind).denoiser.path
    drawn = torch.stack([times(path, 10, torch.Generator().manual_seed(s)) for s in range(300)])
    spans = (drawn.float() / (path.last + (kind == "eps")) * 10).ceil().clamp(min=1)
    low = drawn.amin(0).float()
    assert (drawn >= 0).all()
    assert (drawn <= path.last).all()
    if kind == "flow":
        assert (drawn > 0).all()
        assert torch.equal(spans, torch.arange(1.0, 11).expand_as(spans))
    else:
        assert torch.equal(drawn // 100, torch.arange(10).expand_as(drawn))
        assert low[0] < 5
        assert drawn.max() > 995


def test_resumed_pool_draws_what_the_undisturbed_one_would() -> None:
    model, state = toy.model(), State(0)
    source = state.keep("pool", pool(model, state, 7, 3))
    source.draw()
    saved = state.state_dict()
    want = [source.draw() for _ in range(6)]
    resumed_state = State.load(saved)
    resumed = resumed_state.keep("pool", pool(model, resumed_state, 7, 3))
    for w in want:
        got = resumed.draw()
        assert torch.equal(w.x_t, got.x_t)
        assert torch.equal(w.t, got.t)
