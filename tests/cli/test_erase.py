"""Command `demo`, on an untrained model under the shipped one's name; the audit and the judges are the real ones.

What `erase` does is tested in `tests/test_cli.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from expunge import auditing, backbones, cli
from expunge.backbones import tiny
from expunge.backbones.unet import UNetModel
from expunge.kernel.model import Sampling
from expunge.protocols import PROTOCOLS, Protocol
from expunge.records import Run
from expunge.zoo.emoji.world import world

SHORT = Protocol(id="emoji-v1", world="emoji", steps=1, targets=6, retained=8, near=2, near_each=1)
LEFT = ("report.html", "card.json", "edit.safetensors", "scores.json", "samples/index.json", "samples/sheet.png")
QUICK = ("-s", "steps=1", "-s", "batch=2")


def small() -> UNetModel:
    """Return an untrained model that is taken for the shipped one."""
    # the judges read pictures of 64 pixels
    return UNetModel(tiny.pipeline(window=48), "emoji", world(), Sampling(steps=2, guidance=3.0, size=64))


@pytest.fixture(scope="module", autouse=True)
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let everything that loads the shipped model get the small one, and audit it on a handful of pictures."""
    with pytest.MonkeyPatch.context() as patch:
        for home in (backbones, auditing):
            patch.setattr(home, "load", lambda *_, **__: small())
        patch.setitem(PROTOCOLS, "emoji-v1", SHORT)
        patch.setenv("EXPUNGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def demo(out: Path, *options: str) -> int:
    return cli.main(["demo", "--out", str(out), "--device", "cpu", *options])


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "usual"
    assert demo(out) == 0
    return out


def test_the_demo_leaves_a_run_its_scores_and_a_report(usual: Path) -> None:
    assert [name for name in LEFT if not (usual / name).stat().st_size] == []
    run = Run.open(usual)
    assert (run.card.method, run.card.concept["name"], run.card.seed) == ("tuce", "bomb", 0)
    assert (run.card.model, run.card.status, run.card.make_images) == ("emoji", "complete", 0)
    assert {s.metric: s.n for s in run.scores if s.metric in ("ua", "ira")} == {"ua": 6, "ira": 8}
    assert all(s.protocol == "emoji-v1" for s in run.scores)
    pairs = json.loads((usual / "samples" / "index.json").read_text())
    assert {pair["role"] for pair in pairs} == {"target", "neighbour", "retain"}
    with Image.open(usual / "samples" / pairs[0]["edited"]) as image:
        assert image.size == (64, 64)
    page = (usual / "report.html").read_text(encoding="utf-8")
    assert all(word in page for word in ("bomb", "emoji-v1", "data:image/png"))


def test_the_demo_says_what_it_found_and_is_not_started_over(
    capsys: pytest.CaptureFixture[str], usual: Path, tmp_path: Path
) -> None:
    assert demo(tmp_path / "again", "--concept", "Santa Claus", "--method", "uce", "--seed", "7") == 0
    said = capsys.readouterr()
    assert said.out == f"Report: {tmp_path / 'again' / 'report.html'}\n"
    assert "'Santa Claus' is gone from" in said.err
    card = Run.open(tmp_path / "again").card
    assert (card.method, card.concept["name"], card.seed) == ("uce", "Santa Claus", 7)
    assert demo(usual) == 2
    assert "not empty" in capsys.readouterr().err


def test_an_audit_of_the_demo_is_gated(capsys: pytest.CaptureFixture[str], usual: Path) -> None:
    def gated(rule: str) -> int:
        return cli.main(["audit", str(usual), "--device", "cpu", "--gate", rule])

    assert gated("ua>=0,ira>=0") == 0
    assert "gate:" not in capsys.readouterr().err
    assert gated("ua>=0,ira>1") == 3
    assert "gate: ira>1 fails: ira is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "folders"),
    [
        ("erasediff", {"forget", "retain"}),
        ("salun", {"forget", "retain"}),
        ("neggrad", {"forget", "retain"}),
        ("fewshot", {"forget"}),
    ],
)
def test_the_demo_draws_the_pictures_that_a_method_learns_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, folders: set[str]
) -> None:
    monkeypatch.setattr(sys.modules["expunge.cli.erase"], "DEMO_PICTURES", 3)
    assert demo(tmp_path / "run", "-m", method, *QUICK) == 0
    assert Run.open(tmp_path / "run").card.make_images == 3
    drawn = sorted((tmp_path / "run" / "images").rglob("*.png"))
    assert {p.parent.name for p in drawn} == folders
    assert len(drawn) == 3 * len(folders)


@pytest.mark.parametrize(("until", "steps"), [("1", 25), ("0", 30)])
def test_a_judge_ends_an_erasure_early(tmp_path: Path, until: str, steps: int) -> None:
    out, options = tmp_path / "run", ("-s", "steps=30", "-s", "batch=1", "-s", "rollouts=1", "-s", "sampling_steps=2")
    said = ["erase", "emoji", "--concept", "bomb", "-m", "esd", "--device", "cpu", "--until", until, "--out", str(out)]
    assert cli.main([*said, *options]) == 0
    card = Run.open(out).card
    assert card.steps == steps
    assert [0 < seen < 1 for seen in card.losses["probe"]] == [True]


def test_nothing_looks_at_what_no_judge_knows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = ["erase", "tiny", "--concept", "bomb", "--until", "0.05", "--out", str(tmp_path / "run")]
    assert cli.main(said) == 2
    assert "no protocol judges this model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
