"""Loading the CLIP towers that lie beside a pipeline, on tiny untrained ones."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from expunge.backbones import tiny
from expunge.judges.clip import load_clip

WINDOW, WIDTH = 16, 12


@pytest.fixture
def folder(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                image_size=32,
                patch_size=16,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                projection_dim=WIDTH,
            )
        )
        text = CLIPTextModel(tiny.text_config(WINDOW))
        weight = torch.randn(WIDTH, text.config.hidden_size)
    vision.save_pretrained(tmp_path / "clip")
    text.save_pretrained(tmp_path / "text_encoder")
    tiny.tokenizer(WINDOW).save_pretrained(tmp_path / "tokenizer")
    save_file({"weight": weight}, tmp_path / "clip/text_projection.safetensors")
    return tmp_path


def test_pictures_and_prompts_become_unit_vectors_of_one_space(folder):
    clip = load_clip(folder)
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images, texts = clip.images(x), clip.texts(["bomb", "a cake", "bomb"])
    assert images.shape == texts.shape == (3, WIDTH)
    assert torch.allclose(images.norm(dim=1), torch.ones(3))
    assert torch.allclose(texts.norm(dim=1), torch.ones(3))
    assert torch.equal(texts[0], texts[2])
    assert not torch.allclose(texts[0], texts[1])
    assert not torch.allclose(images[0], images[1])


def test_the_hash_is_of_both_towers(folder):
    before = load_clip(folder).hash
    assert load_clip(folder).hash == before
    for name in ("clip/text_projection.safetensors", "text_encoder/model.safetensors"):
        path = folder / name
        whole = load_file(path)
        save_file({k: v + 1 if k == sorted(whole)[0] else v for k, v in whole.items()}, path)
        assert load_clip(folder).hash != before
        before = load_clip(folder).hash


def test_parity_with_the_models_themselves(folder):
    clip = load_clip(folder)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = clip.vision(pixel_values=(x - 0.5) / 0.5).image_embeds
    assert torch.allclose(clip.images(x), raw / raw.norm(dim=1, keepdim=True), atol=1e-6)


def test_pictures_of_another_size_are_resized(folder):
    clip = load_clip(folder)
    grey = torch.full((1, 3, 64, 64), 0.25)
    assert torch.allclose(clip.images(grey), clip.images(grey[..., :32, :32]), atol=1e-5)
