"""The shipped world: complete, small, readable by its judges."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import expunge
from expunge.errors import ConceptError
from expunge.judges.classifier import load_judge
from expunge.judges.clip import Clip, load_clip
from expunge.kernel.model import Model
from expunge.zoo.emoji import world

LIMIT = 40_000_000  # bytes, everything in the package's weights folder
THINGS = ("pizza", "bomb", "watermelon", "soccer ball", "Santa Claus", "police car", "skull", "panda")
PROMPT = "a noto style emoji of {o}"
LEAD = 0.2  # cosine; the towers as they were trained have 0.5, shuffled ones 0.1 at most
VISIBLE = 0.05  # mean absolute difference of two pictures in [0, 1]; measured: 0.16


def test_weights_are_small_and_complete() -> None:
    files = [f for f in world.WEIGHTS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= LIMIT
    assert {"card.md", "drawn.json", "judge-a.safetensors", "judge-b.safetensors"} <= {f.name for f in files}
    assert not [f.name for f in files if f.suffix in (".ckpt", ".pt", ".bin")]


def test_it_draws_the_targets_and_names_every_set_it_learned_from() -> None:
    assert set(world.BENCH_TARGETS) <= set(world.drawn())
    card = (world.WEIGHTS / "card.md").read_text()
    assert all(f"@iconify-json/{package} " in card for package in world.STYLES.values())


@pytest.mark.parametrize("which", ["a", "b"])
def test_judges_know_every_object_the_model_draws(which: str) -> None:
    judge = load_judge(world.WEIGHTS / f"judge-{which}.safetensors")
    assert set(world.drawn()) <= set(judge.objects)
    assert judge.styles == tuple(world.STYLES)
    # measured on fresh augmentations of real renders when it was trained
    assert judge.accuracy["object"] >= 0.99


@pytest.mark.parametrize("which", ["a", "b"])
def test_judges_know_the_styles(which: str) -> None:
    assert load_judge(world.WEIGHTS / f"judge-{which}.safetensors").accuracy["style"] >= 0.995


def test_judges_are_two_different_networks() -> None:
    a, b = (load_judge(world.WEIGHTS / f"judge-{w}.safetensors") for w in "ab")
    assert a.hash != b.hash
    assert {n for n, _ in a.named_parameters()} != {n for n, _ in b.named_parameters()}


@pytest.fixture(scope="module")
def model() -> Model:
    return expunge.load("emoji")


@pytest.fixture(scope="module")
def images(model: Model) -> Tensor:
    """One picture of each of THINGS, (8, 3, 64, 64)."""
    return model.generate([PROMPT.format(o=o) for o in THINGS], seeds=range(len(THINGS)))


def test_pictures_are_more_like_their_prompt_than_noise_is(images: Tensor) -> None:
    """Judge b gives the object of the prompt more probability in pictures than in noise (the before check)."""
    assert images.shape == (8, 3, 64, 64)
    judge = load_judge(world.WEIGHTS / "judge-b.safetensors")
    rows, wanted = torch.arange(len(THINGS)), torch.tensor([judge.objects.index(o) for o in THINGS])
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    right, chance = (judge.read(x).objects[rows, wanted].mean().item() for x in (images, noise))
    assert chance < 0.1
    assert right > 3 * chance + 0.1


def test_the_clip_towers_belong_to_the_text_encoder(images: Tensor) -> None:
    """A picture is nearer to its own prompt than to others', and not so by a projection of another encoder's states."""
    towers = load_clip(world.WEIGHTS)
    assert towers is not None

    def lead(clip: Clip) -> float:
        cosines = clip.images(images) @ clip.texts([PROMPT.format(o=o) for o in THINGS]).T
        others = cosines[~torch.eye(len(THINGS), dtype=torch.bool)]
        return (cosines.diagonal().mean() - others.mean()).item()

    shuffled = torch.randperm(towers.projection.shape[1], generator=torch.Generator().manual_seed(0))
    assert abs(lead(replace(towers, projection=towers.projection[:, shuffled]))) < LEAD
    assert lead(towers) > LEAD


def test_seeds_differ_visibly_and_one_seed_is_one_picture(model: Model) -> None:
    one, again = (model.generate([PROMPT.format(o="pizza")] * 2, seeds=[0, 1], steps=4) for _ in range(2))
    assert torch.equal(one, again)
    assert (one[0] - one[1]).abs().mean() > VISIBLE


def test_unknown_concepts_are_refused_with_near_ones(model: Model) -> None:
    with pytest.raises(ConceptError, match="bomb"):
        expunge.Concept("bom").resolve(model.world)
    with pytest.raises(ConceptError, match="Santa Claus"):
        expunge.Concept("santa").resolve(model.world)


def test_drawn_objects_are_a_part_of_the_data() -> None:
    assert set(world.drawn()) <= {o["name"] for o in json.loads((world.HERE / "objects.json").read_text())}
