"""Textual inversion: pictures become vectors; only these move."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

from expunge.backbones import tiny
from expunge.backbones.unet import UNetModel
from expunge.kernel.inversion import error, invert, start
from expunge.kernel.model import Sampling
from expunge.kernel.state import Step

PROMPTS = ("<x>", "a <x>")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["epsilon", "v_prediction", "two encoders"])
def model(request: pytest.FixtureRequest) -> UNetModel:
    if request.param == "two encoders":
        return UNetModel(tiny.xl_pipeline(), "xl", sampling=Sampling(4, 3.0, 16))
    return tiny.model(request.param)


def latents(model: UNetModel) -> torch.Tensor:
    return model.latents(torch.rand(3, 3, 16, 16, generator=seeded(7)))


def run(steps: Generator[Step, None, dict[str, torch.Tensor]]) -> tuple[list[Step], dict[str, torch.Tensor]]:
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            return seen, end.value


def test_lowers_the_error_and_touches_nothing_else(model: UNetModel) -> None:
    before, z = model.hash, latents(model)
    initial = start(model.soft, "cat", 2)

    def measured(vectors: dict[str, torch.Tensor]) -> float:
        # the same draws each time, and not those of the training
        with torch.no_grad(), model.soft.tokens({"<x>": vectors}):
            return error(model, z, PROMPTS, seeded(99), 256).item()

    seen, found = run(invert(model, model.soft, z, "<x>", PROMPTS, initial, seeded(0), steps=60, lr=1.0))
    assert [(s.i, s.n) for s in seen] == [(i, 60) for i in range(60)]
    assert all(set(s.losses) == {"inversion"} for s in seen)
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in initial.items()}
    assert measured(initial) == measured(initial)
    assert measured(found) < measured(initial) - 1e-4
    assert model.fingerprint() == before
    assert not model.soft.held


def test_the_generator_decides() -> None:
    model = tiny.model()
    z, initial = latents(model), start(model.soft, "", 1)
    one, two, other = (
        run(invert(model, model.soft, z, "<x>", PROMPTS, initial, seeded(s), steps=3))[1] for s in (0, 0, 1)
    )
    assert torch.equal(one["text_encoder"], two["text_encoder"])
    assert not torch.equal(one["text_encoder"], other["text_encoder"])
    assert not torch.equal(one["text_encoder"], initial["text_encoder"])


def test_no_steps_is_the_start() -> None:
    model = tiny.model()
    initial = start(model.soft, "cat", 2)
    seen, found = run(invert(model, model.soft, latents(model), "<x>", PROMPTS, initial, seeded(0), steps=0))
    assert seen == []
    assert torch.equal(found["text_encoder"], initial["text_encoder"])


def test_starts_at_the_mean_of_the_words() -> None:
    model = tiny.model()
    words = model.soft.embedding("cat")["text_encoder"]
    assert len(words) == 3
    assert torch.equal(start(model.soft, "cat", 2)["text_encoder"], words.mean(0).repeat(2, 1))
    everything = model.pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(start(model.soft, "", 1)["text_encoder"], everything.mean(0, keepdim=True))


def test_an_abandoned_inversion_leaves_no_trace() -> None:
    model = tiny.model()
    steps = invert(model, model.soft, latents(model), "<x>", PROMPTS, start(model.soft, "", 1), seeded(0))
    next(steps)
    assert model.soft.held
    steps.close()
    assert not model.soft.held
