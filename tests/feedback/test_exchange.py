"""Ratings out and in: the same values in every format, everything checked, nothing doubled, all or nothing."""

from __future__ import annotations

import csv
import json

import pytest

from expunge.errors import BadStudy, NeedsError
from expunge.feedback import Study
from expunge.feedback.exchange import FIELDS, export, load, rows, scores

PARQUET = pytest.param(".parquet", marks=pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:pyarrow"))
FORMATS = [".jsonl", ".csv", PARQUET]


@pytest.fixture
def rated(make_study):
    """A study with ratings that are awkward to write down."""
    study = make_study(4, name="rated")
    study.rate_all(
        [
            ("Ada, the first", 1, "concept", 1500, "2026-01-31T12:00:00+00:00"),
            ('Zoë "Z" <b>', 2, "not", 0, "2026-01-31T12:00:01.500+00:00"),
            ("李雷", 3, "unsure", 86_400_000, "2026-01-31T12:00:02+00:00"),
        ]
    )
    return study


@pytest.fixture
def empty(make_study):
    return make_study(4, name="empty")


def jsonl(path, *lines):
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


@pytest.mark.parametrize("suffix", FORMATS)
def test_out_and_in_again(rated, empty, tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"ratings{suffix}"
    assert export(rated, path) == 3
    assert load(empty, path) == (3, 0)
    assert empty.ratings() == rated.ratings()
    # again, and into where it came from
    assert load(empty, path) == (0, 3)
    assert load(rated, path) == (0, 3)
    assert empty.ratings() == rated.ratings()


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_field_is_there(rated, tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    export(rated, tmp_path / f"ratings{suffix}")
    first = next(rows(tmp_path / f"ratings{suffix}"))
    assert tuple(first) == FIELDS
    assert first == {
        "rater": "Ada, the first", "item": 1, "picture": 1, "file": "00001.png", "other": None, "other_file": None,
        "prompt": "prompt 1", "seed": 1, "answer": "concept", "milliseconds": 1500,
        "time": "2026-01-31T12:00:00+00:00",
    }  # fmt: skip


def test_plain_tools_read_the_export(rated, tmp_path):
    export(rated, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as file:
        assert [row["rater"] for row in csv.DictReader(file)] == ["Ada, the first", 'Zoë "Z" <b>', "李雷"]
    export(rated, tmp_path / "r.jsonl")
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 3


def test_pairs_out_and_in_turned_round(make_study, tmp_path):
    study, other = make_study(5, pairs=True, name="a"), make_study(5, pairs=True, name="b")
    for item, answer in zip(study.items(), ("first", "second", "unsure"), strict=False):
        study.rate("Ada", item.id, answer)
    export(study, tmp_path / "r.jsonl")
    turn = {"first": "second", "second": "first", "unsure": "unsure"}
    turned = [
        {"rater": r["rater"], "file": r["other_file"], "other": r["picture"], "answer": turn[r["answer"]]}
        for r in rows(tmp_path / "r.jsonl")
    ]
    assert load(other, jsonl(tmp_path / "turned.jsonl", *turned)) == (3, 0)
    assert [r.worse for r in other.ratings()] == [r.worse for r in study.ratings()]
    assert [r.worse is None for r in study.ratings()] == [False, False, True]


def test_the_least_that_a_row_needs(empty, tmp_path):
    path = jsonl(tmp_path / "r.jsonl", {"rater": "Ada", "answer": "not", "file": "00003.png"})
    assert load(empty, path) == (1, 0)
    (rating,) = empty.ratings()
    assert (rating.picture, rating.milliseconds, rating.time[:2]) == (3, 0, "20")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"answer": "not", "picture": 1}, "'' cannot be a rater's name"),
        ({"rater": "=1+1", "answer": "not", "picture": 1}, "cannot be a rater's name"),
        ({"rater": "Ada", "picture": 1}, "'' is no answer here. Answers: concept, not, unsure"),
        ({"rater": "Ada", "answer": "first", "picture": 1}, "'first' is no answer here"),
        ({"rater": "Ada", "answer": "not"}, "no picture: not a picture of this study"),
        ({"rater": "Ada", "answer": "not", "picture": 9}, "picture 9: not a picture of this study .1 to 4"),
        ({"rater": "Ada", "answer": "not", "file": "../study.sqlite"}, "not a picture of this study"),
        ({"rater": "Ada", "answer": "not", "picture": 1, "file": "00002.png"}, "picture 1, file '00002.png'"),
        ({"rater": "Ada", "answer": "not", "picture": 1, "prompt": "another"}, "prompt 'another' is not that of"),
        ({"rater": "Ada", "answer": "not", "picture": 1, "seed": 7}, "seed 7 is not that of picture 1, 1"),
        ({"rater": "Ada", "answer": "not", "picture": 1, "item": 2}, "item 2 is not that"),
        ({"rater": "Ada", "answer": "not", "picture": 1, "milliseconds": -5}, "-5 ms is impossible"),
        ({"rater": "Ada", "answer": "not", "picture": 1, "time": "yesterday"}, "time 'yesterday' is not"),
        ({"rater": "Ada", "answer": "not", "picture": 1.5}, "picture is 1.5, not a whole number"),
        ({"rater": "Ada", "answer": "not", "picture": True}, "could not convert"),
        ({"rater": "Ada", "answer": "not", "picture": "one"}, "could not convert"),
        ([1, 2], "is no row"),
        ("{broken", "cannot be read"),
    ],
)
def test_a_wrong_row_is_named_and_nothing_is_imported(empty, tmp_path, row, why):
    good = {"rater": "Ada", "answer": "not", "picture": 2}
    with pytest.raises(BadStudy, match=why):
        load(empty, jsonl(tmp_path / "r.jsonl", good, row))
    assert empty.ratings() == []
    assert empty.raters() == []


def test_the_number_of_a_wrong_row_is_told(empty, tmp_path):
    good = {"rater": "Ada", "answer": "not", "picture": 2}
    with pytest.raises(BadStudy, match=r"r\.jsonl, rating 3: .* Nothing was imported"):
        load(empty, jsonl(tmp_path / "r.jsonl", good, good, {**good, "picture": 9}))


def test_two_answers_of_one_rater_are_refused(empty, tmp_path):
    one = {"rater": "Ada", "answer": "not", "picture": 2}
    two = {"rater": " ADA ", "answer": "concept", "picture": 2}
    with pytest.raises(BadStudy, match="answered 'not' to item 2 elsewhere, and 'concept' here"):
        load(empty, jsonl(tmp_path / "r.jsonl", one, two))
    empty.rate("Ada", 2, "unsure")
    with pytest.raises(BadStudy, match="answered 'unsure' to item 2"):
        load(empty, jsonl(tmp_path / "r.jsonl", one))
    assert len(empty.ratings()) == 1


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("r.xlsx", b"", "ends in '.xlsx'. Formats: .jsonl, .csv, .parquet"),
        ("r.jsonl", None, "cannot be read"),
        ("r.csv", b"rater,answer\nAda,not,extra\n", "row 1, is no row"),
        ("r.csv", b"\xff\xfe\x00", "cannot be read"),
        ("r.jsonl", b"\xff", "cannot be read"),
        ("r.parquet", b"no parquet", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(empty, tmp_path, name, data, why):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(BadStudy, match=why):
        load(empty, tmp_path / name)


def test_parquet_without_pyarrow_says_what_to_install(rated, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(NeedsError, match=r"pip install 'expunge\[parquet\]', or write .csv"):
        export(rated, tmp_path / "r.parquet")
    assert list(tmp_path.glob("*.parquet")) == []


def test_a_spreadsheets_csv_is_read(empty, tmp_path):
    (tmp_path / "r.csv").write_bytes("\ufeffrater,picture,answer\r\nAda,1.0,not\r\nZoë,2,concept\r\n".encode())
    assert load(empty, tmp_path / "r.csv") == (2, 0)
    assert [r.rater for r in empty.ratings()] == ["Ada", "Zoë"]
    # a column that is there and empty says nothing
    (tmp_path / "r.csv").write_text("rater,picture,prompt,seed,answer\nBo,1,,,not\n")
    assert load(empty, tmp_path / "r.csv") == (1, 0)


def test_an_import_from_another_place_is_there_for_everyone(empty, tmp_path):
    load(empty, jsonl(tmp_path / "r.jsonl", {"rater": "Ada", "answer": "not", "picture": 2}))
    with Study.open(empty.folder) as again:
        assert [i.id for i in again.upcoming("Ada", 9)] == [i for i in again.order("Ada") if i != 2]


def test_scores_of_a_detector(empty, tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("file,score\n00001.png,0.5\n00002.png,1\n")
    assert scores(empty, path) == {1: 0.5, 2: 1.0}
    for text, why in [
        ("picture,score\n1,0.5\n1,0.5\n", "row 2, holds another score of picture 1"),
        ("picture,score\n1,high\n", "holds no number `score` of picture 1"),
        ("picture,score\n1,nan\n", "holds no number"),
        ("picture\n1\n", "holds no number"),
        ("picture,score\n1,1\n9,1\n", r"s\.csv, row 2: picture 9: not a picture of this study"),
    ]:
        path.write_text(text)
        with pytest.raises(BadStudy, match=why):
            scores(empty, path)
