"""Sparse autoencoders: the sparse arithmetic equals the dense, training finds planted features, ablation is exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.kernel.sae import SAE, Ablation, active, geometric_median, hooked, train
from expunge.kernel.state import State

WIDTH, FEATURES, K = 16, 48, 4
ROUNDING = 1e-5  # float32 sums of a few numbers of order 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(n: int, rows: Tensor, g: torch.Generator) -> Tensor:
    """States that are each a positive sum of two of the rows, on an offset."""
    pair = torch.stack([torch.randperm(len(rows), generator=g)[:2] for _ in range(n)])
    return ((1 + torch.rand(n, 2, 1, generator=g)) * rows[pair]).sum(1) + 3


def some_sae(features: int = FEATURES) -> SAE:
    return SAE(WIDTH, features, K, generator(1))


def dense(sae: SAE, x: Tensor) -> Tensor:
    """All activations, most of them zero."""
    scores = (x - sae.bias) @ sae.encoder.T
    kept = scores >= scores.topk(sae.k).values[..., -1:]
    return (scores * kept).relu()


def test_sparse_decoding_equals_the_dense_one() -> None:
    sae, x = some_sae(), torch.randn(2, 5, WIDTH, generator=generator())
    assert (sae(x) - x).abs().max() > 0.1
    torch.testing.assert_close(sae(x), dense(sae, x) @ sae.decoder + sae.bias, atol=ROUNDING, rtol=0)


def test_sparse_gradients_equal_the_dense_ones() -> None:
    sae, x = some_sae(), torch.randn(9, WIDTH, generator=generator())
    outs = (sae(x), dense(sae, x) @ sae.decoder + sae.bias)
    ours, theirs = (torch.autograd.grad(out.square().sum(), list(sae.parameters())) for out in outs)
    assert all(bool(g.any()) for g in theirs)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def learned(
    steps: int, state: State | None = None, stop: int | None = None
) -> tuple[SAE, State, list[dict[str, float]]]:
    """Train on states made of 12 planted features."""
    rows = F.normalize(torch.randn(12, WIDTH, generator=generator(2)), dim=1)
    state, sae = state or State(0), SAE(WIDTH, FEATURES, 2, generator(1))
    sae.bias.data = geometric_median(planted(256, rows, generator(3)))

    def draw() -> dict[str, Tensor]:
        return {"text": planted(128, rows, state.generator)}

    figures = []
    for step in train({"text": sae}, draw, state, steps=steps, lr=1e-2, patience=20):
        figures.append(step.losses)
        if step.i == stop:
            break
    return sae, state, figures


def test_training_explains_planted_features_and_keeps_rows_of_length_one() -> None:
    sae, _, figures = learned(200)
    assert figures[0]["error"] > 0.3
    assert figures[-1]["error"] < 0.05
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(FEATURES), atol=ROUNDING, rtol=0)


def test_gradients_that_only_stretch_rows_never_reach_adam() -> None:
    before, _, _ = learned(3, stop=1)
    x = torch.randn(64, WIDTH, generator=generator())
    raw = torch.autograd.grad(before.losses(x, 20)["error"], before.decoder)[0]
    assert (raw * before.decoder).sum(1).abs().max() > 1e-4
    after, _, _ = learned(3, stop=2)
    assert after.decoder.grad is not None
    assert after.decoder.grad.norm() > 1e-3
    assert (after.decoder.grad * before.decoder).sum(1).abs().max() < 1e-6


def test_training_goes_on_bit_for_bit() -> None:
    whole, _, figures = learned(8)
    _, state, first = learned(8, stop=3)
    saved = {k: v.copy() if isinstance(v, dict) else v for k, v in copied(state.state_dict()).items()}
    again, _, rest = learned(8, State.load(saved))
    assert [*first, *rest] == figures
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def test_dead_features_get_a_gradient_once_they_are_dead() -> None:
    """The released code waits for ten times its whole training: there the term never starts."""
    sae, x = some_sae(), torch.randn(256, WIDTH, generator=generator())
    with torch.no_grad():
        sae.encoder[:8] *= 0.01  # too weak to be among the strongest, though they point somewhere
    for patience, revived in ((10**6, False), (3, True)):
        sae.idle.zero_()
        for _ in range(5):
            terms = sae.losses(x, patience)
        assert ("revive" in terms) is revived
        grad = torch.autograd.grad(torch.stack(list(terms.values())).sum(), sae.encoder)[0]
        assert bool(grad[:8].any()) is revived
        assert bool(grad[8:].any())


def test_geometric_median_is_not_drawn_away_by_a_few_long_states() -> None:
    x = torch.randn(200, WIDTH, generator=generator()) * 0.1 + 1
    x[:10] *= 300
    assert (x.mean(0) - 1).norm() > 10
    assert (geometric_median(x) - 1).norm() < 0.2


@pytest.fixture
def ablation() -> Ablation:
    sae = some_sae()
    features = torch.tensor([3, 7, 11, 40])
    return Ablation(
        sae.encoder.detach(), sae.bias.detach(), features, sae.decoder.detach()[features], K, 0, -2.0, -1.0, first=1
    )


@pytest.fixture
def states() -> Tensor:
    return torch.randn(6, 5, WIDTH, generator=generator())


def test_ablation_is_the_dense_one_with_the_error_kept(ablation: Ablation, states: Tensor) -> None:
    sae = some_sae()
    z = dense(sae, states)
    weaker = z.clone()
    weaker[..., ablation.features] *= ablation.scale
    want = states + (weaker - z) @ sae.decoder.detach()
    want[:, 0] = states[:, 0]
    got = ablation(states)
    assert got is not None
    assert (got - states).abs().max() > 0.1
    torch.testing.assert_close(got, want, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("how", ["no feature", "scale 1"])
def test_ablating_nothing_is_the_identity(ablation: Ablation, states: Tensor, how: str) -> None:
    """Even where the threshold lets every prompt be changed. Without the error it would not be."""
    none = replace(ablation, scale=1.0)
    if how == "no feature":
        none = replace(ablation, features=ablation.features[:0], decoder=ablation.decoder[:0])
    sae = some_sae()
    assert (sae(states) - states).abs().max() > 0.1
    for threshold in (-1.0, 0.0):
        out = replace(none, threshold=threshold)(states)
        assert out is None or torch.equal(out, states)


def test_prompts_below_the_threshold_are_not_touched(ablation: Ablation, states: Tensor) -> None:
    strength = ablation.strength(ablation.change(states))
    tau = strength.sort().values[3].item()
    assert (strength > tau).tolist().count(True) == 2
    out = replace(ablation, threshold=tau)(states)
    assert out is not None
    for row, hit in enumerate(strength > tau):
        assert torch.equal(out[row], states[row]) is not bool(hit)
    assert replace(ablation, threshold=strength.max().item())(states) is None


def test_the_first_token_is_neither_changed_nor_counted(ablation: Ablation, states: Tensor) -> None:
    longer = states.clone()
    longer[:, 0] = 100 * ablation.encoder[3]
    assert active(longer[:, 0], ablation.encoder, ablation.bias, K)[1].eq(3).any()
    assert torch.equal(ablation.strength(ablation.change(longer)), ablation.strength(ablation.change(states)))
    out = ablation(longer)
    assert out is not None
    assert torch.equal(out[:, 0], longer[:, 0])


def test_a_hook_comes_before_those_that_only_look_on() -> None:
    """transformers records the states that SDXL reads by hooks, which are there before ours."""
    layer, seen = nn.Identity(), list[Tensor]()
    layer.register_forward_hook(lambda _, __, out: seen.append(out))
    with hooked(layer, lambda h: h + 1):
        assert layer(torch.zeros(2)).tolist() == [1, 1]
    assert layer(torch.zeros(2)).tolist() == [0, 0]
    assert [s.tolist() for s in seen] == [[1, 1], [0, 0]]
