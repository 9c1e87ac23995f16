"""A cell of a grid: what counts as finished, and how an unfinished one goes on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expunge.backbones import tiny
from expunge.bench import cells
from expunge.concept import Concept
from expunge.door import erase
from expunge.errors import BadRun, NeedsError
from expunge.methods.fewshot import FewShot
from expunge.methods.neggrad import NegGrad
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
    # a cell of a version without some option counts for its default alone, and one with an option that is gone does not
    run = Run(tmp_path / "run")
    older = {k: v for k, v in run.card.settings.items() if k != "reads"}
    run.write_card(replace(run.card, settings=older))
    assert cells.finished(tmp_path / "run", UCE(), model.hash, cells.SHORT)
    assert not cells.finished(tmp_path / "run", UCE(reads="tokens"), model.hash, cells.SHORT)
    run.write_card(replace(run.card, settings=older | {"gone": 1}))
    assert not cells.finished(tmp_path / "run", UCE(), model.hash, cells.SHORT)
    assert not cells.finished(tmp_path / "run", UCE(), "0" * 64, cells.SHORT)


def test_the_method_of_a_few_pictures_is_drawn_a_few(model: Any, tmp_path: Path) -> None:
    assert [cells.drawn(m) for m in (UCE(), NegGrad(), FewShot())] == [0, 64, 4]
    for i, method in enumerate((UCE(), FewShot(steps=1))):
        cells.fill(model, None, method, BOMB, tmp_path / str(i))
        card = Run(tmp_path / str(i)).card
        assert card.make_images == cells.drawn(method)
        assert cells.finished(tmp_path / str(i), method, model.hash)
    # a cell of another number of pictures begins anew
    Run(tmp_path / "1").write_card(replace(card, make_images=8))
    assert not cells.finished(tmp_path / "1", FewShot(steps=1), model.hash)


def test_one_value_alone_has_no_ends() -> None:
    assert cells.told(cells.interval([[0.5]])) == "0.500"
    assert cells.told(cells.interval([[0.5], [0.5]])) == "0.500 [0.500, 0.500]"
    assert cells.told(cells.interval([])) == "-"


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


def test_a_cell_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "esd" / "bomb"
    with cells.claimed(folder) as mine:
        assert mine
        # a second opening of the file locks like a second process
        with cells.claimed(folder) as theirs, cells.claimed(tmp_path / "esd" / "pill") as another:
            assert not theirs
            assert another
    with cells.claimed(folder) as again:
        assert again


def test_what_cells_found_goes_to_another_machine_without_their_pictures(model: Any, tmp_path: Path) -> None:
    here, there, known = tmp_path / "here", tmp_path / "there", tmp_path / "known.jsonl"
    cells.recall(known, here)  # no file yet: nothing is known
    assert not here.exists()
    cells.fill(model, None, UCE(), BOMB, here / "uce" / "bomb")
    write_json(here / "uce" / "bomb" / cells.MEASURES, {"updates": 0.0})
    write_json(here / "uce" / "pill" / cells.REFUSED, {"error": "no", "base_hash": model.hash, "settings": {}})
    cells.keep(known, here)
    assert len(known.read_text().splitlines()) == 2
    assert not cells.finished(there / "uce" / "bomb", UCE(), model.hash)
    write_json(there / "uce" / "pill" / cells.REFUSED, {"error": "its own"})
    cells.recall(known, there)
    assert cells.finished(there / "uce" / "bomb", UCE(), model.hash)
    assert sorted(p.name for p in (there / "uce" / "bomb").iterdir()) == ["card.json", "measures.json", "scores.json"]
    # what is there already stays
    assert "its own" in (there / "uce" / "pill" / cells.REFUSED).read_text()
    # and what comes back is what went out
    write_json(there / "uce" / "pill" / cells.REFUSED, {"error": "no", "base_hash": model.hash, "settings": {}})
    before = known.read_bytes()
    cells.keep(known, there)
    assert known.read_bytes() == before
    # cells of other settings begin anew, though nothing but their figures is there
    cells.fill(model, None, UCE(ridge=7.0), BOMB, there / "uce" / "bomb")
    assert (there / "uce" / "bomb" / "edit.safetensors").exists()


@pytest.mark.parametrize("line", ["{", "[]", '{"card.json": {}}'])
def test_a_file_that_is_none_of_ours_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "known.jsonl").write_text(line + "\n")
    with pytest.raises(BadRun, match="line 1 of .*known.jsonl is no cell"):
        cells.recall(tmp_path / "known.jsonl", tmp_path / "work")
    assert not (tmp_path / "work").exists()
