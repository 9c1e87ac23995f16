"""Claims: arms are run once, finished cells are kept, and verdicts follow from intervals."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from expunge import backbones, cli
from expunge.backbones import tiny
from expunge.bench import cells, claims, measures
from expunge.bench.cells import interval
from expunge.bench.claims import CLAIMS, Claim, grid, row, verdict
from expunge.bench.measures import FOUND, Cell, label
from expunge.errors import NeedsError
from expunge.methods.uce import UCE
from expunge.protocols import METRICS
from expunge.records import Card, Run, Score

ONE, TWO = UCE(), UCE(preserve=0.0)
PAIR = Claim("uce", "better", (ONE, TWO), "h", "higher", beside=("ua", "updates", "ua pruned"))
ALONE = Claim("uce", "few", (ONE,), "updates", "lower", limit=0.0, beside=())
TARGETS = ["bomb", "skull"]
ARMS = {m for c in CLAIMS for m in c.arms}


def quiet(*_: Any) -> None:
    """No progress."""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny model and the calls of erasures, audits and looks, which are stand-ins; the judges are left out."""
    calls: list[tuple[str, str, str, int]] = []

    def erase(model: Any, concept: Any, method: Any, *, seed: int, out: Path, **_: Any) -> None:
        calls.append(("erase", label(method), concept.name, seed))
        if concept.name == "pill" and method == TWO:
            raise NeedsError("no pill")
        card = Card(
            method="uce", settings=cells.settings_of(method), concept={"name": concept.name}, model="tiny",
            base_hash=model.hash, seed=seed, version="0",
        )  # fmt: skip
        Run(out).write_card(card)

    def audit(folder: Path, rules: Any, **_: Any) -> None:
        card = Run(folder).card
        # targets and seeds differ more than arms do
        h = (
            (0.2 if card.concept["name"] == "bomb" else 0.7)
            + 0.03 * card.seed
            + (0.01 if card.settings["preserve"] else 0)
        )
        Run(folder).write_scores([Score(protocol=rules.id, metric=m, value=h, n=1) for m in ("h", "ua")])

    def looked(scene: Any) -> dict[str, float]:
        calls.append(("look", label(scene.cell.method), scene.cell.target, scene.cell.seed))
        return {"updates": 0.0, "ua pruned": math.nan}

    monkeypatch.setattr(cells, "erase", erase)
    monkeypatch.setattr(cells, "audit", audit)
    monkeypatch.setattr(claims, "load_panel", quiet)

    def together(scene: Any) -> dict[str, float]:
        calls.append(("late", label(scene.cell.method), scene.cell.target, scene.cell.seed))
        return {"ua composed": 0.0}

    for name in ("updates", "ua pruned"):
        monkeypatch.setitem(FOUND, name, looked)
    monkeypatch.setitem(FOUND, "ua composed", together)
    return tiny.model(), calls


def todo(model: Any, wanted: dict[Cell, set[str]], work: Path) -> dict[Cell, set[str]]:
    return {c: w for c, w in wanted.items() if not claims.whole(c, w, work, model.hash)}


def test_every_claim_compares_two_arms_or_holds_one_against_a_limit() -> None:
    for claim in CLAIMS:
        assert len(claim.arms) == (2 if claim.limit is None else 1)
        for name in (claim.measure, *claim.beside):
            assert name in FOUND or name in METRICS or name.removesuffix(" / base") in METRICS
    assert {c.name for c in CLAIMS} >= {"ap", "erasediff", "salun", "spm", "itd", "ant", "allbutone", "fewshot", "ssd"}


def test_arms_have_folders_of_their_own_and_the_same_training_as_what_they_are_compared_with() -> None:
    assert len({Cell(m, "bomb", 0).folder(Path()) for m in ARMS}) == len(ARMS)
    assert len({Cell(ONE, t, s).folder(Path()) for t in TARGETS for s in (0, 1)}) == 4
    for claim in CLAIMS:
        known = [asdict(m) for m in claim.arms]
        # SPM's membranes are trained from nothing, at a rate of their own
        for k in ("steps", "batch", *(("lr",) if claim.name != "spm" else ())):
            assert len({m.get(k) for m in known}) == 1
        assert all(getattr(m, "preserve", 0.0) == 0 for m in claim.arms if claim.name not in ("fewshot",))


def test_shared_arms_are_one_cell_that_is_asked_for_everything() -> None:
    found, apart = grid(CLAIMS, TARGETS, 3), [c for c in CLAIMS if c.objects]
    assert len(apart) == 1
    assert len(found) == (len(ARMS) - 1) * 2 * 3 + len(measures.JOINED)
    assert sum(len(c.arms) for c in CLAIMS) > len(ARMS)
    asked = {c.name: found[Cell(c.arms[-1], "bomb", 2)] for c in CLAIMS if not c.objects}
    assert asked["sara"] >= {"ua pruned", "ua lost by pruning", "accuracy of the pruned base"}
    assert "null change" in asked["allbutone"]
    assert "neighbours" in asked["ap"]
    assert not asked["spm"] & set(measures.COMPOSED)
    assert {c.target for c in found if c.method == apart[0].arms[0]} == set(measures.JOINED)
    assert all(found[Cell(apart[0].arms[0], t, 0)] == set(measures.COMPOSED) for t in measures.JOINED)
    assert [(c.target, c.seed) for c in grid([ALONE], TARGETS, 2)] == [(t, s) for s in (0, 1) for t in TARGETS]


def test_what_needs_the_edits_of_other_cells_is_measured_when_all_are_made(bench: Any, tmp_path: Path) -> None:
    model, calls = bench
    late = replace(ALONE, measure="ua composed", objects=(*TARGETS, "pill"))
    claims.run(model, grid([late, ALONE], TARGETS, 2), tmp_path, quiet)
    assert calls[-3:] == [("late", "uce", t, 0) for t in late.objects]
    assert [c for c in calls if c[0] == "late"] == calls[-3:]
    assert row(late, TARGETS, 2, tmp_path).n == 3
    assert row(ALONE, TARGETS, 2, tmp_path).n == 4


def test_only_cells_with_like_ua_decide_where_a_claim_says_so(bench: Any, tmp_path: Path) -> None:
    """Where a weaker erasure is compared, it also damages less."""
    model, _ = bench
    claims.run(model, grid([PAIR], TARGETS, 3), tmp_path, quiet)
    equal = replace(PAIR, alike=0.1)
    assert (row(equal, TARGETS, 3, tmp_path).n, row(equal, TARGETS, 3, tmp_path).unlike) == (6, 0)
    other = Cell(TWO, "skull", 1).folder(tmp_path)
    scores = [replace(s, value=(s.value or 0) - 0.2) if s.metric == "ua" else s for s in Run(other).scores]
    Run(other).write_scores(scores)
    found = row(equal, TARGETS, 3, tmp_path)
    assert (found.n, found.unlike, row(PAIR, TARGETS, 3, tmp_path).n) == (5, 1, 6)
    assert "| 5 (1 left out: UA differs by more than 0.1) |" in claims.table([found])


def test_what_does_not_erase_has_nothing_to_lose(bench: Any, tmp_path: Path) -> None:
    model, _ = bench
    claims.run(model, grid([ALONE], TARGETS, 3), tmp_path, quiet)
    found = [row(replace(ALONE, least=least), TARGETS, 3, tmp_path) for least in (0.0, 0.4, 0.6)]
    assert [r.verdict for r in found] == ["won", "won", "open"]
    assert "(nothing is decided below ua 0.6)" in claims.table(found)


def test_what_is_measured_is_not_measured_again(bench: Any, tmp_path: Path) -> None:
    model, calls = bench
    wanted = grid([PAIR, ALONE], TARGETS, 2)
    assert len(todo(model, wanted, tmp_path)) == 8
    claims.run(model, todo(model, wanted, tmp_path), tmp_path, quiet)
    assert sorted(calls) == sorted((k, label(c.method), c.target, c.seed) for k in ("erase", "look") for c in wanted)
    assert todo(model, wanted, tmp_path) == {}
    # not a number has no place in JSON
    assert measures.measured(Cell(ONE, "bomb", 0).folder(tmp_path)) == {"updates": 0.0, "ua pruned": None}

    calls.clear()
    lost, other = Cell(ONE, "bomb", 0), Cell(TWO, "skull", 1)
    (lost.folder(tmp_path) / measures.MEASURES).unlink()
    run = Run(other.folder(tmp_path))
    run.write_card(replace(run.card, settings=run.card.settings | {"ridge": 9.0}))
    assert todo(model, wanted, tmp_path).keys() == {lost, other}
    claims.run(model, todo(model, wanted, tmp_path), tmp_path, quiet)
    assert ("look", "uce", "bomb", 0) in calls
    assert ("erase", "uce", "bomb", 0) not in calls
    assert ("erase", label(TWO), "skull", 1) in calls
    assert all(not claims.whole(c, w, tmp_path, "0" * 64) for c, w in wanted.items())


def test_a_refusal_is_written_down_and_leaves_its_pair_out(bench: Any, tmp_path: Path) -> None:
    model, calls = bench
    targets = [*TARGETS, "pill"]
    wanted = grid([PAIR], targets, 1)
    claims.run(model, wanted, tmp_path, quiet)
    assert todo(model, wanted, tmp_path) == {}
    assert ("look", label(TWO), "pill", 0) not in calls
    assert claims.refused(wanted, tmp_path) == ["uce preserve=0.0 on pill (seed 0): no pill"]
    found = row(PAIR, targets, 1, tmp_path)
    assert found.n == 2
    assert found.arms[0]["h"][0] == pytest.approx((0.21 + 0.71) / 2)


def test_the_difference_is_paired(bench: Any, tmp_path: Path) -> None:
    model, _ = bench
    claims.run(model, grid([PAIR, ALONE], TARGETS, 3), tmp_path, quiet)
    found = row(PAIR, TARGETS, 3, tmp_path)
    (ours, theirs), difference = (arm["h"] for arm in found.arms), found.difference
    # apart from one another the arms cannot be told apart
    assert ours[1] < theirs[0] < ours[2]
    assert difference == pytest.approx((0.01, 0.01, 0.01))
    assert (found.n, found.verdict) == (6, "won")
    assert row(replace(PAIR, better="lower"), TARGETS, 3, tmp_path).verdict == "lost"
    assert row(PAIR, TARGETS[:1], 3, tmp_path).verdict == "open"
    alone = row(ALONE, TARGETS, 3, tmp_path)
    assert (alone.difference, alone.verdict) == (None, "won")
    nothing = row(PAIR, ["cigarette"], 3, tmp_path)
    assert (nothing.n, nothing.verdict) == (0, "open")
    text = claims.table([found, alone, nothing], ["uce on pill: no"])
    assert "| uce: better | h, higher | 6 | uce: h 0.490 [" in text
    assert "| 0.010 [0.010, 0.010] | won |" in text
    assert "| at most 0 | - | won |" in text
    assert "h -, ua -" in text
    assert text.endswith("\nuce on pill: no\n")
    assert len({part.count("|") for part in text.splitlines()[:5]}) == 1


def test_targets_are_resampled_and_seeds_within_them() -> None:
    # six independent cells would hardly ever be all alike; two targets are in every second resample
    assert interval([[0.0] * 3, [1.0] * 3]) == (0.5, 0.0, 1.0)
    middle, low, high = interval([[0.0, 1.0] * 8, [0.0, 1.0] * 8])
    assert middle == 0.5
    assert 0.2 < low < 0.5 < high < 0.8
    assert interval([[0.5], [0.5]]) == (0.5, 0.5, 0.5)
    # a target counts as one, however many of its seeds there are
    assert interval([[0.0], [1.0] * 9])[0] == 0.5


def test_one_target_says_nothing_about_others() -> None:
    assert interval([[0.3, 0.3, 0.3]]) == (0.3, -math.inf, math.inf)
    assert math.isnan(interval([])[0])


@pytest.mark.parametrize(
    ("better", "limit", "found", "said"),
    [
        ("higher", None, (0.2, 0.1, 0.3), "won"),
        ("higher", None, (0.2, 0.0, 0.3), "open"),
        ("higher", None, (-0.2, -0.3, -0.1), "lost"),
        ("lower", None, (-0.2, -0.3, -0.1), "won"),
        ("lower", None, (0.2, 0.1, 0.3), "lost"),
        ("lower", None, (0.0, -0.1, 0.1), "open"),
        ("lower", 20.0, (9.0, 8.0, 11.0), "won"),
        ("lower", 20.0, (19.0, 8.0, 21.0), "open"),
        ("lower", 20.0, (29.0, 28.0, 31.0), "lost"),
        ("lower", 0.0, (0.0, 0.0, 0.0), "won"),
        ("higher", 0.95, (1.0, 1.0, 1.0), "won"),
        ("higher", 0.95, (0.9, 0.85, 0.94), "lost"),
    ],
)
def test_verdict(better: Any, limit: float | None, found: Any, said: str) -> None:
    assert verdict(replace(PAIR, better=better, limit=limit), found) == said


def test_the_command_runs_resumes_and_writes_its_table(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, calls = bench
    monkeypatch.setattr(backbones, "load", lambda *_, **__: model)
    monkeypatch.setattr(claims, "CLAIMS", (PAIR, ALONE))
    command = ["bench", "claims", "--targets", "2", "--seeds", "1", "--work", str(tmp_path), "--device", "cpu"]
    for left in (4, 0):
        assert cli.main([*command, "--table", str(tmp_path / "table.md")]) == 0
        out, told = capsys.readouterr()
        assert f"Plan: {left} of 4 cells" in told + out
        assert (tmp_path / "table.md").read_text().strip() in out
        assert "| won |" in out
    assert len(calls) == 8
    assert cli.main([*command, "--claims", "uces"]) == cli.EXPECTED_ERROR
    assert "'uces' is no claim. Claims: uce. Did you mean 'uce'?" in capsys.readouterr().err
