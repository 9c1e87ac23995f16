"""Closed-form edits inside a text encoder."""

from __future__ import annotations

import pytest
import torch

from expunge.backbones import tiny
from expunge.errors import ConceptError
from expunge.kernel.model import Model
from expunge.kernel.residual import Stream, closing, rewritten

NAME = "text_encoder"
EXACT = 1e-5  # float32


def applied(model: Model, found: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in found.items():
            model.modules()[NAME].get_parameter(name).copy_(value)


def test_a_stream_ends_where_the_encoder_does() -> None:
    model = tiny.model()
    text, prompts = model.need_text(), ["a cat", "a dog"]
    stream = Stream(model, NAME, prompts)
    entered = stream.states
    for layer in text.layers[NAME]:
        read = stream.through(layer)
        assert read.shape == (2, 16, closing(layer).in_features)
    assert not torch.allclose(stream.states, entered, atol=0.1)
    final = model.modules()[NAME].get_submodule("final_layer_norm")(stream.states)
    torch.testing.assert_close(final, model.encode(prompts).tokens, atol=EXACT, rtol=0)


def test_erased_prompts_are_read_as_their_anchors_and_kept_ones_as_before() -> None:
    """With fewer tokens than features in front of the matrices both can be had."""
    model = tiny.model(window=6)
    prompts, anchors, keeps = ["cat"], ["dog"], ["owl"]
    goal, before = model.encode(anchors).tokens, model.encode(keeps).tokens
    assert (model.encode(prompts).tokens - goal).abs().max() > 0.1
    found, left = rewritten(model, NAME, prompts, anchors, keeps, ridge=1e-9, preserve=1.0)
    assert left < 1e-3
    assert set(found) == {n for n, _ in model.modules()[NAME].named_parameters() if n.endswith("mlp.fc2.weight")}
    applied(model, found)
    assert (model.encode(prompts).tokens - goal).abs().max() < 0.05
    assert (model.encode(keeps).tokens - before).abs().max() < 0.05


def test_what_is_solved_for_is_what_the_edited_encoder_does() -> None:
    """Every layer is solved for the states that the edited layers before it leave."""
    model = tiny.model()
    prompts, anchors, keeps = ["a cat", "cat"], ["a dog", "dog"], ["an owl", "tree", ""]
    found, left = rewritten(model, NAME, prompts, anchors, keeps, ridge=0.01, preserve=3.0)
    goals, kept = Stream(model, NAME, anchors), model.encode(keeps).tokens
    for layer in model.need_text().layers[NAME]:
        goals.through(layer)
    applied(model, found)
    now = Stream(model, NAME, prompts)
    for layer in model.need_text().layers[NAME]:
        now.through(layer)
    behind = torch.zeros(2, 16, dtype=torch.bool)
    behind[0, 2:] = behind[1, 1:] = True  # the word's first letter
    error = (goals.states - now.states)[behind].square().mean() / goals.states[behind].var()
    assert error.item() == pytest.approx(left, rel=1e-2)
    assert (model.encode(keeps).tokens - kept).abs().max() > 0  # three prompts do not fit: a compromise


def test_prompts_that_are_their_anchors_are_refused() -> None:
    with pytest.raises(ConceptError, match="as it reads their anchors"):
        rewritten(tiny.model(), NAME, ["a cat"], ["a cat"], [], ridge=0.01, preserve=3.0)
