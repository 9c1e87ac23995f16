"""Where an adversary's words come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from expunge.concept import Concept, Targets, World
from expunge.errors import SettingError
from expunge.vocabulary import NOUNS, instead, vocabulary

WORLD = World("w", ("bomb", "cat", "dog"), ("flat", "mono"), {"bomb": ("grenade",)}, ("{c}", "a {x} {c}"), ("{c} {x}",))
BOMB = Concept("bomb")


def test_a_worlds_names_of_the_concepts_kind() -> None:
    assert vocabulary(WORLD, BOMB, ["Bomb"]) == ("cat", "dog")
    assert vocabulary(WORLD, Concept("x", kind="style"), ["x"]) == ("flat", "mono")


def test_shipped_words_where_no_world_is_known() -> None:
    words = vocabulary(None, BOMB, ["bomb", "CAT"])
    assert len(words) > 300
    assert not {"bomb", "cat"} & set(words)
    assert {"dog", "watercolor"} < set(words)
    assert not [w for w in words if w.startswith("#") or w != w.strip()]
    assert len(set(words)) == len(words)


def test_the_list_names_nobody_twice_and_only_words() -> None:
    lines = [x for x in NOUNS.read_text().splitlines() if not x.startswith("#")]
    assert len(set(lines)) == len(lines)
    assert all(x and x == x.lower() and x.replace(" ", "").isalpha() for x in lines)


def test_a_file_wins_over_the_world(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# mine\nhouse\n\nBOMB\n tree \nhouse\n")
    assert vocabulary(WORLD, BOMB, ["bomb"], str(path)) == ("house", "tree")


@pytest.mark.parametrize("text", ["", "bomb\ncat\n"])
def test_too_small_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "words.txt"
    path.write_text(text)
    with pytest.raises(SettingError, match=r"too small: .*words.txt has [01] words .*needs two"):
        vocabulary(WORLD, BOMB, ["bomb"], str(path))
    with pytest.raises(SettingError, match="the world 'w' has 1 words"):
        vocabulary(WORLD, BOMB, ["bomb", "cat"])


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"no\.txt cannot be read"):
        vocabulary(None, BOMB, ["bomb"], str(tmp_path / "no.txt"))


def test_prompts_with_a_word_instead() -> None:
    target = BOMB.resolve(WORLD)
    assert "a mono grenade" in target.prompts
    assert instead(target, "cat", WORLD)[target.prompts.index("a mono grenade")] == "a mono cat"
    soft: Targets = replace(target, prompts=("<bomb>", "a flat <bomb>"))
    assert instead(soft, "cat", WORLD) == ["cat", "cat"]
