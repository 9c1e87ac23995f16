"""CLIP towers: pictures and prompts into one space, unit length.

Layout of a CLIP folder beside a pipeline (the shipped one is `zoo/emoji/weights`):

    clip/config.json, clip/model.safetensors    CLIPVisionModelWithProjection; pictures scaled to [-1, 1]
    clip/text_projection.safetensors            {"weight": (p, d)}: projection of the pipeline's pooled text
    text_encoder/, tokenizer/                   the pipeline's own
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ..errors import BadModel


class Towers(Protocol):
    """What the CLIP score needs."""

    def images(self, images: Tensor) -> Tensor:
        """Return unit vectors (n, d) of pictures (n, 3, h, w) in [0, 1]."""

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Return unit vectors (n, d) of prompts."""


FILES = (
    "clip/model.safetensors", "clip/text_projection.safetensors", "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
)  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """An image tower and the text tower it was trained against; `hash` is the SHA-256 of the files of both."""

    vision: Any
    text: Any
    tokenizer: Any
    projection: Tensor
    hash: str

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Return unit vectors (n, d) of pictures (n, 3, h, w) in [0, 1]."""
        return self.seen(images)

    def seen(self, images: Tensor) -> Tensor:
        """Return the same with gradient."""
        side = self.vision.config.image_size
        if images.shape[-1] != side:
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        parts = [self.vision(pixel_values=part * 2 - 1).image_embeds for part in torch.split(images, 64)]
        return F.normalize(torch.cat(parts), dim=1)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Return unit vectors (n, d) of prompts."""
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        return F.normalize(self.text(ids).pooler_output @ self.projection.T, dim=1)


def load_clip(folder: Path) -> Clip | None:
    """Load the towers of `folder/clip`; None when the world ships none.

    Raises:
        BadModel: the folder is there, but incomplete or damaged.
    """
    if not (folder / "clip" / "config.json").is_file():
        return None
    # transformers takes seconds to import, and a world may ship no CLIP model
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection  # noqa: PLC0415

    try:
        vision = CLIPVisionModelWithProjection.from_pretrained(folder / "clip")
        text = CLIPTextModel.from_pretrained(folder / "text_encoder")
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        projection = load_file(folder / "clip" / "text_projection.safetensors")["weight"].float()
        told = sha256(b"".join((folder / name).read_bytes() for name in FILES)).hexdigest()
    except Exception as error:  # transformers has no common error for a damaged folder
        raise BadModel(f"{folder / 'clip'} is not a whole CLIP folder: {error}. Reinstall expunge.") from error
    for tower in (vision, text):
        tower.float().eval().requires_grad_(False)
    return Clip(vision, text, tokenizer, projection, told)
