"""What people said, in the report."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from expunge.errors import BadRun
from expunge.records import REWARD
from expunge.report import build

from .test_build import text

AUC = {"value": 0.914, "low": 0.86, "high": 0.951, "n": 200}
ROW: dict[str, Any] = {
    "concept": "creepy", "study": "studies/creepy", "embedding": "judge-a", "pairs": False, "raters": 3,
    "reliability": [0.97, 0.93, 0.9], "rated": 200, "rejected": 41, "blind": False, "auc": AUC, "calibration": 0.034,
    "penalty": 0.3, "cut": 0.44, "used": 52,
    "curve": [{"ratings": 50, "value": 0.81, "low": 0.7, "high": 0.89, "n": 200}, {"ratings": 160, **AUC}],
}  # fmt: skip


def said(run: Any, row: dict[str, Any]) -> str:
    (run.folder / REWARD).write_text(json.dumps([row]))
    return text(build([run]))


def test_auc_calibration_and_curve_are_shown(make_run: Any) -> None:
    found = said(make_run(), ROW)
    for expected in (
        "What people said “creepy”: 3 raters decided 200 pictures and rejected 41.",
        "with a chance of 91.4 % (test AUC, 95 % interval 86.0\N{EN DASH}95.1 %)",
        "3.4 % off on average (calibration error)",
        "50 81.0 % 70.0\N{EN DASH}89.0 % 160 91.4 %",
        "Study: studies/creepy",
    ):
        assert expected in found
    assert "reaches chance" not in found


def test_a_model_no_better_than_chance_is_told(make_run: Any) -> None:
    found = said(make_run(), ROW | {"auc": AUC | {"low": 0.45}, "blind": True})
    assert "The interval reaches chance" in found
    assert "saw no pattern in that, so the concept was learned from these answers alone" in found


def test_pairs_and_missing_figures(make_run: Any) -> None:
    none = {"value": None, "low": None, "high": None, "n": 0}
    found = said(make_run(), ROW | {"pairs": True, "raters": 1, "auc": none, "calibration": None, "concept": ""})
    assert "1 rater decided 200 pairs of pictures. A reward model" in found
    assert "a chance of \N{EN DASH} ;" in found


def test_without_ratings_there_is_no_such_part(make_run: Any) -> None:
    assert "What people said" not in text(build([make_run()]))


def test_hostile_text_is_text(make_run: Any) -> None:
    run, nasty = make_run(), "<script>alert(1)</script>"
    (run.folder / REWARD).write_text(json.dumps([ROW | dict.fromkeys(("concept", "study", "embedding"), nasty)]))
    assert "<script" not in build([run])


@pytest.mark.parametrize("change", [{"auc": 3}, {"raters": "three"}, {"calibration": True}, {"curve": None}])
def test_a_broken_file_is_named(make_run: Any, change: dict[str, Any]) -> None:
    run = make_run()
    (run.folder / REWARD).write_text(json.dumps([ROW | change]))
    with pytest.raises(BadRun, match=r"reward\.json"):
        build([run])


def test_a_study_is_given_to_the_command_as_it_was(make_run: Any) -> None:
    run = make_run()
    both = [{"name": "creepy", "kind": "object", "images": "studies/creepy"}, {"name": "bomb", "images": None}]
    run.write_card(replace(run.card, concept=both[0], also=both[1:]))
    assert "--concept study:studies/creepy --concept bomb --kind object --method" in said(run, ROW).replace(" \\", "")
