"""Broken run folders are refused, with the name of the file at fault."""

from __future__ import annotations

import base64

import pytest
from PIL import Image

from expunge.errors import BadRun
from expunge.report import build
from expunge.report.read import LARGEST_SIDE, picture, read


def test_a_whole_run_is_read(make_run):
    contents = read(make_run(), 5)
    assert [p.role for p in contents.pairs] == ["target"] * 5 + ["retain"] * 5
    assert contents.left_out == 26 - 10
    assert [n.damage for n in contents.neighbours[:3]] == [0.5, 0.25, 0.25]
    assert contents.pairs[0].reading == "bomb → balloon"
    assert not contents.pairs[0].wrong


def test_failures_of_single_pictures_are_marked(make_run):
    contents = read(make_run(), 99)
    assert [p.prompt for p in contents.pairs if p.wrong] == ["a twemoji style emoji of bomb"]


BREAKS = [
    ("scores.json", lambda d: d[0].update(value="much")),
    ("scores.json", lambda d: d[0].update(value=float("nan"))),
    ("scores.json", lambda d: d[0].update(colour="red")),
    ("scores.json", lambda d: {"ua": d}),
    ("neighbours.json", lambda d: d[0].pop("damage")),
    ("neighbours.json", lambda d: d[0].update(base=None)),
    ("samples/index.json", lambda d: d[0].pop("seed") and None),
    ("samples/index.json", lambda d: d[3].update(edited="missing.png")),
    ("samples/index.json", lambda d: d[3].update(edited="../../secret.png")),
    ("card.json", lambda d: d.pop("method")),
    ("card.json", lambda d: d["concept"].pop("name")),
    ("card.json", lambda d: d.update(seconds="long")),
    ("card.json", lambda d: d.update(losses={"erase": "none"})),
]


@pytest.mark.parametrize(("name", "change"), BREAKS)
def test_a_broken_file_is_named(make_run, edit_json, name, change):
    run = make_run()
    assert read(run, 0).card.method == "sdd"

    def apply(data):
        result = change(data)
        return result if isinstance(result, dict) and name == "scores.json" else None

    edit_json(run.folder / name, apply)
    with pytest.raises(BadRun) as caught:
        build([run])
    named = "missing.png" if "missing.png" in (run.folder / name).read_text() else name
    assert named in str(caught.value)
    assert "bomb-sdd" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["card.json", "scores.json", "neighbours.json", "outcomes.jsonl", "samples/index.json"]
)
def test_a_truncated_file_is_named(make_run, name):
    run = make_run()
    file = run.folder / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BadRun, match=name):
        build([run])


def test_a_truncated_picture_is_named(make_run):
    run = make_run()
    file = run.folder / "samples" / "edited-002.png"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BadRun, match=r"edited-002\.png"):
        build([run])


def test_a_picture_that_is_no_png_is_refused(make_run):
    run = make_run()
    (run.folder / "samples" / "edited-002.png").write_text("<svg onload='alert(1)'/>")
    with pytest.raises(BadRun, match="not a whole PNG"):
        build([run])


def test_unread_pictures_are_said_to_be_unread(make_run):
    run = make_run()
    rows = run.outcomes
    rows[0]["edited"] = {"object": None, "style": None, "confidence": None}
    run.write_outcomes(rows)
    assert read(run, 1).pairs[0].reading == "bomb → not read"


def test_small_pictures_go_in_unchanged_and_large_ones_are_reduced(tmp_path):
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    Image.new("RGB", (64, 64), "red").save(small)
    Image.effect_noise((768, 512), 80).convert("RGB").save(large)
    uri, size = picture(small)
    assert base64.b64decode(uri.split(",")[1]) == small.read_bytes()
    assert size == (64, 64)
    uri, size = picture(large)
    assert max(size) == LARGEST_SIDE
    assert len(uri) < large.stat().st_size / 10


def test_no_run_is_refused():
    with pytest.raises(BadRun, match="at least one run"):
        build([])
