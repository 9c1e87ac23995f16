import numpy as np
import pytest

from expunge.neighbours import alternating, damage, nearest, similarities


def test_a_common_part_does_not_make_everything_similar():
    common = np.array([100.0, 0, 0])
    vectors = {
        "bomb": common + np.array([0, 1, 0]),
        "dynamite": common + np.array([0, 0.9, 0.1]),
        "cake": common + np.array([0, -1, 1]),
    }
    raw = vectors["bomb"] @ vectors["cake"] / np.linalg.norm(vectors["bomb"]) / np.linalg.norm(vectors["cake"])
    found = similarities(vectors, ["bomb"])
    assert raw > 0.99
    assert found["dynamite"] > 0.8
    assert found["cake"] < 0
    assert nearest(found, 1) == ["dynamite"]


def test_the_nearest_of_several_targets_counts():
    vectors = {k: np.array(v, float) for k, v in {"a": (1, 0), "b": (0, 1), "x": (0.1, 0.9), "y": (-1, -1)}.items()}
    found = similarities(vectors, ["a", "b"])
    assert set(found) == {"x", "y"}
    assert found["x"] > similarities(vectors, ["a"])["x"]


def test_a_broken_vector_is_left_out_and_an_unknown_target_has_no_neighbours():
    vectors = {"a": np.ones(2), "b": np.array([1.0, np.nan]), "c": np.zeros(2)}
    assert set(similarities(vectors, ["a"])) == {"c"}
    assert similarities(vectors, ["z"]) == {}


def test_damage_ranks_neighbours_and_an_unread_picture_is_damage():
    concepts = ["near", "near", "lookalike", "far", "far"]
    base, edited = np.array([1, 0.8, 0.9, 1, 1]), np.array([0.9, 0.7, np.nan, 0, 0])
    rows = damage(concepts, base, edited, {"near": 0.9, "far": 0.0, "undrawn": 1.0}, {"lookalike": 0.8}, 1)
    assert [r["name"] for r in rows] == ["lookalike", "near"]
    rows = damage(concepts, base, edited, {"near": 0.9, "far": 0.0}, {"lookalike": 0.8}, 2)
    assert [(r["name"], r["n"]) for r in rows] == [("far", 2), ("lookalike", 1), ("near", 2)]
    assert [r["damage"] for r in rows] == pytest.approx([1.0, 0.9, 0.1])
    assert rows[1]["text_similarity"] is None


def test_near_ones_come_from_both_spaces_by_turns() -> None:
    text, look = {"a": 0.9, "b": 0.8, "c": 0.1}, {"c": 0.7, "a": 0.6, "d": 0.5}
    assert alternating(text, look, 3) == ["a", "c", "b"]
    assert alternating(text, look, 9) == ["a", "c", "b", "d"]
    assert alternating(text, {}, 2) == ["a", "b"]
