"""Records: what a run leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from expunge.errors import BadRun
from expunge.records import Card, Run, Score, thin

CARD = Card(
    method="sdd", settings={"steps": 3}, concept={"name": "bomb"}, model="tiny", base_hash="ab", seed=0, version="0.1.0"
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    Run(tmp_path).write_card(CARD)
    return Run.open(tmp_path)


def test_card_round_trip(run: Run) -> None:
    assert run.card == CARD
    several = replace(CARD, also=[{"name": "dagger"}])
    run.write_card(several)
    assert [c["name"] for c in run.card.concepts] == ["bomb", "dagger"]


def test_scores_of_a_protocol_replace_its_former_ones(run: Run) -> None:
    a = Score(protocol="emoji-v1", metric="ua", value=0.9, n=48)
    b = Score(protocol="other", metric="ua", value=None, errors=2)
    assert run.scores == []
    run.write_scores([a, b])
    run.write_scores([replace(a, value=0.8)])
    assert run.scores == [b, replace(a, value=0.8)]
    wanted = {"protocol", "metric", "value", "low", "high", "n", "errors"}
    assert wanted <= set(json.loads((run.folder / "scores.json").read_text())[0])


def test_neighbours_come_by_damage(run: Run) -> None:
    run.write_neighbours([{"name": "a", "damage": 0.1}, {"name": "b", "damage": 0.5}])
    assert [n["name"] for n in run.neighbours] == ["b", "a"]


def test_other_files_round_trip(run: Run) -> None:
    assert run.samples == run.outcomes == run.neighbours == []
    run.write_samples([{"role": "target"}])
    run.write_outcomes([{"role": "target"}, {"role": "retain"}])
    assert run.samples == [{"role": "target"}]
    assert len(run.outcomes) == 2


@pytest.mark.parametrize("broken", ['{"role": "tar', "3", "\x00"])
def test_a_broken_line_is_told_with_its_number(run: Run, broken: str) -> None:
    # a line separator that JSON does not escape and `splitlines` would cut at
    run.write_outcomes([{"prompt": "a\u2028b"}])
    assert run.outcomes == [{"prompt": "a\u2028b"}]
    path = run.folder / "outcomes.jsonl"
    path.write_text(path.read_text() + f"\n{broken}\n")
    with pytest.raises(BadRun, match=r"outcomes\.jsonl, line 3, .*expunge audit"):
        _ = run.outcomes
    path.write_bytes(b"\xff")
    with pytest.raises(BadRun, match=r"outcomes\.jsonl cannot be read"):
        _ = run.outcomes


def test_refusals_say_what_is_missing(run: Run, tmp_path: Path) -> None:
    with pytest.raises(BadRun, match="no such folder"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(BadRun, match=r"edit.safetensors is missing"):
        _ = run.edit_path
    (tmp_path / "card.json").write_text('{"method": "sdd"')
    with pytest.raises(BadRun, match=r"card.json cannot be read"):
        _ = run.card
    (tmp_path / "card.json").write_text('{"method": "sdd"}')
    with pytest.raises(BadRun, match="settings"):
        _ = run.card
    (tmp_path / "card.json").unlink()
    (tmp_path / "state.safetensors").write_text("")
    with pytest.raises(BadRun, match=r"card.json is missing \(found: state.safetensors\).*--resume"):
        Run.open(tmp_path)


def test_thin_keeps_ends_and_order() -> None:
    values = [float(i) for i in range(1001)]
    thinned = thin(values)
    assert len(thinned) == 200
    assert (thinned[0], thinned[-1]) == (0.0, 1000.0)
    assert thinned == sorted(set(thinned))
    assert thin(values[:5]) == values[:5]
