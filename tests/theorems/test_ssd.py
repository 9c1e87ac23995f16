"""SSD: only what matters to the concept alone is dampened, by how much more it matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from expunge.backbones import tiny, toy
from expunge.concept import Concept, World
from expunge.door import erase
from expunge.errors import NeedsError
from expunge.kernel.path import KINDS, Kind
from expunge.kernel.state import Probe
from expunge.methods.ssd import SSD, dampened

BOMB = Concept("bomb", templates=("{c}",), keep=("cat", "dog"))
SHORT: dict[str, Any] = {"draws": 12, "rollouts": 2, "sampling_steps": 6}


def mean(model: toy.ToyModel, prompt: str) -> Tensor:
    """The colour that a prompt stands for."""
    c = model.encode(prompt).tokens
    layer = model.network.to_mean
    return (c.sum(1) @ layer.weight.T + layer.bias).detach()[0]


def importances(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    w = {"a": torch.randn(6, 5, generator=g), "b": torch.randn(10, 10, generator=g)}
    erased, retained = ({n: torch.rand(v.shape, generator=g) for n, v in w.items()} for _ in range(2))
    return w, erased, retained


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_dampening_against_its_definition(quantile: float, strength: float) -> None:
    w, erased, retained = importances()
    got = dampened(w, erased, retained, quantile, strength)
    for name, v in w.items():
        r = (erased[name] / retained[name]).flatten().tolist()
        flagged = sorted(range(len(r)), key=lambda i: -r[i])[: round((1 - quantile) * len(r))]
        want = v.flatten().clone()
        for i in flagged:
            want[i] *= min(strength / r[i], 1.0)
        torch.testing.assert_close(got[name].flatten(), want, rtol=1e-6, atol=0)
        untouched = [i for i in range(len(r)) if i not in flagged]
        assert torch.equal(got[name].flatten()[untouched], v.flatten()[untouched])
    if quantile < 1:
        assert any(not torch.equal(got[n], w[n]) for n in w)


def test_a_higher_quantile_touches_fewer_weights_and_1_none() -> None:
    w, erased, retained = importances()
    touched = [
        sum(int((dampened(w, erased, retained, q, 1.0)[n] != w[n]).sum()) for n in w) for q in (0.5, 0.8, 0.95, 1.0)
    ]
    assert touched == sorted(touched, reverse=True)
    assert touched[0] > touched[1] > touched[-1] == 0


def test_what_matters_to_both_alike_stays() -> None:
    w, erased, _ = importances()
    assert any(not torch.equal(v, w[n]) for n, v in dampened(w, erased, erased, 0.0, 0.5).items())
    assert all(torch.equal(v, w[n]) for n, v in dampened(w, erased, erased, 0.0, 1.0).items())
    nothing = {n: torch.zeros_like(v) for n, v in w.items()}
    assert all(torch.equal(v, w[n]) for n, v in dampened(w, nothing, nothing, 0.0, 1.0).items())


def test_importances_are_paired() -> None:
    """A retained prompt that is read as the concept has the same importances, draw by draw: nothing is dampened."""
    model = toy.model("eps")
    model.world = World("toy", ("bomb", "bomb again"), (), {}, ("{c}",), ("{c}",))
    before = model.network.to_mean.weight.detach().clone()
    with erase(model, Concept("bomb"), SSD(quantile=0.0, strength=1.0, **SHORT), seed=0).on(model):
        assert torch.equal(model.network.to_mean.weight, before)
    model.world = World("toy", ("bomb", "cat"), (), {}, ("{c}",), ("{c}",))
    with erase(model, Concept("bomb"), SSD(quantile=0.0, strength=1.0, **SHORT), seed=0).on(model):
        assert not torch.equal(model.network.to_mean.weight, before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_concept_becomes_unconditional_and_nothing_else_moves(kind: Kind) -> None:
    """Each word has weights of its own in the Gaussian world: the concept's go to zero."""
    model = toy.model(kind)
    cat, dog, null = (mean(model, w) for w in ("cat", "dog", ""))
    assert (mean(model, "bomb") - null).norm() > 0.1
    with erase(model, BOMB, SSD(**SHORT), seed=0).on(model):
        assert torch.equal(mean(model, "bomb"), null)
        assert torch.equal(mean(model, "cat"), cat)
        assert torch.equal(mean(model, "dog"), dog)


def test_a_probe_finds_the_fewest_weights() -> None:
    """Without the word's third weight, 3 of 36, it is still visible: the search must end just below 33/36."""
    model = toy.model("eps")
    visible = Probe(lambda m: mean(m, "bomb").norm().item(), until=0.0)
    edit = erase(model, BOMB, SSD(quantile=0.2, search=8, **SHORT), seed=0, probe=visible)
    assert edit.card is not None
    tried, seen = edit.card.losses["quantile"], edit.card.losses["probe"]
    assert len(tried) == len(seen) == 8
    content = [q for q, v in zip(tried, seen, strict=True) if v == 0]
    # 0.8 of the range in 8 halvings; the rounding to whole weights makes 3 of 36 out of anything below 33.5/36
    assert 33.5 / 36 - 0.8 / 2**8 - 1e-6 <= max(content) <= 33.5 / 36
    with edit.on(model):
        assert mean(model, "bomb").norm() == 0


def test_a_probe_that_is_never_content_leaves_the_setting() -> None:
    made, model = SSD(quantile=0.5, search=3, **SHORT), tiny.model()
    one = erase(model, BOMB, made, seed=0, probe=Probe(lambda _: 1.0, until=0.5)).tensors()
    two = erase(model, BOMB, made, seed=0).tensors()
    assert all(torch.equal(one[n], two[n]) for n in two)


def test_nothing_retained_is_told() -> None:
    with pytest.raises(NeedsError, match="--keep"):
        erase(toy.model(), Concept("bomb"), SSD(**SHORT))
