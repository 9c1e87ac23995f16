"""UCE without an anchor: what the rest of a prompt says is read as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from expunge.backbones import tiny, toy
from expunge.backbones.unet import UNetModel
from expunge.concept import Concept
from expunge.door import erase
from expunge.errors import ConceptError, NeedsError
from expunge.kernel.closedform import Rewrite, renamed
from expunge.methods.base import readings
from expunge.methods.uce import UCE

CONVERGED = 1e-3  # means are of order 1; what a ridge of 1e-6 leaves
RED_BOMB = Concept("bomb", templates=("{x} {c}", "{c}"))


def mean(model: toy.ToyModel, prompt: str) -> Tensor:
    """The colour that a prompt stands for."""
    layer = model.network.to_mean
    return (model.encode(prompt).tokens.sum(1) @ layer.weight.T + layer.bias).detach()[0]


@pytest.fixture(autouse=True)
def contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expunge.concept.OBJECT_CONTEXTS", ("red", "dark"))


def test_a_context_of_the_concept_survives_its_erasure() -> None:
    """Paired with the empty prompt, as published, the context goes with the concept."""
    drift = {}
    for anchorless in ("blank", "empty"):
        model = toy.model("v")
        red, bomb = mean(model, "red"), mean(model, "bomb")
        assert min(red.norm(), bomb.norm()) > 0.1
        with erase(model, RED_BOMB, UCE(anchorless=anchorless, ridge=1e-6), seed=0).on(model):
            assert mean(model, "bomb").norm() < CONVERGED
            drift[anchorless] = (mean(model, "red") - red).norm().item()
    assert drift["blank"] < CONVERGED
    assert drift["empty"] > 0.1


def test_an_anchor_wins_over_the_blank() -> None:
    model = toy.model("v")
    concept = Concept("bomb", templates=("{x} {c}",), anchor="cat")
    cat = mean(model, "cat")
    assert (mean(model, "bomb") - cat).norm() > 0.1
    with erase(model, concept, UCE(ridge=1e-6), seed=0).on(model):
        assert (mean(model, "bomb") - cat).norm() < CONVERGED


@pytest.mark.parametrize("anchorless", ["blank", "empty"])
def test_a_word_that_says_nothing_is_refused(anchorless: str) -> None:
    model = toy.model()
    with pytest.raises(ConceptError, match="the word says nothing to it"):
        erase(model, Concept("teapot", templates=("{c}",)), UCE(anchorless=anchorless), seed=0)


def test_only_what_the_word_changes_is_erased() -> None:
    model = tiny.model()
    target = Concept("bomb", templates=("a {c}",)).resolve()
    before = model.encode("a").tokens[0, :2].double()  # start token and "a"
    x, y = readings(model, [target], "blank")
    assert not any(torch.equal(row, other) for row in x for other in before)
    assert len(x) == 16 - 2
    x, _ = readings(model, [target], "empty")
    assert any(torch.equal(row, before[1]) for row in x)
    assert len(y) == 16 - 2


def test_of_many_prompts_a_sample_is_looked_at_and_a_blank_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny.model(), list[list[str]]()
    words, forms = ("bomb", "cat", "dog"), ("a {c}", "the {c}", "one {c}")
    targets = [Concept(w, templates=forms).resolve() for w in words]
    encode = type(model).encode
    monkeypatch.setattr(type(model), "encode", lambda self, prompts: (seen.append(prompts), encode(self, prompts))[1])
    pairs = sum(map(len, (targets[0].prompts, targets[1].prompts, targets[2].prompts)))
    readings(model, targets, "blank")
    assert len(seen.pop()) == pairs + len(set(targets[0].blanks)) < 2 * pairs
    readings(model, targets, "blank", 3, torch.Generator().manual_seed(0))
    told = seen.pop()
    assert len(told) <= 6
    assert [sum(w in p.split() for p in told) for w in words] == [1, 1, 1]


@pytest.mark.parametrize(("word", "count"), [("bomb", 4), ("<soft>", 2)])
def test_what_follows_the_word_meets_its_counterpart(word: str, count: int) -> None:
    """Also behind a soft token, which is as long as it has vectors."""
    model = tiny.model(window=24)
    text = model.need_text()
    soft = {"<soft>": {"text_encoder": torch.randn(2, 16, generator=torch.Generator().manual_seed(0))}}
    with text.tokens(soft):
        assert text.lengths([f"{word}, red", ", red", word]) == [2 + count + 4, 2 + 4, 2 + count]
        target = Concept(word, templates=("{c}, red",)).resolve()
        x, y = readings(model, [target], "blank")
        c, blank = (model.encode(p).tokens[0].double() for p in (f"{word}, red", ", red"))
    place = {int((c == i).all(1).nonzero()): int((blank == j).all(1).nonzero()) for i, j in zip(x, y, strict=True)}
    comma = 1 + count
    assert [place[comma + i] for i in range(4)] == [1, 2, 3, 4]
    assert [place[i] for i in range(1, comma)] == [1] * count


def test_a_table_of_vectors_is_a_layer_that_reads_one_hots() -> None:
    rng = torch.Generator().manual_seed(0)
    table = torch.randn(7, 5, generator=rng)
    x, y, keep = torch.tensor([1, 1, 2, 4]), torch.tensor([3, 4, 3, 5]), torch.tensor([2, 3, 3, 6])
    rewrite, one = Rewrite(7, table.device), torch.eye(7)
    rewrite.add(one[x], one[y])
    rewrite.add(one[keep], one[keep], 3.0)
    found = renamed(table, x, y, keep, preserve=3.0, ridge=0.1)
    assert (found - table).abs().max() > 0.1
    torch.testing.assert_close(found, rewrite.solve(table.T, 0.1).T.float())
    assert torch.equal(found[[0, 3, 5, 6]], table[[0, 3, 5, 6]])


@pytest.mark.parametrize("make", [tiny.pipeline, tiny.xl_pipeline])
def test_words_without_rows_of_their_own_left_say_nothing(make: Callable[[], object]) -> None:
    """A letter is a token here; prompts that hold none of the word's letters stay what they were, bit for bit."""
    model, concept = UNetModel(make(), "tiny"), Concept("bomb", templates=("{c}",))
    word, empty, other = (model.encode(p).tokens for p in ("bomb", "", "a cat"))
    assert (word - empty).norm() > 0.1 * empty.norm()
    edit = erase(model, concept, UCE(reads="tokens", preserve=0.0, ridge=1e-9), seed=0)
    with edit.on(model):
        torch.testing.assert_close(model.encode("bomb").tokens, empty)
        assert torch.equal(model.encode("a cat").tokens, other)
    with erase(model, concept, UCE(reads="tokens", preserve=1e6, ridge=1e-9), seed=0).on(model):
        torch.testing.assert_close(model.encode("bomb").tokens, word, atol=1e-2, rtol=0)


def test_only_words_have_rows(tmp_path: Path) -> None:
    with pytest.raises(NeedsError):
        erase(toy.model(), Concept("bomb", templates=("{c}",)), UCE(reads="tokens"), seed=0)
    save_file({"<soft>": torch.ones(1, 16)}, tmp_path / "soft.safetensors")
    soft = Concept("soft", embedding=tmp_path / "soft.safetensors")
    erase(tiny.model(), soft, UCE(), seed=0)
    with pytest.raises(ConceptError, match="no word to the vocabulary"):
        erase(tiny.model(), soft, UCE(reads="tokens"), seed=0)


def test_two_hundred_concepts_are_one_edit() -> None:
    """In one solution, whose squared error over everything that was asked is below that of the untouched readers."""
    model = tiny.model()
    words = [f"{a}{b}" for a in "abcdefghijklmnopqrst" for b in "uvwxyz1234"]
    concepts = [Concept(w, templates=("a {c}",)) for w in words]
    x, y = readings(model, [c.resolve() for c in concepts], "blank")

    def left(now: UNetModel, before: list[Tensor]) -> float:
        layers = now.denoiser.text_readers(now.encode("")).values()
        pairs = zip(layers, before, strict=True)
        return sum((x.float() @ layer.weight.T - y.float() @ w.T).square().sum().item() for layer, w in pairs)

    before = [layer.weight.clone() for layer in model.denoiser.text_readers(model.encode("")).values()]
    first = left(model, before)
    assert first > 0
    edit = erase(model, concepts, UCE(preserve=0.0, ridge=1e-6), seed=0)
    with edit.on(model):
        assert left(model, before) < 0.5 * first
    assert model.fingerprint() == model.hash
    assert edit.card is not None
    assert len(edit.card.concepts) == len(words) == 200
