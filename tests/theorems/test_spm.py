"""SPM: membranes that erase what opens them and let everything else pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from expunge import checkpoint
from expunge.backbones import tiny, toy, unet
from expunge.concept import Concept
from expunge.door import erase
from expunge.edits import GatedEdit
from expunge.errors import BadEdit
from expunge.kernel.gate import planted
from expunge.kernel.model import Model
from expunge.kernel.path import KINDS, Kind
from expunge.kernel.sampler import clean
from expunge.kernel.state import State
from expunge.methods.spm import SPM

CONVERGED = 1e-2  # means are of order 1; what Adam at this rate leaves after the steps below
TRAIN: dict[str, Any] = {"lr": 0.04, "batch": 32, "rollouts": 8, "sampling_steps": 10}
SHORT: dict[str, Any] = {"steps": 3, "batch": 2, "rollouts": 1, "sampling_steps": 3, "lr": 0.05, "anchoring": 1.0}
BOMB = Concept("bomb", templates=("{c}", "a {c}"), keep=("cat", "dog"))
DAGGER = Concept("dagger", templates=("{c}", "a {c}"), keep=("cat", "dog"))


@torch.no_grad()
def mean(model: toy.ToyModel, prompt: str) -> Tensor:
    """The colour that a prompt stands for: at the last time the noise says nothing, and the clean prediction is it."""
    denoiser, c = model.denoiser, model.encode(prompt)
    x_t, t = torch.zeros(1, *denoiser.shape), torch.tensor([int(denoiser.path.last)])
    return clean(denoiser, lambda x, t: denoiser(x, t, c), x_t, t)[0].mean((1, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_open_membrane_reaches_negative_guidance(kind: Kind) -> None:
    model = toy.model(kind)
    before, null, cat = mean(model, "bomb"), mean(model, ""), mean(model, "cat")
    wanted = null - (before - null)
    assert (before - wanted).norm() > 0.1
    edit = erase(model, BOMB, SPM(steps=120, anchoring=1.0, **TRAIN), seed=0)
    with edit.on(model):
        torch.testing.assert_close(mean(model, "bomb"), wanted, atol=CONVERGED, rtol=0)
        torch.testing.assert_close(mean(model, "cat"), cat, atol=0, rtol=0)
    assert torch.equal(mean(model, "bomb"), before)


def test_latent_anchoring_holds_what_an_open_membrane_sees() -> None:
    """Exported without its gate the membrane is open to everything: anchored, it hardly moves what is kept."""
    drift = {}
    for anchoring in (0.0, 10.0):
        model = toy.model("eps")
        cat = mean(model, "cat")
        edit = erase(model, BOMB, SPM(steps=120, anchoring=anchoring, **TRAIN), seed=0)
        assert isinstance(edit, GatedEdit)
        down, up = edit.membranes[0].factors["unet.to_mean.weight"]
        with torch.no_grad():
            model.network.to_mean.weight.add_(up @ down)
        drift[anchoring] = (mean(model, "cat") - cat).norm().item()
    assert drift[0.0] > 0.05
    assert drift[10.0] < drift[0.0] / 4


def test_each_concept_has_a_membrane_of_its_own() -> None:
    model = toy.model("v")
    before = {w: mean(model, w) for w in ("bomb", "dagger", "bomb dagger")}
    edit = erase(model, [BOMB, DAGGER], SPM(steps=200, anchoring=1.0, **TRAIN), seed=0)
    assert isinstance(edit, GatedEdit)
    with edit.on(model):
        for word in ("bomb", "dagger"):
            torch.testing.assert_close(mean(model, word), -before[word], atol=2 * CONVERGED, rtol=0)
    alone = GatedEdit(edit.membranes[:1], edit.card)
    with alone.on(model):
        torch.testing.assert_close(mean(model, "bomb"), -before["bomb"], atol=2 * CONVERGED, rtol=0)
        assert torch.equal(mean(model, "dagger"), before["dagger"])


def pictures(model: tiny.UNetModel, prompts: list[str]) -> Tensor:
    return model.generate(prompts, seeds=range(len(prompts)))


def test_a_closed_gate_leaves_pictures_as_they_are_bit_for_bit() -> None:
    """In one batch with prompts that open it, and under guidance, whose null row has a gate of its own."""
    model = tiny.model()
    prompts = ["cat", "a bomb", "dog", "bomb", ""]
    base = pictures(model, prompts)
    edit = erase(model, BOMB, SPM(**SHORT), seed=0)
    with edit.on(model):
        drawn = pictures(model, prompts)
    moved = (drawn - base).abs().amax((1, 2, 3)).tolist()
    assert min(moved[1], moved[3]) > 1e-3
    assert [moved[i] for i in (0, 2, 4)] == [0, 0, 0]


def test_membranes_compose_side_by_side() -> None:
    """Nested or joined, each erases its own; a prompt that opens one does not meet the other."""
    model = tiny.model()
    one, two = (erase(model, c, SPM(**SHORT), seed=0) for c in (BOMB, DAGGER))
    assert isinstance(one, GatedEdit)
    assert isinstance(two, GatedEdit)
    prompts = ["a bomb", "a dagger", "cat"]
    base = pictures(model, prompts)
    with one.on(model):
        first = pictures(model, prompts)
    with two.on(model):
        second = pictures(model, prompts)
    assert (first[0] - base[0]).abs().max() > 1e-3
    assert (second[1] - base[1]).abs().max() > 1e-3
    with one.on(model), two.on(model):
        nested = pictures(model, prompts)
    with GatedEdit.joined([one, two]).on(model):
        joined = pictures(model, prompts)
    assert torch.equal(nested[2], base[2])
    torch.testing.assert_close(joined, nested, atol=1e-5, rtol=0)


def finetuned(scale: float, text: float = 0.0) -> tiny.UNetModel:
    """A fine-tune of the tiny model: the same names and shapes, other weights."""
    pipe = tiny.pipeline()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part, amount in ((pipe.unet, scale), (pipe.text_encoder, text)):
            for p in part.parameters():
                p.add_(amount * p.std() * torch.randn(p.shape, generator=g) if p.numel() > 1 else 0)
    return tiny.UNetModel(pipe, "finetune", sampling=tiny.model().sampling)


@pytest.mark.parametrize("text", [0.0, 0.05])
def test_a_membrane_carries_over_to_another_fine_tune_when_asked_to(text: float) -> None:
    base, other = tiny.model(), finetuned(0.05, text)
    edit = erase(base, BOMB, SPM(**SHORT), seed=0)
    assert isinstance(edit, GatedEdit)
    with pytest.raises(BadEdit, match=r"made for 'tiny' with weights.*on\(model, transfer=True\)"), edit.on(other):
        pass
    prompts = ["a bomb", "cat", ""]
    before, own = pictures(other, prompts), pictures(base, prompts)
    assert (before - own).abs().max() > 1e-3
    with edit.on(other, transfer=True):
        after = pictures(other, prompts)
    assert (after[0] - before[0]).abs().max() > 1e-3
    assert torch.equal(after[1:], before[1:])
    assert torch.equal(pictures(other, prompts), before)
    # what it does there is what it does here, as far as the two networks are alike
    with edit.on(base):
        here = pictures(base, prompts)[0] - own[0]
    there = after[0] - before[0]
    assert torch.cosine_similarity(here.flatten(), there.flatten(), 0) > 0.8


def test_a_membrane_does_not_fit_another_architecture() -> None:
    edit = erase(toy.model(), BOMB, SPM(**SHORT), seed=0)
    assert isinstance(edit, GatedEdit)
    message = r"layer 'unet.to_mean.weight' is missing in 'tiny'"
    with pytest.raises(BadEdit, match=message), edit.on(tiny.model(), transfer=True):
        pass


def test_one_membrane_of_stable_diffusion_1() -> None:
    """The U-Net of Stable Diffusion 1 by its configuration, without weights: 423,936 numbers, 0.05 % of it."""
    with torch.device("meta"):
        network = UNet2DConditionModel(cross_attention_dim=768)
    total = sum(p.numel() for p in network.parameters())
    names = [n for n, _ in network.named_parameters() if unet.GROUPS["transformer-blocks"](n)]
    factors = planted(network, names, 1, torch.Generator())
    numbers = sum(w.numel() for pair in factors.values() for w in pair)
    assert total == 859_520_964
    assert len(factors) == 192
    assert numbers == 423_936
    assert round(4 * numbers / 1e6, 1) == 1.7
    assert round(100 * numbers / total, 2) == 0.05


def run(model: Model, state: State, stop: int | None = None, path: Path = Path()) -> dict[str, Tensor]:
    """Drive a fit to its end, or save it after an update and leave."""
    fit = SPM(**SHORT).fit(model, [BOMB.resolve(), DAGGER.resolve()], state)
    while True:
        try:
            step = next(fit)
        except StopIteration as end:
            return dict(end.value.tensors())
        if step.i == stop:
            checkpoint.save(path, state.state_dict())
            fit.close()
            return {}


def test_a_resumed_fit_is_the_same_to_the_bit(tmp_path: Path) -> None:
    whole = run(tiny.model(), State(0))
    run(tiny.model(), State(0), 1, tmp_path / "state")
    resumed = run(tiny.model(), State.load(checkpoint.load(tmp_path / "state")))
    other = run(tiny.model(), State(1))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert any(not torch.equal(whole[k], other[k]) for k in whole)


def test_an_interrupted_fit_leaves_no_hook_behind(tmp_path: Path) -> None:
    model = tiny.model()
    base = pictures(model, ["bomb"])
    run(model, State(0), 1, tmp_path / "state")
    assert torch.equal(pictures(model, ["bomb"]), base)
