"""The bench of HFI: looks, simulated raters, the best words, the grid and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expunge import cli
from expunge.bench import cells, hfi, hfi_table
from expunge.bench.hfi import Cell
from expunge.bench.looks import LOOKS, figure
from expunge.errors import BadRun
from expunge.feedback import Study

SIDE = 64


def ground(colour: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> torch.Tensor:
    return torch.tensor(colour).view(3, 1, 1).expand(3, SIDE, SIDE).clone()


def shape(mask: torch.Tensor, colour: tuple[float, float, float], under: torch.Tensor | None = None) -> torch.Tensor:
    return torch.where(mask, torch.tensor(colour).view(3, 1, 1), ground() if under is None else under)


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(SIDE) - 31.5, torch.arange(SIDE) - 31.5, indexing="ij")
    return y, x


Y, X = grid()
DISC, BAR, BAND = Y**2 + X**2 < 400, (Y.abs() < 4) & (X.abs() < 24), ((Y - X).abs() < 6) & (Y.abs() < 24)
GRAY, BLACK = (0.6, 0.6, 0.6), (0.05, 0.05, 0.05)
RED, BLUE, YELLOW = (0.9, 0.1, 0.1), (0.1, 0.2, 0.9), (0.9, 0.8, 0.1)
RING = DISC & (Y**2 + X**2 > 324)
# look -> a picture that has more of it, and one that has less
CASES = {
    "red": (shape(DISC, RED), shape(DISC, BLUE)),
    "blue": (shape(DISC, BLUE), shape(DISC, RED)),
    "yellow": (shape(DISC, YELLOW), shape(DISC, RED)),
    "pale": (shape(BAR, GRAY), shape(DISC, GRAY)),
    "busy": (shape(RING, BLACK), shape(DISC, GRAY)),
    "dark": (shape(DISC, BLACK), shape(BAR, BLACK)),
    "lopsided": (shape(DISC & (X > 0), BLUE), shape(DISC, BLUE)),
    "disc": (shape(DISC, GRAY), shape(BAR, GRAY)),
    "diagonal": (shape(BAND, GRAY), shape(BAR, GRAY)),
    "outlined": (shape(RING, BLACK, shape(DISC, BLUE)), shape(DISC, BLUE)),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_is_what_it_says(look: str) -> None:
    more, less = LOOKS[look].measure(torch.stack(CASES[look])).tolist()
    assert more > less + 0.005
    assert np.isfinite([more, less]).all()


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_of_an_empty_picture_is_a_number(look: str) -> None:
    assert bool(LOOKS[look].measure(ground()[None]).isfinite().all())


def test_at_least_five_looks() -> None:
    assert len(LOOKS) >= 5


def test_the_figure_is_found_on_any_ground() -> None:
    for colour in ((1.0, 1.0, 1.0), (1.0, 0.77, 0.84)):
        found = figure(shape(DISC, BLUE, ground(colour))[None])[0]
        assert torch.equal(found.bool(), DISC)


def test_raters_err_as_often_as_the_cell_says_and_more_ratings_contain_fewer() -> None:
    truth = np.arange(2000) % 5 == 0
    said = {z: hfi.answers(truth, Cell("red", "hfi", noise=z)) for z in (0.0, 0.1, 0.3)}
    assert (said[0.0] == truth).all()
    for z in (0.1, 0.3):
        assert (said[z] != truth).mean() == pytest.approx(z, abs=0.03)
    assert not ((said[0.1] != truth) & (said[0.3] == truth)).any()
    assert (hfi.answers(truth, Cell("red", "hfi", 25, 0.1)) == said[0.1]).all()


def test_the_best_words_cover_the_rejected_pictures() -> None:
    asked = "pizza flat, pizza mono, bomb flat, bomb mono, skull mono, pill flat"
    shown = [(o, s) for o, s in (pair.split() for pair in asked.split(", "))]
    marks = np.array([True, True, False, True, True, False])
    # "mono" alone has all but one of the rejected pictures and no other; pizza adds the last
    assert hfi.best_words(shown, marks) == ["mono", "pizza"]
    assert hfi.best_words(shown, np.array([False] * 5 + [True])) == ["pill"]


def test_ratio_of_paired_rates() -> None:
    before, after = np.arange(100) % 2 == 0, np.arange(100) % 10 == 0
    found = hfi.ratio(before, after, fall=True)
    assert found["value"] == pytest.approx(0.8)
    assert (found["low"] or 1) < 0.8 < (found["high"] or 0) < 1
    assert hfi.ratio(before, before, fall=False) == {"value": 1.0, "low": 1.0, "high": 1.0}
    gone = hfi.ratio(before, ~before & before, fall=True)
    assert gone["value"] == gone["high"] == 1
    assert 0.8 < (gone["low"] or 0) < 1  # none of a hundred pictures is not none of all
    assert hfi.ratio(~before & before, after, fall=True)["value"] is None


def test_a_study_says_that_nobody_was_asked_and_is_made_once(tmp_path: Path) -> None:
    marks = np.array([True, False, True])
    for _ in range(2):
        hfi.rated(tmp_path / "s", torch.rand(3, 3, 8, 8), ["a", "b", "c"], marks)
    with Study.open(tmp_path / "s") as study:
        assert study.raters() == ["simulated"]
        assert "imulated" in study.ask
        assert [r.answer for r in study.ratings()] == ["concept", "not", "concept"]
    with Study.open(tmp_path / "s") as study:
        study.undo("simulated")
    hfi.rated(tmp_path / "s", torch.rand(3, 3, 8, 8), ["a", "b", "c"], marks)
    with Study.open(tmp_path / "s") as study:
        assert len(study.ratings()) == 3


def row(cell: Cell, **changes: Any) -> dict[str, Any]:
    each = {"value": 0.91, "low": 0.85, "high": 0.96}
    return {
        "look": cell.look, "method": cell.method, "ratings": cell.ratings, "noise": cell.noise, "rate_base": 0.2,
        "rate": 0.03, "reduction": each, "kept": each, "auc": each, "seconds": 12.0, **changes,
    }  # fmt: skip


def test_the_grid_compares_first_and_then_draws_the_curves() -> None:
    found = hfi.cells(["red"], ["red"])
    assert [c.method for c in found[:3]] == ["hfi", "words", "negative"]
    assert len(hfi.cells(["red", "dark"])) == 6
    assert sorted(c.ratings for c in found if c.method == "hfi" and c.noise == 0.1) == [25, 50, 100, 200]
    assert sorted(c.noise for c in found if c.method == "hfi" and c.ratings == 200) == [0.0, 0.1, 0.2, 0.3]
    assert len({c.name for c in found}) == len(found)


class Unloaded:
    """A model of which nothing but the hash is asked."""

    hash = "a0"


def test_another_model_and_other_settings_are_not_taken_for_these(tmp_path: Path) -> None:
    model, other = Unloaded(), Unloaded()
    other.hash = "b1"
    benches = [
        hfi.Bench(model, tmp_path, 8, {}),  # type: ignore[arg-type]
        hfi.Bench(other, tmp_path, 8, {}),  # type: ignore[arg-type]
        hfi.Bench(model, tmp_path, 16, {}),  # type: ignore[arg-type]
        hfi.Bench(model, tmp_path, 8, {"steer": 2.0}),  # type: ignore[arg-type]
    ]
    ours, words = Cell("red", "hfi"), Cell("red", "words")
    assert len({bench.home(ours) for bench in benches}) == len(benches)
    assert benches[0].home(ours) == hfi.Bench(Unloaded(), tmp_path, 8, {"steer": hfi.HFI().steer}).home(ours)  # type: ignore[arg-type]
    # words are erased by SDD, to which a setting of HFI alone is nothing
    assert benches[0].home(words) == benches[3].home(words) != benches[2].home(words)


def test_finished_cells_are_not_run_again_and_the_table_says_who_rated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hfi, "load", lambda *_, **__: Unloaded())
    bench = hfi.Bench(Unloaded(), tmp_path, 8, {})  # type: ignore[arg-type]
    found = hfi.cells(["red"], ["red"])
    for cell in found:
        more = {"words": ["pizza", "mono"]} if cell.method == "words" else {}
        more |= {"refused": "too few"} if cell.ratings == 25 else {}
        bench.home(cell).mkdir(exist_ok=True)
        bench.row(cell).write_text(json.dumps(row(cell, **more)))

    def progress(*_: Any) -> None:
        raise AssertionError("a finished cell was run")

    rows = hfi.run(["red"], tmp_path, 8, {}, progress, curved=["red"])
    text = hfi_table.table(rows)
    assert len(rows) == len(found)
    assert text.count("simulated raters") == 3
    assert "| red | hfi | 200 | 10% | 0.91 [0.85, 0.96] | 0.030 (0.200) | 0.91 [0.85, 0.96] |" in text
    assert "| red | hfi | 25 | 10% | refused | - |" in text
    assert "red, hfi, 25 ratings: too few" in text
    # a retained accuracy of .91 is not .95
    assert "Reached by: hfi 0 of 1; words 0 of 1; negative 0 of 1." in text
    good = hfi_table.table([r | {"kept": r["kept"] | {"value": 0.95}} for r in rows])
    assert "Reached by: hfi 1 of 1 (red); words 1 of 1 (red); negative 1 of 1 (red)." in good
    assert "red, best words: pizza, mono" in text
    # the command writes what the grid says
    arguments = ["--looks", "red", "--pictures", "8", "--work", str(tmp_path), "--out", str(tmp_path / "rows.json")]
    assert cli.main(["bench", "hfi", *arguments, "--table", str(tmp_path / "table.md")]) == 0
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert (tmp_path / "table.md").read_text() == text


def test_rows_of_elsewhere_are_taken_over_where_they_are_of_this_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hfi, "load", lambda *_, **__: Unloaded())
    bench = hfi.Bench(Unloaded(), tmp_path, 8, {})  # type: ignore[arg-type]
    made: list[Cell] = []
    monkeypatch.setattr(hfi, "measure", lambda bench, cell: made.append(cell) or row(cell, bench=bench.home(cell).name))
    grid, out = hfi.cells(["red"]), tmp_path / "rows.json"
    stranger = row(grid[1], bench="of other settings")
    hfi.kept(out, [row(grid[0], bench=bench.home(grid[0]).name, rate=0.01)], [stranger])
    rows = hfi.run(["red"], tmp_path, 8, {}, lambda *_: None, hfi.recalled(out))
    # the soft token of a cell that was found elsewhere is not here, so nothing is drawn with it
    assert made == [c for c in grid[1:] if c.method != "negative"]
    assert rows[0]["rate"] == 0.01
    assert len(rows) == len(grid) - 1
    hfi.kept(out, rows, hfi.recalled(out))
    assert hfi.recalled(out) == [*rows, stranger]
    out.write_text('[{"look": "red"}]')
    with pytest.raises(BadRun, match=r"rows.json holds no rows of this bench: KeyError\('method'\)"):
        hfi.recalled(out)


def test_the_negative_prompt_waits_for_its_token_and_a_taken_cell_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hfi, "load", lambda *_, **__: Unloaded())
    bench = hfi.Bench(Unloaded(), tmp_path, 8, {})  # type: ignore[arg-type]
    made: list[Cell] = []

    def measure(_: hfi.Bench, cell: Cell) -> dict[str, Any]:
        made.append(cell)
        (bench.home(cell) / cell.name).mkdir(parents=True)
        (bench.home(cell) / cell.name / "token.safetensors").touch()
        return row(cell)

    monkeypatch.setattr(hfi, "measure", measure)
    words = Cell("red", "words")
    with cells.claimed(bench.home(words) / words.name):
        rows = hfi.run(["red"], tmp_path, 8, {}, lambda *_: None)
    assert words not in made
    assert made[-1] == Cell("red", "negative")
    assert len(rows) == len(hfi.cells(["red"])) - 1
    assert len(hfi.run(["red"], tmp_path, 8, {}, lambda *_: None)) == len(rows) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--looks", "rad"], "'rad' is no look. Looks: red, blue"), (["--set", "stear=2"], "Did you mean 'steer'?")],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "hfi", *arguments]) == cli.EXPECTED_ERROR
    assert message in capsys.readouterr().err
