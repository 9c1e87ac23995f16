"""SPEED: an update that what is retained cannot see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expunge.backbones import tiny, toy
from expunge.concept import Concept
from expunge.door import erase
from expunge.kernel.closedform import Rewrite, null_space, restricted
from expunge.kernel.condition import Condition
from expunge.kernel.model import Model
from expunge.methods.speed import SPEED

EXACT = 1e-9  # float64 on systems of this size


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_update_is_the_authors_with_lagrange_multipliers() -> None:
    """Delta P = W (A - C) C^T P [I - M S (S^T P M S)^-1 S^T P] M with M = (C C^T P + lambda I)^-1."""
    d, eye = 9, torch.eye(9, dtype=torch.float64)
    w, c, a = random(5, d), random(d, 4, seed=1), random(d, 4, seed=2)
    kept, s = random(20, 4, seed=3) @ random(4, d, seed=4), random(d, 2, seed=5)
    moment, ridge = kept.T @ kept / 20, 0.3
    u, values, _ = torch.linalg.svd(moment)
    p = u[:, values < 1e-6] @ u[:, values < 1e-6].T
    m = torch.linalg.inv(c @ c.T / 4 @ p + ridge * c.square().mean() * eye)
    correct = eye - m @ s @ torch.linalg.inv(s.T @ p @ m @ s) @ s.T @ p
    theirs = w @ (a - c) @ c.T / 4 @ p @ correct @ m
    ours = restricted(w, c.T, a.T, null_space(moment, torch.tensor(1e-6), s.T), ridge)
    assert theirs.norm() > 0.1
    torch.testing.assert_close(ours, theirs @ p, atol=EXACT, rtol=0)
    without = w @ (a - c) @ c.T / 4 @ p @ m
    assert (without - theirs).norm() > 1e-3


@pytest.mark.parametrize("settings", [{}, {"filter": True, "augment": 1.0}])
def test_what_is_retained_and_what_is_invariant_do_not_move(settings: dict[str, float]) -> None:
    """A least-squares edit of the same pairs moves both."""
    w, x, y = random(5, 12), random(6, 12, seed=1), random(6, 12, seed=2)
    kept, s = random(40, 5, seed=3) @ random(5, 12, seed=4), random(2, 12, seed=5)
    method = SPEED(threshold=1e-6, ridge=1e-3, **settings)
    new = method.edited(w, x, y, kept, s)
    least = Rewrite(12, w.device)
    least.add(x, y)
    least.add(kept, kept)
    other = least.solve(w, 1e-3)
    assert (x @ new.T - x @ w.T).norm() > 1
    assert (s @ (new - w).T).norm() < EXACT
    assert (kept @ (new - w).T).norm() < 1e-6
    assert (kept @ (other - w).T).norm() > 0.1
    assert (s @ (other - w).T).norm() > 0.1


def test_the_threshold_goes_from_everything_to_nothing() -> None:
    w, x, y, kept = random(5, 7), random(6, 7, seed=1), random(6, 7, seed=2), random(30, 7, seed=3)
    nothing = torch.zeros(1, 7, dtype=torch.float64)
    moved = [(SPEED(threshold=t).edited(w, x, y, kept, nothing) - w).norm().item() for t in (1e-6, 1.0, 1e6)]
    assert moved[0] == 0
    assert moved[0] < moved[1] < moved[2]
    free = restricted(w, x, y, torch.eye(7, dtype=w.dtype), SPEED().ridge)
    assert moved[2] == pytest.approx(free.norm().item(), rel=1e-9)


def test_the_filter_lets_go_of_what_the_erasure_would_hardly_move() -> None:
    """Encodings that no erased one touches cost null space and gain nothing."""
    w, x = random(5, 8), torch.zeros(2, 8, dtype=torch.float64)
    x[:, :2], y = random(2, 2, seed=1) + 3, torch.zeros(2, 8, dtype=torch.float64)
    near, far = torch.zeros(1, 8, dtype=torch.float64), torch.zeros(6, 8, dtype=torch.float64)
    near[0, 0], far[:, 2:] = 1.0, torch.eye(6, dtype=torch.float64)
    kept, nothing = torch.cat([near, far]), torch.zeros(1, 8, dtype=torch.float64)
    full, filtered = (SPEED(threshold=1e-6, filter=f).edited(w, x, y, kept, nothing) - w for f in (False, True))
    assert (near @ filtered.T).norm() < EXACT
    torch.testing.assert_close(filtered, full, atol=EXACT, rtol=0)
    # with erased encodings that do reach them, the unfiltered null space is the smaller one
    x[:, 4] = 0.1
    full, filtered = (SPEED(threshold=1e-6, filter=f).edited(w, x, y, kept, nothing) for f in (False, True))
    assert (x @ filtered.T).norm() < (x @ full.T).norm()
    assert (near @ (filtered - w).T).norm() < EXACT


def test_augmentation_protects_the_direction_to_which_a_layer_is_blind() -> None:
    w, x, y, kept = random(5, 7), random(6, 7, seed=1), random(6, 7, seed=2), random(3, 7, seed=3)
    nothing = torch.zeros(1, 7, dtype=torch.float64)
    blind = torch.linalg.svd(w, full_matrices=False).Vh[-1]
    with_it, without = (SPEED(threshold=1e-6, augment=a).edited(w, x, y, kept, nothing) - w for a in (1.0, 0.0))
    assert (without @ blind).norm() > 0.1
    assert (with_it @ blind).norm() < 1e-6


def test_erases_several_and_keeps() -> None:
    model = toy.model("flow")
    words = ["bomb", "dagger", "dog"]
    concepts = [Concept(w, templates=("{c}",), anchor="cat", keep=("dog", "house")) for w in words[:2]]

    def means() -> Tensor:
        return (model.encode([*words, "cat"]).tokens.sum(1) @ model.network.to_mean.weight.T).detach()

    before = means()
    assert (before[:2] - before[3]).norm() > 0.1
    with erase(model, concepts, SPEED(ridge=1e-6), seed=0).on(model):
        after = means()
    torch.testing.assert_close(after[:2], before[[3, 3]], atol=1e-3, rtol=0)
    torch.testing.assert_close(after[2], before[2], atol=1e-6, rtol=0)


def test_of_many_prompts_a_sample_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    many = Concept("bomb", templates=tuple(f"{a} {{c}}" for a in "abcdefgh"), keep=("cat", "dog", "cup", "hat"))
    told, seen, encode = many.resolve(), set[str](), type(tiny.model()).encode

    def listening(self: Model, prompts: str | list[str]) -> Condition:
        seen.update([prompts] if isinstance(prompts, str) else prompts)
        return encode(self, prompts)

    def edited(method: SPEED, seed: int) -> tuple[tuple[int, int], dict[str, Tensor]]:
        seen.clear()
        found = dict(erase(tiny.model(), many, method, seed=seed).tensors())
        return (len(seen.intersection(told.prompts)), len(seen.intersection(told.keeps))), found

    monkeypatch.setattr(type(tiny.model()), "encode", listening)
    assert edited(SPEED(), 0)[0] == (len(told.prompts), len(told.keeps)) != (3, 3)
    (few, one), (_, again), (_, other) = (edited(SPEED(sample=3), seed) for seed in (0, 0, 1))
    assert few == (3, 3)
    assert all(torch.equal(v, again[k]) for k, v in one.items())
    assert any(not torch.equal(v, other[k]) for k, v in one.items())
