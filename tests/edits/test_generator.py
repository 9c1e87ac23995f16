"""The generator as an edit, as a model, and as a pipeline of diffusers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from expunge.backbones import adapt, load, tiny, toy
from expunge.concept import Concept
from expunge.door import erase
from expunge.edits import GeneratorEdit, LowRankEdit, WeightEdit, load_edit
from expunge.errors import BadEdit, BadModel, BadRun, NeedsError, Unsupported
from expunge.kernel.model import Model
from expunge.kernel.sampler import guided, one_step
from expunge.methods.esd import ESD
from expunge.methods.sfd import SFD
from expunge.methods.uce import UCE

CONCEPT = Concept("bomb", templates=("{c}",), anchor="cat", keep=("dog",))
QUICK: dict[str, Any] = {"steps": 2, "batch": 2, "lr": 1e-2, "probe": 0, "guidance": 1.0}
ASK: dict[str, Any] = {"prompts": ["a bomb", "a dog"], "seeds": [0, 1]}
ROUNDING = 1e-5  # of pictures: the same arithmetic by another road, in float32


def made(model: Model, out: Path | None = None, **changes: Any) -> GeneratorEdit:
    edit = erase(model, CONCEPT, SFD(**QUICK | changes), seed=0, out=out)
    assert isinstance(edit, GeneratorEdit)
    return edit


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a generator of the model in the folder beside it."""
    folder = tmp_path_factory.mktemp("generator")
    made(load(tiny.save(folder / "base")), folder / "run")
    return folder / "run"


# -------------------------------------------------------------------------------------------------------------- an edit


@pytest.mark.parametrize("rank", [0, 2])
def test_the_base_comes_back_and_draws_as_before(rank: int, tmp_path: Path) -> None:
    model = tiny.model()
    before, known = model.generate(**ASK), model.hash
    edit = made(model, rank=rank)
    assert isinstance(edit.weights, LowRankEdit if rank else WeightEdit)
    with edit.on(model) as generator:
        assert generator is model
        assert model.hash != known
        drawn = model.generate(**ASK)
    assert (drawn - before).abs().max() > 1e-3
    assert (model.one_step, model.hash, model.fingerprint()) == (None, known, known)
    assert torch.equal(model.generate(**ASK), before)
    edit.save(tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors")
    assert isinstance(again, GeneratorEdit)
    assert (again.t, again.card, type(again.weights)) == (edit.t, edit.card, type(edit.weights))
    with again.on(model):
        assert torch.equal(model.generate(**ASK), drawn)


@pytest.mark.parametrize("asked", [{}, {"steps": 20, "guidance": 5.0}])
def test_it_draws_by_one_call_at_its_time(asked: dict[str, Any]) -> None:
    model, times = tiny.model(), list[torch.Tensor]()
    edit = made(model)
    handle = model.denoiser.module.register_forward_pre_hook(
        lambda _m, args, _k: times.append(args[1]), with_kwargs=True
    )
    model.generate(**ASK)
    assert len(times) == model.sampling.steps
    times.clear()
    with edit.on(model):
        model.generate(**ASK, **asked)
    handle.remove()
    assert [t.unique().tolist() for t in times] == [[edit.t]]


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_pipeline_draws_what_training_saw(prediction: str) -> None:
    """The scheduler that diffusers gets and the kernel's own line are one function."""
    model = tiny.model(prediction)
    with made(model).on(model), torch.no_grad():
        assert model.one_step is not None
        c = model.encode(ASK["prompts"])
        z = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in ASK["seeds"]])
        x = one_step(model.denoiser, guided(model.denoiser, c, c, 1.0), z, model.one_step.t)
        wanted = (model.pipe.vae.decode(x / model.pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(model.generate(**ASK), wanted, atol=ROUNDING, rtol=0)


def test_edits_of_the_multi_step_model_are_refused_on_a_generator() -> None:
    model = tiny.model()
    generator, other = made(model), erase(model, CONCEPT, UCE(), seed=0)
    with generator.on(model), pytest.raises(BadEdit, match="made for 'tiny' with weights"), other.on(model):
        pass
    assert model.fingerprint() == model.hash


def test_a_generator_of_another_base_is_refused() -> None:
    edit, other = made(tiny.model()), tiny.model(seed=1)
    with pytest.raises(BadEdit, match="made for 'tiny'"), edit.on(other):
        pass
    assert other.one_step is None


def test_an_edit_of_no_updates_is_still_another_model() -> None:
    """Its weights are the base's: were the time not in the hash, their cached pictures would be mixed up."""
    model = tiny.model()
    with made(model, steps=0).on(model):
        generator = model.hash
    assert generator != model.hash


# -------------------------------------------------------------------------------------------------------------- a model


def test_a_run_is_a_model(run: Path) -> None:
    base = load(run.parent / "base")
    with load_edit(run).on(base):
        wanted, known = base.generate(**ASK), base.hash
    model = load(run)
    assert torch.equal(model.generate(**ASK), wanted)
    assert (model.name, model.hash) == (str(run), known)
    # the teacher is the base, bit for bit, though its weights have been replaced
    c, x, t = base.encode("a dog"), torch.ones(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        assert torch.equal(model.teacher(x, t, c), base.denoiser(x, t, c))
        assert not torch.equal(model.denoiser(x, t, c), base.denoiser(x, t, c))


def test_forgetting_goes_on_from_a_run(run: Path, tmp_path: Path) -> None:
    model = load(run)
    edit = made(model, tmp_path / "second", lr=1e-3)
    assert edit.card is not None
    assert edit.card.model == str(run)
    with edit.on(model):
        wanted = model.generate(**ASK)
    assert model.one_step is not None
    again = load(tmp_path / "second")
    assert torch.equal(again.generate(**ASK), wanted)
    assert again.one_step is not None
    assert again.one_step.teacher is not None
    assert model.fingerprint() == model.hash
    with pytest.raises(BadEdit, match="Load the base it was made for"), edit.on(load(run.parent / "base")):
        pass


def test_a_generator_is_refused_where_a_model_is_sampled_in_steps(run: Path, tmp_path: Path) -> None:
    with pytest.raises(NeedsError, match="esd needs a model that is sampled in steps"):
        erase(load(run), CONCEPT, ESD(steps=1), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_run_of_another_edit_is_no_model(tmp_path: Path) -> None:
    erase(tiny.model(), CONCEPT, UCE(), out=tmp_path / "run")
    with pytest.raises(BadModel, match="kind 'weights' of the model 'tiny'.*Give 'tiny'"):
        load(tmp_path / "run")


def test_a_toy_generator() -> None:
    model = toy.model("flow")
    edit = made(model)
    with edit.on(model):
        assert model.generate(["cat"], seeds=[0]).shape == (1, 3, 4, 4)
    with pytest.raises(Unsupported, match="'toy' is no diffusers pipeline"):
        edit.export(model, Path("nowhere"))
    assert not Path("nowhere").exists()


# --------------------------------------------------------------------------------------------- a pipeline of diffusers'


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers' own, of its own scheduler
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_plain_diffusers_draws_the_same(prediction: str, tmp_path: Path) -> None:
    model = tiny.model(prediction)
    edit = made(model)
    with edit.on(model):
        ours = model.generate(**ASK)
    edit.export(model, tmp_path / "pipeline")
    assert type(model.pipe.scheduler).__name__ == "DDIMScheduler"
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    z = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in ASK["seeds"]])
    ask = {"height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt"}
    theirs = pipe(ASK["prompts"], latents=z, **ask).images
    # weights that are mapped from the file lie otherwise in memory, and other kernels add them up
    torch.testing.assert_close(theirs, ours, atol=ROUNDING, rtol=0)
    assert (tiny.model(prediction).generate(**ASK) - ours).abs().max() > 1e-3


def test_sdxl(tmp_path: Path) -> None:
    model = adapt(tiny.xl_pipeline(), "xl", "cpu")
    edit = made(model, group="cross-attention")
    edit.export(model, tmp_path)
    with edit.on(model):
        torch.testing.assert_close(load(tmp_path).generate(**ASK), model.generate(**ASK), atol=0, rtol=0)


def test_an_exported_generator_knows_that_it_is_one(tmp_path: Path) -> None:
    model = tiny.model()
    edit = made(model)
    edit.export(model, tmp_path)
    with edit.on(model):
        wanted = model.generate(**ASK)
    again = load(tmp_path)
    torch.testing.assert_close(again.generate(**ASK), wanted, atol=0, rtol=0)
    with pytest.raises(NeedsError, match="is a one-step generator"):
        erase(again, CONCEPT, ESD(steps=1))
    with pytest.raises(NeedsError, match="does not say what it was distilled from"):
        erase(again, CONCEPT, SFD(**QUICK))
    with pytest.raises(BadRun, match="not empty"):
        edit.export(model, tmp_path)
    late = edit.t + 1
    for told, says in (({"time": 3}, "cannot be read"), ({"t": late}, f"has the time {late}, its scheduler 1 to")):
        (tmp_path / "one_step.json").write_text(json.dumps(told))
        with pytest.raises(BadModel, match=rf"one_step\.json {says}"):
            load(tmp_path)
