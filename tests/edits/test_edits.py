"""Edits on disk, on the wrong model, compressed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from expunge.backbones import tiny
from expunge.concept import Concept
from expunge.door import erase
from expunge.edits import LowRankEdit, WeightEdit, compress, load_edit
from expunge.edits.io import FORMAT, write
from expunge.errors import BadEdit
from expunge.kernel.lowrank import factor, product
from expunge.methods.esd import ESD
from expunge.methods.uce import UCE

CONCEPT = Concept("bomb", templates=("{c}",), keep=("cat",))


@pytest.fixture
def edit() -> WeightEdit:
    made = erase(tiny.model(), CONCEPT, UCE(), seed=0)
    assert isinstance(made, WeightEdit)
    return made


def test_edit_of_another_base_is_refused(edit: WeightEdit) -> None:
    other = tiny.model(seed=1)
    with pytest.raises(BadEdit, match="made for 'tiny' with weights"), edit.on(other):
        pass
    assert other.fingerprint() == other.hash


def test_base_comes_back_after_an_error_inside(edit: WeightEdit) -> None:
    model = tiny.model()

    def fail_inside() -> None:
        with edit.on(model):
            assert model.fingerprint() != model.hash
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert model.fingerprint() == model.hash


def test_truncated_and_foreign_files_are_refused(edit: WeightEdit, tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    with pytest.raises(BadEdit, match="no edit at"):
        load_edit(path)
    edit.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadEdit, match="not a whole safetensors file"):
        load_edit(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(BadEdit, match="not an edit of expunge"):
        load_edit(path)


@pytest.mark.parametrize(
    ("kind", "tensors", "says"),
    [
        ("lowrank", {"unet.a.weight.down": (1, 4)}, "'unet.a.weight.up'"),
        ("generator", {"unet.a.weight": (4, 4)}, "'t'"),
        ("gated", {"0.unet.a.weight.down": (1, 4)}, "'gate.tokens'"),
        ("hook", {"text_encoder.encoder": (4, 4)}, "'text_encoder.numbers'"),
    ],
)
def test_a_file_that_lacks_a_part_is_refused(
    kind: str, tensors: dict[str, tuple[int, ...]], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "edit.safetensors"
    write(path, {name: torch.zeros(shape) for name, shape in tensors.items()}, kind, None)
    with pytest.raises(BadEdit, match=f"lacks a part of an edit of kind '{kind}' .*{says}"):
        load_edit(path)


@pytest.mark.parametrize("card", ["{", "[]", '{"method": "esd"}', '{"colour": "red"}'])
def test_a_card_that_cannot_be_read_is_told(card: str, tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"format": FORMAT, "kind": "weights", "card": card})
    with pytest.raises(BadEdit, match=r"the card of the edit .* cannot be read: .*\. Update expunge"):
        load_edit(path)


def test_matrices_of_other_sizes_are_refused() -> None:
    model = tiny.model()
    name, weight = next((n, p) for n, p in model.pipe.unet.named_parameters() if p.ndim == 2)
    out, width = weight.shape
    for down, up in (((2, width + 1), (out, 2)), ((2, width), (1, 2))):
        edit = LowRankEdit({f"unet.{name}": (torch.ones(down), torch.ones(up))})
        with pytest.raises(BadEdit, match="1 matrices that this model lacks or shapes otherwise"), edit.on(model):
            pass
    assert model.fingerprint() == model.hash


def test_compression_is_exact_at_full_rank_and_honest_below(edit: WeightEdit) -> None:
    model = tiny.model()
    full, lost = compress(edit, model, rank=16)
    assert lost < 1e-10
    with edit.on(model):
        want = {k: p.detach().clone() for k, p in model.pipe.unet.named_parameters()}
    with full.on(model):
        for k, p in model.pipe.unet.named_parameters():
            torch.testing.assert_close(p.detach(), want[k], atol=1e-5, rtol=0)
    small, lost = compress(edit, model, rank=1)
    assert isinstance(small, LowRankEdit)
    assert 0.01 < lost < 1


def test_compression_counts_vectors_as_lost() -> None:
    model = tiny.model()
    settings = {"steps": 2, "batch": 2, "rollouts": 1, "sampling_steps": 3, "lr": 1e-2}
    edit = erase(model, CONCEPT, ESD(group="all", **settings), seed=0)
    assert isinstance(edit, WeightEdit)
    _, lost = compress(edit, model, rank=256)
    assert lost > 1e-4


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)])
def test_factor_is_the_best_approximation(shape: tuple[int, ...]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(delta.flatten(1).double())
    for rank in (1, 2, 4):
        error = (delta - product(*factor(delta, rank))).square().sum().item()
        assert error == pytest.approx(s[rank:].square().sum().item(), abs=1e-5)
