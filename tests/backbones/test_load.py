"""Loading: what works, and one clear error for everything that does not."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expunge.backbones import adapt, load, not_about_a_cut, tiny
from expunge.backbones.unet import UNetModel
from expunge.errors import BadModel, Unsupported


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def test_diffusers_folder(folder: Path) -> None:
    model = load(folder)
    assert model.fingerprint() == tiny.model().hash
    assert model.generate(["a bomb"], seeds=[0], steps=2).shape == (1, 3, 16, 16)


def test_sdxl_folder(tmp_path: Path) -> None:
    """Two text encoders, pooled text and sizes: same sampler, same readers."""
    tiny.xl_pipeline().save_pretrained(tmp_path / "xl")
    model = load(tmp_path / "xl")
    assert set(model.modules()) == {"unet", "text_encoder", "text_encoder_2"}
    c = model.encode(["a bomb"])
    assert set(c.extra) == {"text_embeds", "time_ids"}
    readers = model.denoiser.text_readers(c)
    assert readers
    assert all(".attn2.to_" in name for name in readers)
    assert model.generate(["a bomb"], seeds=[0], steps=2).shape[1] == 3


@pytest.mark.parametrize("name", ["emojy", "./nowhere", "/nowhere/at/all", "nowhere.safetensors"])
def test_nothing_there(name: str) -> None:
    with pytest.raises(BadModel, match="no model at"):
        load(name)


def test_near_miss_of_a_shipped_name() -> None:
    with pytest.raises(BadModel, match="Did you mean 'emoji'"):
        load("emojy")


def test_hub_id_without_a_network() -> None:
    with pytest.raises(BadModel, match="could not be loaded"):
        load("nobody/no-such-model")


def test_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="without model_index.json"):
        load(tmp_path)


def test_another_pipeline_class(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "SomeVideoPipeline"}))
    with pytest.raises(Unsupported, match="SomeVideoPipeline"):
        load(folder)


@pytest.mark.parametrize(("index", "error"), [("{", BadModel), ("[]", Unsupported), ("\x00", BadModel)])
def test_a_broken_index(index: str, error: type[Exception], folder: Path) -> None:
    (folder / "model_index.json").write_text(index)
    with pytest.raises(error, match=str(folder)):
        load(folder)


def test_the_tiny_model_has_the_type_asked_for() -> None:
    assert {p.dtype for p in load("tiny", dtype=torch.float64).denoiser.module.parameters()} == {torch.float64}
    assert load("tiny").hash == tiny.model().hash


def test_what_decides_a_picture_beside_the_weights_is_told_apart() -> None:
    """Base pictures are kept by it: it must not depend on how diffusers came by a scheduler's settings."""
    plain = tiny.model().painter
    noted = tiny.pipeline()
    noted.scheduler = type(noted.scheduler).from_config({**noted.scheduler.config, "_diffusers_version": "0.0.1"})
    assert UNetModel(noted, "tiny").painter == plain
    other = tiny.pipeline()
    other.scheduler = type(other.scheduler).from_config(other.scheduler.config, beta_end=0.02)
    read = tiny.pipeline()
    read.tokenizer.add_tokens(["bomb"])
    assert len({plain, *(UNetModel(pipe, "tiny").painter for pipe in (other, read))}) == 3


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_truncated_weights(folder: Path, component: str) -> None:
    file = next((folder / component).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BadModel, match=f"{component}.*cut off or damaged"):
        load(folder)


def test_missing_weights(folder: Path) -> None:
    next((folder / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(BadModel, match="holds no weights"):
        load(folder)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_a_tensor(folder: Path, component: str) -> None:
    """The file is whole in itself, so diffusers only logs that it has made up the rest."""
    file = next((folder / component).glob("*.safetensors"))
    weights = load_file(file)
    lost = sorted(weights)[3]
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, file, metadata={"format": "pt"})
    for options in ({}, {"allow_pickle": True}):
        with pytest.raises(BadModel) as error:
            load(folder, **options)
        assert str(error.value) == f"{folder} lacks 1 weights of its {component} ({lost}). Copy it again."
    save_file(dict(sorted(weights.items())[:4]), file, metadata={"format": "pt"})
    with pytest.raises(
        BadModel, match=rf"lacks {len(weights) - 4} weights of its {component} \([^.]+\.[^)]+, \.\.\.\)"
    ):
        load(folder)


def test_the_second_text_encoder_lacks_a_tensor(tmp_path: Path) -> None:
    tiny.xl_pipeline().save_pretrained(tmp_path / "xl")
    file = next((tmp_path / "xl" / "text_encoder_2").glob("*.safetensors"))
    weights = load_file(file)
    del weights["text_projection.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(BadModel, match=r"lacks 1 weights of its text_encoder_2 \(text_projection.weight\)"):
        load(tmp_path / "xl")


def test_a_text_encoder_under_the_names_of_older_files(folder: Path) -> None:
    """Files of released models have a prefix that transformers has dropped since, and positions among the weights."""
    file = next((folder / "text_encoder").glob("*.safetensors"))
    old = {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    old["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(old, file, metadata={"format": "pt"})
    assert load(folder).fingerprint() == tiny.model().hash


def test_missing_component(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    with pytest.raises(BadModel, match="no folder vae"):
        load(folder)


def test_missing_tokenizer_files(folder: Path) -> None:
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(BadModel, match="tokenizer"):
        load(folder)


def test_pickle_is_refused_unless_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(BadModel, match="pickled checkpoint.*allow"):
        load(path)
    with pytest.raises(BadModel) as error:
        load(path, allow_pickle=True)
    assert "pickled checkpoint, which" not in str(error.value)


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("unet", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ],
)
def test_pickled_weights_in_a_folder_are_refused_unless_asked_for(folder: Path, component: str, name: str) -> None:
    file = next((folder / component).glob("*.safetensors"))
    pickled = folder / component / name
    torch.save(load_file(file), pickled)
    file.unlink()
    with pytest.raises(BadModel) as error:
        load(folder)
    assert str(error.value).startswith(f"{pickled} is a pickled checkpoint, which can run any code when it is read. ")
    assert "pass allow_pickle=True (--allow-pickle) if you trust its source" in str(error.value)
    model = load(folder, allow_pickle=True)
    assert (model.fingerprint(), model.painter) == (tiny.model().hash, tiny.model().painter)


def test_single_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(BadModel, match="no Stable-Diffusion checkpoint"):
        load(path)
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(BadModel, match="cut off"):
        load(path)


def test_prompt_longer_than_the_window_is_named() -> None:
    model = tiny.model(window=16)
    [(prompt, cut)] = model.clipped(["abcdefghijklmnopqrstuvwxyz", "short"])
    assert prompt.startswith("abc")
    assert cut == "opqrstuvwxyz"


def test_a_cut_prompt_is_not_logged_a_second_time() -> None:
    """`PromptCut` tells it; diffusers' own line says the same and cannot be filtered as a warning can."""
    heard: list[str] = []
    log = logging.getLogger("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    ear = logging.Handler()
    ear.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    level = log.level
    log.addHandler(ear)
    log.setLevel(logging.WARNING)
    try:
        model = tiny.model(window=16)
        log.removeFilter(not_about_a_cut)
        model.encode("abcdefghijklmnopqrstuvwxyz")
        assert len(heard) == 1
        adapt(model.pipe, "tiny", "cpu").encode("abcdefghijklmnopqrstuvwxyz")
        assert len(heard) == 1
        log.warning("The scheduler has changed")
        assert heard[1:] == ["The scheduler has changed"]
    finally:
        log.removeHandler(ear)
        log.setLevel(level)
