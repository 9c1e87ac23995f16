"""TUCE: prompts of the concept are read as the anchor's, others as before, by the text encoder itself."""

from __future__ import annotations

import pytest

from expunge.backbones import tiny
from expunge.concept import Concept
from expunge.door import erase
from expunge.methods.tuce import TUCE

CAT = Concept("cat", templates=("{c}",), anchor="dog", keep=("owl",))


@pytest.mark.parametrize("sample", [1, 8])
def test_a_concept_is_read_as_its_anchor_and_what_is_kept_as_before(sample: int) -> None:
    model = tiny.model(window=6)
    cat, dog, owl = (model.encode(p).tokens for p in ("cat", "dog", "owl"))
    assert (cat - dog).norm() > 1
    # the nouns that are held beside the owl do not fit into 32 features: they are few, or count for little
    edit = erase(model, CAT, TUCE(ridge=1e-9, preserve=1e-3, sample=sample), seed=0)
    assert {name.split(".")[0] for name in edit.tensors()} == {"text_encoder"}
    with edit.on(model):
        assert (model.encode("cat").tokens - dog).norm() < 0.05 * (cat - dog).norm()
        moved = (model.encode("owl").tokens - owl).norm()
    assert moved < 0.3 * (cat - dog).norm()


def test_without_an_anchor_the_rest_of_the_prompt_is_what_is_left() -> None:
    model = tiny.model(window=12)
    concept = Concept("cat", templates=("red {c}",))
    padding = slice(8, None)
    cat, red = (model.encode(p).tokens[:, padding] for p in ("red cat", "red"))
    assert (cat - red).norm() > 1
    with erase(model, concept, TUCE(ridge=1e-9, preserve=1e-3, sample=4), seed=0).on(model):
        assert (model.encode("red cat").tokens[:, padding] - red).norm() < 0.1 * (cat - red).norm()


def test_what_else_there_is_is_held_though_nobody_says_so() -> None:
    """Common nouns are retained without a world and without a word to keep."""
    model = tiny.model(window=12)
    others = ["horse", "lamp", "river"]
    before, cat = model.encode(others).tokens, model.encode("cat").tokens
    damage, erased = {}, {}
    for preserve in (0.0, 10.0):
        with erase(model, Concept("cat", templates=("{c}",)), TUCE(preserve=preserve, sample=64), seed=0).on(model):
            damage[preserve] = (model.encode(others).tokens - before).norm().item()
            erased[preserve] = (model.encode("cat").tokens - cat).norm().item()
    assert damage[10.0] < 0.5 * damage[0.0]
    assert erased[10.0] > 0
