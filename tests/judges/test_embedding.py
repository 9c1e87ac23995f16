"""The embedding that ratings are learned on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expunge.errors import BadModel
from expunge.judges.embedding import Embedding, embedding


@pytest.fixture(scope="module")
def embed() -> Embedding:
    return embedding()


def pictures(n: int, side: int = 64) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_every_part_counts_alike_and_every_picture_for_itself(embed: Embedding) -> None:
    images = pictures(5)
    found = embed(images)
    parts = 5 + (embed.clip is not None)
    torch.testing.assert_close(found.square().sum(1), torch.full((5,), float(parts)))
    # float32: a batch may be summed in another order
    torch.testing.assert_close(embed(images[2:3]), found[2:3], atol=1e-5, rtol=0)


def test_sizes_are_made_equal(embed: Embedding) -> None:
    assert embed(pictures(2, 96)).shape == embed(pictures(2, 16)).shape == embed(pictures(2)).shape


def test_it_sees_layout_and_colour(embed: Embedding) -> None:
    """A mirror image has the same things in it, a recoloured one the same shapes; neither is the same look."""
    images = pictures(1)
    images[..., :32] *= 0.2
    base = embed(images)
    noise = (embed((images + 0.002).clamp(0, 1)) - base).norm()
    assert (embed(images.flip(-1)) - base).norm() > 20 * noise
    assert (embed(images.flip(1)) - base).norm() > 5 * noise


def test_a_clip_tower_in_the_model_s_folder_is_used(tmp_path: Path, embed: Embedding) -> None:
    class Tower:
        def seen(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(torch.ones(len(images), 7), dim=1)

        def texts(self, *_: object) -> torch.Tensor:
            raise AssertionError

    plain = Embedding(embed.judge)
    both = Embedding(embed.judge, Tower())
    assert (plain.name, both.name) == ("judge-a", "judge-a and CLIP")
    assert both(pictures(2)).shape[1] == plain(pictures(2)).shape[1] + 7
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/config.json").write_text("{}")
    with pytest.raises(BadModel, match="not a whole CLIP folder"):
        embedding(tmp_path)


def test_gradients_reach_the_pictures(embed: Embedding) -> None:
    images = pictures(2).requires_grad_(True)
    seen = embed.seen(images)
    torch.testing.assert_close(seen.detach(), embed(images.detach()))
    (slope,) = torch.autograd.grad(seen.square()[:, ::3].sum(), images)
    assert bool((slope.flatten(1).abs().amax(1) > 1e-6).all())
    assert not embed(images).requires_grad
