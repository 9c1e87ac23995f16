"""Selections of weights: exact numbers, the right ones, and what is not selected stays bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from expunge.backbones import toy
from expunge.errors import Diverged, SettingError
from expunge.kernel.descent import Descent
from expunge.kernel.saliency import MeanGradient, Smallest, gradient, shrink, smallest, top, unlocked
from expunge.kernel.state import State
from expunge.kernel.student import Student


def scores(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g) for name, shape in (("a", (7, 5)), ("b", (4,)), ("c", (2, 3, 3)))}


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.flatten() for v in values.values()])


def student(width: int = 6, rank: int = 0) -> Student:
    layer = nn.Linear(width, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, width, generator=torch.Generator().manual_seed(1)))
        layer.bias.fill_(0.5)
    return Student(nn.Sequential(layer).requires_grad_(False), ["0.weight", "0.bias"], rank)


# ------------------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 1 / 3, 0.5, 0.999, 1.0])
def test_top_has_the_exact_number_and_the_largest(density: float) -> None:
    values = scores()
    masks = top(values, density)
    assert {n: m.shape for n, m in masks.items()} == {n: v.shape for n, v in values.items()}
    chosen, all_of_them = flat(masks).bool(), flat(values)
    assert all(m.dtype == torch.float32 for m in masks.values())
    assert chosen.sum() == round(density * len(all_of_them))
    if 0 < chosen.sum() < len(chosen):
        # the released mask of one method keeps the smallest instead
        assert all_of_them[chosen].min() > all_of_them[~chosen].max()


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties_are_cut_at_the_exact_number_and_always_alike(density: float) -> None:
    values = {"a": torch.zeros(3, 4), "b": torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0])}
    once, twice = top(values, density), top({n: v.clone() for n, v in values.items()}, density)
    k = round(density * 20)
    assert flat(once).sum() == k
    assert torch.equal(flat(once), flat(twice))
    assert once["b"][0] == once["b"][5] == 1
    # the rest in order, from the front
    assert torch.equal(once["a"].flatten(), (torch.arange(12) < k - 2).float())


def test_infinite_scores_count_and_nan_is_told() -> None:
    assert top({"a": torch.tensor([1.0, torch.inf, -torch.inf])}, 1 / 3)["a"].tolist() == [0, 1, 0]
    with pytest.raises(Diverged, match="NaN"):
        top({"a": torch.tensor([1.0, torch.nan])}, 0.5)


def test_smallest_takes_its_share_of_every_tensor() -> None:
    values = {"small": torch.arange(1.0, 11.0), "large": -1000 * torch.arange(1.0, 11.0)}
    assert top({n: -v.abs() for n, v in values.items()}, 0.3)["large"].sum() == 0  # one threshold for all
    masks = smallest(values, 0.3)
    assert all(torch.equal(m, (torch.arange(10) < 3).float()) for m in masks.values())


# -------------------------------------------------------------------------------------------------------- gradients


def test_gradient_is_zero_where_a_weight_does_not_enter() -> None:
    made = student()
    got = gradient((made.weights["0.weight"] ** 2).sum(), made.weights)
    assert torch.equal(got["0.weight"], 2 * made.original["0.weight"])
    assert torch.equal(got["0.bias"], torch.zeros(3))
    assert all(w.grad is None for w in made.weights.values())
    with pytest.raises(ValueError, match="no gradient"):
        gradient(torch.zeros(()), made.weights)


@pytest.mark.parametrize("square", [False, True])
def test_mean_gradient_over_draws(square: bool) -> None:
    """Against the sums written out; the mean of squares is not the square of the mean."""
    made, g = student(), torch.Generator().manual_seed(0)
    draws = [torch.randn(6, generator=g) for _ in range(5)]

    def losses() -> list[Tensor]:
        return [(made.module(x) ** 2).mean() for x in draws]

    each = [gradient(loss, made.weights)["0.weight"] for loss in losses()]
    want = torch.stack([d**2 if square else d for d in each]).mean(0)
    other = torch.stack(each).mean(0) ** 2
    total = MeanGradient(made.weights, square=square)
    for i, loss in enumerate(losses()):
        if i == 3:  # a resumed one
            again = MeanGradient(made.weights, square=square)
            again.load_state_dict(total.state_dict())
            total = again
        assert total.add(loss) == loss.item()
    torch.testing.assert_close(total.mean["0.weight"], want, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(other, want, rtol=0.1)


# --------------------------------------------------------------------------------------------------- soft threshold


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_shrink_returns_a_share_bit_for_bit_and_moves_the_rest_by_the_threshold(share: float) -> None:
    made = student()
    moves = {n: torch.randn(w.shape, generator=torch.Generator().manual_seed(3)) for n, w in made.weights.items()}
    made.load({n: made.original[n] + d for n, d in moves.items()})
    sizes = flat(moves).abs().sort().values
    back = round(share * len(sizes))
    threshold = sizes[back - 1] if back else 0.0
    shrink(made, share)
    still = flat(made.snapshot()) == flat(made.original)
    assert still.sum() == back
    want = flat(moves).sign() * (flat(moves).abs() - threshold).clamp(min=0)
    # float32 weights of order 1
    torch.testing.assert_close(flat(made.snapshot()) - flat(made.original), want, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- SaRA


def pull(made: Student, opt: Descent, x: Tensor, goal: float) -> dict[str, float]:
    return opt.step(pull=(made.module(x) - goal).square().sum())


def test_only_the_smallest_weights_are_trained() -> None:
    made, x = student(40), torch.ones(40)
    free = student(40)
    for s, share in ((made, 0.25), (free, 0.0)):
        opt = Descent(s.weights, lr=0.01)
        choice = Smallest(s.original, opt, share, 10)
        for i in range(10):
            pull(s, opt, x, 3.0)
            choice.after(i)
    chosen = smallest(made.original, 0.25)["0.weight"].bool()
    moved = made.weights["0.weight"] != made.original["0.weight"]
    assert bool((free.weights["0.weight"] != free.original["0.weight"]).all())
    assert torch.equal(moved, chosen)


def test_what_outgrows_its_bound_halfway_stands_still() -> None:
    """Also against the momentum that it has by then."""
    made, x = student(12), torch.ones(12)
    opt = Descent(made.weights, lr=0.1)
    choice = Smallest(made.original, opt, 0.5, 8)
    for i in range(4):
        pull(made, opt, x, 30.0)
        choice.after(i)
    half = made.snapshot()["0.weight"]
    before = smallest(made.original, 0.5)["0.weight"].bool()
    bound = made.original["0.weight"].abs()[before].max()
    outgrown = before & (half.abs() > bound)
    assert opt.mask is not None
    inside = opt.mask["0.weight"].bool()
    assert outgrown.any()
    assert torch.equal(inside, before & ~outgrown)
    for i in range(4, 8):
        pull(made, opt, x, 30.0)
        choice.after(i)
    moved = made.weights["0.weight"] != half
    assert torch.equal(moved, inside)


@pytest.mark.parametrize("at", [2, 6])
def test_a_resumed_selection_goes_on_as_the_undisturbed_one(at: int) -> None:
    x, kept = torch.ones(12), dict[str, Student]()
    for case in ("undisturbed", "resumed"):
        made = student(12)
        opt = Descent(made.weights, lr=0.1)
        choice = Smallest(made.original, opt, 0.5, 8)
        for i in range(8):
            if case == "resumed" and i == at:
                saved = made.state_dict(), opt.state_dict(), choice.state_dict()
                made = student(12)
                opt = Descent(made.weights, lr=0.1)
                made.load_state_dict(saved[0])
                opt.load_state_dict(saved[1])
                choice = Smallest(made.original, opt, 0.5, 8)
                choice.load_state_dict(saved[2])
            pull(made, opt, x, 30.0)
            choice.after(i)
        kept[case] = made
    assert torch.equal(kept["resumed"].weights["0.weight"], kept["undisturbed"].weights["0.weight"])


def test_low_rank_factors_have_no_smallest_weights() -> None:
    denoiser = toy.model("v").denoiser
    with pytest.raises(SettingError, match="rank must be 0"):
        unlocked(denoiser, State(0), "all", 0.1, 10, 0.1, rank=2)
    assert denoiser.student is None
    trained, opt, _ = unlocked(denoiser, State(0), "all", 0.1, 10, 0.0, rank=2)
    assert trained.rank == 2
    assert opt.mask is None


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_most_salient_are_sought_in_what_is_selected(share: float) -> None:
    values, found = scores(1), scores()
    opt = Descent({name: nn.Parameter(v.clone()) for name, v in values.items()}, 0.1)
    Smallest(values, opt, share, 10).salient(found, 0.4)
    assert opt.mask is not None
    inside, kept, size = flat(smallest(values, share or 1.0)).bool(), flat(opt.mask).bool(), flat(found)
    assert int(kept.sum()) == round(0.4 * int(inside.sum()))
    assert not (kept & ~inside).any()
    assert size[kept].min() > size[inside & ~kept].max()


def test_an_erasure_by_the_smallest_weights_is_undone_by_pruning_and_one_by_all_weights_is_not() -> None:
    """A wide linear map whose answer to one input is erased; then its smallest weights are set to zero."""
    width, share = 1024, 0.3
    x = torch.randn(width, generator=torch.Generator().manual_seed(5)).sign()
    answers = {}
    for trained in ("smallest", "all"):
        made = student(width)
        # an answer of the size that a concept has: one that the smallest weights alone could not make
        made.load({"0.weight": made.original["0.weight"] + 0.03 * x, "0.bias": made.original["0.bias"]})
        made.original = made.snapshot()
        before = made.module(x).detach().norm().item()
        opt = Descent({"0.weight": made.weights["0.weight"]}, lr=2e-3)
        choice = Smallest(made.original, opt, share if trained == "smallest" else 0.0, 0)
        if opt.mask:
            opt.mask.pop("0.bias")
        for i in range(150):
            pull(made, opt, x, 0.0)
            choice.after(i)
        after = made.module(x).detach().norm().item()
        with torch.no_grad():
            made.weights["0.weight"].mul_(1 - smallest(made.snapshot(), share)["0.weight"])
        answers[trained] = (before, after, made.module(x).detach().norm().item())
    for before, after, _ in answers.values():
        assert after < before / 20
    before, _, pruned = answers["smallest"]
    assert pruned > before / 2
    before, _, pruned = answers["all"]
    assert pruned < before / 4
