"""The bench's grid: what is run, what is kept, and what its table says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expunge import cli
from expunge.backbones import tiny
from expunge.bench import cells
from expunge.bench import methods as grid
from expunge.errors import ExpungeError, NeedsError, SettingError, StorageError
from expunge.methods import get
from expunge.methods.esd import ESD
from expunge.metrics.rates import wilson
from expunge.records import Card, Run, Score
from expunge.storage import write_json

BASE = "f" * 64  # hash of the model that is measured


def cell(work: Path, method: str, target: str, ua: float, ira: float, seconds: float = 2.0) -> None:
    folder = grid.folder_of(work, method, target)
    folder.mkdir(parents=True)
    run = Run(folder)
    run.write_card(
        Card(
            method=method, settings=cells.settings_of(get(method)()), concept={"name": target}, model="emoji",
            base_hash=BASE, seed=0, version="0", seconds=seconds,
        )
    )  # fmt: skip
    rate = {"protocol": "emoji-v1", "base": 0.8}
    run.write_scores(
        [
            Score(metric="ua", value=ua, n=40, errors=10, **{**rate, "base": 0.0}),
            Score(metric="ira", value=ira, n=100, **rate),
            Score(metric="cra", value=0.8, n=100, **rate),
            Score(metric="h", value=0.5, **rate),
        ]
    )


def test_the_grid_goes_target_by_target() -> None:
    assert grid.grid(["a", "b"], ["x", "y"]) == [("a", "x"), ("b", "x"), ("a", "y"), ("b", "y")]


def test_only_a_whole_audit_or_a_refusal_counts_as_finished(tmp_path: Path) -> None:
    assert not grid.finished(tmp_path, "esd", "bomb", BASE)
    cell(tmp_path, "esd", "bomb", 1.0, 0.8)
    assert grid.finished(tmp_path, "esd", "bomb", BASE)
    scores = grid.folder_of(tmp_path, "esd", "bomb") / "scores.json"
    scores.write_text("[]")
    assert not grid.finished(tmp_path, "esd", "bomb", BASE)
    scores.write_text(json.dumps([Score(protocol="other-v1", metric="ua", value=1.0).to_json()]))
    assert not grid.finished(tmp_path, "esd", "bomb", BASE)
    refuse(tmp_path, "esd", "bomb")
    assert grid.finished(tmp_path, "esd", "bomb", BASE)


def refuse(work: Path, method: str, target: str, why: str = "no such layer") -> None:
    about = {"error": why, "base_hash": BASE, "settings": cells.settings_of(get(method)())}
    write_json(grid.folder_of(work, method, target) / cells.REFUSED, about)


def test_cells_of_another_model_or_of_other_defaults_are_not_finished(tmp_path: Path) -> None:
    cell(tmp_path, "esd", "bomb", 1.0, 0.8)
    refuse(tmp_path, "sdd", "bomb")
    for method in ("esd", "sdd"):
        assert not grid.finished(tmp_path, method, "bomb", "0" * 64)
    run = Run(grid.folder_of(tmp_path, "esd", "bomb"))
    run.write_card(replace(run.card, settings=run.card.settings | {"steps": 3}))
    assert not grid.finished(tmp_path, "esd", "bomb", BASE)


def test_an_arm_is_a_method_with_settings() -> None:
    assert grid.built("esd") == ESD()
    assert grid.built("esd steps=3 lr=0.01") == ESD(steps=3, lr=0.01)
    assert grid.folder_of(Path("w"), "esd steps=3", "beer mug") == Path("w/esd-steps=3/beer-mug")
    with pytest.raises(SettingError, match="steps"):
        grid.built("esd stepps=3")


def test_a_cell_that_another_process_is_at_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[Path] = []
    monkeypatch.setattr(cells, "fill", lambda *given: filled.append(given[-1]))
    busy, free = (grid.folder_of(tmp_path, "uce", t) for t in ("bomb", "pizza"))
    with cells.claimed(busy):
        grid.run(tiny.model(), [("uce", "bomb"), ("uce", "pizza")], tmp_path, lambda *_: None)
    assert filled == [free]


def test_a_refusal_is_a_result_and_a_full_disk_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(window=64)

    def fails(error: ExpungeError) -> None:
        def erase(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(cells, "erase", erase)

    fails(NeedsError("no pictures"))
    grid.run(model, [("uce", "bomb"), ("uce", "pizza")], tmp_path, lambda *_: None)
    assert grid.refusals(["uce"], ["bomb", "pizza", "skull"], tmp_path) == ["uce on bomb, pizza: no pictures"]
    assert grid.rows(["uce"], ["bomb", "pizza"], tmp_path) == []
    fails(StorageError("the disk is full"))
    with pytest.raises(StorageError):
        grid.run(model, [("uce", "skull")], tmp_path, lambda *_: None)
    assert not grid.finished(tmp_path, "uce", "skull", model.hash)


def test_row_pools_pictures_and_compares_with_the_base(tmp_path: Path) -> None:
    cell(tmp_path, "esd", "bomb", 1.0, 0.8)
    cell(tmp_path, "esd", "skull", 0.5, 0.4)
    refuse(tmp_path, "esd", "pill")
    cell(tmp_path, "esd", "fluent", 0.0, 0.0)  # a style: a row of its own
    row = grid.row("esd", "object", ["bomb", "skull", "pill", "not run", "fluent"], tmp_path)
    assert row is not None
    assert row.n == 2
    # 50 pictures each, of which 10 could not be scored: they stay in the denominator
    assert row.ua == pytest.approx((0.75, *(wilson(75, 100) or ())))
    assert row.worst == 0.5
    assert row.ira[0] == pytest.approx(0.75)
    assert row.ira[1] == pytest.approx(0.5)
    assert row.ira[2] == pytest.approx(1.0)
    assert row.cra == pytest.approx((1, 1, 1))
    singles = grid.by_target(["esd"], ["skull", "pill", "fluent"], tmp_path)
    text = grid.table([row], singles, grid.refusals(["esd"], ["bomb", "skull", "pill"], tmp_path))
    assert "| esd | 2 objects | 0.750 [" in text
    assert "| skull | esd | 0.500 (0.000) | 0.400 (0.800) | 0.800 (0.800) | - | - |" in text
    assert "| style fluent | esd | 0.000 (0.000) |" in text
    assert "| pill |" not in text
    assert "esd on pill: no such layer" in text


def test_objects_and_styles_have_rows_of_their_own(tmp_path: Path) -> None:
    for target in ("bomb", "fluent", "twemoji"):
        cell(tmp_path, "esd", target, 1.0, 0.8)
    found = grid.rows(["esd"], ["bomb", "fluent", "twemoji"], tmp_path)
    assert [(r.kind, r.n) for r in found] == [("object", 1), ("style", 2)]


def test_nothing_run_is_no_row(tmp_path: Path) -> None:
    assert grid.rows(["esd"], ["bomb"], tmp_path) == []


def test_plot_is_an_svg_and_the_same_twice(tmp_path: Path) -> None:
    cell(tmp_path, "esd", "bomb", 1.0, 0.8)
    for name in ("a.svg", "b.svg"):
        grid.plot(grid.rows(["esd"], ["bomb"], tmp_path), tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert ">esd, 2 s<" in text
    assert ">objects<" in text
    assert ">styles<" not in text
    assert text == (tmp_path / "b.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods", "--methods", "ucee"], "'ucee' is not known here. Did you mean 'uce'?"),
        (["methods", "--targets", "bom"], "'bom' is not known here. Did you mean 'bomb'?"),
        (["uce", "--counts", "1,ten"], "'ten'"),
        (["uce", "--counts", ""], "Give whole numbers from 1"),
        (["uce", "--counts", "1,4000"], "can lose at most"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == cli.EXPECTED_ERROR
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("heights", "found"),
    [
        ([0.9, 0.5], [0.9, 0.5]),
        ([0.9, 0.9, 0.85], [0.9, 0.8, 0.7]),
        ([0.15, 0.05, 0.05], [0.2, 0.1, 0.0]),
        ([], []),
    ],
)
def test_names_lie_apart(heights: list[float], found: list[float]) -> None:
    assert grid.apart(heights, 0.1) == pytest.approx(found)
