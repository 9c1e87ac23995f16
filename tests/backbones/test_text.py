"""Soft tokens: a placeholder is read as its vectors, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expunge import tokens
from expunge.backbones import tiny
from expunge.backbones.unet import UNetModel
from expunge.errors import ConceptError
from expunge.kernel.condition import Condition
from expunge.kernel.model import Sampling

WINDOW = 32
PROMPTS = ("<x>", "a <x>, big", "a <x> and a <x>", "no placeholder")
MODELS: dict[str, Any] = {
    "one encoder": lambda: tiny.model(window=WINDOW),
    "two encoders": lambda: UNetModel(tiny.xl_pipeline(window=WINDOW), "xl", sampling=Sampling(4, 3.0, 16)),
}
models = pytest.mark.parametrize("name", MODELS)


def same(a: Condition, b: Condition) -> bool:
    return torch.equal(a.tokens, b.tokens) and all(torch.equal(a.extra[k], b.extra[k]) for k in a.extra)


def hooks(model: UNetModel) -> int:
    every = [m for module in model.modules().values() for m in module.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in every)


def random(model: UNetModel, k: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.05 * torch.randn(k, d, generator=generator) for n, d in model.soft.widths.items()}


@models
@pytest.mark.parametrize("word", ["b", "bomb"])
def test_a_words_own_vectors_are_read_as_the_word(name: str, word: str) -> None:
    model = MODELS[name]()
    plain = model.encode([p.replace("<x>", word) for p in PROMPTS])
    assert not torch.equal(model.encode(list(PROMPTS)).tokens[0], plain.tokens[0])
    vectors = model.soft.embedding(word)
    assert all(len(v) == len(word) for v in vectors.values())
    with model.soft.tokens({"<x>": vectors}):
        assert same(model.encode(list(PROMPTS)), plain)
        seen = model.generate(["a <x>, big"], seeds=[0])
    assert torch.equal(seen, model.generate([f"a {word}, big"], seeds=[0]))


@models
def test_no_trace_is_left(name: str) -> None:
    model = MODELS[name]()
    before, plain = model.hash, model.encode(list(PROMPTS))
    tokenizers = [model.pipe.components[t] for t in ("tokenizer", "tokenizer_2") if t in model.pipe.components]
    sizes = [len(t) for t in tokenizers]
    hooked = hooks(model)  # transformers has its own
    with model.soft.tokens({"<x>": random(model, 2)}):
        assert model.fingerprint() == before
        assert not same(model.encode(list(PROMPTS)), plain)
        assert hooks(model) > hooked
        assert model.encode(["no placeholder"]).tokens.equal(plain.tokens[3:])
    with pytest.raises(KeyError), model.soft.tokens({"<x>": random(model, 2)}):
        raise KeyError
    assert model.fingerprint() == before
    assert same(model.encode(list(PROMPTS)), plain)
    after = [model.pipe.components[t] for t in ("tokenizer", "tokenizer_2") if t in model.pipe.components]
    assert all(a is b for a, b in zip(after, tokenizers, strict=True))
    assert [len(t) for t in after] == sizes
    assert hooks(model) == hooked
    assert not model.soft.held


@models
def test_several_placeholders_together_and_nested(name: str) -> None:
    model = MODELS[name]()
    one, two = random(model, 1), random(model, 3, seed=1)
    with model.soft.tokens({"<x>": one, "<y>": two}):
        both = model.encode("<x> or <y>")
    with model.soft.tokens({"<x>": one}), model.soft.tokens({"<y>": two}):
        assert same(model.encode("<x> or <y>"), both)
    with model.soft.tokens({"<x>": random(model, 1, seed=2), "<y>": two}):
        assert not same(model.encode("<x> or <y>"), both)


def test_the_end_of_a_prompt_is_found_where_it_is_the_largest_id() -> None:
    """SDXL's own configuration says so; a placeholder's id is larger still."""
    model = MODELS["two encoders"]()
    model.pipe.text_encoder_2.eos_token_id = 2
    plain = model.encode("a bomb, big")
    with model.soft.tokens({"<x>": model.soft.embedding("bomb")}):
        assert same(model.encode("a <x>, big"), plain)


@models
def test_a_gradient_reaches_vectors_that_want_one_and_nothing_else(name: str) -> None:
    model = MODELS[name]()
    vectors = random(model, 2)
    with model.soft.tokens({"<x>": vectors}):
        assert not model.encode("a <x>").tokens.requires_grad
    for v in vectors.values():
        v.requires_grad_()
    with model.soft.tokens({"<x>": vectors}):
        c = model.encode("a <x>")
        with torch.no_grad():
            assert not model.encode("a <x>").tokens.requires_grad
    (c.tokens.sum() + sum(v.sum() for v in c.extra.values())).backward()
    assert all(v.grad is not None and bool(v.grad.any(1).all()) for v in vectors.values())
    assert all(p.grad is None for m in model.modules().values() for p in m.parameters())
    assert not model.encode("a <x>").tokens.requires_grad


def test_a_word_of_the_vocabulary_is_no_placeholder() -> None:
    model = MODELS["one encoder"]()
    before = model.pipe.tokenizer
    with pytest.raises(ConceptError, match="'a' is a word"), model.soft.tokens({"a": random(model, 1)}):
        pass
    assert model.pipe.tokenizer is before


def test_what_is_cut_is_counted_in_vectors() -> None:
    model = tiny.model(window=8)
    with model.soft.tokens({"<x>": random(model, 5)}):
        assert model.clipped(["<x>b"]) == []
        assert [p for p, _ in model.clipped(["<x>bc"])] == ["<x>bc"]


@pytest.mark.parametrize("k", [1, 3])
def test_diffusers_loads_our_file_and_draws_the_same(tmp_path: Path, k: int) -> None:
    model, path = MODELS["one encoder"](), tmp_path / "token.safetensors"
    vectors, ask = random(model, k), {"prompts": ["a <x>, big", "<x>"], "seeds": [0, 1]}
    base = model.generate(**ask)
    tokens.write(path, "<x>", vectors, {})
    with model.soft.tokens({"<x>": tokens.read(path, model.soft.widths)}):
        ours = model.generate(**ask)
    assert (ours - base).abs().max() > 1e-3
    model.pipe.load_textual_inversion(str(path))
    assert torch.equal(model.generate(**ask), ours)


def test_diffusers_loads_our_file_of_two_encoders(tmp_path: Path) -> None:
    model, path = MODELS["two encoders"](), tmp_path / "token.safetensors"
    vectors = random(model, 2)
    base = model.generate(["a <x>, big"], seeds=[0])
    tokens.write(path, "<x>", vectors, {})
    with model.soft.tokens({"<x>": tokens.read(path, model.soft.widths)}):
        ours = model.generate(["a <x>, big"], seeds=[0])
    assert (ours - base).abs().max() > 1e-3
    pipe, state = model.pipe, load_file(path)
    pipe.load_textual_inversion(state["clip_l"], token="<x>", tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
    pipe.load_textual_inversion(
        state["clip_g"], token="<x>", tokenizer=pipe.tokenizer_2, text_encoder=pipe.text_encoder_2
    )
    assert torch.equal(model.generate(["a <x>, big"], seeds=[0]), ours)


@pytest.mark.parametrize("key", ["<cat-toy>", "emb_params", "learned_embeds"])
@pytest.mark.parametrize("shape", [(16,), (1, 16), (4, 16)])
def test_reads_the_usual_layouts(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    save_file({key: value}, tmp_path / "e.safetensors")
    found = tokens.read(tmp_path / "e.safetensors", {"text_encoder": 16})
    assert found.keys() == {"text_encoder"}
    assert torch.equal(found["text_encoder"], value.float().view(-1, 16))


@pytest.mark.parametrize(
    ("state", "widths", "message"),
    [
        ({"<x>": torch.zeros(1, 8)}, {"text_encoder": 16}, r"e\.safetensors.*1x8 \(<x>\).*16 \(text_encoder\) wide"),
        ({"<x>": torch.zeros(1, 16)}, {"text_encoder": 16, "text_encoder_2": 20}, r"20 \(text_encoder_2\)"),
        ({"clip_l": torch.zeros(1, 16), "clip_g": torch.zeros(1, 20)}, {"text_encoder": 16}, r"1x20 \(clip_g\)"),
        ({"<x>": torch.zeros(1, 1, 16)}, {"text_encoder": 16}, "fits another model"),
        ({"<x>": torch.zeros(0, 16)}, {"text_encoder": 16}, "fits another model"),
        ({"<x>": torch.full((1, 16), torch.nan)}, {"text_encoder": 16}, "NaN"),
        ({"a": torch.zeros(16), "b": torch.zeros(16)}, {"text_encoder": 16}, "holds 2 tensors"),
    ],
)
def test_refuses_what_does_not_fit(tmp_path: Path, state: Any, widths: dict[str, int], message: str) -> None:
    save_file(state, tmp_path / "e.safetensors")
    with pytest.raises(ConceptError, match=message):
        tokens.read(tmp_path / "e.safetensors", widths)


def test_refuses_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "e.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConceptError, match="cannot be read"):
        tokens.read(tmp_path / "e.safetensors", {"text_encoder": 16})


@models
def test_ids_are_rows_of_the_vocabulary_and_a_soft_token_has_none(name: str) -> None:
    model = MODELS[name]()
    text = model.soft
    with text.tokens({"<x>": random(model, 2)}):
        rows = text.ids(["bomb", "<x>"])
    for encoder, table in text.embedding().items():
        assert rows[encoder].shape == (2, WINDOW)
        assert torch.equal(table[rows[encoder][0, 1:5]], text.embedding("bomb")[encoder])
        assert rows[encoder][0].max() < len(table)
        assert rows[encoder][1, 1:3].min() >= len(table)
        parameters = dict(text.encoders[encoder].named_parameters())
        assert parameters[text.vocabularies[encoder]].data_ptr() == table.data_ptr()
