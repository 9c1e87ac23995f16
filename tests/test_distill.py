"""Distillation: resumes bit for bit, notices a collapse, says what is missing; its command; what the watch sees."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge import checkpoint, cli, prompts
from expunge.backbones import load, tiny, toy
from expunge.concept import Concept, World
from expunge.distill import SiD, distill, estimate
from expunge.door import erase
from expunge.edits import GeneratorEdit, load_edit
from expunge.errors import BadRun, Diverged, NeedsError, SettingError, Unsupported
from expunge.kernel.identity import Distillation, Distilling
from expunge.kernel.model import Model
from expunge.kernel.state import Probe, State, Step
from expunge.kernel.watch import (
    NOISES,
    PROMPTS,
    SAMPLES,
    Watch,
    energy_distance,
    recognised,
    repeated,
    spaced,
    spread,
    spread_within,
)
from expunge.methods.sfd import SFD
from expunge.records import CARD, CHECKPOINT, EDIT, Run, Score
from expunge.snapshot import snapshot

WORDS = "a cat\na dog\na house\na bomb\n"


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None]:
    """A sum's order depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of prompts; the teacher of what is distilled on it draws in a moment."""
    monkeypatch.setattr("expunge.kernel.watch.STEPS", 2)
    path = tmp_path / "prompts.txt"
    path.write_text(WORDS)
    return str(path)


def quick(words: str, **changes: Any) -> SiD:
    return SiD(**{"steps": 4, "batch": 2, "lr": 1e-3, "probe": 2, "prompts": words} | changes)


def same(a: GeneratorEdit, b: GeneratorEdit) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def stop_at(i: int, seen: list[Step]) -> Any:
    def progress(step: Step) -> None:
        seen.append(step)
        if step.i == i:
            raise KeyboardInterrupt

    return progress


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("rank", [0, 2])
def test_resumes_bit_for_bit(words: str, tmp_path: Path, rank: int) -> None:
    model, method = tiny.model(), quick(words, rank=rank, group="cross-attention")
    undisturbed, seen = distill(model, method, seed=3), list[Step]()
    with pytest.raises(KeyboardInterrupt):
        distill(model, method, seed=3, out=tmp_path / "run", save_every=0, progress=stop_at(1, seen))
    with pytest.raises(BadRun, match="seed: 3 then, 4 now"):
        distill(model, method, seed=4, out=tmp_path / "run", resume=True)
    edit = distill(model, method, seed=3, out=tmp_path / "run", resume=True, progress=stop_at(-1, seen))
    assert [step.i for step in seen] == [0, 1, 2, 3]
    assert same(edit, undisturbed)
    assert undisturbed.card is not None
    card = Run.open(tmp_path / "run").card
    assert (card.method, card.kind, card.concepts, card.steps) == ("sid", "generator", [], 4)
    assert card.losses == undisturbed.card.losses
    looks = {"distance": 2, "variety": 2, "recognised": 2}
    assert {k: len(v) for k, v in card.losses.items()} == {"identity": 4, "fake": 4, **looks}
    # a finished run is given back
    assert same(distill(model, method, seed=3, out=tmp_path / "run", resume=True), edit)
    assert not same(distill(model, method, seed=4), edit)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_finished_run_goes_on_bit_for_bit(words: str, tmp_path: Path, rank: int) -> None:
    """Three updates, then six: six at once. Also where the rest is interrupted, and looked at meanwhile."""
    model, out, seen = tiny.model(), tmp_path / "run", list[Step]()
    settings: dict[str, Any] = {"rank": rank, "group": "cross-attention"}
    whole = distill(model, quick(words, steps=6, **settings), seed=3)
    first = distill(model, quick(words, steps=3, **settings), seed=3, out=out)
    assert not same(first, whole)
    assert sorted(p.name for p in out.iterdir()) == [CARD, EDIT, CHECKPOINT]
    more, options = quick(words, steps=6, **settings), {"seed": 3, "out": out, "save_every": 0}
    with pytest.raises(BadRun, match=r"Add --resume and more steps \(--set steps=\.\.\.\)"):
        distill(model, more, **options)
    with pytest.raises(KeyboardInterrupt):
        distill(model, more, resume=True, progress=stop_at(4, seen), **options)
    # until the rest is done the folder is the finished run that it was
    assert same(distill(model, quick(words, steps=3, **settings), resume=True, **options), first)
    with pytest.raises(BadRun, match="setting steps: 6 then, 5 now"):
        distill(model, quick(words, steps=5, **settings), resume=True, **options)
    edit = distill(model, more, resume=True, progress=stop_at(-1, seen), **options)
    assert [step.i for step in seen] == [3, 4, 5]
    assert same(edit, whole)
    read = load_edit(out)
    assert isinstance(read, GeneratorEdit)
    assert same(read, whole)
    assert whole.card is not None
    card = Run.open(out).card
    assert (card.status, card.steps, card.settings["steps"]) == ("complete", 6, 6)
    assert all(card.losses[k] == whole.card.losses[k] for k in ("identity", "fake"))


def test_an_interrupted_run_may_be_asked_for_more(words: str, tmp_path: Path) -> None:
    model, out = tiny.model(), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        distill(model, quick(words), out=out, save_every=0, progress=stop_at(1, []))
    with pytest.raises(BadRun, match="It differs in setting lr: 0.001 then, 0.002 now.$"):
        distill(model, quick(words, steps=6, lr=2e-3), out=out, resume=True)
    edit = distill(model, quick(words, steps=6), out=out, resume=True)
    assert same(edit, distill(model, quick(words, steps=6)))


def test_a_run_that_goes_on_takes_what_was_said_of_the_former_generator_with_it(words: str, tmp_path: Path) -> None:
    model, out = tiny.model(), tmp_path / "run"
    distill(model, quick(words, steps=1), out=out)
    run = Run(out)
    run.write_scores([Score(protocol="p", metric="ira", value=0.1)])
    run.write_outcomes([{}])
    run.write_samples([{}])
    distill(model, quick(words, steps=1), out=out, resume=True)
    assert (len(run.scores), len(run.outcomes), len(run.samples)) == (1, 1, 1)
    distill(model, quick(words, steps=2), out=out, resume=True)
    assert (run.scores, run.outcomes, run.samples) == ([], [], [])


def test_what_going_on_needs_can_be_left_out(words: str, tmp_path: Path) -> None:
    model, out = tiny.model(), tmp_path / "run"
    distill(model, quick(words, steps=1), out=out, keep_state=False)
    assert sorted(p.name for p in out.iterdir()) == [CARD, EDIT]
    with pytest.raises(BadRun, match=r"finished with steps=1, .* go on to 2 was not kept .* keep_state=True"):
        distill(model, quick(words, steps=2), out=out, resume=True)


def test_a_divergence_leaves_the_finished_run_what_it_was(words: str, tmp_path: Path) -> None:
    model, out = tiny.model(), tmp_path / "run"
    first = distill(model, quick(words, steps=2, probe=0), out=out)
    edit = load_edit(out)
    saved = checkpoint.load(out / CHECKPOINT)
    saved["fit"]["theta"] = {k: v * float("nan") for k, v in saved["fit"]["theta"].items()}
    checkpoint.save(out / CHECKPOINT, saved)
    with pytest.raises(Diverged, match=rf"The edit in {out} is that of fewer steps, as before\."):
        distill(model, quick(words, steps=4, probe=0), out=out, resume=True)
    assert Run.open(out).card == first.card == edit.card
    assert same(distill(model, quick(words, steps=2, probe=0), out=out, resume=True), first)


def test_only_the_group_is_trained_and_the_average_is_the_result(words: str) -> None:
    model = tiny.model()
    before = {f"unet.{n}": p.detach().clone() for n, p in model.denoiser.module.named_parameters()}
    moved = {}
    for decay in (0.0, 0.9):
        values = distill(model, quick(words, steps=1, decay=decay, group="text-readers", probe=0)).tensors()
        values.pop("t")
        assert {k.partition(".")[2] for k in values} == set(model.denoiser.names("text-readers"))
        moved[decay] = torch.cat([(v - before[k]).flatten() for k, v in values.items()])
    assert moved[0.0].norm() > 1e-3
    # the first decay of the warm-up
    torch.testing.assert_close(moved[0.9], 0.9 * moved[0.0], atol=1e-6, rtol=0)


def test_bf16_is_asked_for_and_refused_where_there_is_none(words: str, tmp_path: Path) -> None:
    """Scores are compared in float32, as published, unless somebody says otherwise."""
    game = Distillation(toy.model(), State(0), SiD())
    with game.arithmetic():
        assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(Unsupported, match=r"precision=bf16 is for CUDA .* the model is on cpu. Leave it at fp32"):
        distill(tiny.model(), quick(words, precision="bf16"), out=tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    with pytest.raises(SettingError, match="precision=fp16"):
        distill(tiny.model(), quick(words, precision="fp16"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_precision_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """On a device that has bf16, which the CPU is taken for here."""
    monkeypatch.setattr("expunge.kernel.identity.bf16_on", lambda _: True)
    model, seen = toy.model(), set()
    model.network.to_mean.register_forward_hook(lambda _m, _a, out: seen.add(out.dtype))
    game = Distillation(model, State(0), SiD(**{"precision": precision}))
    for clone in (game.theta, game.psi):
        clone.module.get_submodule("to_mean").register_forward_hook(lambda _m, _a, out: seen.add(out.dtype))
    c = model.encode(["cat"] * 2)
    assert game.fake_loss(c).dtype == game.generator_loss(c, c).dtype == torch.float32
    assert seen == {torch.float32 if precision == "fp32" else torch.bfloat16}


def test_a_judge_sees_the_generator_and_can_end_the_fit(words: str) -> None:
    """A probe of the door looks at the model: a method that trains a copy puts it in."""
    model, seen = tiny.model(), []

    def measure(shown: Model) -> float:
        seen.append((shown.one_step is not None, shown.fingerprint()))
        return 1.0 if len(seen) < 2 else 0.0

    edit = erase(model, (), quick(words, probe=0, steps=9), probe=Probe(measure, until=0.5, every=1))
    assert edit.card is not None
    assert edit.card.steps == 2
    assert [one_step for one_step, _ in seen] == [True, True]
    assert len({fingerprint for _, fingerprint in seen} | {model.hash}) == 3


# ------------------------------------------------------------------------------------------------------------- refusals


def test_refuses_before_any_work(words: str, tmp_path: Path) -> None:
    out, empty = tmp_path / "run", tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(NeedsError, match="what 'tiny' can draw is not known.*--set prompts=FILE"):
        distill(tiny.model(), out=out)
    with pytest.raises(SettingError, match="cannot be read"):
        distill(tiny.model(), quick(str(tmp_path / "none.txt")), out=out)
    with pytest.raises(SettingError, match="are empty"):
        distill(tiny.model(), quick(str(empty)), out=out)
    with pytest.raises(SettingError, match="batch=0"):
        distill(tiny.model(), quick(words, batch=0), out=out)
    assert not out.exists()
    model = distill(tiny.model(), quick(words, steps=0)).settle(tiny.model())
    with pytest.raises(NeedsError, match="sid needs a model that is sampled in steps"):
        distill(model, quick(words), out=out)
    assert not out.exists()


def test_a_world_is_told_in_all_its_prompts() -> None:
    world = World("w", ("bomb", "cat"), ("flat", "round"), {}, ("{c}", "a {x} {c}"), ("{c}",))
    assert prompts.known(world) == ("bomb", "a flat bomb", "a round bomb", "cat", "a flat cat", "a round cat")
    model = toy.model()
    model.world = world
    assert SiD().told(model) == prompts.known(world)


# ------------------------------------------------------------------------------------------------------------ the watch


def test_a_collapse_stops_and_the_last_good_state_stays(words: str, tmp_path: Path) -> None:
    model = tiny.model()
    fingerprint = model.fingerprint()
    wild = quick(words, lr=1.0, steps=50, decay=0.0, probe=1)
    with pytest.raises(Diverged, match=r"has collapsed: .* at step .*lies in .*state\.safetensors") as caught:
        distill(model, wild, out=tmp_path / "run", save_every=0)
    assert model.fingerprint() == fingerprint
    run = Run.open(tmp_path / "run")
    assert run.card.status == f"diverged at step {caught.value.step}"
    saved = checkpoint.load(tmp_path / "run" / CHECKPOINT)
    assert saved["done"] <= caught.value.step
    assert checkpoint.finite(saved)
    assert not (tmp_path / "run" / "edit.safetensors").exists()


@pytest.mark.parametrize("factor", [0.0, 1e-3, 1e3, float("nan")])
def test_no_collapsed_generator_is_kept(factor: float) -> None:
    model, state = toy.model("v"), State(0)
    game = Distillation(model, state, Distilling(group="cross-attention"))
    c = model.encode(spaced(["cat", "dog", "bomb", "house"]))
    factors = [1.0]
    weights = game.generator.weights
    watch = Watch(game, state, lambda: {k: v.detach() * factors[0] for k, v in weights.items()}, {"all": (c, None)}, 1)
    state.keep("watch", watch)
    assert state.state_dict()["watch"] == {}
    figures = watch.look(0, 5)
    assert figures["all"] == 1.0
    assert 0 < figures["variety"] < 1
    # of its Gaussians the generator has the means, and hardly any of the spread
    assert 0 <= figures["distance"] < 0.1
    factors[0] = factor
    for look in (lambda: watch.look(0, 5), state.state_dict):
        with pytest.raises(Diverged, match="has collapsed"):
            look()


def test_one_picture_a_prompt_is_a_collapse_though_prompts_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a prompt's samples have in common stays, so that samples of different prompts differ as before."""
    model, state = toy.model("v"), State(0)
    game = Distillation(model, state, Distilling(group="cross-attention"))
    c = model.encode(spaced(["cat", "dog", "bomb", "house"]))
    weights = game.generator.weights
    watch = Watch(game, state, lambda: {k: v.detach() for k, v in weights.items()}, {"all": (c, None)}, 1)
    watch.look(0, 5)
    drawn = watch.drawn
    # the mean over the noise is what the generator makes of none
    monkeypatch.setattr(watch, "drawn", lambda c, z, w: drawn(c, torch.zeros_like(z), w))
    x = watch.samples("all", watch.weights())
    assert watch.least <= spread(x) <= watch.most
    assert energy_distance(x, watch.truth) <= watch.far
    assert spread(x[:8]) < 1e-6
    for look in (lambda: watch.look(0, 5), watch.state_dict):
        with pytest.raises(Diverged, match=r"those of one prompt by 0 \(from "):
            look()


def test_the_spread_within_prompts_is_the_mean_of_their_spreads() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(PROMPTS, NOISES, 3, generator=g)
    apart = x + 1e3 * torch.randn(PROMPTS, 1, 3, generator=g)
    wanted = sum(spread(p) for p in x) / PROMPTS
    assert spread(apart.flatten(0, 1)) > 100 * wanted
    assert spread_within(apart.flatten(0, 1)) == pytest.approx(wanted, rel=1e-3)
    # one prompt that hardly varies, of many that do, is not the end of a run
    x[0] *= 0
    assert 0 < spread_within(x.flatten(0, 1)) < wanted
    c = toy.model().encode(spaced(["cat", "dog", "bomb", "house"]))
    assert [len(repeated(c)), len({tuple(t.flatten().tolist()) for t in repeated(c).tokens})] == [PROMPTS * NOISES, 4]
    assert all(torch.equal(t, group[0]) for group in repeated(c).tokens.split(NOISES) for t in group)


def test_the_energy_distance_is_zero_for_one_distribution_and_one_for_two_points() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 400, 3, generator=g).unbind()
    assert abs(energy_distance(a, b)) < 0.01
    assert 0.05 < energy_distance(a, b + 1) < energy_distance(a, b + 3) < energy_distance(a, b + 1e4)
    assert energy_distance(a, b + 1e4) == pytest.approx(1, abs=1e-3)
    assert spread(2 * a) == pytest.approx(2 * spread(a))


def test_the_teacher_tells_its_own_samples_from_others() -> None:
    model, g = toy.model("eps"), torch.Generator().manual_seed(0)
    cat, dog = (model.encode([word] * SAMPLES) for word in ("cat", "dog"))
    pictures = model.generate(["cat"] * SAMPLES, seeds=range(SAMPLES))
    x, eps = pictures * 2 - 1, torch.randn(pictures.shape, generator=g)
    assert recognised(model.denoiser, x, cat, dog, eps) == 1
    assert recognised(model.denoiser, x, dog, cat, eps) == 0
    assert recognised(model.denoiser, x, dog, dog, eps) == 0.5


# ------------------------------------------------------------------------------------------------------- a look midway


@pytest.mark.parametrize("rank", [0, 2])
def test_a_snapshot_is_the_run_of_so_many_updates(words: str, tmp_path: Path, rank: int) -> None:
    model, run, out = tiny.model(), tmp_path / "run", tmp_path / "look"
    method = quick(words, rank=rank, group="cross-attention", steps=6)
    with pytest.raises(KeyboardInterrupt):
        distill(model, method, seed=3, out=run, save_every=0, progress=stop_at(3, []))
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    # the fourth update's checkpoint came before the interruption
    edit = snapshot(run, out)
    wanted = distill(model, replace(method, steps=4), seed=3)
    assert same(edit, wanted)
    assert wanted.card is not None
    card = Run.open(out).card
    told = ("method", "settings", "steps", "status", "kind", "base_hash", "seed", "samples_seen", "model")
    assert {k: getattr(card, k) for k in told} == {k: getattr(wanted.card, k) for k in told}
    assert all(card.losses[k] == wanted.card.losses[k] for k in ("identity", "fake"))
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    assert sorted(p.name for p in out.iterdir()) == [CARD, EDIT]
    drawn = load(out).generate(["a cat"], seeds=[0])
    with wanted.on(model):
        assert torch.equal(model.generate(["a cat"], seeds=[0]), drawn)
    with pytest.raises(BadRun, match="is not empty"):
        snapshot(run, out)


def test_a_snapshot_of_a_forgetting_does_not_count_what_psi_learned_alone(tmp_path: Path) -> None:
    base, run, concept = (
        tmp_path / "base",
        tmp_path / "run",
        Concept("bomb", templates=("{c}",), anchor="cat", keep=("dog",)),
    )
    settings: dict[str, Any] = {"steps": 3, "batch": 2, "probe": 0, "guidance": 1.0, "warmup": 2}
    erase(tiny.model(), concept, SFD(**settings), out=base)
    with pytest.raises(KeyboardInterrupt):
        erase(load(base), concept, SFD(**settings), out=run, save_every=0, progress=stop_at(3, []))
    edit = snapshot(run, tmp_path / "look")
    wanted = erase(load(base), concept, SFD(**settings | {"steps": 2}))
    assert isinstance(wanted, GeneratorEdit)
    assert same(edit, wanted)
    assert edit.card is not None
    assert (edit.card.steps, edit.card.settings["steps"]) == (4, 2)


def test_a_snapshot_needs_a_generator(words: str, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "look"
    with pytest.raises(BadRun, match=rf"holds no state to take a generator from: {CHECKPOINT} is missing"):
        snapshot(run, out)
    with pytest.raises(KeyboardInterrupt):
        distill(tiny.model(), quick(words, probe=0), out=run, save_every=1e9, progress=stop_at(0, []))
    with pytest.raises(BadRun, match="holds no generator yet: .* Wait"):
        snapshot(run, out)
    saved = checkpoint.load(run / CHECKPOINT)
    saved["request"]["method"] = "esd"
    checkpoint.save(run / CHECKPOINT, saved)
    with pytest.raises(BadRun, match="is a run of 'esd', which makes no generator"):
        snapshot(run, out)
    assert not out.exists()


def test_a_run_that_is_a_model_has_the_fake_score_that_it_kept(words: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    distill(tiny.model(), quick(words, group="cross-attention"), out=run)
    model = load(run)
    assert model.one_step is not None
    assert model.one_step.fake is not None
    with checkpoint.reading(run / CHECKPOINT) as part:
        left = part("fit", "psi")
    found = model.one_step.fake()
    assert found.keys() == left.keys()
    assert all(torch.equal(found[k], left[k]) for k in left)
    # the fake score of a second distillation is known only beside that of the first
    concept, settings = (
        Concept("bomb", templates=("{c}",), anchor="cat", keep=("dog",)),
        {"steps": 1, "batch": 2, "probe": 0},
    )
    erase(model, concept, SFD(**settings), out=tmp_path / "second", keep_state=True)
    second = load(tmp_path / "second")
    assert second.one_step is not None
    assert second.one_step.fake is None
    (run / CHECKPOINT).unlink()
    model = load(run)
    assert model.one_step is not None
    assert model.one_step.fake is None


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command(capsys: pytest.CaptureFixture[str], words: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["-s", f"prompts={words}", "-s", "steps=4", "-s", "batch=2", "-s", "probe=2"]
    assert cli.main(["distill", "tiny", "--out", str(out), *settings]) == 0
    found = capsys.readouterr()
    assert found.out == f"Run: {out}\n"
    assert "distil   4 prompts, guidance 3\n" in found.err
    assert "cost     4 updates of 18 forward passes of 2 samples: about 0:00:0" in found.err
    assert "update 2: distance " in found.err
    assert "update 4: distance " in found.err
    edit = load_edit(out)
    assert isinstance(edit, GeneratorEdit)
    assert load(out).one_step is not None
    assert cli.main(["distill", "tiny", "--out", str(out), *settings]) == 2
    assert "not empty" in capsys.readouterr().err
    assert cli.main(["generate", str(out), "--prompt", "a cat", "--seeds", "0-1", "--out", str(tmp_path / "p")]) == 0


def test_the_command_goes_on_and_looks_midway(capsys: pytest.CaptureFixture[str], words: str, tmp_path: Path) -> None:
    out, look = tmp_path / "run", tmp_path / "look"
    command = ["distill", "tiny", "--out", str(out), "-s", f"prompts={words}", "-s", "batch=2", "-s", "probe=0"]
    assert cli.main([*command, "-s", "steps=1"]) == 0
    assert (out / CHECKPOINT).exists()
    assert cli.main([*command, "-s", "steps=3", "--resume", "--no-keep-state"]) == 0
    found = capsys.readouterr().err
    assert "cost     2 updates of" in found
    assert not (out / CHECKPOINT).exists()
    assert Run.open(out).card.steps == 3
    assert cli.main([*command, "-s", "steps=4", "--resume"]) == 2
    assert "--keep-state" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        distill(
            tiny.model(), quick(words, probe=0), out=tmp_path / "half", save_every=0, progress=stop_at(1, [])
        )  # fmt: skip
    assert cli.main(["distill", str(tmp_path / "half"), "--snapshot", "--out", str(look)]) == 0
    found = capsys.readouterr()
    assert f"The generator of {tmp_path / 'half'} after 2 updates." in found.err
    assert found.out == f"Run: {look}\n"
    assert load(look).one_step is not None
    assert cli.main(["distill", str(tmp_path / "half"), "--snapshot", "-s", "steps=3", "--out", str(look)]) == 2
    assert "Leave out --set" in capsys.readouterr().err


def test_forgetting_in_one_stage_says_how_long_it_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["erase", "tiny", "--concept", "bomb", "--anchor", "cat", "--keep", "dog", "--method", "sfd"]
    quickly = [*command, "-s", "batch=2", "-s", "probe=0", "-s", "guidance=1", "-s", "steps=1"]
    assert cli.main([*quickly, "--keep-state", "--out", str(tmp_path / "run")]) == 0
    assert "note     a one-step generator is distilled as well, in 1 updates" in capsys.readouterr().err
    assert (tmp_path / "run" / CHECKPOINT).exists()
    quickly[1] = str(tmp_path / "run")
    assert cli.main([*quickly, "--out", str(tmp_path / "second")]) == 0
    assert "note" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--set prompts=FILE"),
        (["--set", "stepz=3"], "unknown setting 'stepz' of SiD.*Did you mean 'steps'"),
        (["--recipe", "recipes/esd.toml"], "is a recipe of 'esd'"),
        (["--device", "gpu"], "unknown device 'gpu'"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str) -> None:
    import re

    given = [a.replace("recipes/", f"{Path(__file__).parents[1] / 'recipes'}/") for a in arguments]
    assert cli.main(["distill", "tiny", *given, "--out", str(tmp_path / "run")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_the_estimate_grows_with_what_there_is_to_do(words: str) -> None:
    assert (SiD().passes(1.0), SiD().passes(5.0)) == (11, 18)
    model = tiny.model()
    assert estimate(model, quick(words, steps=100_000)) > estimate(model, quick(words, steps=10)) > 0
    assert estimate(model, quick(words, steps=10), done=10) == 0
