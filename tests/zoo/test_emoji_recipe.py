"""The recipe of the `emoji` world, on made-up pictures: joining, drawing, captions, resuming."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expunge.zoo.emoji import data, text, world
from expunge.zoo.emoji.training import Ema, Pictures, cosine, generator, loop


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Two objects in eight styles: a red square and a blue one, on nothing."""
    pictures = np.zeros((2, 8, 128, 128, 4), dtype=np.uint8)
    pictures[:, :, 32:96, 32:96, 3] = 255
    pictures[0, :, 32:96, 32:96, 0] = 255
    pictures[1, :, 32:96, 32:96, 2] = 255
    np.save(tmp_path / "pictures.npy", pictures)
    (tmp_path / "objects.json").write_text(json.dumps(world.objects()[:2]))
    return tmp_path


def test_slug_and_code_points_are_spelled_as_the_sets_do() -> None:
    assert data.slug("Mrs. Claus") == "mrs-claus"
    assert data.slug("rescue worker\u2019s helmet") == "rescue-workers-helmet"
    assert data.bare("1F3DD-FE0F") == "1f3dd"


def test_icons_are_found_by_code_point_then_by_name(tmp_path: Path) -> None:
    (tmp_path / "icons.json").write_text(
        json.dumps(
            {"icons": {"bomb": {"body": "<g/>"}}, "aliases": {"boom": {"parent": "bomb"}}, "width": 32, "height": 16}
        )
    )
    icons = data.IconSet(tmp_path)
    assert icons.find("1f4a3", {"bomb"}) == "bomb"
    assert icons.find("1f4a3", {"dagger"}) is None
    assert 'viewBox="0 0 32 16"' in icons.svg("boom")
    (tmp_path / "chars.json").write_text(json.dumps({"1F4A3-FE0F": "bomb"}))
    assert data.IconSet(tmp_path).find("1f4a3", set()) == "bomb"


def test_distinctness_is_zero_for_two_equal_drawings_and_not_before() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (1, 3, 128, 128, 4), dtype=np.uint8)
    pictures[:, 1, :, :, :3] //= 3
    pictures[..., 3] = 255
    pictures[:, 2, :64] = 0
    assert data.distinctness(pictures)[0] > 0.05
    pictures[:, 2] = pictures[:, 0]
    assert data.distinctness(pictures)[0] == 0


def test_drawing_fills_the_background_and_moves_with_the_seed(work: Path) -> None:
    pictures = Pictures(work)
    index = torch.tensor([0, 1])
    white, pink = (
        pictures.draw(index, index, torch.full((2,), b), generator(0, 0))
        for b in (0, list(world.BACKGROUNDS).index("pink"))
    )
    assert white.shape == (2, 3, 64, 64)
    assert torch.equal(white[:, :, 0, 0], torch.ones(2, 3))
    expected = torch.tensor(world.BACKGROUNDS["pink"]) / 255
    torch.testing.assert_close(pink[:, :, 0, 0], expected.expand(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(white[:, :, 32, 32], torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]), atol=1e-6, rtol=0)
    again, other = (pictures.draw(index, index, index * 0, generator(0, k)) for k in (0, 1))
    assert torch.equal(again, white)
    assert not torch.equal(other, white)


def test_captions_name_every_background_but_white() -> None:
    entry, rng = world.objects()[0], random.Random(0)
    on_white = {text.caption(entry, 1, 0, rng) for _ in range(300)}
    on_pink = {text.caption(entry, 1, list(world.BACKGROUNDS).index("pink"), rng) for _ in range(300)}
    assert all("pink background" in c for c in on_pink)
    assert not any("background" in c for c in on_white)
    assert f"a twemoji style emoji of {entry['name']}" in on_white


def test_tokenizer_spells_every_name_within_the_window() -> None:
    words = text.tokenizer(world.objects())
    longest = [t.format(o=o["name"], s="emojione", b="orange") for o in world.objects() for t in world.TEMPLATES]
    encoded = words(longest).input_ids
    assert max(map(len, encoded)) <= text.WINDOW
    sample = words.decode(words("a noto style emoji of Statue of Liberty").input_ids, skip_special_tokens=True)
    assert sample.strip() == "a noto style emoji of statue of liberty"
    assert len({tuple(words(o["name"]).input_ids) for o in world.objects()}) == len(world.objects())


def test_targets_and_their_relatives_are_in_the_world() -> None:
    names = {o["name"] for o in world.objects()}
    assert len(names) >= 300
    assert len(world.BENCH_TARGETS) == 16
    assert {*world.BENCH_TARGETS, *world.KEPT} <= names
    assert set(world.BENCH_STYLES) <= set(world.STYLES)


def fit(work: Path, stop: int | None = None) -> Tensor:
    """Train a linear map by the recipe's loop; `stop` raises in the middle, as a kill would end it."""
    torch.default_generator.manual_seed(0)
    net = nn.Linear(4, 1)
    ema = Ema(net, decay=0.9)
    optimizer = torch.optim.AdamW(net.parameters(), 0.05)

    def update(step: int, rng: torch.Generator) -> Tensor:
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(8, 4, generator=rng)
        return (net(x) - x.sum(1, keepdim=True)).square().mean()

    loop(
        "net",
        work,
        30,
        {"net": net, "ema": ema},
        optimizer,
        lambda i: cosine(i, 30, warmup=5),
        update,
        after=ema.update,
    )
    ema.copy_to_modules()
    return net.weight.detach().clone()


def test_training_goes_on_after_a_kill_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expunge.zoo.emoji.training.CHECKPOINT_SECONDS", 0.0)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", stop=17)
    assert torch.load(tmp_path / "killed" / "net.ckpt", weights_only=True)["step"] == 17
    assert torch.equal(fit(tmp_path / "killed"), whole)


def test_learning_rate_warms_up_holds_and_decays() -> None:
    assert cosine(0, 1000) == pytest.approx(0.01)
    assert cosine(300, 1000, flat=0.5) == 1
    assert cosine(1000, 1000) == pytest.approx(0.02)
