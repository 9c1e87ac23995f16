"""The panel of a protocol: the judge that scores, the trunk of the distances, the CLIP towers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BadModel
from ..metrics.clip import clip_cosines
from .classifier import Judge, Reading, finite, load_judge
from .clip import Towers, load_clip


@dataclass(frozen=True)
class Judged:
    """Everything that is measured on n pictures, one row a picture; nan where a picture could not be read.

    Attributes:
        reading: probabilities of the scoring judge.
        depths: the trunk's activations by stage, each (n, c, h, w).
        features: the trunk's pooled features (n, d).
        cosines: CLIP cosine of picture and prompt (n,).
    """

    reading: Reading
    depths: list[Tensor]
    features: Tensor
    cosines: Tensor


@dataclass(frozen=True)
class Panel:
    """Judges of one protocol."""

    scorer: Judge
    trunk: Judge
    clip: Towers | None = None

    def texts(self, prompts: Sequence[str]) -> Tensor | None:
        """Return what `judge` compares pictures of these prompts with, (n, d); None without CLIP towers."""
        return None if self.clip is None else self.clip.texts(prompts)

    @torch.no_grad()
    def judge(self, images: Tensor, texts: Tensor | None) -> Judged:
        """Judge pictures (n, 3, 64, 64) in [0, 1] made from the prompts that `texts` was made of."""
        reading = self.scorer.read(images)
        seen = finite(images)
        lost = ~images.isfinite().flatten(1).all(1)
        depths = [torch.cat(stage) for stage in zip(*map(self.trunk.depths, torch.split(seen, 64)), strict=True)]
        features = depths[-1].mean((2, 3)).masked_fill(lost[:, None], torch.nan)
        depths = [d.masked_fill(lost[:, None, None, None], torch.nan) for d in depths]
        pair = None if self.clip is None or texts is None else (self.clip.images(seen), texts)
        cosines = clip_cosines(pair, len(images))
        return Judged(reading, depths, features, cosines.masked_fill(lost, torch.nan))


def load_panel(folder: Path, scorer: str, trunk: str, hashes: tuple[tuple[str, str], ...] = ()) -> Panel:
    """Load `SCORER.safetensors`, `TRUNK.safetensors` and, if there is one, the CLIP model of a world's weights folder.

    Raises:
        BadModel: a judge or the CLIP model is missing, damaged, or not the one that the protocol pins.
    """
    judges, clip = {name: load_judge(folder / f"{name}.safetensors") for name in (scorer, trunk)}, load_clip(folder)
    found = {name: judge.hash for name, judge in judges.items()} | ({"clip": clip.hash} if clip else {})
    for name, pinned in hashes:
        if name in found and found[name] != pinned:
            raise BadModel(
                f"{name} in {folder} has hash {found[name][:12]}, the protocol was made with {pinned[:12]}: "
                "numbers would not be comparable. Reinstall expunge, or give the protocol a new id."
            )
    return Panel(judges[scorer], judges[trunk], clip)
