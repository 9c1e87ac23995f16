"""The shipped world: complete, small, readable by its judges."""

from __future__ import annotations

import json

import pytest
import torch

import expunge
from expunge.errors import ConceptError
from expunge.judges.classifier import load_judge
from expunge.zoo.emoji import world

LIMIT = 40_000_000  # bytes, everything in the package's weights folder


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


def test_pictures_are_more_like_their_prompt_than_noise_is() -> None:
    """Judge b gives the object of the prompt more probability in pictures than in noise (the before check)."""
    model = expunge.load("emoji")
    things = ["pizza", "bomb", "watermelon", "soccer ball", "Santa Claus", "police car", "skull", "panda"]
    images = model.generate([f"a noto style emoji of {o}" for o in things], seeds=range(len(things)))
    assert images.shape == (8, 3, 64, 64)
    judge = load_judge(world.WEIGHTS / "judge-b.safetensors")
    rows, wanted = torch.arange(len(things)), torch.tensor([judge.objects.index(o) for o in things])
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    right, chance = (judge.read(x).objects[rows, wanted].mean().item() for x in (images, noise))
    assert chance < 0.1
    assert right > 3 * chance + 0.1


def test_unknown_concepts_are_refused_with_near_ones() -> None:
    model = expunge.load("emoji")
    with pytest.raises(ConceptError, match="bomb"):
        expunge.Concept("bom").resolve(model.world)
    with pytest.raises(ConceptError, match="Santa Claus"):
        expunge.Concept("santa").resolve(model.world)


def test_drawn_objects_are_a_part_of_the_data() -> None:
    assert set(world.drawn()) <= {o["name"] for o in json.loads((world.HERE / "objects.json").read_text())}
