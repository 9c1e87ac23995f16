"""Score-identity distillation and SFD in the exact Gaussian world, whose fixed points are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expunge import checkpoint
from expunge.backbones import toy
from expunge.concept import Concept
from expunge.distill import SiD, distill
from expunge.door import erase
from expunge.edits import GeneratorEdit, WeightEdit
from expunge.errors import BadRun, ConceptError, NeedsError
from expunge.kernel.descent import Descent
from expunge.kernel.identity import Distillation, Distilling, identity
from expunge.kernel.lowrank import product
from expunge.kernel.model import Model, OneStep
from expunge.kernel.path import KINDS, Kind
from expunge.kernel.sampler import clean, guided, one_step
from expunge.kernel.state import State, Step
from expunge.methods.sfd import SFD
from expunge.records import CHECKPOINT

CONVERGED = 0.03  # means are of order 1; what sign-like updates (Adam without momentum) of this rate leave
ROUNDING = 1e-3  # float32 through a division by alpha of 0.08, relative
GAME: dict[str, Any] = {"group": "cross-attention"}
TRAIN: dict[str, Any] = {
    "group": "cross-attention", "steps": 350, "lr": 0.01, "fake_lr": 0.05, "batch": 16, "decay": 0.97, "probe": 0
}  # fmt: skip


def mean(model: Model, prompt: str) -> Tensor:
    """The colour that a prompt stands for."""
    layer = model.denoiser.module.get_submodule("to_mean")
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    return (model.encode(prompt).tokens.sum(1) @ weight.T + bias).detach()[0]


def drawn(model: Model, prompt: str) -> Tensor:
    """The mean colour of a generator's latents."""
    assert model.one_step is not None
    c, z = model.encode([prompt] * 256), torch.randn(256, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = one_step(model.denoiser, guided(model.denoiser, c, c, 1.0), z, model.one_step.t)
    return x.mean((0, 2, 3))


@dataclass
class Exact:
    """A generator of N(mean(s), SPREAD^2) by construction, watched by its exact score; its teacher is at `p`."""

    kind: Kind
    p: str
    s: str

    def predictions(self, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return samples and the two clean predictions at one noise level."""
        model, g = toy.model(self.kind), torch.Generator().manual_seed(0)
        x = mean(model, self.s)[:, None, None] + toy.SPREAD * torch.randn(4096, 3, 4, 4, generator=g)
        t = torch.full((4096,), model.denoiser.path.time(ratio))
        x_t = model.denoiser.path.noised(x, torch.randn(x.shape, generator=g), t)
        told = [model.encode([prompt] * 4096) for prompt in (self.p, self.s)]
        with torch.no_grad():
            p, s = (clean(model.denoiser, guided(model.denoiser, c, c, 1.0), x_t, t) for c in told)
        return x, p, s


# ------------------------------------------------------------------------------------------------------------- the loss


def test_the_loss_and_its_gradient_are_zero_iff_the_scores_agree() -> None:
    x, p, s = torch.randn(3, 5, 2, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    for other, agree in ((s, False), (p, True)):
        a, b = p.clone().requires_grad_(), other.clone().requires_grad_()
        loss = identity(x, a, b, alpha=1.0)
        assert loss.shape == (5,)
        # both predictions move with the generator's sample: what reaches it is the sum
        whole = torch.stack(torch.autograd.grad(loss.sum(), (a, b))).sum(0)
        assert bool((loss == 0).all()) == bool((whole.abs().amax() < 1e-6).item()) == agree


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_with_the_exact_fake_score_the_loss_is_the_distance_of_the_scores(kind: Kind, alpha: float) -> None:
    """E (P - S) . [(P - x) - alpha (P - S)] = (1 - alpha) |P - S|^2, because E (P - S) . (S - x) = 0."""
    x, p, s = Exact(kind, "bomb", "cat").predictions(1.0)
    w = (p - x).abs().flatten(1).mean(1)
    distance = (p - s).square().mean().item()
    assert distance > 1e-6
    noise = ((p - s) * (s - x)).flatten(1).mean(1).std().item() / 4096**0.5
    assert (identity(x, p, s, alpha) * w).mean().item() == pytest.approx((1 - alpha) * distance, abs=5 * noise)


def test_clean_predictions_make_the_parameterisations_one() -> None:
    """Loss of the generator and its gradient are the same for an eps, an x0 and a v network that are one function."""
    found = {}
    for kind in ("eps", "x0", "v"):
        model = toy.model(kind)  # type: ignore[arg-type]
        game = Distillation(model, State(0), Distilling(**GAME | {"most": 5.0}))
        loss = game.generator_loss(model.encode(["bomb"] * 8), model.encode(["cat"] * 8))
        gradient = torch.autograd.grad(loss.sum(), list(game.generator.weights.values()))[0]
        assert gradient.norm() > 0.1
        found[kind] = (loss.detach(), gradient)
    for kind in ("x0", "v"):
        for one, other in zip(found[kind], found["eps"], strict=True):
            torch.testing.assert_close(one, other, rtol=10 * ROUNDING, atol=ROUNDING * other.abs().max().item())


def test_the_gradient_runs_through_both_networks_and_stays_in_neither() -> None:
    found = []
    for cut in ("", "phi", "psi"):
        model = toy.model("v")
        game = Distillation(model, State(0), Distilling(**GAME))
        if cut:
            getattr(game, cut).call = torch.no_grad()(game.phi.call)
        loss = game.generator_loss(model.encode(["bomb"] * 8), model.encode(["cat"] * 8))
        loss.sum().backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is None for p in (*game.phi.module.parameters(), *game.psi.module.parameters()))
        found.append(next(iter(game.generator.weights.values())).grad)
    whole, without_phi, without_psi = found
    assert not torch.allclose(whole, without_phi)
    assert not torch.allclose(whole, without_psi)
    assert all(p.requires_grad for p in game.fake.weights.values())


# --------------------------------------------------------------------------------------------------------- fixed points


@pytest.mark.parametrize("kind", KINDS)
def test_the_fake_score_of_a_gaussian_is_at_its_mean(kind: Kind) -> None:
    """Before any update a generator at time t* draws mu sigma^2 / (alpha^2 SPREAD^2 + sigma^2): psi ends up there."""
    model = toy.model(kind)
    game = Distillation(model, State(0), Distilling(**GAME | {"noise": 0.1}))
    alpha, sigma = (v.item() for v in model.denoiser.path.at(torch.tensor([game.t])))
    wanted = mean(model, "cat") * sigma**2 / (alpha**2 * toy.SPREAD**2 + sigma**2)
    c = model.encode(["cat"] * 32)

    def psi() -> Tensor:
        return next(iter(game.fake.weights.values())).detach() @ c.tokens[0].sum(0)

    assert (psi() - wanted).norm() > 0.2
    opt = Descent(game.fake.weights, 0.02)
    for _ in range(150):
        opt.step(fake=game.fake_loss(c).mean())
    torch.testing.assert_close(psi(), wanted, atol=CONVERGED, rtol=0)


@pytest.mark.parametrize("kind", ["v", "flow"])
def test_sfd_draws_the_safe_concept_and_keeps_the_others(kind: Kind) -> None:
    """One stage, from a generator that draws too near to zero: forgotten at its anchor, retained at its own mean."""
    model = toy.model(kind)
    concept = Concept("bomb", templates=("{c}",), anchor="cat", keep=("dog",))
    start, method = (SFD(**TRAIN | {"noise": 0.1, "steps": n}) for n in (0, 350))
    with erase(model, concept, start).on(model):
        assert (drawn(model, "dog") - mean(toy.model(kind), "dog")).norm() > 0.1
        assert (drawn(model, "bomb") - mean(toy.model(kind), "cat")).norm() > 1
    with erase(model, concept, method, seed=0).on(model):
        torch.testing.assert_close(drawn(model, "dog"), mean(toy.model(kind), "dog"), atol=CONVERGED, rtol=0)
        torch.testing.assert_close(drawn(model, "bomb"), mean(toy.model(kind), "cat"), atol=CONVERGED, rtol=0)


def test_sfd_goes_on_with_a_generator(tmp_path: Any) -> None:
    """Two stages: distil, then forget; the teacher is still the multi-step model, and the generator keeps its time."""
    (tmp_path / "prompts.txt").write_text("bomb\ncat\ndog\n")
    multi = toy.model("v")
    first = distill(multi, SiD(**TRAIN | {"noise": 0.5, "prompts": str(tmp_path / "prompts.txt")}))
    model = first.settle(toy.model("v"))
    for word in ("bomb", "cat", "dog"):
        torch.testing.assert_close(drawn(model, word), mean(multi, word), atol=CONVERGED, rtol=0)
    concept = Concept("bomb", templates=("{c}",), anchor="cat", keep=("dog",))
    second = erase(model, concept, SFD(**TRAIN), seed=1)
    assert isinstance(second, GeneratorEdit)
    assert second.t == first.t != multi.denoiser.path.time(SFD().noise)
    with second.on(model):
        torch.testing.assert_close(drawn(model, "bomb"), mean(multi, "cat"), atol=CONVERGED, rtol=0)
        torch.testing.assert_close(drawn(model, "dog"), mean(multi, "dog"), atol=CONVERGED, rtol=0)
    torch.testing.assert_close(drawn(model, "bomb"), mean(multi, "bomb"), atol=CONVERGED, rtol=0)


@pytest.mark.parametrize("preserve", [0.0, 1e3])
def test_what_a_generator_drew_of_the_rest_is_held(preserve: float) -> None:
    """A generator that draws its retained prompt too near to zero: the paper's loss leads it to the teacher's mean."""
    model = toy.model("v")
    concept = Concept("bomb", templates=("{c}",), anchor="cat", keep=("dog",))
    first = erase(model, concept, SFD(**TRAIN | {"noise": 0.1, "steps": 0})).settle(toy.model("v"))
    before, there = drawn(first, "dog"), mean(model, "dog")
    assert (before - there).norm() > 0.1
    bomb = drawn(first, "bomb")
    with erase(first, concept, SFD(**TRAIN | {"preserve": preserve}), seed=0).on(first):
        torch.testing.assert_close(drawn(first, "dog"), before if preserve else there, atol=CONVERGED, rtol=0)
        assert (drawn(first, "bomb") - bomb).norm() > 0.1


def kept(folder: Path, **changes: Any) -> Model:
    """A generator whose run kept its fake score, loaded as a model."""
    from expunge import fake

    (folder / "prompts.txt").write_text("bomb\ncat\ndog\n")
    settings = TRAIN | {"noise": 0.5, "steps": 30, "prompts": str(folder / "prompts.txt")} | changes
    edit = distill(toy.model("v"), SiD(**settings), out=folder / "run")
    model = edit.settle(toy.model("v"))
    teacher = model.teacher
    model.become(OneStep(edit.t, teacher, lambda: fake.read(folder / "run" / CHECKPOINT, teacher)))
    return model


CONCEPT = Concept("bomb", templates=("{c}",), anchor="cat", keep=("dog",))
QUICK = TRAIN | {"steps": 2, "warmup": 100}


def run(model: Model, method: SFD) -> tuple[State, list[tuple[set[str], Tensor, Tensor]]]:
    """Return a fit's state, and of each update the figures it had, and psi and theta after it."""
    state, seen = State(0), []
    fit = method.fit(model, [CONCEPT.resolve(None)], state)
    for step in fit:
        psi, theta = (next(iter(state.objects[k].state_dict().values())) for k in ("psi", "theta"))
        seen.append((set(step.losses), psi, theta))
    return state, seen


@pytest.mark.parametrize("rank", [0, 2])
def test_the_fake_score_of_the_distillation_goes_on(tmp_path: Path, rank: int) -> None:
    """Two stages as the authors do them: psi is where the first stage left it, and learns nothing alone."""
    model = kept(tmp_path, rank=rank)
    with checkpoint.reading(tmp_path / "run" / CHECKPOINT) as part:
        left = part("fit", "psi")
    weight = left["to_mean.weight"] if not rank else product(left["to_mean.weight.down"], left["to_mean.weight.up"])
    teacher = toy.model("v").network.to_mean.weight.detach()
    wanted = weight if not rank else teacher + weight
    assert (wanted - teacher).norm() > 0.05
    for changes in ({}, {"rank": 1}):
        game = Distillation(model, State(0), SFD(**QUICK | changes))
        torch.testing.assert_close(game.psi.module.get_parameter("to_mean.weight").detach(), wanted)
        assert torch.equal(game.phi.module.get_parameter("to_mean.weight"), teacher)
        assert game.known
    seen = run(model, SFD(**QUICK))[1]
    assert [names for names, _, _ in seen] == [{"retain", "forget", "fake"}] * 2
    # so much for what is trained: nothing of the generator's start has changed
    assert model.fingerprint() == model.hash


def test_without_its_fake_score_psi_learns_alone_at_first(tmp_path: Path) -> None:
    """Then psi knows the generator before it is taught by it: of one that draws everything as another word."""
    edit = GeneratorEdit(WeightEdit({"unet.to_mean.weight": shifted()}), t=999)
    model = edit.settle(toy.model("v"))
    before = model.network.to_mean.weight.detach().clone()
    method = SFD(**QUICK)
    _, seen = run(model, method)
    assert [names for names, _, _ in seen] == [{"fake"}] * 100 + [{"retain", "forget", "fake"}] * 2
    assert all(torch.equal(theta, before) for _, _, theta in seen[:100])
    assert not torch.equal(seen[100][2], before)
    away = [(psi - before)[:, [toy.WORDS.index(w) for w in ("bomb", "dog")]].norm().item() for _, psi, _ in seen]
    assert away[0] > 1
    assert away[99] < 0.1
    # of a model that is sampled in steps, psi starts as near to the generator as it can
    assert [names for names, _, _ in run(toy.model("v"), method)[1]] == [{"retain", "forget", "fake"}] * 2


def shifted() -> Tensor:
    """The words' colours, exchanged."""
    return toy.model("v").network.to_mean.weight.detach().flip(1).clone()


def test_forgetting_counts_and_resumes_what_psi_learned_alone(tmp_path: Path) -> None:
    model = GeneratorEdit(WeightEdit({"unet.to_mean.weight": shifted()}), t=999).settle(toy.model("v"))
    method, seen = SFD(**QUICK | {"warmup": 3, "steps": 3}), list[int]()
    whole = erase(model, CONCEPT, method)
    assert whole.card is not None
    assert whole.card.steps == 6
    assert {k: len(v) for k, v in whole.card.losses.items()} == {"fake": 6, "retain": 3, "forget": 3}

    def stop(step: Step) -> None:
        seen.append(step.i)
        if step.i in (1, 4):
            raise KeyboardInterrupt

    for at in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            erase(model, CONCEPT, method, out=tmp_path, resume=at > 1, save_every=0, progress=stop)
    again = erase(model, CONCEPT, method, out=tmp_path, resume=True, progress=lambda step: seen.append(step.i))
    assert seen == [0, 1, 2, 3, 4, 5]
    assert all(torch.equal(v, whole.tensors()[k]) for k, v in again.tensors().items())


def test_another_fake_score_is_another_run(tmp_path: Path) -> None:
    model = kept(tmp_path)
    known, method = model.one_step, SFD(**QUICK)
    edit = erase(model, CONCEPT, method, out=tmp_path / "sfd")
    assert edit.card is not None
    assert len(edit.card.contents["fake score"]) == 64
    erase(model, CONCEPT, method, out=tmp_path / "sfd", resume=True)
    assert known is not None
    model.become(OneStep(known.t, known.teacher))
    with pytest.raises(BadRun, match=r"contents of fake score: \w{12} then, none now"):
        erase(model, CONCEPT, method, out=tmp_path / "sfd", resume=True)


def test_a_fake_score_of_another_model_is_refused(tmp_path: Path) -> None:
    model = kept(tmp_path)
    saved = checkpoint.load(tmp_path / "run" / CHECKPOINT)
    saved["fit"]["psi"]["conv_in.weight"] = torch.zeros(1)
    checkpoint.save(tmp_path / "run" / CHECKPOINT, saved)
    with pytest.raises(BadRun, match="fake score of another model: this one has no weight 'conv_in.weight'"):
        erase(model, CONCEPT, SFD(**QUICK))


def test_few_updates_on_a_model_that_is_sampled_in_steps_are_remarked(tmp_path: Path) -> None:
    multi = toy.model("v")
    assert "distilled as well, in 200 updates" in SFD().caution(multi)
    assert SFD(steps=2000).caution(multi) == ""
    assert SFD().caution(GeneratorEdit(WeightEdit({}), t=999).settle(multi)) == ""


def test_guidance_is_distilled_into_the_generator(tmp_path: Any) -> None:
    """Long and short guidance: without any guidance of its own it draws `mu_0 + k (mu_c - mu_0)`, the guided mean."""
    (tmp_path / "prompts.txt").write_text("dog\n")
    model = toy.model("v")
    with torch.no_grad():
        model.network.to_mean.bias.fill_(0.2)
    wanted = mean(model, "") + 2 * (mean(model, "dog") - mean(model, ""))
    assert (wanted - mean(model, "dog")).norm() > 0.3
    prompts = str(tmp_path / "prompts.txt")
    made = distill(model, SiD(**TRAIN | {"guidance": 2.0, "prompts": prompts, "noise": 0.5}))
    with made.on(model):
        torch.testing.assert_close(drawn(model, "dog"), wanted, atol=CONVERGED, rtol=0)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_concept_cannot_become_another_forgotten_one() -> None:
    concepts = [Concept("bomb", templates=("{c}",), anchor="cat", keep=("dog",)), Concept("cat", templates=("{c}",))]
    with pytest.raises(ConceptError, match="'cat' is to be forgotten and to be drawn instead"):
        erase(toy.model(), concepts, SFD(**TRAIN))
    with pytest.raises(ConceptError, match="is the concept itself"):
        erase(toy.model(), Concept("bomb", anchor="bomb", keep=("dog",)), SFD(**TRAIN))


def test_a_prompt_is_not_forgotten_and_retained(tmp_path: Path) -> None:
    """The file that a distillation was made of names everything, the concept too."""
    file = tmp_path / "prompts.txt"
    file.write_text("dog\nbomb\n")
    with pytest.raises(ConceptError, match=f"'bomb' is to be forgotten and to be retained. Take it out of {file}"):
        erase(toy.model(), Concept("bomb", templates=("{c}",), anchor="cat"), SFD(**TRAIN | {"prompts": str(file)}))


def test_something_must_be_retained() -> None:
    with pytest.raises(NeedsError, match="--set prompts=FILE"):
        erase(toy.model(), Concept("bomb"), SFD(**TRAIN))


def test_without_an_anchor_each_prompt_becomes_a_retained_one() -> None:
    from expunge.concept import Targets

    target = Targets(Concept("bomb"), ("bomb", "a bomb", "bomb, red"), ("", "a cat", ""), ("dog", "house"))
    retained, forgotten, safe = SFD().divided([target])
    assert (retained, forgotten, safe) == (["dog", "house"], ["bomb", "a bomb", "bomb, red"], ["dog", "a cat", "house"])
