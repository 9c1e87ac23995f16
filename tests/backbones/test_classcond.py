"""Class-conditional pipelines: what they draw, what a condition is, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from expunge.backbones import load, tiny
from expunge.backbones.classcond import LABELS, ClassModel
from expunge.concept import Concept
from expunge.door import erase
from expunge.errors import BadModel, ConceptError, EmptySelection, NeedsError, Unsupported
from expunge.kernel.condition import Condition
from expunge.kernel.model import OneStep
from expunge.methods.esd import ESD
from expunge.methods.uce import UCE

PREDICTIONS = ("epsilon", "sample", "v_prediction")
SEEDS = [3, 4, 5]
# weights from a file lie at other addresses, and sums of floats then come in another order
ROUNDING = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_class_model(tmp_path / "model")


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in SEEDS]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_pictures_are_those_of_the_plain_diffusers_pipeline(prediction: str, tmp_path: Path) -> None:
    model = tiny.class_model(prediction)
    ours = model.generate(["cat", "3", "cat"], seeds=SEEDS)
    model.save(tmp_path / "model")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    how = {"batch_size": 3, "num_inference_steps": 4, "generator": generators(), "output_type": "pt"}
    theirs = pipe(class_labels=[1, 3, 1], **how).images
    assert ours.shape == (3, 3, 8, 8)
    torch.testing.assert_close(theirs.expand(-1, 3, -1, -1), ours, **ROUNDING)
    other = pipe(class_labels=[2, 3, 1], **how | {"generator": generators()}).images
    assert not torch.equal(other[0], theirs[0])


def test_an_ancestral_scheduler_draws_from_each_pictures_own_seed() -> None:
    pipe = tiny.class_pipeline("epsilon")
    pipe.scheduler = DDPMScheduler(clip_sample=True)
    model = ClassModel(pipe, "ancestral", tiny.CLASSES)
    ours = model.generate(["cat"] * 3, seeds=SEEDS, steps=3)
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 3, "generator": generators(), "output_type": "pt"}
    theirs = pipe(batch_size=3, class_labels=[1] * 3, **how).images
    assert torch.equal(ours, theirs.expand(-1, 3, -1, -1))
    torch.testing.assert_close(model.generate(["cat"], seeds=SEEDS[1:2], steps=3), ours[1:2], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own, of its scheduler
def test_a_one_step_generator_is_a_pipeline_of_its_own(tmp_path: Path) -> None:
    model = tiny.class_model()
    before, plain = model.generate(["cat"], seeds=[0]), model.hash
    model.become(OneStep(400))
    ours = model.generate(["cat"], seeds=[0], steps=7, guidance=3.0)
    assert not torch.equal(ours, before)
    assert model.hash != plain
    model.save(tmp_path / "generator")
    torch.testing.assert_close(load(tmp_path / "generator").generate(["cat"], seeds=[0]), ours, **ROUNDING)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "generator")
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(0)]
    theirs = pipe(class_labels=[1], num_inference_steps=1, generator=generator, output_type="pt").images
    torch.testing.assert_close(theirs.expand(-1, 3, -1, -1), ours, **ROUNDING)


def test_guidance_mixes_the_class_and_the_empty_prompt() -> None:
    model = tiny.class_model()
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    with torch.no_grad():
        e_c, e_0 = model.denoiser.pair(x, t, model.encode("cat"), model.encode(""))
    assert (e_c - e_0).abs().max() > 1e-4
    plain, guided = (model.generate(["cat"], seeds=[0], guidance=g) for g in (1.0, 3.0))
    assert not torch.equal(plain, guided)
    against = model.generate(["cat"], seeds=[0], guidance=3.0, negative="dog")
    assert not torch.equal(guided, against)


def test_conditions_mix_join_and_gather() -> None:
    """A mixed condition has the mixed embedding, and what is trained reaches conditions made before."""
    model = tiny.class_model()
    cat, dog = model.encode(["cat", "dog"]).tokens
    assert cat.shape == (1, 6)
    embedding = model.pipe.unet.class_embedding
    alone = embedding(torch.tensor([1, 2]))
    assert not torch.equal(alone[0], alone[1])
    torch.testing.assert_close(embedding(0.25 * cat + 0.75 * dog)[0], 0.25 * alone[0] + 0.75 * alone[1])
    both = Condition.cat([model.encode("cat"), model.encode("dog")])[torch.tensor([1, 0, 1])]
    assert both.tokens[:, 0].argmax(1).tolist() == [2, 1, 2]
    student = model.denoiser.unlock("class-embedding")
    x, t = torch.zeros(1, 1, 8, 8), torch.tensor([500])
    model.denoiser(x, t, model.encode("cat")).sum().backward()
    grad = student.weights["class_embedding.weight"].grad
    assert grad is not None
    assert grad.abs().sum(1).nonzero().flatten().tolist() == [1]
    model.lock()


def test_groups_are_parts_of_the_network() -> None:
    denoiser = tiny.class_model().denoiser
    everything = denoiser.names("all")
    for group in ("class-embedding", "conditioning", "self-attention"):
        assert 0 < len(denoiser.names(group)) < len(everything)
    with pytest.raises(EmptySelection, match="Groups here: all, class-embedding, conditioning, self-attention"):
        denoiser.names("cross-attention")


def test_no_layer_reads_a_text() -> None:
    model = tiny.class_model()
    with pytest.raises(EmptySelection, match="no layer of UNet2DModel"):
        model.denoiser.text_readers(model.encode("cat"))
    with pytest.raises(NeedsError, match="uce needs a model that reads text"):
        erase(model, Concept("cat", kind="class"), UCE(), seed=0)


def test_the_folder_comes_back_whole(folder: Path) -> None:
    model = load(folder)
    assert model.hash == tiny.class_model().hash
    assert model.world is not None
    assert (model.world.name, model.world.objects) == ("tiny-classes", tiny.CLASSES.classes)
    assert (model.sampling.steps, model.sampling.guidance, model.sampling.size) == (4, 1.0, 8)
    ours = tiny.class_model().generate(["dog"], seeds=[1])
    torch.testing.assert_close(model.generate(["dog"], seeds=[1]), ours, **ROUNDING)


def test_without_labels_classes_are_numbers_and_there_is_no_empty_prompt(folder: Path) -> None:
    (folder / LABELS).unlink()
    model = load(folder)
    assert model.world is not None
    assert model.world.objects == tuple("012345")
    assert model.encode(["5"]).tokens[0, 0].argmax() == 5
    with pytest.raises(Unsupported, match="without label dropout"):
        model.encode("")


def test_other_containers_of_such_a_network(tmp_path: Path) -> None:
    pipe = tiny.class_pipeline()
    DDPMPipeline(pipe.unet, DDPMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path / "model")
    assert load(tmp_path / "model").generate(["2"], seeds=[0], steps=2).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("prompt", ["sparrow", "6", "-1", "a cat", " "])
def test_unknown_classes_are_refused(prompt: str) -> None:
    with pytest.raises(ConceptError, match=r"is no class .* 0 bomb, 1 cat, 2 dog, 3 house, 4 dagger"):
        tiny.class_model().encode(prompt)


@pytest.mark.parametrize(
    ("concept", "says"),
    [
        (Concept("sparrow", kind="class"), "sparrow"),
        (Concept("7", kind="class"), "'7'"),
        (Concept("cat", kind="class", anchor="sparrow"), "sparrow"),
        (Concept("cat", kind="class", anchor="1"), "is the concept itself"),
        (Concept("cat", kind="class", templates=("a {c}",)), "a cat"),
        (Concept("cat", kind="class", synonyms=("kitten",)), "kitten"),
        (Concept("cat", kind="class", keep=("9",)), "'9'"),
    ],
)
def test_concepts_that_it_cannot_have_are_refused_before_any_work(concept: Concept, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConceptError, match=says):
        erase(tiny.class_model(), concept, ESD(group="all", steps=1), seed=0, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_class_by_its_number_is_recorded_by_its_name() -> None:
    method = ESD(group="all", steps=1, batch=2, rollouts=1, sampling_steps=2)
    by_number, by_name = (erase(tiny.class_model(), Concept(n, kind="class"), method, seed=0) for n in ("1", "CAT"))
    assert by_number.card is not None
    assert by_number.card.concept["name"] == "cat"
    assert all(torch.equal(v, by_name.tensors()[k]) for k, v in by_number.tensors().items())


def unet(**options: object) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8, in_channels=1, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), norm_num_groups=4, layers_per_block=1, **{"out_channels": 1} | options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("network", "says"),
    [
        ({}, "no table of classes"),
        ({"class_embed_type": "timestep"}, "timestep"),
        ({"num_class_embeds": 3, "out_channels": 2}, "from 1 to 2 channels"),
    ],
)
def test_networks_that_draw_no_classes_are_refused(network: dict[str, object], says: str, tmp_path: Path) -> None:
    DDPMPipeline(unet(**network), DDPMScheduler()).save_pretrained(tmp_path / "model")
    with pytest.raises(Unsupported, match=says):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        (json.dumps({"classes": ["a"]}), "world"),
        (json.dumps({"world": "w", "classes": ["a", "b"]}), "names 2 classes, the network has 6"),
        (json.dumps({"world": "w", "classes": list("abcde"), "size": 3}), "size"),
        (json.dumps(["w"]), "world"),
        (json.dumps({"world": "w", "classes": "abcde"}), "classes=abcde of Labels is refused"),
        (json.dumps({"world": "w", "classes": [1, 2, 3, 4, 5]}), "classes=.* is refused"),
        (json.dumps({"world": "w", "classes": list("abcda")}), "names a class twice"),
        (json.dumps({"world": "w", "classes": list("abcde"), "steps": 0}), "steps=0 of Labels is refused"),
    ],
)
def test_broken_labels(text: str, says: str, folder: Path) -> None:
    (folder / LABELS).write_text(text)
    with pytest.raises(BadModel, match=says):
        load(folder)


def test_a_folder_without_its_weights(folder: Path) -> None:
    next(folder.glob("unet/*.safetensors")).unlink()
    with pytest.raises(BadModel, match="holds no weights"):
        load(folder)


def test_unpaired_prompts_and_seeds() -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        tiny.class_model().generate(["cat", "dog"], seeds=[0])


def test_latents_are_the_pictures() -> None:
    model = tiny.class_model()
    images = torch.rand(2, 1, 8, 8).expand(-1, 3, -1, -1)
    assert torch.allclose(model.latents(images), images[:, :1] * 2 - 1, atol=1e-6)
    assert model.clipped(["cat"]) == []
