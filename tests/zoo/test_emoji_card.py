"""The card of the `emoji` world: what is counted, what is said of the aims, and what the shipped one says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from expunge.backbones import tiny
from expunge.backbones.unet import UNetModel
from expunge.judges.classifier import Reading
from expunge.kernel.model import Sampling
from expunge.zoo.emoji import __main__ as recipe
from expunge.zoo.emoji import card, world

NAMES = [entry["name"] for entry in world.objects()[:2]]
STYLES = len(world.STYLES)
FIGURES: dict[str, Any] = {
    "candidates": 496,
    "known": 304,
    "objects": 304,
    "asked": 304,
    "styles": 8,
    "seeds": 1,
    "pictures": 2432,
    "hits": {"object": 2415, "style": 2359},
    "style_hits_by_style": {"noto": 298, "fluent": 287},
    "rounds": [{"object": 2415, "style": 2359}],
    "vae_psnr_db": 28.61,
    "judges": {"a": {"object": 1.0, "style": 4084 / 4096}},
}
MADE = [{"style": "noto", "package": "@iconify-json/noto 1", "author": "A", "licence": "L"}]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """What the stages before leave: two objects' drawings, a pipeline, an autoencoder."""
    np.save(tmp_path / "pictures.npy", np.zeros((2, STYLES, 128, 128, 4), dtype=np.uint8))
    (tmp_path / "objects.json").write_text(json.dumps(world.objects()[:2]))
    tiny.pipeline(window=64).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "pipeline" / "drawn.json").write_text(json.dumps(NAMES))
    AutoencoderKL(
        block_out_channels=(4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=2, sample_size=64,
        mid_block_add_attention=False,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(prompt, seed) of whatever is drawn, in two steps; a stand-in reads the pictures.

    It takes the first picture for another object, and every second one of a later seed for another style.
    """
    seen, generate = list[tuple[str, int]](), UNetModel.generate

    def watched(self: UNetModel, prompts: Any, *, seeds: Any, **options: Any) -> torch.Tensor:
        seen.extend(zip(prompts, seeds, strict=True))
        return generate(self, prompts, seeds=seeds, **options)

    def read(images: torch.Tensor) -> Reading:
        place = torch.arange(len(images))
        objects, styles = place // STYLES % 2, place % STYLES
        objects[0] = 1
        styles = torch.where((place >= 2 * STYLES) & (place % 2 == 0), (styles + 1) % STYLES, styles)
        return Reading(torch.eye(2)[objects], torch.eye(STYLES)[styles])

    judge = SimpleNamespace(objects=NAMES, accuracy={"object": 1.0, "style": 0.5}, read=read)
    monkeypatch.setattr(card, "load_judge", lambda _: judge)
    monkeypatch.setattr(card, "Sampling", lambda _, guidance, size: Sampling(2, guidance, size))
    monkeypatch.setattr(UNetModel, "generate", watched)
    return seen


def test_every_picture_has_a_seed_of_its_own_and_rounds_are_pooled(work: Path, asked: list[tuple[str, int]]) -> None:
    one, images = card.measure(work, work / "pipeline")
    n = 2 * STYLES
    assert [seed for _, seed in asked] == list(range(n))
    assert images.shape == (n, 3, 64, 64)
    assert (one["pictures"], one["hits"]) == (n, {"object": n - 1, "style": n})
    assert one["rounds"] == [one["hits"]]
    asked.clear()
    two, images = card.measure(work, work / "pipeline", seeds=2)
    prompts, seeds = zip(*asked, strict=True)
    assert seeds == tuple(range(2 * n))
    assert prompts[:n] == prompts[n:]
    assert len(set(prompts)) == n
    assert len(images) == two["pictures"] == 2 * n
    assert two["rounds"] == [{"object": n - 1, "style": n}, {"object": n, "style": n // 2}]
    assert two["hits"] == {"object": 2 * n - 1, "style": n + n // 2}
    assert two["style_hits_by_style"] == {s: 4 if i % 2 else 2 for i, s in enumerate(world.STYLES)}
    assert card.measure(work, work / "pipeline", every=2)[0]["asked"] == 1


def test_the_card_of_two_seeds_has_the_figures_of_each(work: Path, asked: list[tuple[str, int]]) -> None:
    told = card.text(card.measure(work, work / "pipeline", seeds=2)[0], MADE, {})
    assert "2 objects, 2 pictures of each in every style, all of different seeds, n = 32 | 96.9% [84.3%, 99.4%]" in told
    assert "| style, likewise | 75.0% [57.9%, 86.7%], 24 of 32 | 97%: missed |" in told
    assert "| style, seeds 0 to 15 | 100.0% [80.6%, 100.0%], 16 of 16 |  |" in told
    assert "| style, seeds 16 to 31 | 50.0% [28.0%, 72.0%], 8 of 16 |  |" in told
    assert "independent" in told
    assert "independent" not in card.text(FIGURES, MADE, {})


def test_nothing_is_rounded_up_to_an_aim_that_it_misses() -> None:
    assert f"{2359 / 2432:.1%}" == "97.0%"  # the trap
    assert card.percent(2359, 2432, 0.97) == "96.998%"
    assert card.percent(2360, 2432, 0.97) == "97.0%"
    assert card.percent(2359, 2432) == "97.0%"
    told = card.text(FIGURES, MADE, {})
    assert "| style, likewise | 96.998% [96.2%, 97.6%], 2359 of 2432 | 97%: missed |" in told
    assert "a picture of each in every style, all of different seeds, n = 2432 | 99.3% [98.9%, 99.6%], 2415" in told
    assert "2415 of 2432 | 90%: met |" in told
    assert "| objects drawn | 304 | 300: met |" in told
    reached = FIGURES | {"hits": {"object": 2415, "style": 2360}, "objects": 299}
    assert "2360 of 2432 | 97%: met |" in card.text(reached, MADE, {})
    assert "| objects drawn | 299 | 300: missed |" in card.text(reached, MADE, {})


def test_the_card_says_what_the_data_are_and_how_it_was_made() -> None:
    told = " ".join(card.text(FIGURES, MADE, {"unet": {"steps": 5, "seconds": 2, "loss": 0.1}}).split())
    assert "304 objects in all 8 styles, 2432 drawings: of 496 candidates (`candidates.txt`)" in told
    assert "One pose is drawn of each" in told
    assert "two seeds differ in the background" in told
    assert "in one run or in several: the table of trainings" in told
    assert "| unet | 5 | 2 | 0.1 |" in told
    assert "emoji all" not in told
    assert "style 99.71% (4084)" in told


def test_the_command_asks_for_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = list[tuple[Any, ...]]()
    monkeypatch.setattr(card, "ship", lambda *given: calls.append(given))
    recipe.app(["card", "--work", str(tmp_path), "--seeds", "2"], standalone_mode=False)
    recipe.app(["card", "--work", str(tmp_path)], standalone_mode=False)
    assert calls == [(tmp_path, 1, 2), (tmp_path, 1, 1)]


def test_the_shipped_card_is_what_the_recipe_writes() -> None:
    """Of two rounds of pictures; its rows and its counts go together."""
    two = FIGURES | {"seeds": 2, "pictures": 4864, "hits": {"object": 4831, "style": 4726},
                     "rounds": [{"object": 2416, "style": 2359}, {"object": 2415, "style": 2367}]}  # fmt: skip
    shipped, written = (world.WEIGHTS / "card.md").read_text(), card.text(two, MADE, {})
    upto = written.index("| style, noto")
    assert shipped.startswith(written[:upto])
    assert "| style, seeds 0 to 2431 | 96.998% [96.2%, 97.6%], 2359 of 2432 |  |" in written[:upto]
    assert card.INTERVALS[0] in shipped
    assert shipped.endswith(written[written.index("\n\nNames, groups") :])
    by_style = re.findall(r"\| style, (\w+) \| [0-9.]+%, (\d+) of 608 \|", shipped)
    assert [name for name, _ in by_style] == list(world.STYLES)
    assert sum(int(hits) for _, hits in by_style) == 4726
