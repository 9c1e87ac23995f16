"""SaRA's selection inside a method: what is not among the smallest weights stays bit for bit, in the average too."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expunge import door
from expunge.backbones import tiny, toy
from expunge.concept import Concept
from expunge.edits import Edit
from expunge.errors import SettingError
from expunge.kernel.model import Model
from expunge.kernel.saliency import smallest
from expunge.kernel.state import Step
from expunge.methods import erasediff
from expunge.methods.allbutone import AllButOne
from expunge.methods.ant import ANT
from expunge.methods.ap import AP
from expunge.methods.erasediff import EraseDiff
from expunge.methods.esd import ESD
from expunge.methods.fewshot import FewShot
from expunge.methods.hfi import HFI
from expunge.methods.neggrad import NegGrad
from expunge.methods.salun import SalUn
from expunge.methods.sdd import SDD

BOMB = Concept("bomb", templates=("{c} red green blue bright dark",), keep=())
SHORT: dict[str, Any] = {"steps": 8, "lr": 0.05, "batch": 8}
ROLLED: dict[str, Any] = {"rollouts": 2, "sampling_steps": 6, **SHORT}
SHOWN: dict[str, Any] = {"group": "cross-attention", **SHORT}

RANKED = {
    "allbutone": partial(AllButOne, **ROLLED),
    "ap": partial(AP, every=2, **ROLLED),
    "esd": partial(ESD, **ROLLED),
    "hfi": partial(HFI, decay=0.5, **ROLLED),
    "sdd": partial(SDD, decay=0.5, **ROLLED),
}
PICTURES = {
    "erasediff": partial(EraseDiff, **SHOWN),
    "neggrad": partial(NegGrad, beta=1.0, **SHOWN),
    "salun": partial(SalUn, density=1.0, **SHOWN),
}
METHODS = {**RANKED, **PICTURES, "ant": partial(ANT, density=1.0, **ROLLED)}
methods = pytest.mark.parametrize("name", METHODS)


def erase(model: Model, method: Any, **rest: Any) -> Edit:
    """Erase, from pictures that the model draws where a method needs them."""
    concept = replace(BOMB, keep=("cat",)) if method.needs.images else BOMB
    if method.needs.encoders:
        concept = replace(concept, templates=("{c}", "a {c}"))
    return door.erase(model, concept, method, make_images=6 if method.needs.images else 0, **rest)


def moved(method: Any, share: float) -> tuple[Tensor, Tensor]:
    """Return where the edit differs from the base, and where the smallest weights are."""
    model = toy.model("v")
    base = model.network.to_mean.weight.detach().clone()
    edit = erase(model, method, seed=0).tensors()
    chosen = smallest({"w": base}, share)["w"].bool()
    return edit["unet.to_mean.weight"] != base, chosen


@methods
def test_the_smallest_weights_alone_are_trained(name: str) -> None:
    read = [toy.WORDS.index(w) for w in BOMB.templates[0].format(c="bomb").split()]
    everywhere, _ = moved(METHODS[name](), 0.0)
    assert everywhere[:, read].all()
    some, chosen = moved(METHODS[name](smallest=0.25), 0.25)
    assert torch.equal(some, everywhere & chosen)
    assert some.any()
    assert (everywhere & ~chosen).any()


@methods
def test_a_selection_of_everything_is_none(name: str) -> None:
    """Bit for bit; of one update, because halfway what has grown is held."""
    one, two = (erase(toy.model("v"), METHODS[name](smallest=s, steps=1), seed=0).tensors() for s in (0.0, 1.0))
    base = toy.model("v").network.to_mean.weight
    assert not torch.equal(one["unet.to_mean.weight"], base)
    assert all(torch.equal(v, two[k]) for k, v in one.items())


@pytest.mark.parametrize("name", RANKED)
def test_not_with_low_rank_factors(name: str) -> None:
    with pytest.raises(SettingError, match="rank must be 0"):
        erase(toy.model("v"), METHODS[name](smallest=0.25, rank=1))


@methods
def test_halfway_what_has_outgrown_its_bound_stands_still(name: str) -> None:
    """Some weights are beyond their tensor's bound by then; they keep their value, and others go on."""
    model = toy.model("v")
    base = model.network.to_mean.weight.detach().clone()
    chosen = smallest({"w": base}, 0.25)["w"].bool()
    bound = (base.abs() * chosen).amax()
    seen: list[torch.Tensor] = []

    def look(step: Step) -> None:
        if "drawn" not in step.losses:
            seen.append(model.network.to_mean.weight.detach().clone())

    erase(model, METHODS[name](smallest=0.25, steps=20, lr=0.02), seed=0, progress=look)
    assert len(seen) == 20
    half, end = seen[9], seen[-1]
    outgrown = chosen & (half.abs() > bound)
    assert outgrown.any()
    assert not (end != half)[outgrown].any()
    assert (end != half).any()


def resumed(method: Any, at: int, make: Any, out: Path) -> bool:
    """Return whether a fit that is killed at an update ends as an undisturbed one."""
    wanted = erase(make(), method, seed=3).tensors()

    def stop(step: Step) -> None:
        if step.i == at and "drawn" not in step.losses:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        erase(make(), method, seed=3, out=out, save_every=0, progress=stop)
    found = erase(make(), method, seed=3, out=out, resume=True).tensors()
    return all(torch.equal(found[k], v) for k, v in wanted.items())


@methods
def test_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Killed behind the adjustment, which is where the masks are no longer those of the base."""
    assert resumed(METHODS[name](smallest=0.25, steps=12), 8, lambda: toy.model("v"), tmp_path / "run")


MASKED = {
    "ant": partial(ANT, density=0.4, maps=3, **ROLLED),
    "salun": partial(SalUn, density=0.4, draws=4, **SHOWN),
}  # of both, three updates draw the map
masked = pytest.mark.parametrize("name", MASKED)


@masked
def test_a_mask_is_drawn_among_the_smallest_weights(name: str) -> None:
    """As many as `density` of them, and not the share that two masks happen to have in common."""
    free, chosen = moved(MASKED[name](), 0.5)
    assert (free & ~chosen).any()
    some, chosen = moved(MASKED[name](smallest=0.5), 0.5)
    assert not (some & ~chosen).any()
    assert int(some.sum()) == round(0.4 * int(chosen.sum()))


@masked
@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_mask_among_the_smallest_weights_is_resumed(name: str, at: int, tmp_path: Path) -> None:
    """Killed while the map is drawn, before and behind the adjustment."""
    assert resumed(MASKED[name](smallest=0.5, steps=10), at, lambda: toy.model("v"), tmp_path / "run")


def test_the_soft_threshold_and_a_selection_exclude_each_other() -> None:
    with pytest.raises(SettingError, match="needs threshold='hard'"):
        SalUn(threshold="soft", smallest=0.25)


def test_lambda_is_that_of_the_weights_which_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole gradients it would weigh what is held, and forget too little or too much of the rest."""
    model, asked, solve = toy.model("v"), list[Any](), erasediff.multiplier
    monkeypatch.setattr(erasediff, "multiplier", lambda *given: (asked.append(given), solve(*given))[1])
    for share in (0.0, 0.25):
        erase(model, PICTURES["erasediff"](smallest=share, steps=1), seed=0)
    (free, *_), (held, *_) = (call[:2] for call in asked)
    chosen = smallest({n: p.detach() for n, p in model.network.named_parameters() if n in free}, 0.25)
    assert any((g * (1 - chosen[n])).any() for n, g in free.items())
    assert all(torch.equal(held[n], g * chosen[n]) for n, g in free.items())


def encoder(model: Model) -> dict[str, Tensor]:
    return {f"text_encoder.{n}": p.detach().clone() for n, p in model.modules()["text_encoder"].named_parameters()}


def test_few_shot_trains_the_smallest_weights_of_its_encoders(tmp_path: Path) -> None:
    few = partial(FewShot, steps=6, lr=1e-2, batch=2, others=2)
    base = encoder(tiny.model())
    free, held = (erase(tiny.model(), few(smallest=s), seed=0).tensors() for s in (0.0, 0.25))
    chosen = {n: m.bool() for n, m in smallest({n: base[n] for n in held}, 0.25).items()}
    assert any((free[n] != base[n])[~chosen[n]].any() for n in free)
    assert not any((held[n] != base[n])[~chosen[n]].any() for n in held)
    assert any((held[n] != base[n]).any() for n in held)
    assert resumed(few(smallest=0.25), 4, tiny.model, tmp_path / "run")
