"""EraseDiff: the multiplier solves its problem, the published inner loop does nothing, the concept becomes another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expunge.backbones import toy
from expunge.concept import Concept
from expunge.door import erase
from expunge.kernel.descent import Descent, mse
from expunge.kernel.path import KINDS, Kind
from expunge.kernel.saliency import gradient
from expunge.methods.erasediff import EraseDiff, multiplier

BOMB = Concept("bomb", templates=("{c}",), anchor="cat", keep=("cat", "dog"))
TRAIN = {"group": "cross-attention", "lr": 0.1, "batch": 8, "steps": 90}


def mean(model: toy.ToyModel, prompt: str) -> Tensor:
    """The colour that a prompt stands for."""
    c = model.encode(prompt).tokens
    layer = model.network.to_mean
    return (c.sum(1) @ layer.weight.T + layer.bias).detach()[0]


def world(kind: Kind) -> toy.ToyModel:
    """The Gaussian world, paler: brighter colours than a picture can hold would be cut off in what it draws."""
    model = toy.model(kind)
    with torch.no_grad():
        model.network.to_mean.weight.mul_(0.25)
    return model


def pair(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    g_f, g_r = ({"a": torch.randn(3, 2, generator=g), "b": torch.randn(4, generator=g)} for _ in range(2))
    return g_f, g_r


def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((a[n] * b[n]).sum()) for n in a)


@pytest.mark.parametrize("seed", range(6))
def test_the_step_is_the_nearest_one_that_forgets_fast_enough(seed: int) -> None:
    """min |d - g_r|^2 subject to <d, g_f> >= eta |g_f|^2; its solution lies on g_r + lambda g_f, lambda >= 0."""
    (g_f, g_r), eta = pair(seed), 0.3
    lam = multiplier(g_f, g_r, eta, "ratio")
    step = {n: g_r[n] + lam * g_f[n] for n in g_r}
    wanted = eta * dot(g_f, g_f)
    assert dot(step, g_f) >= wanted - 1e-5
    if dot(g_r, g_f) >= wanted:
        assert lam == 0
    else:
        assert lam > 0
        assert dot(step, g_f) == pytest.approx(wanted, rel=1e-4)
        # any smaller multiplier breaks the constraint
        assert dot({n: g_r[n] + 0.99 * lam * g_f[n] for n in g_r}, g_f) < wanted


def test_both_cases_occur_above() -> None:
    active = [multiplier(*pair(seed), 0.3, "ratio") > 0 for seed in range(6)]
    assert True in active
    assert False in active


def test_the_two_published_forms_differ_by_the_ratio_of_the_norms() -> None:
    g_f, g_r = pair(0)
    g_r = {n: -3 * g_f[n] + 0.1 * v for n, v in g_r.items()}  # a conflict
    ratio, cosine = (multiplier(g_f, g_r, 0.1, form) - 0.1 for form in ("ratio", "cosine"))
    assert ratio == pytest.approx(cosine * (dot(g_r, g_r) / dot(g_f, g_f)) ** 0.5, rel=1e-5)
    assert ratio > 2 * cosine > 0
    same = {n: v * (dot(g_r, g_r) / dot(g_f, g_f)) ** 0.5 for n, v in g_f.items()}
    assert multiplier(same, g_r, 0.1, "ratio") == pytest.approx(multiplier(same, g_r, 0.1, "cosine"), rel=1e-4)


def test_a_forgotten_concept_asks_for_nothing() -> None:
    g_f, g_r = pair(0)
    zero = {n: torch.zeros_like(v) for n, v in g_f.items()}
    assert multiplier(zero, g_r, 0.1, "ratio") == multiplier(zero, g_r, 0.1, "cosine") == 0


@pytest.mark.parametrize("inner", [1, 5])
def test_the_published_inner_loop_has_no_effect_on_the_outer_gradient(inner: int) -> None:
    """It minimises L_f from the present weights, puts these back and subtracts what it reached: a constant."""
    model = toy.model("eps")
    e_theta = model.denoiser
    student = e_theta.unlock("all")
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(8, 3, 4, 4, generator=g), torch.randint(100, 900, (8,), generator=g)
    c, c_m, c_r = (model.encode(word) for word in ("bomb", "cat", "dog"))
    eps = torch.randn(x.shape, generator=g)

    def forgetting() -> Tensor:
        with torch.no_grad():
            goal = e_theta(x, t, c_m)
        return mse(e_theta(x, t, c), goal)

    def outer(value: float) -> dict[str, Tensor]:
        return gradient(mse(e_theta(x, t, c_r), eps) + 0.1 * (forgetting() - value), student.weights)

    plain = outer(0.0)
    before, first = student.snapshot(), forgetting().item()
    loop = Descent(student.weights, lr=0.05)
    for _ in range(inner):
        loop.step(forget=forgetting())
    reached = forgetting().item()
    moved = student.snapshot()
    student.load(before)
    # the loop did work
    assert reached < first - 1e-4
    assert any(not torch.equal(moved[n], before[n]) for n in before)
    with_loop = outer(reached)
    assert all(torch.equal(with_loop[n], plain[n]) for n in plain)
    assert any(v.any() for v in plain.values())
    model.lock()


@pytest.mark.parametrize("kind", KINDS)
def test_relabelling_reaches_the_anchor_and_keeps_the_rest(kind: Kind) -> None:
    model = world(kind)
    cat, dog = mean(model, "cat"), mean(model, "dog")
    assert (mean(model, "bomb") - cat).norm() > 0.1
    edit = erase(model, BOMB, EraseDiff(eta=1.0, **TRAIN), seed=0, make_images=4)
    with edit.on(model):
        gone, kept = (mean(model, "bomb") - cat).norm(), (mean(model, "dog") - dog).norm()
    # pictures of the base are few, so that what they show is not quite what the base means
    assert gone < 0.05
    assert kept < 0.05


def test_several_concepts_at_once() -> None:
    model = world("v")
    concepts = [Concept(w, templates=("{c}",), anchor="cat", keep=("cat", "dog")) for w in ("bomb", "dagger")]
    cat = mean(model, "cat")
    for w in ("bomb", "dagger"):
        assert (mean(model, w) - cat).norm() > 0.1
    with erase(model, concepts, EraseDiff(eta=1.0, **(TRAIN | {"batch": 32})), seed=0, make_images=4).on(model):
        for w in ("bomb", "dagger"):
            assert (mean(model, w) - cat).norm() < 0.05


def test_noise_as_the_target_is_the_same_method_in_every_parameterisation() -> None:
    """The loss is taken in eps, whatever the network predicts; eps, x0 and v networks of one schedule agree."""
    columns, bomb = {}, toy.WORDS.index("bomb")
    for kind in ("eps", "x0", "v"):
        model = world(kind)
        before = model.network.to_mean.weight[:, bomb].detach().clone()
        edit = erase(model, BOMB, EraseDiff(target="noise", **(TRAIN | {"steps": 20})), seed=0, make_images=4)
        columns[kind] = edit.tensors()["unet.to_mean.weight"][:, bomb]
        assert (columns[kind] - before).norm() > 0.05
    # float32, through 20 Adam steps
    torch.testing.assert_close(columns["x0"], columns["eps"], atol=1e-3, rtol=0)
    torch.testing.assert_close(columns["v"], columns["eps"], atol=1e-3, rtol=0)


def test_noise_as_the_target_lowers_its_loss() -> None:
    model = world("eps")
    g = torch.Generator().manual_seed(9)
    x0, t = mean(model, "bomb")[:, None, None].expand(500, 3, 4, 4), torch.arange(0, 1000, 2)
    eps = torch.randn(x0.shape, generator=g)
    x, u = model.denoiser.path.noised(x0, eps, t), torch.rand(x0.shape, generator=g)

    def loss() -> float:
        with torch.no_grad():
            return mse(model.denoiser(x, t, model.encode("bomb")), u).item()

    before = loss()
    method = EraseDiff(target="noise", **(TRAIN | {"lr": 0.01, "batch": 64}))
    with erase(model, BOMB, method, seed=0, make_images=4).on(model):
        assert loss() < before - 0.05
