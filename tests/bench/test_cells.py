"""A cell of a grid: what counts as finished, and how an unfinished one goes on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expunge.backbones import tiny
from expunge.bench import cells
from expunge.concept import Concept
from expunge.door import erase
from expunge.errors import NeedsError
from expunge.methods.uce import UCE
from expunge.records import Run, Score
from expunge.storage import write_json

BOMB = Concept("bomb")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny model, and audits that are stand-ins."""

    def stand_in(run: Path, rules: Any, **_: Any) -> None:
        Run(run).write_scores([Score(protocol=rules.id, metric="ua", value=1.0, n=1)])

    monkeypatch.setattr(cells, "audit", stand_in)
    return tiny.model(window=64)


def test_a_cell_goes_on_or_begins_anew(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = tmp_path / "bomb", []

    def watched(*given: Any, **options: Any) -> Any:
        asked.append(options["resume"])
        return erase(*given, **options)

    monkeypatch.setattr(cells, "erase", watched)
    assert not cells.finished(folder, UCE(), model.hash)
    cells.fill(model, None, UCE(), BOMB, folder)
    made = Run(folder).card.created, (folder / "edit.safetensors").stat().st_mtime_ns
    assert cells.finished(folder, UCE(), model.hash)
    (folder / "scores.json").unlink()
    assert not cells.finished(folder, UCE(), model.hash)
    cells.fill(model, None, UCE(), BOMB, folder)
    # the erasure was whole: only its audit was missing
    assert (Run(folder).card.created, (folder / "edit.safetensors").stat().st_mtime_ns) == made
    assert asked == [True, True]
    (folder / "measures.json").write_text("{}")
    Run(folder).write_card(replace(Run(folder).card, base_hash="0" * 64))
    cells.fill(model, None, UCE(), BOMB, folder)
    assert asked == [True] * 4
    assert Run(folder).card.base_hash == model.hash
    # nothing is left that belonged to the other model
    assert not (folder / "measures.json").exists()


def test_a_cell_belongs_to_model_settings_and_protocol(model: Any, tmp_path: Path) -> None:
    cells.fill(model, None, UCE(), BOMB, tmp_path / "run", rules=cells.SHORT, seed=3)
    assert Run(tmp_path / "run").card.seed == 3
    assert cells.finished(tmp_path / "run", UCE(), model.hash, cells.SHORT)
    assert not cells.finished(tmp_path / "run", UCE(), model.hash)
    assert not cells.finished(tmp_path / "run", UCE(ridge=7.0), model.hash, cells.SHORT)
    assert not cells.finished(tmp_path / "run", UCE(), "0" * 64, cells.SHORT)


def test_refusals_are_kept_and_told_once_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NeedsError("no pictures")

    model = tiny.model()
    monkeypatch.setattr(cells, "erase", refuse)
    cells.fill(model, None, UCE(), BOMB, tmp_path / "a")
    assert cells.finished(tmp_path / "a", UCE(), model.hash)
    assert not cells.finished(tmp_path / "a", UCE(ridge=7.0), model.hash)
    assert cells.scores_of(tmp_path / "a") == {}
    write_json(tmp_path / "b" / cells.REFUSED, {"error": "no pictures"})
    told = cells.refusals([("uce", "bomb", tmp_path / "a"), ("uce", "pill", tmp_path / "b"), ("uce", "x", tmp_path)])
    assert told == ["uce on bomb, pill: no pictures"]
