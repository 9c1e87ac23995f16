"""Few-shot: the bounded loss has an end and holds other prompts, the paper's has neither; any number of encoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expunge.backbones import text, tiny, toy
from expunge.backbones.unet import UNetModel
from expunge.concept import Concept
from expunge.door import erase
from expunge.errors import EmptySelection, NeedsError
from expunge.kernel.condition import Condition
from expunge.kernel.descent import mse
from expunge.kernel.model import Model, Sampling
from expunge.kernel.pool import Pool
from expunge.kernel.state import State, Step
from expunge.methods.fewshot import FewShot

PICTURES = 4
BOMB = Concept("bomb", templates=("{c}", "a {c}"), keep=("cat", "dog"))
SHORT = FewShot(steps=4, lr=1e-2, batch=2, others=2)
LONG = replace(SHORT, steps=60)


class Three(UNetModel):
    """A tiny pipeline whose denoiser reads the states of three text encoders, one after the other."""

    def __init__(self) -> None:
        pipe = tiny.pipeline()
        super().__init__(pipe, "three", sampling=Sampling(4, 3.0, 16))
        for i in (2, 3):
            encoder = tiny.pipeline(seed=i).text_encoder.requires_grad_(False)
            self.soft.encoders[f"text_encoder_{i}"] = encoder
            self.soft.layers[f"text_encoder_{i}"] = text.layers(encoder)
        self.soft.groups = {g: {e: text.rule(g, 2) for e in self.soft.encoders} for g in text.GROUPS}

    def _encode(self, prompts: list[str]) -> Condition:
        ids = self.pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return Condition(torch.cat([e(ids).last_hidden_state for e in self.soft.encoders.values()], 1))

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"unet": self.pipe.unet, **self.soft.encoders}


MODELS: dict[str, Callable[[], UNetModel]] = {
    "one": tiny.model,
    "two": lambda: UNetModel(tiny.xl_pipeline(), "xl", sampling=Sampling(2, 3.0, 16)),
    "three": Three,
}
models = pytest.mark.parametrize("name", MODELS)


def weights(model: Model) -> dict[str, Tensor]:
    return {f"{c}.{n}": p.detach().clone() for c, m in model.modules().items() for n, p in m.named_parameters()}


def denoising_error(model: Model, z: Tensor) -> float:
    """The error on noised pictures under the concept's prompt, the same draws every time."""
    pool = Pool(model.denoiser, z, torch.zeros(len(z), dtype=torch.long), State(7), 64)
    drawn = pool.draw()
    with torch.no_grad():
        return mse(model.denoiser(drawn.x_t, drawn.t, model.encode("bomb")), pool.truth(drawn)).item()


def pictures(model: Model) -> Tensor:
    """Latents of the pictures that a door with seed 0 would draw, near enough: some pictures of the model's."""
    return model.latents(model.generate(["bomb"] * PICTURES, seeds=range(PICTURES), steps=2))


@models
def test_every_text_encoder_is_trained_and_nothing_else(name: str) -> None:
    model = MODELS[name]()
    before, fingerprint = weights(model), model.hash
    edit = erase(model, BOMB, SHORT, seed=0, make_images=2)
    assert model.fingerprint() == fingerprint
    with edit.on(model):
        changed = {k for k, v in weights(model).items() if not torch.equal(v, before[k])}
    assert {k.partition(".")[0] for k in changed} == model.soft.encoders.keys()
    assert all(".mlp." in k or ".self_attn." in k for k in changed)
    last = {f".layers.{len(stack) - 1}.self_attn." for stack in model.soft.layers.values()}
    assert {part for k in changed for part in last if part in k} == last
    assert model.fingerprint() == fingerprint


@pytest.mark.parametrize("part", [*text.GROUPS])
def test_a_part_names_the_weights(part: str) -> None:
    model = tiny.model()
    before = weights(model)
    with erase(model, BOMB, replace(SHORT, part=part), seed=0, make_images=2).on(model):
        changed = {k.removeprefix("text_encoder") for k, v in weights(model).items() if not torch.equal(v, before[k])}
    pieces = [p.format(last=1) for p in text.GROUPS[part]]
    assert changed
    assert all(any(p in k for p in pieces) for k in changed)
    assert all(any(p in k for k in changed) for p in pieces)


def test_the_papers_ascent_raises_the_error_without_bound() -> None:
    model = tiny.model()
    z = pictures(model)
    errors = [denoising_error(model, z)]
    for steps in (10, 40):
        method = replace(LONG, loss="ascent", steps=steps)
        edit = erase(model, BOMB, method, seed=0, make_images=PICTURES)
        assert edit.card is not None
        assert all(v < 0 for v in edit.card.losses["ascent"])
        with edit.on(model):
            errors.append(denoising_error(model, z))
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_redirection_ends_where_the_concept_is_seen_as_its_anchor(prediction: str) -> None:
    """Its loss is a square: it goes to zero and stays there, where the ascent goes on."""
    model = tiny.model(prediction)
    concept = replace(BOMB, anchor="cat", templates=("{c}",))
    drawn = Pool(model.denoiser, pictures(model), torch.zeros(PICTURES, dtype=torch.long), State(7), 64).draw()

    @torch.no_grad()
    def seen_as(word: str) -> Tensor:
        return model.denoiser(drawn.x_t, drawn.t, model.encode(word))

    goal = seen_as("cat")
    apart = mse(seen_as("bomb"), goal).item()
    edit = erase(model, concept, replace(LONG, preserve=0.0), seed=0, make_images=PICTURES)
    with edit.on(model):
        assert mse(seen_as("bomb"), goal).item() < apart / 10
    assert edit.card is not None
    assert max(edit.card.losses["redirect"][-20:]) < apart / 5


def test_anchored_prompts_are_read_as_before() -> None:
    model = tiny.model()
    held = ["cat", "a cat", "dog", "a dog", ""]
    before = model.encode(held).tokens
    moved = {}
    for preserve in (0.0, 100.0):
        with erase(model, BOMB, replace(LONG, preserve=preserve), seed=0, make_images=PICTURES).on(model):
            moved[preserve] = mse(model.encode(held).tokens, before).item() / before.var().item()
    assert moved[0.0] > 1e-3
    assert moved[100.0] < moved[0.0] / 4


def test_several_concepts_at_once_each_with_its_own_pictures() -> None:
    model = tiny.model()
    dagger = replace(BOMB, name="dagger", names=("dagger",))
    before = model.encode(["bomb", "dagger"]).tokens
    with erase(model, [BOMB, dagger], LONG, seed=0, make_images=2).on(model):
        moved = (model.encode(["bomb", "dagger"]).tokens - before).flatten(1).norm(dim=1)
    assert bool((moved > 0.05 * before.flatten(1).norm(dim=1)).all())


@models
@pytest.mark.parametrize("loss", ["redirect", "ascent"])
def test_an_interrupted_fit_goes_on_bit_for_bit(name: str, loss: Any, tmp_path: Path) -> None:
    method = replace(SHORT, loss=loss)
    ask = {"seed": 0, "make_images": 2}
    whole = erase(MODELS[name](), BOMB, method, **ask)

    def kill(step: Step) -> None:
        if step.i == 1 and "drawn" not in step.losses:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    model = MODELS[name]()
    with pytest.raises(KeyboardInterrupt):
        erase(model, BOMB, method, **ask, out=out, save_every=0, progress=kill)
    assert model.fingerprint() == model.hash
    again = erase(MODELS[name](), BOMB, method, **ask, out=out, resume=True).tensors()
    assert all(torch.equal(v, again[k]) for k, v in whole.tensors().items())


def test_bad_input_is_told_before_any_training() -> None:
    with pytest.raises(NeedsError, match="fewshot needs pictures of 'bomb'.*--make-images"):
        erase(tiny.model(), BOMB, SHORT, seed=0)
    with pytest.raises(NeedsError, match="'toy' has no text encoder that can be reached"):
        erase(toy.model(), BOMB, SHORT, seed=0, make_images=2)
    with pytest.raises(EmptySelection, match="'mpl' is not known.*Did you mean 'mlp'"):
        erase(tiny.model(), BOMB, replace(SHORT, part="mpl"), seed=0, make_images=2)
