"""The bench's grid: what is run, what is kept, and what its table says."""

import json
from pathlib import Path

import pytest

from expunge import cli
from expunge.bench import methods as grid
from expunge.metrics.rates import wilson
from expunge.records import Card, Run, Score


def cell(work: Path, method: str, target: str, ua: float, ira: float, seconds: float = 2.0) -> None:
    folder = grid.folder_of(work, method, target)
    folder.mkdir(parents=True)
    run = Run(folder)
    run.write_card(
        Card(
            method=method, settings={}, concept={"name": target}, model="emoji", base_hash="0", seed=0, version="0",
            seconds=seconds,
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
    assert grid.cells(["a", "b"], ["x", "y"]) == [("a", "x"), ("b", "x"), ("a", "y"), ("b", "y")]


def test_only_a_whole_audit_or_a_refusal_counts_as_finished(tmp_path: Path) -> None:
    assert not grid.finished(tmp_path, "esd", "bomb")
    folder = grid.folder_of(tmp_path, "esd", "bomb")
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text("[]")
    assert not grid.finished(tmp_path, "esd", "bomb")
    (folder / "refused.json").write_text('{"error": "no"}')
    assert grid.finished(tmp_path, "esd", "bomb")
    cell(tmp_path, "esd", "slot machine", 1.0, 0.8)
    assert grid.finished(tmp_path, "esd", "slot machine")


def test_row_pools_pictures_and_compares_with_the_base(tmp_path: Path) -> None:
    cell(tmp_path, "esd", "bomb", 1.0, 0.8)
    cell(tmp_path, "esd", "skull", 0.5, 0.4)
    refused = grid.folder_of(tmp_path, "esd", "pill")
    refused.mkdir()
    (refused / "refused.json").write_text(json.dumps({"error": "no such layer"}))
    row = grid.row("esd", ["bomb", "skull", "pill", "not run"], tmp_path)
    assert row is not None
    assert row.n == 2
    # 50 pictures each, of which 10 could not be scored: they stay in the denominator
    assert row.ua == pytest.approx((0.75, *(wilson(75, 100) or ())))
    assert row.worst == 0.5
    assert row.ira[0] == pytest.approx(0.75)
    assert row.ira[1] == pytest.approx(0.5)
    assert row.ira[2] == pytest.approx(1.0)
    assert row.cra == pytest.approx((1, 1, 1))
    assert row.failed == {"pill": "no such layer"}
    text = grid.table([row])
    assert "| esd | 2 | 0.750 [" in text
    assert "esd on pill: no such layer" in text


def test_nothing_run_is_no_row(tmp_path: Path) -> None:
    assert grid.rows(["esd"], ["bomb"], tmp_path) == []


def test_plot_is_an_svg_and_the_same_twice(tmp_path: Path) -> None:
    cell(tmp_path, "esd", "bomb", 1.0, 0.8)
    for name in ("a.svg", "b.svg"):
        grid.plot(grid.rows(["esd"], ["bomb"], tmp_path), tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert "esd, 2 s" in text
    assert text == (tmp_path / "b.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods", "--methods", "ucee"], "'ucee' is not known here. Did you mean 'uce'?"),
        (["methods", "--targets", "bom"], "'bom' is not known here. Did you mean 'bomb'?"),
        (["methods", "--protocol", "emoji-v9"], "emoji-v9"),
        (["uce", "--counts", "1,ten"], "'ten'"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == cli.EXPECTED_ERROR
    assert message in capsys.readouterr().err
