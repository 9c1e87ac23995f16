"""Closed-form edits against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expunge.backbones import tiny
from expunge.kernel.closedform import Rewrite, counterparts, fitted, matched, null_space, restricted, solve

EXACT = 1e-9  # float64 on systems of this size


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_rewrite_is_the_minimum_of_what_it_says() -> None:
    w, x, y, k = random(5, 7), random(20, 7, seed=1), random(20, 7, seed=2), random(30, 7, seed=3)
    rewrite = Rewrite(7, w.device)
    rewrite.add(x, y)
    rewrite.add(k, k, 2.0)
    new, ridge = rewrite.solve(w, 0.3), 0.3 * rewrite.gram.diagonal().mean()

    def gradient(v: Tensor) -> Tensor:
        erase = (v @ x.T - w @ y.T) @ x / len(x)
        return erase + 2 * (v - w) @ k.T @ k / len(k) + ridge * (v - w)

    assert gradient(w).norm() > 1
    assert gradient(new).norm() < EXACT


def test_a_rewrite_goes_on_from_its_state() -> None:
    one, two = Rewrite(7, torch.device("cpu")), Rewrite(7, torch.device("cpu"))
    one.add(random(20, 7), random(20, 7, seed=1))
    two.add(random(20, 7, seed=2), random(20, 7, seed=1))
    assert not torch.equal(two.solve(random(5, 7), 0.1), one.solve(random(5, 7), 0.1))
    two.load_state_dict(one.state_dict())
    for rewrite in (one, two):
        rewrite.add(random(3, 7), random(3, 7, seed=1))
    assert torch.equal(one.solve(random(5, 7), 0.1), two.solve(random(5, 7), 0.1))


def test_holding_alone_leaves_a_layer_as_it_is() -> None:
    w, rewrite = random(5, 7), Rewrite(7, torch.device("cpu"))
    rewrite.add(random(4, 7), random(4, 7))
    assert torch.allclose(rewrite.solve(w, 0.1), w, atol=EXACT)
    assert not torch.allclose(solve(w, rewrite.gram, rewrite.cross * 0, 0.1), w, atol=0.1)


def test_a_restricted_update_stays_in_its_basis_and_is_the_best_there() -> None:
    w, x, y = random(5, 7), random(20, 7, seed=1), random(20, 7, seed=2)
    basis = torch.linalg.qr(random(7, 3, seed=3)).Q
    delta, ridge = restricted(w, x, y, basis, 0.2), 0.2 * x.square().mean()
    assert delta.norm() > 0.1
    torch.testing.assert_close(delta @ basis @ basis.T, delta, atol=EXACT, rtol=0)
    gradient = ((w + delta) @ x.T - w @ y.T) @ x / len(x) + ridge * delta
    assert (gradient @ basis).norm() < EXACT
    assert gradient.norm() > 0.1


def test_an_unrestricted_update_is_the_rewrite() -> None:
    w, x, y = random(5, 7), random(20, 7, seed=1), random(20, 7, seed=2)
    rewrite = Rewrite(7, w.device)
    rewrite.add(x, y)
    torch.testing.assert_close(
        w + restricted(w, x, y, torch.eye(7, dtype=w.dtype), 0.2), rewrite.solve(w, 0.2), atol=EXACT, rtol=0
    )


def test_a_null_space_sees_neither_what_is_kept_nor_the_invariants() -> None:
    kept, s = random(50, 3) @ random(3, 9, seed=1), random(2, 9, seed=2)
    moment = kept.T @ kept / 50
    basis = null_space(moment, 1e-6 * moment.diagonal().mean(), s)
    assert basis.shape == (9, 9 - 3 - 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=basis.dtype), atol=EXACT, rtol=0)
    assert (s @ basis).norm() < EXACT
    assert (kept @ basis).norm() < 1e-6
    assert (random(1, 9, seed=4) @ basis).norm() > 0.1


def test_a_null_space_of_nothing_is_everything() -> None:
    zero = torch.zeros(4, 4, dtype=torch.float64)
    assert null_space(zero, zero.sum(), torch.zeros(2, 4, dtype=torch.float64)).shape == (4, 4)


@pytest.mark.parametrize(("word", "other"), [("cat", ""), ("cat", "dog"), ("cat", "horses"), ("elephant", "cow")])
def test_tokens_meet_their_counterparts(word: str, other: str) -> None:
    """Every letter is a token: behind a longer word all positions are shifted, and a comma still meets a comma."""
    model = tiny.model(window=24)
    prompts = [" ".join(f"a {w} , red".split()) for w in (word, other)]
    c, a = model.encode(prompts).tokens
    x, y = matched(c[None], a[None], *(model.need_text().lengths([p]) for p in prompts))
    meets = {int((c == i).all(1).nonzero()): int((a == j).all(1).nonzero()) for i, j in zip(x, y, strict=True)}
    start = 2  # behind the start token and "a"
    comma, end = start + len(word), start + len(other)
    assert min(meets) == start
    assert {meets[comma + i] - end for i in range(4)} == {0, 1, 2, 3}
    assert meets[comma - 1] == max(end - 1, start)
    assert min(meets.values()) == max(end - len(word), start)


def test_equal_prompts_have_no_pairs() -> None:
    c = tiny.model().encode(["a cat", "a dog"]).tokens
    assert len(matched(c, c, [7, 7], [7, 7])[0]) == 0
    assert len(matched(c, c.flip(0), [7, 7], [7, 7])[0]) > 0


def test_padding_meets_the_padding_of_its_place() -> None:
    model = tiny.model(window=24)
    prompts = ["a elephant, red", "a , red"]
    c, a = model.encode(prompts).tokens[:, None]
    long, short = ([n] for n in model.need_text().lengths(prompts))
    index, differ = counterparts(c, a, long, short)
    end = long[0]
    assert index[0, end:].tolist() == list(range(end, 24))
    assert index[0, end - 1] == short[0] - 1  # the end token meets the end token
    assert not differ[0, :2].any()
    assert differ[0, 2:].all()
    # a longer anchor's words reach into the padding, which must not be read as words
    assert counterparts(a, c, short, long)[0][0, short[0] :].min() == end - 1


def test_a_fitted_map_is_the_minimum_of_what_it_says() -> None:
    x, y, k, z = random(20, 7), random(20, 5, seed=1), random(30, 7, seed=2), random(30, 5, seed=3)
    delta = fitted([(x, y, 1.0), (k, z, 2.0)], 0.3)
    ridge = 0.3 * (x.T @ x / 20 + 2 * k.T @ k / 30).diagonal().mean()

    def gradient(d: Tensor) -> Tensor:
        return (d @ x.T - y.T) @ x / 20 + 2 * (d @ k.T - z.T) @ k / 30 + ridge * d

    assert gradient(torch.zeros(5, 7, dtype=x.dtype)).norm() > 0.1
    assert gradient(delta).norm() < EXACT
