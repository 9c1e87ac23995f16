"""RECE: what still produces the concept after a closed-form edit is found, and goes as well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from expunge import checkpoint
from expunge.backbones import tiny, toy
from expunge.concept import Concept
from expunge.door import erase
from expunge.kernel.condition import Condition
from expunge.kernel.model import Model
from expunge.kernel.state import Probe, State
from expunge.methods.base import readers, readings
from expunge.methods.rece import RECE, derived
from expunge.methods.uce import UCE

EXACT = 1e-9  # float64 on systems of this size
BOMB = Concept("bomb", templates=("{c}", "a {c}"), keep=("cat",))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(model: Model) -> list[Tensor]:
    return [w.detach().double().clone() for w in readers(model).values()]


def missed(old: list[Tensor], new: list[Tensor], still: Tensor, c: Tensor) -> float:
    """How far encodings stay from what the concept was read as."""
    return sum((still @ w.T - c @ o.T).square().mean().item() for w, o in zip(new, old, strict=True))


def test_a_derived_encoding_is_the_minimum_of_its_objective() -> None:
    old, new = ([random(5, 7, seed=10 * k + i) for i in range(3)] for k in (1, 2))
    c, shrink = random(4, 7), 0.2
    lam = shrink * sum(w.square().sum() for w in new) / 7
    found = derived(old, new, c, shrink)

    def gradient(x: Tensor) -> Tensor:
        return sum(((x @ w.T - c @ o.T) @ w for w, o in zip(new, old, strict=True)), lam * x)

    assert gradient(c).norm() > 1
    assert gradient(found).norm() < EXACT
    assert derived(old, new, c, 1e9).norm() < 1e-6


def test_what_a_closed_form_leaves_reachable_is_erased() -> None:
    """After UCE an encoding is read almost as the concept was; after RECE that encoding is read as the anchor."""
    model = tiny.model()
    x, y = readings(model, [BOMB.resolve()], "blank")
    old = weights(model)
    with erase(model, BOMB, RECE(rounds=0), seed=0).on(model):
        once = weights(model)
    with erase(model, BOMB, RECE(rounds=3, shrink=0.01), seed=0).on(model):
        often = weights(model)
    back = derived(old, once, x, 0.01)
    assert missed(old, once, back, x) < 0.2 * missed(old, once, x, x)
    assert missed(old, often, back, x) > 5 * missed(old, once, back, x)
    assert missed(old, often, back, y) < missed(old, once, back, y)
    # and no other encoding does as well any more
    assert missed(old, often, derived(old, often, x, 0.01), x) > 2 * missed(old, once, back, x)


def test_without_rounds_it_is_uce() -> None:
    none = RECE(rounds=0)
    same = UCE(ridge=none.ridge, preserve=none.preserve)  # the defaults were chosen apart
    one, two, more = (erase(tiny.model(), BOMB, method, seed=0).tensors() for method in (none, same, RECE(rounds=1)))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-7, rtol=0)
    assert any((more[name] - value).abs().max() > 1e-3 for name, value in one.items())


def test_what_was_erased_first_does_not_come_back() -> None:
    model = toy.model("v")
    concepts = [Concept(w, templates=("{c}",), keep=("cat",)) for w in ("bomb", "dagger")]
    c, null = model.encode(["bomb", "dagger"]).tokens.sum(1), torch.zeros(3)
    before = c @ model.network.to_mean.weight.T
    assert before.abs().max() > 0.1
    with erase(model, concepts, RECE(rounds=4, ridge=1e-6), seed=0).on(model):
        after = c @ model.network.to_mean.weight.T
    torch.testing.assert_close(after, null.expand(2, 3), atol=1e-3, rtol=0)


def test_a_probe_sees_what_the_rounds_have_made() -> None:
    """Nothing in the model changes while they go on."""
    model, looks = tiny.model(), list[list[Tensor]]()
    base = weights(model)

    def look(now: Model) -> float:
        looks.append(weights(now))
        return 0.0 if len(looks) == 2 else 1.0

    edit = erase(model, BOMB, RECE(rounds=4), seed=0, probe=Probe(look, until=0.5, every=1))
    assert edit.card is not None
    assert edit.card.steps == len(looks) == 2
    for rounds, seen in enumerate(looks):
        with erase(model, BOMB, RECE(rounds=rounds), seed=0).on(model):
            assert all(torch.equal(a, b) for a, b in zip(seen, weights(model), strict=True))
    assert all(torch.equal(v, edit.tensors()[k]) for k, v in erase(model, BOMB, RECE(rounds=1)).tensors().items())
    assert any(not torch.equal(a, b) for a, b in zip(looks[0], base, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), base, strict=True))


def test_of_many_prompts_a_sample_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    many = Concept("bomb", templates=tuple(f"{a} {{c}}" for a in "abcdefgh"), keep=("cat", "dog", "cup", "hat"))
    told, seen, encode = many.resolve(), set[str](), type(tiny.model()).encode

    def listening(self: Model, prompts: str | list[str]) -> Condition:
        seen.update([prompts] if isinstance(prompts, str) else prompts)
        return encode(self, prompts)

    def edited(method: RECE, seed: int) -> tuple[tuple[int, int], dict[str, Tensor]]:
        seen.clear()
        found = dict(erase(tiny.model(), many, method, seed=seed).tensors())
        return (len(seen.intersection(told.prompts)), len(seen.intersection(told.keeps))), found

    monkeypatch.setattr(type(tiny.model()), "encode", listening)
    assert edited(RECE(), 0)[0] == (len(told.prompts), len(told.keeps)) != (3, 3)
    (few, one), (_, again), (_, other) = (edited(RECE(sample=3), seed) for seed in (0, 0, 1))
    assert few == (3, 3)
    assert all(torch.equal(v, again[k]) for k, v in one.items())
    assert any(not torch.equal(v, other[k]) for k, v in one.items())


@pytest.mark.parametrize("sample", [512, 1])
def test_a_resumed_round_is_the_same_to_the_bit(tmp_path: Path, sample: int) -> None:
    method, targets = RECE(rounds=3, sample=sample), [BOMB.resolve()]

    def rest(model: Model, state: State, stop: int | None = None) -> dict[str, Tensor]:
        fit = method.fit(model, targets, state)
        while True:
            try:
                step = next(fit)
            except StopIteration as end:
                return dict(end.value.tensors())
            if step.i == stop:
                checkpoint.save(tmp_path / "state", state.state_dict())
                fit.close()
                return {}

    whole = rest(tiny.model(), State(0))
    rest(tiny.model(), State(0), stop=1)
    resumed = rest(tiny.model(), State.load(checkpoint.load(tmp_path / "state")))
    short = erase(tiny.model(), BOMB, RECE(rounds=1, sample=sample), seed=0).tensors()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert any(not torch.equal(whole[k], short[k]) for k in whole)
