"""What HFI provably converges to in the world whose optimum is known, and where on their trajectories it looks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from expunge.backbones import tiny, toy
from expunge.concept import Concept, Targets
from expunge.door import erase
from expunge.edits import Edit
from expunge.kernel.bank import Bank
from expunge.kernel.critic import Critic
from expunge.kernel.inversion import error
from expunge.kernel.path import Kind
from expunge.kernel.state import State
from expunge.methods.hfi import HFI

CONVERGED = 1e-2  # means are of order 1; what Adam at this rate leaves after the steps below
BOMB = Concept("bomb", templates=("{c}",))
READERS = "cross-attention"  # in this world "all" has a bias besides, which moves every prompt at once
TRAIN: dict[str, Any] = {"lr": 0.02, "batch": 16, "rollouts": 8, "sampling_steps": 10, "decay": 0.9}


def mean(model: toy.ToyModel, prompt: str) -> torch.Tensor:
    """The colour that a prompt stands for."""
    c, layer = model.encode(prompt).tokens, model.network.to_mean
    return (c.sum(1) @ layer.weight.T + layer.bias).detach()[0]


def fitted(model: toy.ToyModel, target: Targets, method: HFI, *more: Targets) -> tuple[Edit, State]:
    """Fit without the door: the toy world has no soft tokens, so a word stands in for one."""
    state = State(0)
    steps = method.fit(model, [target, *more], state)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            model.lock()
            return end.value, state


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_the_concept_becomes_unconditional(kind: Kind) -> None:
    model = toy.model(kind)
    null = mean(model, "")
    assert (mean(model, "bomb") - null).norm() > 0.1
    with erase(model, BOMB, HFI(steps=300, **TRAIN), seed=0).on(model):
        torch.testing.assert_close(mean(model, "bomb"), null, atol=CONVERGED, rtol=0)


def critic(model: toy.ToyModel, better: str, worse: str) -> tuple[Critic, torch.Tensor]:
    """A linear judge of a picture's colour, halfway between two prompts' and sure of itself; and its direction."""
    a, b = mean(model, better), mean(model, worse)
    way = (b - a) / (b - a).square().mean().sqrt()

    def logit(y: torch.Tensor) -> torch.Tensor:
        return 200 * ((y.mean((2, 3)) - (a + b) / 2) @ way)

    return Critic(logit, 0.1, 0.9), way


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_prompts_are_led_away_where_the_critic_rejects_them_and_nowhere_else(kind: Kind) -> None:
    """Against the critic's gradient, which in this world is a colour; a prompt that it accepts stays what it was."""
    moved = {}
    for steer in (0.0, 0.1):
        model = toy.model(kind)
        judge, way = critic(model, "dog", "cat")
        target = replace(BOMB.resolve(), rejected=("cat",), accepted=("dog",), critic=judge)
        before, null = {p: mean(model, p) for p in ("cat", "dog")}, mean(model, "")
        edit, _ = fitted(model, target, HFI(group=READERS, steer=steer, token=1.0, steps=300, **TRAIN))
        with edit.on(model):
            torch.testing.assert_close(mean(model, "bomb"), null, atol=CONVERGED, rtol=0)
            moved[steer] = {p: mean(model, p) - before[p] for p in before}
    assert max(v.norm() for v in moved[0.0].values()) < CONVERGED
    cat, dog = moved[0.1].values()
    assert cat.norm() > 0.05
    assert torch.cosine_similarity(cat, -way, dim=0) > 0.99
    assert dog.norm() < CONVERGED


def test_beside_steering_the_token_counts_as_much_as_is_asked() -> None:
    """By default not at all: with the token's own term its prompt becomes the empty one, without it stays."""
    moved = {}
    for token in (0.0, 1.0):
        model = toy.model("eps")
        target = replace(BOMB.resolve(), rejected=("cat",), accepted=("dog",), critic=critic(model, "dog", "cat")[0])
        before = mean(model, "bomb")
        edit, state = fitted(model, target, HFI(group=READERS, token=token, steer=0.1, steps=300, **TRAIN))
        assert ("bank" in state.objects) == bool(token)
        with edit.on(model):
            moved[token] = (mean(model, "bomb") - before).norm()
    assert HFI().token == 0
    assert moved[0.0] < CONVERGED < moved[1.0]


def test_all_weights_are_trained_where_ratings_lead_and_cross_attention_alone_where_they_do_not() -> None:
    moved = {}
    for rejected, steer in ((("cat",), 1.0), (("cat",), 0.0), ((), 1.0)):
        model = toy.model("eps")
        target = replace(BOMB.resolve(), rejected=rejected, critic=critic(model, "dog", "cat")[0])
        edit, _ = fitted(model, target, HFI(steer=steer, steps=3, **TRAIN))
        bias, weight = model.network.to_mean.bias.clone(), model.network.to_mean.weight.clone()
        with edit.on(model):
            moved[rejected, steer] = not torch.equal(model.network.to_mean.bias, bias)
            assert not torch.equal(model.network.to_mean.weight, weight)
    assert moved == {(("cat",), 1.0): True, (("cat",), 0.0): False, ((), 1.0): False}


def test_a_word_beside_a_study_is_erased_though_the_studys_token_is_not() -> None:
    model = toy.model("eps")
    study = replace(
        Concept("dagger", templates=("{c}",)).resolve(), rejected=("cat",), accepted=("dog",),
        critic=critic(model, "dog", "cat")[0],
    )  # fmt: skip
    null, before = mean(model, ""), {p: mean(model, p) for p in ("bomb", "dagger", "cat")}
    edit, _ = fitted(model, study, HFI(group=READERS, steer=0.1, steps=300, **TRAIN), BOMB.resolve())
    with edit.on(model):
        torch.testing.assert_close(mean(model, "bomb"), null, atol=CONVERGED, rtol=0)
        assert (mean(model, "dagger") - before["dagger"]).norm() < CONVERGED
        assert (mean(model, "cat") - before["cat"]).norm() > 0.05


def test_rejected_and_accepted_prompts_take_turns() -> None:
    model = toy.model("eps")
    target = replace(
        BOMB.resolve(), rejected=("cat",), accepted=("dog", "snow", "tree"), critic=critic(model, "dog", "cat")[0]
    )
    _, state = fitted(model, target, HFI(steps=1, **TRAIN))
    assert state.objects["asked"].sizes.tolist() == [1, 3]


def test_without_a_critic_nothing_is_led_away() -> None:
    model = toy.model("eps")
    target = replace(BOMB.resolve(), rejected=("cat",))
    _, state = fitted(model, target, HFI(steps=1, **TRAIN))
    assert "asked" not in state.objects


def test_what_people_accept_is_kept_where_weights_are_shared() -> None:
    drift = {}
    for preserve in (0.0, 10.0):
        model = toy.model("eps")
        before = mean(model, "cat")
        target = replace(BOMB.resolve(), keeps=("cat",))
        edit, _ = fitted(model, target, HFI(group="all", preserve=preserve, steps=200, **TRAIN))
        with edit.on(model):
            drift[preserve] = (mean(model, "cat") - before).norm().item()
    assert drift[0.0] > 5e-3
    assert drift[10.0] < drift[0.0] / 4


def shares(beta: tuple[float, float] | None) -> torch.Tensor:
    """Where on their trajectories latents are drawn, from 0 at pure noise to 1."""
    model = toy.model("flow")
    bank = Bank(
        model.denoiser, model.denoiser.teacher, model.encode("red"), model.encode(""), State(0),
        batch=8000, rollouts=200, steps=20, guidance=1.0, reuse=2, beta=beta,
    )  # fmt: skip
    return 1 - bank.draw().t / model.denoiser.path.last


def test_latents_are_drawn_from_the_middle_of_their_trajectories() -> None:
    """Beta(a, b) has mean a / (a + b) and variance ab / (a + b)^2 (a + b + 1); evenly, 1/2 and 1/12."""
    even, middle, late = shares(None), shares((3.0, 3.0)), shares((6.0, 2.0))
    assert even.var().item() == pytest.approx(1 / 12, rel=0.05)
    assert middle.mean().item() == pytest.approx(0.5, abs=0.01)
    assert middle.var().item() == pytest.approx(1 / 28, rel=0.05)
    assert late.mean().item() == pytest.approx(0.75, abs=0.01)


def test_the_method_asks_for_its_settings_distribution() -> None:
    model = toy.model("eps")
    target = replace(BOMB.resolve(), rejected=("cat",), critic=critic(model, "dog", "cat")[0])
    _, state = fitted(model, target, HFI(alpha=2.0, beta=5.0, token=1.0, steps=1, **TRAIN))
    banks: list[Any] = [state.objects["bank"], state.objects["asked"]]
    assert [bank.beta for bank in banks] == [(2.0, 5.0)] * 2


def test_pictures_are_inverted_as_often_as_they_weigh() -> None:
    """A picture of weight 0 does not enter; weights in the ratio 3:1 weigh the errors 3:1."""
    model = tiny.model()
    # of very different size, so that their errors differ
    z = torch.stack([torch.zeros(4, 8, 8), torch.full((4, 8, 8), 3.0)])

    def estimate(weights: list[float] | None, z: torch.Tensor = z) -> float:
        found = None if weights is None else torch.tensor(weights)
        with torch.no_grad():
            return error(model, z, ("a",), torch.Generator().manual_seed(1), 512, found).item()

    spoiled = torch.stack([z[0], torch.full_like(z[1], torch.nan)])
    assert torch.tensor(estimate(None, spoiled)).isnan()
    assert not torch.tensor(estimate([1.0, 0.0], spoiled)).isnan()
    one, two, mixed = estimate([1.0, 0.0]), estimate([0.0, 1.0]), estimate([3.0, 1.0])
    assert two > 5 * one
    assert mixed == pytest.approx(0.75 * one + 0.25 * two, rel=0.1)  # 512 draws; equal weights would be 60 % off
