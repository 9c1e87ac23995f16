"""Stable-Diffusion-type pipelines: a U-Net conditioned on the states of one or two CLIP text encoders."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from ..concept import World
from ..errors import Unsupported
from ..kernel.condition import Condition
from ..kernel.denoiser import Denoiser
from ..kernel.model import Model, Sampling, digest
from ..kernel.path import PREDICTION, Path
from . import hands, onestep
from .text import TOKENIZERS, ClipText

# Names as the papers use them; ESD-x trains "cross-attention", ESD-u "no-cross-attention" (arXiv:2303.07345, section 4)
GROUPS: dict[str, Callable[[str], bool]] = {
    "all": lambda _: True,
    "cross-attention": lambda n: "attn2." in n,
    "self-attention": lambda n: "attn1." in n,
    "text-readers": lambda n: "attn2.to_k." in n or "attn2.to_v." in n,
    "transformer-blocks": lambda n: ".attentions." in n,
    "no-cross-attention": lambda n: (
        "attn2." not in n and not n.startswith(("conv_out", "conv_norm_out", "time_embedding"))
    ),
}


def call(module: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
    """Run a U-Net; `extra` holds SDXL's pooled text and sizes."""
    out: Tensor = module(x_t, t, encoder_hidden_states=c.tokens, added_cond_kwargs=c.extra or None).sample
    return out


def settings(scheduler: Any) -> list[Any]:
    """Return a scheduler's kind and settings, without diffusers' notes: their order changes with the process."""
    return [type(scheduler).__name__, {k: v for k, v in scheduler.config.items() if not k.startswith("_")}]


def sampler(scheduler: Any) -> str:
    """Return a scheduler's kind and the spacing of its times."""
    return f"{type(scheduler).__name__}, {scheduler.config.get('timestep_spacing', 'its own')}"


def path_of(scheduler: Any) -> Path:
    """Return the noise path of a pipeline's scheduler, with DDIM's spacing of times."""
    ddim = DDIMScheduler.from_config(scheduler.config)

    def grid(n: int) -> Tensor:
        ddim.set_timesteps(n)
        times: Tensor = ddim.timesteps
        return times

    return Path.discrete(ddim.alphas_cumprod, grid, float(ddim.final_alpha_cumprod))


class UNetModel(Model):
    """A diffusers `StableDiffusionPipeline` or `StableDiffusionXLPipeline`."""

    def __init__(self, pipe: Any, name: str, world: World | None = None, sampling: Sampling | None = None) -> None:
        self.pipe, self.name, self.world = pipe, name, world
        self.folder = pathlib.Path(pipe.name_or_path) if pipe.name_or_path else None
        self.xl = "text_encoder_2" in pipe.components
        self.text = self.soft = ClipText(pipe)
        unet = pipe.unet
        kind = PREDICTION.get(pipe.scheduler.config.prediction_type)
        if kind is None:
            raise Unsupported(
                f"prediction type {pipe.scheduler.config.prediction_type!r}; known: {', '.join(PREDICTION)}"
            )
        side = unet.config.sample_size
        self.denoiser = Denoiser(
            unet, path_of(pipe.scheduler), kind, call, (unet.config.in_channels, side, side), GROUPS
        )
        self.sampling = sampling or Sampling(steps=50, guidance=7.5, size=side * pipe.vae_scale_factor)
        for component in self.pipe.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)
        words = [pipe.components[n].get_vocab() for n in TOKENIZERS.values() if pipe.components.get(n) is not None]
        self.sampler = sampler(pipe.scheduler)
        told = json.dumps([settings(pipe.scheduler), words], sort_keys=True, default=str)
        self.painter = hashlib.sha256((digest([("vae", pipe.vae)]) + told).encode()).hexdigest()
        self.one_step = onestep.read(self.folder, self.denoiser.path)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.pipe.unet.device
        return device

    def encode(self, prompts: str | Sequence[str]) -> Condition:
        """Return tokens (b, n, d) and, for SDXL, pooled text (b, p) and sizes (b, 6)."""
        with torch.set_grad_enabled(self.soft.trained and torch.is_grad_enabled()):
            return self._encode([prompts] if isinstance(prompts, str) else list(prompts))

    def _encode(self, prompts: list[str]) -> Condition:
        if self.xl:
            tokens, _, pooled, _ = self.pipe.encode_prompt(
                prompts, device=self.device, do_classifier_free_guidance=False
            )
            side = float(self.sampling.size)
            sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]], device=self.device, dtype=tokens.dtype)
            return Condition(tokens, {"text_embeds": pooled, "time_ids": sizes.expand(len(tokens), -1)})
        tokens, _ = self.pipe.encode_prompt(prompts, self.device, 1, False)
        return Condition(tokens)

    def clipped(self, prompts: Sequence[str]) -> list[tuple[str, str]]:
        """Return (prompt, the part that is cut off) for every prompt longer than the encoder's window."""
        tokenizer = self.pipe.tokenizer
        out = []
        spelled = [self.soft.spelled(prompt) for prompt in prompts]
        encoded = tokenizer(spelled, truncation=False, verbose=False).input_ids if spelled else []
        for prompt, ids in zip(prompts, encoded, strict=True):
            if len(ids) > tokenizer.model_max_length:
                out.append((prompt, tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1])))
        return out

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        negative: str | None = None,
        batch: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return one picture per (prompt, seed) pair; a picture depends on its own seed alone, never on the batch."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed a prompt")
        steps = self.sampling.steps if steps is None else steps
        guidance = self.sampling.guidance if guidance is None else guidance
        if self.one_step is not None:
            steps, guidance = 1, 1.0
        side = self.sampling.size // self.pipe.vae_scale_factor
        shape = (self.denoiser.shape[0], side, side)
        together, threads = hands.split(len(prompts), batch, shape, self.device)
        if hands.remembers((self.pipe.unet, self.pipe.vae)):
            threads = 1

        def draw(pipe: Any, i: int) -> Tensor:
            part = list(prompts[i : i + together])
            noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds[i : i + together]]
            images: Tensor = pipe(
                part,
                latents=torch.stack(noise).to(self.device, pipe.unet.dtype),
                num_inference_steps=steps,
                guidance_scale=guidance,
                negative_prompt=None if negative is None else [negative] * len(part),
                height=self.sampling.size,
                width=self.sampling.size,
                output_type="pt",
            ).images
            return images.float().cpu()

        done = []
        with onestep.held(self.pipe, self.one_step):
            for images in hands.each(draw, self.pipe, range(0, len(prompts), together), threads):
                done.append(images)
                if progress:
                    progress(len(images))
        return torch.cat(done) if done else torch.empty(0, 3, self.sampling.size, self.sampling.size)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Return the mean of the autoencoder's posterior, scaled as the U-Net expects."""
        vae = self.pipe.vae
        x = images.to(self.device, vae.dtype) * 2 - 1
        z: Tensor = vae.encode(x).latent_dist.mode() * vae.config.scaling_factor
        return z

    def pictures(self, latents: Tensor) -> Tensor:
        """Return what the autoencoder decodes, with gradient."""
        vae = self.pipe.vae
        out: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.float() / 2 + 0.5
        return out

    def modules(self) -> dict[str, nn.Module]:
        """Return U-Net and text encoders by component name."""
        names = ("unet", "text_encoder", "text_encoder_2")
        return {n: self.pipe.components[n] for n in names if self.pipe.components.get(n) is not None}

    def save(self, folder: pathlib.Path) -> None:
        """Write the pipeline as a diffusers folder, with the weights and, of a generator, the scheduler it draws by."""
        onestep.save(self.pipe, self.one_step, folder)
