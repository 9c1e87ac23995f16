"""Concepts: a distribution of prompts, and refusals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from expunge.concept import Concept, World
from expunge.errors import ConceptError, NearMiss

WORLD = World(
    name="toy",
    objects=("bomb", "dagger", "Santa Claus", "Mrs. Claus"),
    styles=("flat", "mono"),
    synonyms={"bomb": ("explosive",), "dagger": ("knife",), "Santa Claus": ("saint",), "Mrs. Claus": ("saint",)},
    object_templates=("{c}", "a {x} style emoji of {c}"),
    style_templates=("{c}", "a {c} style emoji of {x}"),
)


def test_words_stand_for_templates_synonyms_and_contexts() -> None:
    prompts = Concept("bomb", synonyms=("grenade",)).prompts(WORLD)
    assert prompts[:3] == ("bomb", "grenade", "explosive")
    assert "a mono style emoji of explosive" in prompts
    assert len(prompts) == len(set(prompts)) == 3 + 3 * 2
    assert prompts == Concept("bomb", synonyms=("grenade",)).prompts(WORLD)


def test_anchors_match_prompts_one_by_one() -> None:
    concept = Concept("bomb", anchor="dagger")
    prompts, anchors = concept.prompts(WORLD), concept.anchors(WORLD)
    assert len(prompts) == len(anchors)
    assert [p.replace("explosive", "bomb").replace("bomb", "dagger") for p in prompts] == list(anchors)
    assert set(Concept("bomb").anchors(WORLD)) == {""}


def test_braces_in_words_are_words() -> None:
    assert "{0}{x}" not in Concept("a{0}").prompts()[1]
    assert Concept("a{0}").prompts()[0] == "a{0}"


def test_keeps_are_the_rest_of_the_world_unless_named() -> None:
    every = Concept("bomb").keeps(WORLD, without=["Santa Claus"])
    assert any("dagger" in k for k in every)
    assert any("flat" in k for k in every)
    assert not any("bomb" in k or "Santa" in k for k in every)
    assert {k for k in Concept("bomb", keep=("dagger",)).keeps(WORLD)} == {"dagger", "a mono style emoji of dagger"}
    assert Concept("bomb").keeps(None) == ()


def test_styles_have_their_own_prompts() -> None:
    assert "a flat style emoji of bomb" in Concept("flat", kind="style").prompts(WORLD)
    assert not any("flat" in k for k in Concept("flat", kind="style").keeps(WORLD))


def test_resolve_follows_case_and_synonyms() -> None:
    target = Concept("Explosive", keep=("KNIFE",)).resolve(WORLD)
    assert target.concept.name == "bomb"
    assert target.concept.keep == ("dagger",)
    assert target.prompts == Concept("bomb").prompts(WORLD)


def test_a_shared_synonym_names_nothing() -> None:
    with pytest.raises(ConceptError, match="'saint' is not a concept"):
        Concept("saint").check(WORLD)


@pytest.mark.parametrize(
    ("concept", "message"),
    [
        (Concept(""), "is empty"),
        (Concept("  "), "is empty"),
        (Concept("bom"), "Near ones: bomb"),
        (Concept("claus"), "Near ones: Mrs. Claus, Santa Claus"),
        (Concept("qqq"), "4 objects, 2 styles.*For example: bomb"),
        (Concept("bomb", keep=("Bomb",)), "to be kept"),
        (Concept("bomb", keep=("explosive",)), "to be kept"),
        (Concept("bomb", keep=("dager",)), "Near ones: dagger"),
        (Concept("bomb", anchor="BOMB"), "the concept itself"),
        (Concept("flat"), "--kind style"),
        (Concept("bomb", kind="style"), "Styles: flat, mono"),
        (Concept("bomb", kind="thing"), "Kinds: object, style"),  # type: ignore[arg-type]
        (Concept("bomb", templates=("a picture",)), "lacks '{c}'"),
        (Concept("bomb", images=Path("/nowhere")), "nothing at /nowhere"),
    ],
)
def test_refusals(concept: Concept, message: str) -> None:
    with pytest.raises(ConceptError, match=message):
        concept.check(WORLD)


@pytest.mark.parametrize("concept", [Concept("bomb"), Concept("flat", kind="style"), Concept("bomb", anchor="a ball")])
def test_good_concepts_pass(concept: Concept) -> None:
    concept.check(WORLD)


@pytest.mark.parametrize(
    ("anchor", "near"),
    [
        ("dager", "dagger"),
        ("DAGGERS", "dagger"),
        ("Santa", "Santa Claus"),
        ("claus", "Santa Claus, Mrs. Claus"),
        ("mon", "mono"),
    ],
)
def test_an_anchor_that_is_nearly_a_name_is_told(anchor: str, near: str) -> None:
    with pytest.warns(NearMiss) as caught:
        target = Concept("bomb", anchor=anchor).resolve(WORLD)
    assert [str(w.message) for w in caught] == [
        f"the anchor {anchor!r} of 'bomb' is no name of the model 'toy', and is taken for a phrase. "
        f"Near names: {near}. If one of them is meant, give it as the anchor."
    ]
    assert caught[0].filename == __file__
    # it is read as it was written all the same
    assert anchor in target.anchors


@pytest.mark.parametrize(
    "anchor", ["", "DAGGER", "knife", "a dagger of glass", "a red ball", "ant", "clau", "a", "sky"]
)
def test_names_and_free_phrases_are_anchors_without_a_word(anchor: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Concept("bomb", anchor=anchor).resolve(WORLD)
        Concept("bomb", anchor="dager").check(WORLD)  # asked before the world's prompts are wanted
        Concept("bomb", anchor="dager").resolve(None)


def test_without_a_world_any_words_pass() -> None:
    Concept("Van Gogh", kind="style", keep=("Monet",)).check(None)
    assert "a landscape in the style of Van Gogh" in Concept("Van Gogh", kind="style").prompts()


def test_a_word_where_words_belong_is_refused() -> None:
    with pytest.raises(ConceptError, match="keep must be a tuple"):
        Concept("bomb", keep="dagger")  # type: ignore[arg-type]


def test_json_round_trip(tmp_path: Path) -> None:
    concept = Concept("bomb", keep=("dagger",), images=tmp_path, anchor="ball")
    data: dict[str, Any] = json.loads(json.dumps(concept.to_json()))
    assert Concept.from_json(data) == concept
    with pytest.raises(ConceptError, match="colour"):
        Concept.from_json(data | {"colour": "red"})


CLASSES = World("shapes", ("circle", "square", "star"), (), {}, ("{c}",), (), labels=True)


@pytest.mark.parametrize("name", ["square", "SQUARE", "1"])
def test_a_class_goes_by_its_name_or_its_number(name: str) -> None:
    found = Concept(name, kind="class", anchor="2").resolve(CLASSES)
    assert (found.concept.name, found.prompts, found.anchors) == ("square", ("square",), ("star",))
    assert found.keeps == ("circle", "star")


@pytest.mark.parametrize(
    ("concept", "says"),
    [
        (Concept("3"), "'3' is not a concept"),
        (Concept("sqare"), "Near ones: square"),
        (Concept("1", anchor="square"), "is the concept itself"),
        (Concept("star", anchor="moon"), "'moon' is not a concept"),
        (Concept("star", templates=("a {c}",)), "'a star' is not a concept"),
        (Concept("star", images=Path(), synonyms=("sun",)), "'sun' is not a concept"),
    ],
)
def test_a_world_of_classes_reads_nothing_else(concept: Concept, says: str) -> None:
    with pytest.raises(ConceptError, match=says):
        concept.resolve(CLASSES)


def test_numbers_are_words_where_there_is_a_text_encoder() -> None:
    assert WORLD.canonical("1") == ""
    assert CLASSES.canonical("1") == "square"
