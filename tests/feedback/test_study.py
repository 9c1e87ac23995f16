"""The store: nothing lost, nothing doubled, whoever asks and whenever the process dies."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter

import pytest

from expunge.errors import BadRun, BadStudy, StorageError
from expunge.feedback import PAIRED, SINGLE, Study
from expunge.feedback.data import clean, fold, question, rings


def answered(study):
    return [(r.rater, r.item, r.answer) for r in study.ratings()]


# ----------------------------------------------------------------------------------------------------------- make, open


def test_what_is_made_is_what_is_opened(make_study, pngs):
    made = make_study(4, drawn=3, blur=True, wanted=3, seed=7, source={"model": "emoji"})
    with Study.open(made.folder) as study:
        assert study.ask == "Does this show “open mouth”?"
        assert (study.concept, study.pairs, study.blur) == ("open mouth", False, True)
        assert (study.wanted, study.seed, study.source) == (3, 7, {"model": "emoji"})
        pictures = study.pictures()
        assert [(p.id, p.file, p.prompt, p.seed, p.drawn) for p in pictures] == [
            (i, f"{i:05d}.png", f"prompt {i}", i, i <= 3) for i in (1, 2, 3, 4)
        ]
        assert study.path(2).read_bytes() == pngs[1]
        assert not study.path(4).exists()
        assert study.answers == SINGLE


def test_the_database_is_in_wal_mode(make_study):
    study = make_study()
    db = sqlite3.connect(study.folder / "study.sqlite")
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()


@pytest.mark.parametrize(
    ("planned", "options", "why"),
    [
        ([], {}, "needs 1 pictures or more, not 0"),
        ([("a", 0)], {"pairs": True}, "of pairs needs 2 pictures or more, not 1"),
        ([("a", 0)] * 2, {"files": ["a.png", "a.png"]}, "1 different file names for 2 pictures"),
        ([("a", 0)], {"files": ["../a.png"]}, "'../a.png' cannot be a picture's file name"),
        ([("a", 0)], {"files": ["a\\b.png"]}, "cannot be a picture's file name"),
        ([("a", 0)], {"files": [".."]}, "cannot be a picture's file name"),
    ],
)
def test_impossible_studies_are_refused_before_anything_is_written(tmp_path, planned, options, why):
    with pytest.raises(BadStudy, match=why):
        Study.create(tmp_path / "study", planned, **options)
    assert not (tmp_path / "study").exists()


def test_a_study_that_could_not_be_made_leaves_nothing_in_the_way(tmp_path):
    with pytest.raises(OverflowError):
        Study.create(tmp_path / "study", [("a", 2**70)])
    assert list((tmp_path / "study").iterdir()) == []
    Study.create(tmp_path / "study", [("a", 0)]).close()


def test_a_folder_in_use_is_refused(make_study):
    study = make_study()
    with pytest.raises(BadRun, match="not empty"):
        Study.create(study.folder, [("a", 0)])


def test_what_is_no_study_is_told(tmp_path, make_study):
    with pytest.raises(BadStudy, match="expunge rate MODEL --out"):
        Study.open(tmp_path)
    (tmp_path / "study.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 20)
    with pytest.raises(BadStudy, match="damaged"):
        Study.open(tmp_path)
    newer = make_study()
    db = sqlite3.connect(newer.folder / "study.sqlite")
    db.execute("UPDATE about SET value = '2' WHERE key = 'version'")
    db.commit()
    db.close()
    with pytest.raises(BadStudy, match="version 2, this Expunge reads 1"):
        Study.open(newer.folder)


# ---------------------------------------------------------------------------------------------------------------- order


def test_order_is_recorded_and_everyone_has_another_one(make_study):
    study = make_study(40, seed=3)
    ada, bob = study.order("Ada"), study.order("Bob")
    assert sorted(ada) == sorted(bob) == list(range(1, 41))
    assert ada != bob
    assert ada != sorted(ada)
    with Study.open(study.folder) as again:
        assert again.order(" ADA ") == ada
    assert make_study(40, seed=4, name="other").order("Ada") != ada


def test_order_has_no_favourite_place(make_study):
    study = make_study(8)
    first = Counter(study.order(f"rater {i}")[0] for i in range(400))
    # 400 draws of 8: each place 50 times, standard deviation 6.6
    assert len(first) == 8
    assert max(abs(n - 50) for n in first.values()) < 30


def test_upcoming_follows_the_order_over_what_is_drawn(make_study, pngs):
    study = make_study(10, drawn=4)
    assert [i.id for i in study.upcoming("Ada", 10)] == [i for i in study.order("Ada") if i <= 4]
    for picture in study.pictures()[4:]:
        study.put(picture.id, pngs[picture.id - 1])
    order = study.order("Ada")
    assert [i.id for i in study.upcoming("Ada", 10)] == order
    study.rate("ada", order[0], "not")
    assert [i.id for i in study.upcoming("Ada", 2)] == order[1:3]
    assert [i.id for i in study.upcoming("Bob")] == study.order("Bob")[:1]


# -------------------------------------------------------------------------------------------------------------- answers


def test_a_rating_holds_everything(make_study):
    study = make_study()
    assert study.rate("Ada", 2, "concept", 1234, "2026-01-31T12:00:00+00:00")
    (rating,) = study.ratings()
    assert (rating.rater, rating.item, rating.picture, rating.other) == ("Ada", 2, 2, None)
    assert (rating.prompt, rating.seed, rating.answer, rating.milliseconds) == ("prompt 2", 2, "concept", 1234)
    assert rating.time == "2026-01-31T12:00:00+00:00"
    assert rating.worse is None


def test_an_answer_that_is_sent_twice_counts_once(make_study):
    study = make_study()
    assert study.rate("Ada", 2, "concept")
    assert not study.rate("ADA", 2, "concept")
    assert not study.rate("Ada", 2, "not")
    assert answered(study) == [("Ada", 2, "concept")]
    assert study.rate("Bob", 2, "not")


@pytest.mark.parametrize(
    ("item", "answer", "milliseconds", "why"),
    [
        (99, "not", 0, "no answer to 99"),
        (6, "not", 0, "not drawn yet"),
        (1, "no", 0, "'no' is no answer here. Answers: concept, not, unsure. Did you mean 'not'"),
        (1, "first", 0, "no answer here"),
        (1, "not", -1, "-1 ms is impossible"),
        (1, "not", 10**9, "impossible"),
    ],
)
def test_impossible_answers_are_refused(make_study, item, answer, milliseconds, why):
    study = make_study(6, drawn=5)
    with pytest.raises(BadStudy, match=why):
        study.rate("Ada", item, answer, milliseconds)
    assert study.ratings() == []
    assert study.raters() == []


def test_many_answers_are_stored_all_or_none(make_study):
    study = make_study()
    good = [("Ada", 1, "not", 5, ""), ("Bob", 1, "concept", 5, ""), ("Ada", 2, "not", 5, "")]
    with pytest.raises(BadStudy):
        study.rate_all([*good, ("Ada", 77, "not", 5, "")])
    assert study.ratings() == []
    assert study.rate_all([*good, good[0]]) == 3
    assert study.rate_all(good) == 0


def test_undo_takes_back_the_last_of_ones_own(make_study):
    study = make_study()
    assert study.undo("Ada") is None
    for item, rater in [(1, "Ada"), (2, "Ada"), (1, "Bob")]:
        study.rate(rater, item, "not")
    assert study.undo("ada").id == 2
    assert answered(study) == [("Ada", 1, "not"), ("Bob", 1, "not")]
    assert study.rate("Ada", 2, "concept")
    assert study.undo("Ada").id == 2
    assert study.undo("Ada").id == 1
    assert study.undo("Ada") is None
    assert answered(study) == [("Bob", 1, "not")]


def test_an_undo_that_is_sent_twice_takes_one_answer_back(make_study):
    study = make_study()
    for item in (1, 2):
        study.rate("Ada", item, "not")
    assert study.last("Ada").id == 2
    assert study.undo("Ada", 2).id == 2
    assert study.undo("Ada", 2) is None
    assert answered(study) == [("Ada", 1, "not")]


def test_progress(make_study):
    study = make_study(4, drawn=3, wanted=2)
    study.join("Cleo")
    for item in (1, 2, 3):
        study.rate("Ada", item, "not")
    progress = study.progress()
    assert (progress.pictures, progress.drawn, progress.items, progress.ready) == (4, 3, 4, 3)
    assert progress.answered == {"Cleo": 0, "Ada": 3}
    assert (progress.finished, progress.wanted) == (0, 2)
    study.put(4, b"png")
    study.rate("Ada", 4, "not")
    assert study.progress().finished == 1


# ---------------------------------------------------------------------------------------------------------------- pairs


def test_every_picture_is_compared_two_to_four_times(make_study):
    items = make_study(20, pairs=True).items()
    assert len({frozenset((i.picture, i.other)) for i in items}) == len(items)
    count = Counter(p for i in items for p in (i.picture, i.other))
    assert set(count) == set(range(1, 21))
    assert set(count.values()) <= {2, 3, 4}
    assert count.total() >= 3.5 * 20


@pytest.mark.parametrize("n", [2, 3, 7, 50])
def test_any_two_pictures_are_linked_by_comparisons(n):
    linked, pairs = {1}, rings(n, seed=0)
    while more := {x for pair in pairs for x in pair if linked & set(pair)} - linked:
        linked |= more
    assert linked == set(range(1, n + 1))


def test_a_pair_waits_for_both_pictures(make_study):
    study = make_study(4, drawn=1, pairs=True)
    assert study.progress().ready == 0
    assert study.upcoming("Ada") == []
    study.put(2, b"png")
    assert {(i.picture, i.other) for i in study.upcoming("Ada", 9)} <= {(1, 2), (2, 1)}


def test_the_worse_of_two(make_study):
    study = make_study(5, pairs=True)
    assert study.answers == PAIRED
    a, b, c = study.items()[:3]
    for item, answer in ((a, "first"), (b, "second"), (c, "unsure")):
        study.rate("Ada", item.id, answer)
    assert [r.worse for r in study.ratings()] == [a.picture, b.other, None]
    with pytest.raises(BadStudy, match="Answers: first, second, unsure"):
        study.rate("Ada", a.id, "concept")


def test_sides_are_swapped_for_half_of_the_pairs(make_study):
    study = make_study(50, pairs=True)
    swapped = [study.swapped("Ada", i.id) for i in study.items()]
    assert swapped == [study.swapped("ada", i.id) for i in study.items()]
    # 100 draws: standard deviation 5
    assert 30 < sum(swapped) < 70


# --------------------------------------------------------------------------------------------------------- names, notes


def test_names(make_study):
    study = make_study()
    assert study.join("  Ada   Lovelace ") == "Ada Lovelace"
    assert study.join("ada lovelace") == "Ada Lovelace"
    assert study.join("Zoë <b>") == "Zoë <b>"
    assert study.join("李雷") == "李雷"
    assert study.raters() == ["Ada Lovelace", "Zoë <b>", "李雷"]
    assert fold("\uff21DA") == fold("ada")


@pytest.mark.parametrize("name", ["", "   ", "x" * 41, "=1+1", "<b>", "Ada\x00", "Ada\u202eBob", "-"])
def test_impossible_names_are_refused(name):
    with pytest.raises(BadStudy, match="cannot be a rater's name"):
        clean(name)


def test_questions():
    asked = {question(c, p) for c in ("", "creepy") for p in (False, True)}
    assert len(asked) == 4


def test_notes(make_study):
    study = make_study()
    assert study.noted("drawing") is None
    study.note("drawing", {"by": 1})
    study.note("drawing", {"by": 2})
    with Study.open(study.folder) as again:
        assert again.noted("drawing") == {"by": 2}
    study.note("drawing", None)
    assert study.noted("drawing") is None


# -------------------------------------------------------------------------------------------------- threads, kill, disk


def test_many_threads_and_two_connections_lose_and_double_nothing(make_study):
    study, n = make_study(40), 4
    with Study.open(study.folder) as other:

        def work(number):
            for item in range(1, 41):
                # everything twice, over two connections, as a lost reply would have it
                study.rate(f"rater {number}", item, "not")
                other.rate(f"rater {number}", item, "not")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(study.ratings()) == len(set(answered(study))) == 40 * n


KILLED = """
import sys
from expunge.feedback import Study
study = Study.open(sys.argv[1])
for item in study.order("Ada"):
    study.rate("Ada", item, "not")
    print(item, flush=True)
"""


def test_what_was_told_stored_survives_kill(make_study):
    study = make_study(60)
    child = subprocess.Popen([sys.executable, "-c", KILLED, study.folder], stdout=subprocess.PIPE, text=True)
    with child:
        told = [int(child.stdout.readline()) for _ in range(20)]
        os.kill(child.pid, signal.SIGKILL)
        told += [int(line) for line in child.stdout if line.endswith("\n")]
    stored = [r.item for r in study.ratings()]
    # one more may have been stored than could be told
    assert stored[: len(told)] == told == study.order("Ada")[: len(told)]
    assert len(stored) - len(told) in (0, 1)
    assert [i.id for i in study.upcoming("Ada", 60)] == study.order("Ada")[len(stored) :]


def test_a_full_disk_is_told_and_nothing_is_half_stored(make_study):
    study = make_study()
    ((pages,),) = study._db.rows("PRAGMA page_count")
    study._db.rows(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageError, match="full.* Nothing of it was stored"):
        study.rate_all([(f"rater {'x' * 20}{i}", 1, "not", 0, "") for i in range(5000)])
    assert study.ratings() == []
    study.rate("Ada", 1, "not")
