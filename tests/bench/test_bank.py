"""The bench of the trajectory bank: what is measured again and what is not, and its plot."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expunge.backbones import tiny
from expunge.bench import bank
from expunge.bench.cells import SHORT
from expunge.records import Score

SECONDS = 2.5


def row(**changes: Any) -> dict[str, Any]:
    each = {"ua": [0.9, 0.8, 0.95], "ira": [0.7, 0.6, 0.8], "seconds": SECONDS}
    return {"base_hash": "x", "concept": "bomb", "reuse": 1, "rollouts": bank.ROLLOUTS} | each | changes


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What is erased, by stand-ins of the erasure and of the audit on the tiny model."""
    cells: list[tuple[str, int, int]] = []

    def erase(model: Any, concept: Any, method: Any, *, seed: int, out: Path) -> Any:
        cells.append((concept.name, method.reuse, method.rollouts))
        return SimpleNamespace(card=SimpleNamespace(seconds=SECONDS))

    def audit(run: Path, rules: Any, *, model: Any) -> list[Score]:
        assert rules is SHORT
        return [Score(protocol=rules.id, metric=m, value=0.5, low=0.4, high=0.6, n=9) for m in ("ua", "ira", "cra")]

    monkeypatch.setattr(bank, "erase", erase)
    monkeypatch.setattr(bank, "audit", audit)
    monkeypatch.setattr(bank, "load", lambda _: tiny.model())
    return cells


def test_known_cells_of_this_model_stay_and_those_of_another_go(asked: list[Any], tmp_path: Path) -> None:
    out, told, mine = tmp_path / "bank.json", list[str](), tiny.model().hash
    known = row(base_hash=mine, ua=[0.0, 0.0, 0.1])
    out.write_text(json.dumps([known, row(), row(reuse=2)]))
    rows = bank.measure(["bomb", "pizza"], out, told.append)
    cells = [(concept, *cell) for concept in ("bomb", "pizza") for cell in bank.GRID]
    assert asked == [c for c in cells if c != ("bomb", 1, bank.ROLLOUTS)]
    assert json.loads(out.read_text()) == rows
    assert rows[0] == known
    assert {r["base_hash"] for r in rows} == {mine}
    assert [(r["concept"], r["reuse"], r["rollouts"]) for r in rows] == cells
    assert [json.loads(line) for line in told] == rows[1:]
    fresh = {"ua": [0.5, 0.4, 0.6], "ira": [0.5, 0.4, 0.6], "seconds": SECONDS}
    assert all(fresh.items() <= r.items() for r in rows[1:])
    # nothing is left to do
    asked.clear()
    assert bank.measure(["pizza", "bomb"], out, told.append) == rows
    assert asked == []


def test_a_cell_that_is_done_is_kept_though_the_next_one_fails(
    asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    erase = bank.erase

    def fails(*given: Any, **options: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        return erase(*given, **options)

    monkeypatch.setattr(bank, "erase", fails)
    with pytest.raises(KeyboardInterrupt):
        bank.measure(["bomb"], tmp_path / "bank.json", lambda _: None)
    assert [(r["reuse"], r["rollouts"]) for r in json.loads((tmp_path / "bank.json").read_text())] == bank.GRID[:2]


def test_the_plot_shows_both_metrics_and_seconds_and_is_the_same_twice(tmp_path: Path) -> None:
    rows = [row(concept=c, reuse=reuse, rollouts=rollouts) for c in ("bomb", "pizza") for reuse, rollouts in bank.GRID]
    drawn = []
    for path in (tmp_path / "new" / "a.svg", tmp_path / "b.svg"):
        bank.plot(rows, path)
        drawn.append(path.read_bytes())
    assert drawn[0] == drawn[1]
    text = drawn[0].decode()
    assert text.startswith("<?xml")
    for words in ("UA, bomb", "IRA, bomb", "UA, pizza", "IRA, pizza", "uses of each latent", "seconds of the erasure"):
        assert f">{words}</text>" in text
    # the rows of other rollouts are not on the curve over reuse
    bank.plot([*rows, row(rollouts=2, ua=[0.1, 0.0, 0.2])], tmp_path / "c.svg")
    assert (tmp_path / "c.svg").read_bytes() == drawn[0]
    bank.plot([*rows[1:], row(ua=[0.1, 0.0, 0.2])], tmp_path / "d.svg")
    assert (tmp_path / "d.svg").read_bytes() != drawn[0]
