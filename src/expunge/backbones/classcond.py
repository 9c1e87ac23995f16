"""Class-conditional pipelines: a U-Net in pixel space that is conditioned on a class instead of a text.

The folder is diffusers' `ConsistencyModelPipeline`, a `UNet2DModel` and a scheduler. In spite of its name it draws with
any scheduler, and it is the pipeline that takes a class, `pipe(class_labels=[3], num_inference_steps=50)`. Beside
`model_index.json` lies `classes.json`, which names the classes. A network of one class more than there are names has
been trained with label dropout: its last class is the empty prompt of guidance.

A condition is weights over the classes, (b, 1, classes), one-hot for a class. They can be mixed, joined and gathered,
and training the class embedding reaches conditions that were made before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from ..concept import World
from ..errors import BadModel, ConceptError, SettingError, Unsupported
from ..flags import build
from ..kernel.condition import Condition
from ..kernel.denoiser import Denoiser
from ..kernel.model import Model, Sampling
from ..kernel.path import PREDICTION
from ..kernel.sampler import guided
from ..storage import write_json
from . import onestep
from .unet import path_of, sampler, settings

LABELS = "classes.json"

# the class enters as a sum with the time's embedding, which every residual block projects for itself
GROUPS: dict[str, Callable[[str], bool]] = {
    "all": lambda _: True,
    "class-embedding": lambda n: n.startswith("class_embedding."),
    "conditioning": lambda n: n.startswith("class_embedding.") or ".time_emb_proj." in n,
    "self-attention": lambda n: ".attentions." in n,
}


@dataclass(frozen=True)
class Labels:
    """What a class-conditional folder says besides its weights."""

    world: Annotated[str, 'name of what it draws, such as "fashion"; protocols go by it']
    classes: Annotated[tuple[str, ...], "their names, by index"]
    steps: Annotated[int, Ge(1), "sampling steps unless told otherwise"] = 50
    guidance: Annotated[float, Ge(0), "guidance scale unless told otherwise; 1 is none"] = 1.0


class Mixing(nn.Embedding):
    """A class embedding that reads indices, as diffusers does, and weights over the classes (b, classes)."""

    def forward(self, classes: Tensor) -> Tensor:
        """Return embeddings (b, d)."""
        return classes @ self.weight if classes.is_floating_point() else super().forward(classes)


def call(module: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
    """Run a U-Net on weights over its classes."""
    out: Tensor = module(x_t, t, class_labels=c.tokens[:, 0]).sample
    return out


def read_labels(folder: Path, count: int) -> Labels:
    """Return the labels of a folder for a network of `count` classes; without a file they are numbers.

    Raises:
        BadModel: the file cannot be read, or names another number of classes.
    """
    path = folder / LABELS
    if not path.is_file():
        return Labels(folder.name, tuple(str(i) for i in range(count)))
    try:
        told = json.loads(path.read_text())
        labels: Labels = build(Labels, told if isinstance(told, dict) else {})
    except (OSError, ValueError, TypeError, SettingError) as error:
        raise BadModel(
            f"{path} cannot be read ({error}). It must hold world, classes and, if wanted, steps and guidance."
        ) from error
    if len(set(labels.classes)) < len(labels.classes):
        raise BadModel(f"{path} names a class twice: {', '.join(labels.classes)}.")
    if len(labels.classes) not in (count, count - 1):
        raise BadModel(
            f"{path} names {len(labels.classes)} classes, the network has {count}. Name each, or all but the last, "
            "which then is the empty prompt."
        )
    return labels


class ClassModel(Model):
    """A diffusers pipeline of a class-conditional `UNet2DModel` and a scheduler.

    Args:
        pipe: the pipeline; its class embedding is replaced by one that also mixes.
        name: what `expunge.load` was given.
        labels: names of the classes.
    """

    reads_text = False

    def __init__(self, pipe: Any, name: str, labels: Labels) -> None:
        unet, kind = pipe.unet, PREDICTION.get(pipe.scheduler.config.prediction_type)
        if kind is None:
            raise Unsupported(
                f"prediction type {pipe.scheduler.config.prediction_type!r}; known: {', '.join(PREDICTION)}"
            )
        self.pipe, self.name, self.labels = pipe, name, labels
        self.folder = Path(pipe.name_or_path) if pipe.name_or_path else None
        self.world = World(labels.world, labels.classes, (), {}, ("{c}",), (), labels=True)
        size, channels = unet.config.sample_size, unet.config.in_channels
        self.sampling = Sampling(labels.steps, labels.guidance, size)
        unet.class_embedding = mixing(unet)
        unet.requires_grad_(False).eval()
        self.count: int = unet.config.num_class_embeds
        self.denoiser = Denoiser(unet, path_of(pipe.scheduler), kind, call, (channels, size, size), GROUPS)
        self.one_step = onestep.read(self.folder, self.denoiser.path)
        self.sampler = sampler(pipe.scheduler)
        told = json.dumps([settings(pipe.scheduler), asdict(labels)], sort_keys=True, default=str)
        self.painter = hashlib.sha256(told.encode()).hexdigest()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.pipe.unet.device
        return device

    def index(self, prompt: str) -> int:
        """Return the class that a prompt names: by name, by number, or the empty one for "".

        Raises:
            ConceptError: there is no such class.
            Unsupported: the empty prompt, of a network that was trained without label dropout.
        """
        classes = self.labels.classes
        if not prompt:
            if self.count == len(classes):
                raise Unsupported(
                    f"{self.name!r} was trained without label dropout, so it has no empty prompt: neither guidance nor "
                    "methods that use it. Give an anchor class, or another method."
                )
            return len(classes)
        name = self.world.canonical(prompt) if self.world else ""
        if not name:
            raise ConceptError(
                f"{prompt!r} is no class of {self.name!r}. Classes, by name or number: "
                f"{', '.join(f'{i} {c}' for i, c in enumerate(classes))}."
            )
        return classes.index(name)

    def encode(self, prompts: str | Sequence[str]) -> Condition:
        """Return one-hot weights over the classes, (b, 1, classes)."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        one_hot = F.one_hot(torch.tensor([self.index(p) for p in prompts], dtype=torch.long), self.count)
        return Condition(one_hot[:, None].to(self.device, self.pipe.unet.dtype))

    def clipped(self, prompts: Sequence[str]) -> list[tuple[str, str]]:  # noqa: ARG002 (a text encoder's business)
        """Return nothing: the name of a class is never too long."""
        return []

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        negative: str | None = None,
        batch: int = 128,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return one picture per (prompt, seed) pair by the pipeline's own scheduler, (n, 3, h, w) in [0, 1].

        A picture depends on its own seed alone, never on the batch. Without guidance, which the pipeline has not, they
        are the pipeline's own: `pipe(class_labels=..., generator=[one a seed])`.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed a prompt")
        steps = self.sampling.steps if steps is None else steps
        scale = self.sampling.guidance if guidance is None else guidance
        if self.one_step is not None:
            steps, scale = 1, 1.0
        done = []
        with onestep.held(self.pipe, self.one_step):
            for i in range(0, len(prompts), batch):
                c = self.encode(list(prompts[i : i + batch]))
                null = c if scale == 1.0 else self.encode(negative or "")
                done.append(self._draw(c, null, seeds[i : i + batch], steps, scale))
                if progress:
                    progress(len(c))
        return torch.cat(done) if done else torch.empty(0, 3, self.sampling.size, self.sampling.size)

    def _draw(self, c: Condition, null: Condition, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
        scheduler, e = self.pipe.scheduler, guided(self.denoiser, c, null, scale)
        draws = [torch.Generator().manual_seed(s) for s in seeds]
        noise = torch.stack([torch.randn(self.denoiser.shape, generator=g) for g in draws])
        x = noise.to(self.device, self.pipe.unet.dtype) * scheduler.init_noise_sigma
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            out = e(scheduler.scale_model_input(x, t), t.to(self.device).expand(len(x)))
            x = scheduler.step(out, t, x, generator=draws).prev_sample
        pictures: Tensor = (x / 2 + 0.5).clamp(0, 1).float().cpu()
        return pictures.expand(-1, 3, -1, -1)

    def latents(self, images: Tensor) -> Tensor:
        """Return pictures in [-1, 1] with the network's channels: it works in pixel space."""
        x = images.to(self.device, self.pipe.unet.dtype) * 2 - 1
        return x.mean(1, keepdim=True) if self.denoiser.shape[0] == 1 else x

    def pictures(self, latents: Tensor) -> Tensor:
        """Return the network's own pixels, in three channels."""
        return (latents.float() / 2 + 0.5).expand(-1, 3, -1, -1)

    def modules(self) -> dict[str, nn.Module]:
        """Return the U-Net."""
        return {"unet": self.pipe.unet}

    def save(self, folder: Path) -> None:
        """Write the model as it is now as a diffusers folder, with its labels."""
        onestep.save(self.pipe, self.one_step, folder)
        write_json(folder / LABELS, asdict(self.labels))


def unfused(unet: nn.Module) -> None:
    """Let attention run step by step: the backward pass of the fused kernel is slow on CPU where pictures are small."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


def mixing(unet: Any) -> Mixing:
    """Return a network's class embedding as one that mixes; the weights are shared.

    Raises:
        Unsupported: the network draws no classes, or has them otherwise, or predicts a variance as well.
    """
    embedding = unet.class_embedding
    if not isinstance(embedding, nn.Embedding):
        raise Unsupported(
            f"this {type(unet).__name__} has no table of classes (class_embed_type {unet.config.class_embed_type!r}, "
            f"num_class_embeds {unet.config.num_class_embeds}); there is nothing in it that could be asked for."
        )
    if unet.config.in_channels != unet.config.out_channels:
        raise Unsupported(
            f"a network from {unet.config.in_channels} to {unet.config.out_channels} channels predicts its variance as "
            "well; this version reads networks that do not."
        )
    return Mixing(embedding.num_embeddings, embedding.embedding_dim, _weight=embedding.weight)
