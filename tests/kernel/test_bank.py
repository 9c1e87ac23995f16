"""The bank: every latent at its own time, all times visited, resumable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from expunge.backbones import toy
from expunge.errors import SettingError
from expunge.kernel.bank import Aimed, Bank
from expunge.kernel.condition import Condition
from expunge.kernel.path import KINDS, Kind
from expunge.kernel.state import State


def bank(model: toy.ToyModel, state: State, prompts: tuple[str, ...] = ("red",), **changes: Any) -> Bank:
    settings: dict[str, Any] = {"batch": 16, "rollouts": 16, "steps": 20, "guidance": 1, "reuse": 1} | changes
    c, null = model.encode(prompts), model.encode("")
    return Bank(model.denoiser, model.denoiser.teacher, c, null, state, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_level_equals_the_schedules(kind: Kind) -> None:
    """In the Gaussian world x_t at time t has variance (alpha s)^2 + sigma^2 and mean alpha mu.

    Published samplers are bins off.
    """
    model = toy.model(kind)
    source = bank(model, State(0), rollouts=400, batch=8000, steps=20)
    x_t, t, _ = source.draw()
    mu = model.network.to_mean(model.encode("red").tokens).sum(1).detach()[0]
    alpha, sigma = model.denoiser.path.levels(t, x_t)
    rest = x_t - alpha * mu[:, None, None]
    measured = rest.flatten(1).square().mean(1)
    expected = ((alpha * toy.SPREAD) ** 2 + sigma**2).flatten()
    for low, high in ((0, 250), (250, 500), (500, 750), (750, 1001)):
        part = (t >= low) & (t < high)
        assert part.sum() > 300
        # discretisation of 20 steps and 48 values a latent: a few percent; one bin off (50 times) is 15 % and more
        assert measured[part].mean() / expected[part].mean() == pytest.approx(1, abs=0.06)


def test_first_latents_are_pure_noise_at_the_first_time() -> None:
    model = toy.model("eps")
    source = bank(model, State(0), rollouts=200, batch=4000)
    x_t, t, _ = source.draw()
    first = t == int(model.denoiser.path.grid(20)[0])
    assert first.sum() == 200
    assert x_t[first].std().item() == pytest.approx(1, abs=0.03)


def test_times_fill_the_gaps_between_sampling_steps() -> None:
    source = bank(toy.model("eps"), State(0), rollouts=64, batch=1280)
    assert len(source.draw().t.unique()) > 400


def test_every_latent_is_used_as_often_as_asked() -> None:
    model = toy.model("eps")
    source = bank(model, State(0), rollouts=4, batch=8, steps=4, reuse=3)
    seen = torch.cat([source.draw().x_t for _ in range(6)]).flatten(1)
    _, counts = seen.unique(dim=0, return_counts=True)
    assert len(counts) == 16
    assert (counts == 3).all()
    before = source.data["x"]
    source.draw()
    assert not torch.equal(before, source.data["x"])


def test_a_batch_that_a_rollout_cannot_fill_is_refused() -> None:
    assert len(bank(toy.model("eps"), State(0), rollouts=2, steps=4, batch=24, reuse=3).draw().t) == 24
    with pytest.raises(SettingError, match=r"batch=25 .* rollouts=2 x sampling_steps=4 x reuse=3 = 24 latents"):
        bank(toy.model("eps"), State(0), rollouts=2, steps=4, batch=25, reuse=3)


def test_each_latent_belongs_to_its_prompt() -> None:
    model = toy.model("eps")
    source = bank(model, State(0), ("red", "blue"), rollouts=64, batch=64, steps=20)
    source.draw()
    last = source.data["t"] <= 50
    means = {k: source.data["x"][last & (source.data["k"] == k)].mean((0, 2, 3)) for k in (0, 1)}
    for k, word in enumerate(("red", "blue")):
        mu = model.network.to_mean(model.encode(word).tokens).sum(1).detach()[0]
        assert (means[k] - mu).norm() < (means[1 - k] - mu).norm()


def test_concepts_take_turns_however_many_prompts_they_have() -> None:
    """Trajectories of a refresh: as many of a concept with one prompt as of one with three, and none left out."""
    model, words = toy.model("eps"), ("red", "blue", "cat", "bomb")
    shares: dict[tuple[int, ...], list[float]] = {}
    for sizes in ((), (1, 3)):
        source = bank(model, State(0), words, sizes=sizes, rollouts=3, batch=3, steps=1)
        drawn = torch.cat([source.draw().k for _ in range(200)])
        assert set(drawn.tolist()) == {0, 1, 2, 3}
        shares[sizes] = (drawn.bincount(minlength=4) / len(drawn)).tolist()
    # without sizes all prompts are one concept's
    assert shares[()][0] == pytest.approx(1 / 4, abs=0.06)
    assert shares[1, 3][0] == 1 / 2
    assert shares[1, 3][1:] == pytest.approx([1 / 6] * 3, abs=0.04)


def test_no_concept_is_left_out_of_a_pass() -> None:
    """Twenty concepts and twenty trajectories, drawn at random, would leave seven out on average."""
    model = toy.model("eps")
    source = bank(model, State(0), ("red",) * 20, sizes=[1] * 20, rollouts=5, batch=5, steps=1)
    assert len(torch.cat([source.draw().k for _ in range(4)]).unique()) == 20


def test_resumed_bank_draws_what_the_undisturbed_one_would() -> None:
    model = toy.model("eps")
    state = State(0)
    source = state.keep("bank", bank(model, state))
    source.draw()
    saved = state.state_dict()
    expected = [source.draw() for _ in range(25)]
    resumed_state = State.load(saved)
    resumed = resumed_state.keep("bank", bank(model, resumed_state))
    for want in expected:
        got = resumed.draw()
        assert torch.equal(want.x_t, got.x_t)
        assert torch.equal(want.t, got.t)


def test_a_target_is_found_once_however_often_its_latent_is_drawn() -> None:
    """And it is that latent's own: its time's and its prompt's too. It survives a pause, and ends with its rollout."""
    model, asked = toy.model("eps"), list[int]()

    def aim(x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        asked.append(len(t))
        return x_t + t.view(-1, 1, 1, 1) + 10_000 * c.tokens[:, 0, 1].view(-1, 1, 1, 1)

    def source(state: State) -> Aimed:
        c, null = model.encode(("red", "green")), model.encode("")
        return Aimed(
            model.denoiser, model.denoiser.teacher, c, null, state,
            batch=8, rollouts=2, steps=4, guidance=1.0, reuse=4, aim=aim,
        )  # fmt: skip

    one, greens = source(State(0)), 0
    for i in range(8):
        if i == 2:
            kept = one.state_dict()
            one = source(State(0))
            one.load_state_dict(kept)
        if i == 4:
            assert sum(asked) == 8  # two trajectories of four latents, each drawn four times
        (x_t, t, k), target = one.aimed()
        greens += int(k.sum())
        torch.testing.assert_close(target, x_t + (t + 10_000 * k).view(-1, 1, 1, 1))
    assert 0 < greens < 64
    assert sum(asked) == 16
