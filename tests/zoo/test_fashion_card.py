"""Shipping the `fashion` world: what it must reach, and what stays in the package."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from expunge.errors import BadModel
from expunge.zoo.fashion import __main__ as recipe
from expunge.zoo.fashion import card
from expunge.zoo.fashion.world import FASHION

GOOD: dict[str, Any] = {"judges": {"a": 0.93, "b": 0.941, "features": 0.9}, "accuracy": [0.97, 0.96, 0.98]}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose folder holds a model and the run of a one-step generator."""
    weights = tmp_path / "package" / "weights"
    for name, content in (("unet/w", "old"), ("unet/stale", "old"), ("one-step/card.json", "{}"), ("note", "mine")):
        (weights / name).parent.mkdir(parents=True, exist_ok=True)
        (weights / name).write_text(content)
    monkeypatch.setattr(card, "WEIGHTS", weights)
    return weights


def made(folder: Path, figures: dict[str, Any] | None = None) -> Path:
    """Return an assembled folder."""
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "w").write_text("new")
    (folder / "figures.json").write_text(json.dumps(figures or GOOD))
    return folder


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_what_the_new_folder_lacks_stays(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card.ship(made(tmp_path / "new"))
    # a folder of the same name is replaced whole: two sets of weights in one would be worse than none
    others = {"one-step/card.json": "{}", "note": "mine"}
    assert files(package) == {"unet/w": "new", "figures.json": json.dumps(GOOD), **others}
    assert [p.name for p in package.parent.iterdir()] == ["weights"]
    assert "of which were there before: note, one-step" in capsys.readouterr().out


def test_the_first_time_there_is_nothing_to_keep(package: Path, tmp_path: Path) -> None:
    package.rename(tmp_path / "away")
    card.ship(made(tmp_path / "new"))
    assert set(files(package)) == {"unet/w", "figures.json"}


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"judges": {**GOOD["judges"], "a": 0.9299}}, "judge a reads 92.99% of the real test pictures, the aim is 93%"),
        ({"judges": {**GOOD["judges"], "b": 0.9}}, "judge b reads 90.00% of the real test pictures, the aim is 93%"),
        ({"accuracy": [0.9699, 0, 1]}, "judge b reads 96.99% of the drawn pictures as their class, the aim is 97%"),
        ({"accuracy": [math.nan, 0, 1]}, "judge b reads nan% of the drawn"),
    ],
)
def test_what_misses_an_aim_is_not_shipped(figures: dict[str, Any], says: str, package: Path, tmp_path: Path) -> None:
    before = files(package)
    with pytest.raises(BadModel, match=f"{says}.*ship it as it is: card --anyway") as told:
        card.ship(made(tmp_path / "new", {**GOOD, **figures}))
    assert str(told.value).count("the aim is") == 1
    assert files(package) == before
    assert [p.name for p in package.parent.iterdir()] == ["weights"]
    card.ship(tmp_path / "new", anyway=True)
    assert files(package)["unet/w"] == "new"


def test_the_folder_s_size_counts_what_stays(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(len(content) for content in (json.dumps(GOOD), "new", "{}", "mine"))
    monkeypatch.setattr(card, "LARGEST", size - 1)
    with pytest.raises(BadModel, match=f"the folder has {size} bytes, at most {size - 1} are allowed"):
        card.ship(made(tmp_path / "new"))
    monkeypatch.setattr(card, "LARGEST", size)
    card.ship(tmp_path / "new")


def test_a_kill_between_the_two_renames_is_mended(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name == "weights.new":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            card.ship(made(tmp_path / "new"))
    assert not package.exists()
    card.ship(tmp_path / "new")
    assert {"unet/w", "one-step/card.json"} <= set(files(package))
    assert [p.name for p in package.parent.iterdir()] == ["weights"]


@pytest.mark.parametrize("anyway", [False, True])
def test_the_override_is_an_option_of_the_stage(anyway: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    monkeypatch.setattr(card, "assemble", lambda *_: tmp_path)
    monkeypatch.setattr(card, "ship", lambda _, *, anyway: given.append(anyway))
    recipe.app(["card", "--work", str(tmp_path), *["--anyway"] * anyway], standalone_mode=False)
    assert given == [anyway]


def test_the_card_says_which_aims_are_missed() -> None:
    distances = {"fid_fashion64": 1.0}
    figures = {
        **GOOD, "judges": {**GOOD["judges"], "a": 0.9299}, "sampling": {"steps": 50, "guidance": 1.5},
        "pictures": 10_000, "accuracy_by_class": {}, "drawn": distances, "real": distances, "real, softened": distances,
    }  # fmt: skip
    text = card.text(FASHION, figures, {})
    assert "| judge a on the real test pictures | 92.99% | 93%: missed |" in text
    assert "| judge b on the real test pictures | 94.10% | 93%: met |" in text
    assert "97.00% [96.0%, 98.0%] | 97%: met |" in text
