"""What raters reject, by their own answers; and the command line's form of a study."""

from __future__ import annotations

from pathlib import Path

import pytest

from expunge.errors import BadStudy, ConceptError
from expunge.feedback.verdict import concept, is_study, rejected

from .conftest import MakeStudy


def test_a_picture_is_rejected_when_more_raters_mark_it_than_pass_it(make_study: MakeStudy) -> None:
    study = make_study(4)
    for rater, answers in {
        "ann": ("concept", "concept", "not", "unsure"),
        "bob": ("concept", "not", "not", "concept"),
        "cid": ("not", "unsure", "not", "unsure"),
    }.items():
        for item, answer in enumerate(answers, 1):
            study.rate(rater, item, answer)
    found = rejected(study.folder)
    assert found == [(study.path(1), "prompt 1"), (study.path(4), "prompt 4")]
    assert all(path.is_file() for path, _ in found)


def test_of_pairs_a_picture_is_rejected_when_it_is_the_worse_of_most(make_study: MakeStudy) -> None:
    study = make_study(4, pairs=True)
    for item in study.items():
        # the higher number is the worse
        assert item.other is not None
        study.rate("ann", item.id, "first" if item.picture > item.other else "second")
    assert [prompt for _, prompt in rejected(study.folder)][-1] == "prompt 4"
    assert "prompt 1" not in [prompt for _, prompt in rejected(study.folder)]


def test_without_answers_nothing_is_rejected(make_study: MakeStudy) -> None:
    assert rejected(make_study().folder) == []


def test_the_form_of_the_command_line(make_study: MakeStudy, tmp_path: Path) -> None:
    folder = make_study().folder
    found = concept(f"study:{folder}", anchor="house", kind="style")
    assert (found.name, found.images, found.anchor, found.kind) == ("open mouth", folder, "house", "style")
    assert concept(f"study:{make_study(name='no-label', concept='').folder}").name == "no-label"
    with pytest.raises(ConceptError, match="by its rated pictures and by images"):
        concept(f"study:{folder}", images=tmp_path)
    with pytest.raises(BadStudy, match="no study at"):
        concept(f"study:{tmp_path}")


def test_a_folder_of_pictures_is_no_study(make_study: MakeStudy) -> None:
    folder = make_study().folder
    assert is_study(folder)
    assert not is_study(folder / "pictures")
