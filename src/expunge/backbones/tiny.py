"""A tiny random Stable-Diffusion-type pipeline, built from configs in a moment: for tests, examples and first tries."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ConsistencyModelPipeline,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..kernel.model import Sampling
from . import quiet
from .classcond import ClassModel, Labels
from .unet import UNetModel

SAMPLING = Sampling(steps=4, guidance=3.0, size=16)


def tokenizer(window: int = 16) -> CLIPTokenizer:
    """Return a byte-level CLIP tokenizer: every character is a token."""
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))] + [
        chr(256 + i) for i in range(68)
    ]
    vocabulary = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[], model_max_length=window)


def text_config(window: int) -> CLIPTextConfig:
    """Return the configuration of a text encoder 16 wide."""
    end = len(tokenizer(window)) - 1
    return CLIPTextConfig(
        vocab_size=end + 1, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2,
        max_position_embeddings=window, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end, projection_dim=16,
    )  # fmt: skip


def autoencoder() -> AutoencoderKL:
    """Return an untrained autoencoder, 16x16 pictures to 8x8 latents."""
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip


def denoiser(**options: object) -> UNet2DConditionModel:
    """Return an untrained U-Net of 0.1 M parameters."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, norm_num_groups=8, **options,
    )  # fmt: skip


def scheduler(prediction: str) -> DDIMScheduler:
    """Return Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction, timestep_spacing="trailing",
    )  # fmt: skip


def pipeline(prediction: str = "v_prediction", seed: int = 0, window: int = 16) -> StableDiffusionPipeline:
    """Return an untrained Stable-Diffusion-type pipeline."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        return StableDiffusionPipeline(
            unet=denoiser(cross_attention_dim=16).eval(), vae=autoencoder().eval(), tokenizer=tokenizer(window),
            text_encoder=CLIPTextModel(text_config(window)).eval(), scheduler=scheduler(prediction),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


def xl_pipeline(seed: int = 0, window: int = 16) -> StableDiffusionXLPipeline:
    """Return an untrained pipeline with two text encoders and SDXL's size conditions."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        unet = denoiser(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=40,
        )
        config = text_config(window)
        return StableDiffusionXLPipeline(
            unet=unet.eval(), vae=autoencoder().eval(), tokenizer=tokenizer(window), tokenizer_2=tokenizer(window),
            text_encoder=CLIPTextModel(config).eval(), text_encoder_2=CLIPTextModelWithProjection(config).eval(),
            scheduler=scheduler("epsilon"),
        )  # fmt: skip


def model(prediction: str = "v_prediction", seed: int = 0, window: int = 16) -> UNetModel:
    """Return the tiny pipeline as a Model."""
    pipe = pipeline(prediction, seed, window)
    quiet(pipe)
    return UNetModel(pipe, "tiny", sampling=SAMPLING)


def save(folder: Path, prediction: str = "v_prediction", seed: int = 0) -> Path:
    """Write the tiny pipeline as a diffusers folder."""
    pipeline(prediction, seed).save_pretrained(folder)
    return folder


CLASSES = Labels("tiny-classes", ("bomb", "cat", "dog", "house", "dagger"), steps=4)


def class_pipeline(prediction: str = "v_prediction", seed: int = 0) -> ConsistencyModelPipeline:
    """Return an untrained class-conditional pipeline: five classes and the empty prompt, gray pictures of 8x8."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8, norm_num_groups=4, num_class_embeds=len(CLASSES.classes) + 1,
        )  # fmt: skip
        return ConsistencyModelPipeline(unet.eval(), scheduler(prediction))


def class_model(prediction: str = "v_prediction", seed: int = 0) -> ClassModel:
    """Return the tiny class-conditional pipeline as a Model."""
    return ClassModel(class_pipeline(prediction, seed), "tiny-classes", CLASSES)


def save_class_model(folder: Path, prediction: str = "v_prediction", seed: int = 0) -> Path:
    """Write the tiny class-conditional pipeline as a diffusers folder."""
    class_model(prediction, seed).save(folder)
    return folder
