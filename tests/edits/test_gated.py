"""Edits of membranes: on disk, joined, exported, refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.backbones import tiny
from expunge.concept import Concept
from expunge.door import erase
from expunge.edits import GatedEdit, load_edit
from expunge.errors import BadEdit, Unsupported
from expunge.kernel.gate import Membranes
from expunge.methods.spm import SPM

SHORT: dict[str, Any] = {"steps": 2, "batch": 2, "rollouts": 1, "sampling_steps": 3, "lr": 0.05, "anchoring": 1.0}
ASK: dict[str, Any] = {"prompts": ["a bomb", "cat"], "seeds": [0, 1]}


def made(word: str, **settings: Any) -> GatedEdit:
    concept = Concept(word, templates=("{c}", "a {c}"), keep=("cat",))
    edit = erase(tiny.model(), concept, SPM(**SHORT | settings), seed=0)
    assert isinstance(edit, GatedEdit)
    return edit


@pytest.fixture(scope="module")
def bomb() -> GatedEdit:
    return made("bomb")


@pytest.fixture(scope="module")
def dagger() -> GatedEdit:
    return made("dagger")


def test_no_weight_changes_and_no_hook_stays_even_after_an_error(bomb: GatedEdit) -> None:
    model = tiny.model()
    base = model.generate(**ASK)

    def fail_inside() -> None:
        with bomb.on(model):
            assert model.fingerprint() == model.hash
            assert not torch.equal(model.generate(**ASK), base)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert torch.equal(model.generate(**ASK), base)


def test_joined_and_loaded_it_is_the_same(bomb: GatedEdit, dagger: GatedEdit, tmp_path: Path) -> None:
    both = GatedEdit.joined([bomb, dagger])
    assert both.card is not None
    assert [c["name"] for c in both.card.concepts] == ["bomb", "dagger"]
    both.save(tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors")
    assert isinstance(again, GatedEdit)
    assert again.card == both.card
    assert [m.gate.closed for m in again.membranes] == [m.gate.closed for m in both.membranes]
    assert len(again.membranes) == 2
    model = tiny.model()
    base = model.generate(**ASK)
    with both.on(model):
        direct = model.generate(**ASK)
    with again.on(model):
        loaded = model.generate(**ASK)
    assert not torch.equal(direct, base)
    assert torch.equal(loaded, direct)


def test_more_than_ten_membranes_stay_in_order(bomb: GatedEdit) -> None:
    many = replace(bomb, membranes=tuple(replace(bomb.membranes[0], gate=replace(bomb.membranes[0].gate, closed=i / 20))
                                         for i in range(12)))  # fmt: skip
    again = GatedEdit.from_tensors(many.tensors(), None)
    assert [m.gate.closed for m in again.membranes] == [i / 20 for i in range(12)]


def test_only_edits_of_one_kind_and_base_are_joined(bomb: GatedEdit) -> None:
    assert bomb.card is not None
    for other in (
        made("dagger", eta=2.0),
        bomb.with_card(replace(bomb.card, base_hash="another")),
        replace(bomb, card=None),
    ):
        with pytest.raises(BadEdit, match="only edits of one base and with the same settings"):
            GatedEdit.joined([bomb, other])


def test_an_export_says_why_it_cannot_hold_the_gate(bomb: GatedEdit, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"opens by what the prompt says.*ungated=True"):
        bomb.export_lora(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("style", ["pytorch_lora_weights.safetensors", "kohya.safetensors"])
def test_an_ungated_export_is_the_membranes_always_open(
    bomb: GatedEdit, dagger: GatedEdit, style: str, tmp_path: Path
) -> None:
    both, model = GatedEdit.joined([bomb, dagger]), tiny.model()
    base = model.generate(**ASK)
    both.export_lora(tmp_path, ungated=True)
    model.pipe.load_lora_weights(tmp_path, weight_name=style)
    theirs = model.generate(**ASK)
    model.pipe.unload_lora_weights()
    factors = {
        n.removeprefix("unet."): tuple(torch.cat([m.factors[n][i] for m in both.membranes], i) for i in range(2))
        for n in bomb.membranes[0].factors
    }
    membranes = Membranes(model.denoiser.module, factors, [m.gate for m in both.membranes])
    with membranes.under(torch.ones(4, 2)):
        ours = model.generate(**ASK)
    membranes.close()
    assert (ours - base).abs().amax((1, 2, 3)).min() > 1e-3
    # the same products summed in another order: float32 rounding through the sampler
    torch.testing.assert_close(theirs, ours, atol=2e-4, rtol=0)


def test_without_its_card_an_edit_cannot_be_measured_anew(bomb: GatedEdit) -> None:
    with (
        pytest.raises(BadEdit, match="does not know its concepts"),
        replace(bomb, card=None).on(tiny.model(seed=1), transfer=True),
    ):
        pass


def test_without_anything_to_retain_common_nouns_close_the_gate() -> None:
    model = tiny.model()
    concept = Concept("bomb", templates=("{c}", "a {c}"))
    edit = erase(model, concept, SPM(**SHORT), seed=0)
    base = model.generate(["dog", "a bomb"], seeds=[0, 1])
    with edit.on(model):
        drawn = model.generate(["dog", "a bomb"], seeds=[0, 1])
    assert torch.equal(drawn[0], base[0])
    assert (drawn[1] - base[1]).abs().max() > 1e-3
