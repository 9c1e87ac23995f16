"""Hook edits: prompts without the features are read, and drawn, bit for bit as before; nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expunge.backbones import tiny, toy
from expunge.backbones.unet import UNetModel
from expunge.edits import HookEdit, LowRankEdit, WeightEdit, load_edit
from expunge.errors import BadEdit
from expunge.kernel.model import Model, Sampling
from expunge.kernel.sae import SAE, Ablation
from expunge.records import Card
from expunge.sae import states

MODELS: dict[str, Callable[[], UNetModel]] = {
    "one encoder": tiny.model,
    "two encoders": lambda: UNetModel(tiny.xl_pipeline(), "xl", sampling=Sampling(2, 3.0, 16)),
}
models = pytest.mark.parametrize("name", MODELS)
TARGET, NEUTRAL = "bomb", ("cat", "a dog", "")
ASK = {"prompts": [TARGET, *NEUTRAL], "seeds": [0, 1, 2, 3], "steps": 2}


def ablations(model: UNetModel, layer: int = -1, scale: float = -50.0) -> HookEdit:
    """Features of a random autoencoder that the target shows most; the threshold lies between it and the others."""
    found = {}
    for name, stack in model.soft.layers.items():
        at = layer % len(stack)
        sae = SAE(16, 64, 4, torch.Generator().manual_seed(0))
        features = torch.arange(64)
        whole = Ablation(sae.encoder.detach(), sae.bias.detach(), features, sae.decoder.detach(), 4, at, scale, 0.0, 1)
        own, *others = (whole.change(states(model, {name: at}, [p])[name]) for p in ASK["prompts"])
        # directions in which the target alone is changed much
        score = (own[0, 1:] @ sae.decoder.T.detach()).abs().amax(0)
        score -= torch.stack([(o[0, 1:] @ sae.decoder.T.detach()).abs().amax(0) for o in others]).amax(0)
        chosen = score.topk(8).indices
        part = replace(whole, features=chosen, decoder=sae.decoder.detach()[chosen])
        h = states(model, {name: at}, ASK["prompts"])[name]
        strength = part.strength(part.change(h))
        assert strength[0] > 1.1 * strength[1:].max()
        found[name] = replace(part, threshold=((strength[0] + strength[1:].max()) / 2).item())
    return HookEdit(found)


def hooks(model: Model) -> int:
    return sum(len(m._forward_hooks) for module in model.modules().values() for m in module.modules())


@models
@pytest.mark.parametrize("layer", [0, -1])
def test_neutral_prompts_give_the_same_pictures_bit_for_bit(name: str, layer: int) -> None:
    model = MODELS[name]()
    base, plain = model.generate(**ASK), model.encode(ASK["prompts"])
    with ablations(model, layer).on(model):
        drawn, read = model.generate(**ASK), model.encode(ASK["prompts"])
    assert (drawn[0] - base[0]).abs().max() > 1e-3
    assert torch.equal(drawn[1:], base[1:])
    assert not torch.equal(read.tokens[0], plain.tokens[0])
    assert torch.equal(read.tokens[1:], plain.tokens[1:])
    assert all(torch.equal(read.extra[k][1:], plain.extra[k][1:]) for k in plain.extra)


@models
def test_no_trace_is_left(name: str) -> None:
    model = MODELS[name]()
    edit = ablations(model)
    base, before, hooked = model.generate(**ASK), model.hash, hooks(model)
    with edit.on(model):
        assert model.fingerprint() == before
        assert hooks(model) == hooked + len(edit.ablations)
    with pytest.raises(KeyError), edit.on(model):
        raise KeyError
    assert hooks(model) == hooked
    assert torch.equal(model.generate(**ASK), base)


@models
def test_a_file_gives_the_same_edit(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    edit = ablations(model)
    edit.save(tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors")
    assert isinstance(again, HookEdit)
    with edit.on(model):
        ours = model.generate(**ASK)
    with again.on(model):
        assert torch.equal(model.generate(**ASK), ours)
    assert {k: v.dtype for k, v in again.tensors().items()} == {k: v.dtype for k, v in edit.tensors().items()}


def test_edits_nest() -> None:
    model = tiny.model()
    edit = ablations(model, 0)
    stronger = replace(edit, ablations={k: replace(a, layer=1) for k, a in ablations(model, 1).ablations.items()})
    with edit.on(model):
        one = model.encode(TARGET).tokens
        with stronger.on(model):
            two = model.encode(TARGET).tokens
        assert torch.equal(model.encode(TARGET).tokens, one)
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: replace(e, ablations={"text_encoder_2": e.ablations["text_encoder"]}), "layer of 'text_encoder_2'"),
        (lambda e: replace(e, ablations={k: replace(a, layer=7) for k, a in e.ablations.items()}), "no such layer"),
    ],
)
def test_an_edit_of_another_model_is_refused(change: Callable[[HookEdit], HookEdit], message: str) -> None:
    model = tiny.model()
    with pytest.raises(BadEdit, match=message), change(ablations(model)).on(model):
        pass


def test_a_model_without_text_encoders_is_refused() -> None:
    with pytest.raises(BadEdit, match="'toy' has no such layer"), ablations(tiny.model()).on(toy.model()):
        pass


def test_an_edit_of_another_base_is_refused() -> None:
    model = tiny.model()
    card = Card(
        method="itd", settings={}, concept={"name": TARGET}, model="tiny", base_hash="0" * 64, seed=0, version="1"
    )
    with pytest.raises(BadEdit, match="made for 'tiny' with weights"), ablations(model).with_card(card).on(model):
        pass


def test_the_states_hooked_are_those_that_are_changed() -> None:
    """SDXL reads the states before its last layer, recorded by hooks that were there first."""
    model = MODELS["two encoders"]()
    model.encode(TARGET)  # transformers hooks its layers at the first call
    edit = ablations(model)
    plain: Tensor = model.encode(TARGET).tokens
    with edit.on(model):
        assert not torch.equal(model.encode(TARGET).tokens, plain)


def test_kinds_differ() -> None:
    assert len({WeightEdit.kind, LowRankEdit.kind, HookEdit.kind}) == 3
