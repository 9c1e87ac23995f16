"""The search for what training has changed most, where that is known."""

from __future__ import annotations

import copy

import pytest
import torch

from expunge.backbones import tiny, toy
from expunge.kernel.adversary import Adversary, Search, adversary, ascent, changes
from expunge.kernel.condition import Condition
from expunge.kernel.descent import mse
from expunge.kernel.model import Model
from expunge.kernel.terms import Space, distance

SEARCHES: tuple[Search, ...] = ("exact", "gumbel", "pgd")
WORDS = ("red", "green", "cat", "dog", "house")


def latents(model: Model, n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, *model.denoiser.shape, generator=g), torch.tensor([50, 300, 600, 900])[:n]


def harmed(word: str) -> toy.ToyModel:
    """A world in training, in which one word's colour has changed."""
    model = toy.model("eps")
    student = model.denoiser.unlock("cross-attention")
    with torch.no_grad():
        student.weights["to_mean.weight"][:, toy.WORDS.index(word)] += 0.5
    return model


def seek(
    kind: Search, model: Model, steps: int = 10, generator: torch.Generator | None = None, space: Space = "native"
) -> Adversary:
    c = model.encode(WORDS)
    generator = generator or torch.Generator().manual_seed(0)
    return adversary(kind, model.denoiser, [c, c], generator, lr=0.05, tau=1.0, steps=steps, space=space)


@pytest.mark.parametrize("word", ["cat", "house"])
def test_the_word_that_changed_most_is_found(word: str) -> None:
    model = harmed(word)
    for kind in ("exact", "gumbel"):
        foe = seek(kind, model, steps=60)
        assert WORDS[foe.index[1]] == "red"
        foe.search(1, *latents(model))
        if kind == "gumbel":  # draws: its opinion is in the logits
            foe.index[1] = int(foe.logits["1"].argmax())  # type: ignore[attr-defined]
        assert WORDS[foe.index[1]] == word
        assert foe.index[0] == 0, "the other concept's adversary is its own"
        assert torch.equal(foe.condition(1).tokens, model.encode(word).tokens)


def test_changes_are_the_candidates_own() -> None:
    """Compared in batches, they are what each candidate gives alone; unchanged weights change nothing."""
    model = tiny.model()
    x_t, t = latents(model, 3)
    c = model.encode([f"word {i}" for i in range(25)])
    student = model.denoiser.unlock("cross-attention")
    assert changes(model.denoiser, x_t, t, c).abs().max() == 0
    with torch.no_grad():
        for p in student.weights.values():
            p.mul_(1.5)
    with torch.no_grad():
        alone = [
            mse(model.denoiser(x_t, t, c[j : j + 1]), model.denoiser.teacher(x_t, t, c[j : j + 1])) for j in range(25)
        ]
    assert torch.stack(alone).std() > 0
    torch.testing.assert_close(changes(model.denoiser, x_t, t, c), torch.stack(alone), atol=0, rtol=1e-4)


def test_changes_are_measured_in_the_space_of_the_term_that_holds() -> None:
    model = harmed("cat")
    x_t, t = latents(model)
    c, e = model.encode(WORDS), model.denoiser
    with torch.no_grad():
        e.student.weights["to_mean.weight"].add_(0.1 * torch.arange(len(toy.WORDS)))
        told = [e(x_t, t, c[j : j + 1]) for j in range(len(c))]
        was = [e.teacher(x_t, t, c[j : j + 1]) for j in range(len(c))]
        wanted = [distance(e, t, a, b, "x0") for a, b in zip(told, was, strict=True)]
    found, native = changes(e, x_t, t, c, "x0"), changes(e, x_t, t, c)
    torch.testing.assert_close(found, torch.stack(wanted), atol=0, rtol=1e-4)
    assert (found[1:] < native[1:] / 2).all()


def test_a_search_in_x0_can_find_another_word() -> None:
    """One word has changed where noise is low, the other where it is high and native predictions hardly tell."""
    model, mixed = toy.model("eps"), torch.tensor([300, 999])
    model.denoiser.unlock("cross-attention")
    x_t = torch.zeros(2, 3, 4, 4)
    call = model.denoiser.call

    def changed(module: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, c: Condition) -> torch.Tensor:
        early, late = (c.tokens.sum(1)[:, toy.WORDS.index(w)] for w in ("cat", "dog"))
        moved = late * (t == 300) * 0.2 + early * (t == 999) * 0.1
        return call(module, x, t, c) + moved.view(-1, 1, 1, 1) * module.to_mean.weight.sum()

    model.denoiser.call = changed
    with torch.no_grad():
        model.denoiser.student.weights["to_mean.weight"].add_(1.0)
    found = {}
    for space in ("native", "x0"):
        foe = seek("exact", model, space=space)
        foe.search(0, x_t, mixed)
        found[space] = WORDS[foe.index[0]]
    assert found == {"native": "dog", "x0": "cat"}


@pytest.mark.parametrize("space", ["native", "x0"])
@pytest.mark.parametrize("rank", [0, 2])
def test_ascent_is_the_gradient_through_both_networks(rank: int, space: Space) -> None:
    """Against two separate networks; the authors' code leaves the original network's share out."""
    model = tiny.model()
    x_t, t = latents(model)
    c, frozen = model.encode("a cat"), copy.deepcopy(model.denoiser.module)
    student = model.denoiser.unlock("cross-attention", rank, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in student.weights.values():
            p.add_(0.1)
    live = student.snapshot()
    tokens = c.tokens.clone().requires_grad_()
    trained = model.denoiser(x_t, t, Condition(tokens))
    original = model.denoiser.call(frozen, x_t, t, Condition(tokens).batch(len(x_t)))
    far = distance(model.denoiser, t, trained, original, space)
    (whole,) = torch.autograd.grad(far, tokens, retain_graph=True)
    far = distance(model.denoiser, t, trained, original.detach(), space)
    (half,) = torch.autograd.grad(far, tokens)
    found = ascent(model.denoiser, x_t, t, c, space)
    assert (half - whole).norm() > 0.1 * whole.norm()
    torch.testing.assert_close(found, whole, atol=1e-6 * whole.abs().max().item(), rtol=1e-3)
    assert all(torch.equal(p, live[k]) for k, p in student.weights.items())
    assert all(p.grad is None for p in student.weights.values())


def test_projected_gradient_changes_more_than_any_word_and_stays_near() -> None:
    model = harmed("cat")
    with torch.no_grad():
        # a little everywhere: from a word that has not changed at all there is no way up
        model.denoiser.student.weights["to_mean.weight"].add_(0.05)
    x_t, t = latents(model)
    foe = seek("pgd", model, steps=20)
    foe.search(0, x_t, t)
    found, words = foe.condition(0), model.encode(WORDS)
    best = changes(model.denoiser, x_t, t, words).max()
    assert changes(model.denoiser, x_t, t, found).item() > 1.5 * best
    start = words.tokens[foe.index[0]]
    assert (found.tokens[0] - start).norm() <= 20 * 0.05 * start.norm() * 1.001


def test_where_nothing_changed_there_is_no_direction() -> None:
    model = toy.model("eps")
    model.denoiser.unlock("cross-attention")
    foe = seek("pgd", model)
    foe.search(0, *latents(model))
    assert torch.equal(foe.condition(0).tokens[0], model.encode(WORDS).tokens[foe.index[0]])


@pytest.mark.parametrize("kind", SEARCHES)
def test_a_resumed_search_goes_on_as_the_undisturbed_one(kind: Search) -> None:
    model = harmed("cat")
    x_t, t = latents(model)
    generator = torch.Generator().manual_seed(0)
    foe = seek(kind, model, 3, generator)
    foe.search(0, x_t, t)
    saved, noise = copy.deepcopy(foe.state_dict()), generator.get_state()
    foe.search(1, x_t, t)
    again = seek(kind, model, 3, torch.Generator().set_state(noise))
    again.load_state_dict(saved)
    again.search(1, x_t, t)
    assert again.index == foe.index
    for i in (0, 1):
        assert torch.equal(again.condition(i).tokens, foe.condition(i).tokens)
    if kind == "gumbel":
        assert torch.equal(again.logits["1"], foe.logits["1"])  # type: ignore[attr-defined]
