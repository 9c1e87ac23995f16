"""A retrained model as the run of an edit: what it draws, what its card says, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from expunge.backbones import load, tiny
from expunge.concept import Concept
from expunge.edits import load_edit
from expunge.errors import BadModel, BadRun, ConceptError, NeedsError
from expunge.records import Run
from expunge.zoo.emoji import __main__ as emoji
from expunge.zoo.emoji import world
from expunge.zoo.fashion import __main__ as fashion
from expunge.zoo.gold import gold

ASK = {"prompts": ["a bomb", "cat"], "seeds": [0, 1], "steps": 2, "guidance": 3.0}
ROUNDING = {"atol": 1e-5, "rtol": 0}  # weights from a file lie at other addresses, sums come in another order
BOMB = (Concept("bomb"),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline that differs from "tiny" in the weights that are trained, and in nothing else."""
    pipe, random = tiny.pipeline(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in (pipe.unet, pipe.text_encoder):
            for weight in part.parameters():
                weight.add_(0.05 * torch.randn(weight.shape, generator=random))
    pipe.save_pretrained(tmp_path / "retrained")
    return tmp_path / "retrained"


def test_the_edit_turns_the_base_into_the_retrained_model(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "unet.jsonl"
    log.write_text('{"step": 50, "loss": 1.0, "seconds": 9.5}\n{"step": 100, "loss": 0.5, "seconds": 20.25}\n')
    gold("tiny", folder, [Concept("bomb"), Concept("dagger")], tmp_path / "run", log)
    model, run = load("tiny"), Run.open(tmp_path / "run")
    before = model.generate(**ASK)
    wanted = load(folder).generate(**ASK)
    assert (wanted - before).abs().max() > 1e-2
    with load_edit(run.folder).on(model):
        torch.testing.assert_close(model.generate(**ASK), wanted, **ROUNDING)
    assert model.fingerprint() == model.hash == run.card.base_hash
    assert [c["name"] for c in run.card.concepts] == ["bomb", "dagger"]
    assert (run.card.method, run.card.model, run.card.steps, run.card.seconds) == ("retrain", "tiny", 100, 20.25)


def test_a_model_that_differs_in_more_than_its_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    other = tiny.save(tmp_path / "other", seed=1)
    with pytest.raises(BadModel, match="other differs from 'tiny' in its autoencoder"):
        gold("tiny", other, BOMB, out, tmp_path / "log")
    larger = tiny.pipeline()
    larger.unet = tiny.denoiser(cross_attention_dim=16, time_embedding_dim=128)
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(BadModel, match="or sizes, which no edit changes"):
        gold("tiny", tmp_path / "larger", BOMB, out, tmp_path / "log")
    assert not out.exists()


def test_bad_input_is_told_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(NeedsError, match=r"no retrained model at .*nowhere.*--without"):
        gold("tiny", tmp_path / "nowhere", BOMB, out, tmp_path / "log")
    classes = tiny.save_class_model(tmp_path / "classes")
    with pytest.raises(ConceptError, match="'sparrow'"):
        gold(str(classes), classes, [Concept("sparrow", kind="class")], out, tmp_path / "log")
    assert not out.exists()
    with pytest.raises(BadRun, match="not empty"):
        gold("tiny", folder, BOMB, folder, tmp_path / "log")


def test_the_card_says_where_the_recipe_worked(tmp_path: Path) -> None:
    classes = tiny.save_class_model(tmp_path / "classes")
    said = {"world": "cifar10", "work": "w"}
    gold(str(classes), classes, [Concept("1", kind="class")], tmp_path / "run", tmp_path / "log", said)
    assert Run.open(tmp_path / "run").card.settings == said


def test_the_recipes_hand_on_what_is_not_their_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, str]] = []
    monkeypatch.setattr("expunge.zoo.gold.gold", lambda *_, settings: told.append(settings))
    (tmp_path / "objects.json").write_text(json.dumps(world.objects()[:2]))
    name = world.objects()[0]["name"]
    emoji.gold([name], tmp_path / "out", tmp_path, "small")
    monkeypatch.setattr(emoji, "WORK", tmp_path)
    emoji.gold([name], tmp_path / "out", tmp_path)
    fashion.gold("cat", tmp_path / "out", "cifar10", tmp_path)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    fashion.gold("Sneaker", tmp_path / "out")
    assert told == [{"work": str(tmp_path), "name": "small"}, {}, {"world": "cifar10", "work": str(tmp_path)}, {}]


def test_a_training_too_short_for_a_log_is_still_a_run(tmp_path: Path) -> None:
    classes, log = tiny.save_class_model(tmp_path / "classes"), tmp_path / "log"
    log.write_text("")
    gold(str(classes), classes, [Concept("1", kind="class")], tmp_path / "run", log)
    card = Run.open(tmp_path / "run").card
    assert (card.concept["name"], card.steps, card.seconds) == ("cat", 0, 0.0)
