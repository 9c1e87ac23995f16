"""Words by their distance to a concept."""

from __future__ import annotations

from expunge.backbones import tiny, toy
from expunge.kernel.neighbours import encoded, nearest, thinned


def test_nearest_first() -> None:
    model = toy.model()
    words = ["green cat", "house", "red bomb", "bomb dark", "bomb"]
    assert nearest(model, words, ["bomb"])[0] == "bomb"
    # the toy's encodings compare words by place: "bomb dark" shares the first
    assert nearest(model, words, ["bomb"])[1] == "bomb dark"
    assert nearest(model, words, ["bomb", "house"])[:2] == ["house", "bomb"]


def test_many_words_are_encoded_as_one_by_one() -> None:
    model = tiny.model()
    words = [f"w{i}" for i in range(130)]
    c = encoded(model, words)
    assert len(c) == 130
    assert (c.tokens[100] - model.encode(words[100]).tokens[0]).abs().max() < 1e-5
    assert (c.tokens[100] - c.tokens[101]).abs().max() > 1e-3


def test_thinned_keeps_the_nearest_and_spreads() -> None:
    words = [str(i) for i in range(100)]
    assert thinned(words, 4) == ["0", "33", "66", "99"]
    assert thinned(words[:3], 32) == ["0", "1", "2"]
    assert len(set(thinned(words, 32))) == 32
