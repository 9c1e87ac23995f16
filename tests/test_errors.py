"""Errors: one tree, near misses."""

from __future__ import annotations

import inspect

import pytest

from expunge import errors
from expunge.errors import ExpungeError, near, nearest


def test_every_error_belongs_to_the_tree() -> None:
    found = [
        c
        for _, c in inspect.getmembers(errors, inspect.isclass)
        if issubclass(c, Exception) and c.__module__ == errors.__name__
    ]
    strangers = [c.__name__ for c in found if not issubclass(c, ExpungeError) and not issubclass(c, Warning)]
    assert len(found) > 10
    assert strangers == []


def test_the_drawing_names_every_error() -> None:
    for name, c in inspect.getmembers(errors, inspect.isclass):
        if issubclass(c, ExpungeError):
            assert name in (errors.__doc__ or "")


@pytest.mark.parametrize(
    ("word", "hint"),
    [("stepz", " Did you mean 'steps'?"), ("STEPS", " Did you mean 'steps'?"), ("zzzz", ""), ("", "")],
)
def test_nearest(word: str, hint: str) -> None:
    assert nearest(word, ["eta", "steps", "lr"]) == hint


def test_near_finds_parts_of_names() -> None:
    assert near("claus", ["bomb", "Mrs. Claus", "Santa Claus"]) == ["Mrs. Claus", "Santa Claus"]


def test_a_whole_word_is_nearer_than_a_like_spelling() -> None:
    assert near("santa", ["ant", "seat", "santas sack", "Santa Claus"], 1) == ["Santa Claus"]
