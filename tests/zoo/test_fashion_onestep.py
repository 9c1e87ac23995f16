"""The stage that distils the `fashion` world's model, and the generator that the package holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import expunge
from expunge.errors import BadModel
from expunge.judges.classes import load_judge
from expunge.kernel.model import digest
from expunge.records import CARD, CHECKPOINT, EDIT
from expunge.zoo.fashion import __main__ as recipe
from expunge.zoo.fashion import card, onestep
from expunge.zoo.fashion.world import FASHION, GENERATOR, ONE_STEP, WEIGHTS


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where the stage puts its run; the package itself is left alone."""
    monkeypatch.setattr(onestep, "GENERATOR", tmp_path / "package" / "one-step")
    monkeypatch.setattr(onestep, "RECIPE", replace(onestep.RECIPE, batch=2, probe=0))
    monkeypatch.setattr(onestep, "COUNT", 20)
    # the package's own generator counts as well where this one is not in its place
    monkeypatch.setattr(onestep, "LARGEST", 2 * onestep.LARGEST)
    return tmp_path / "package" / "one-step"


def test_the_stage_distils_measures_and_ships(package: Path, tmp_path: Path) -> None:
    asked = ["one-step", "--work", str(tmp_path), "--device", "cpu"]
    recipe.app([*asked, "--steps", "1"], standalone_mode=False)
    assert {p.name for p in package.iterdir()} == {EDIT, CARD, onestep.FIGURES}
    figures = json.loads((package / onestep.FIGURES).read_text())
    assert figures["pictures"] == 20
    # one update from the start: what it draws is near what the denoiser makes of pure noise, which no judge reads well
    assert figures["accuracy"][0] < 0.9
    first = (package / EDIT).read_bytes()
    recipe.app([*asked, "--steps", "2"], standalone_mode=False)
    assert (tmp_path / "one-step" / CHECKPOINT).is_file()
    assert (package / EDIT).read_bytes() != first
    assert expunge.load(package).one_step


def test_a_folder_that_would_be_too_large_is_refused(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (EDIT, CARD):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(onestep, "LARGEST", 100)
    with pytest.raises(BadModel, match="at most 100 are allowed"):
        onestep.ship(tmp_path, {"accuracy": [1.0, 1.0, 1.0]})
    assert not package.exists()


def test_the_shipped_generator_draws_its_classes_in_one_step() -> None:
    model, base = expunge.load(ONE_STEP), expunge.load("fashion")
    assert model.name == ONE_STEP
    assert model.one_step
    assert digest([("unet", model.teacher.module)]) == base.hash != model.hash
    names = [c for c in FASHION.classes for _ in range(8)]
    images = model.generate(names, seeds=range(len(names)))
    read = load_judge(WEIGHTS / "judge-b.safetensors").read(images).argmax(1)
    right = (read == torch.arange(len(FASHION.classes)).repeat_interleave(8)).float().mean().item()
    assert right > 0.9
    # the model it was made of makes one blurred picture a class of its first step
    spread = images.unflatten(0, (-1, 8)).std(1).mean()
    assert base.generate(names, seeds=range(len(names)), steps=1).unflatten(0, (-1, 8)).std(1).mean() < spread / 2


def test_the_shipped_generator_s_figures_are_those_of_the_recipe() -> None:
    figures = json.loads((GENERATOR / onestep.FIGURES).read_text())
    about = json.loads((GENERATOR / CARD).read_text())
    assert figures["pictures"] == card.COUNT
    told = {k: about["settings"][k] for k in ("steps", "lr", "fake_lr", "alpha", "batch", "decay")}
    assert told == {k: getattr(onestep.RECIPE, k) for k in told}


def test_an_installation_without_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("expunge.backbones.GENERATOR", tmp_path)
    with pytest.raises(BadModel, match=r"holds no fashion-one-step weights.*python -m expunge\.zoo\.fashion one-step"):
        expunge.load(ONE_STEP)
