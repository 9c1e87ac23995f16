"""CLIP score: the cosine between a picture and its prompt in the space of a CLIP model.

Reference   Hessel et al. 2021, arXiv:2104.08718 (without its factor 2.5 and its floor at 0)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_cosines(pair: tuple[Tensor, Tensor] | None, n: int) -> Tensor:
    """Return the cosine of every picture and its prompt, shape (n,); all nan when there is no CLIP model.

    Args:
        pair: embeddings (n, d) of pictures and of their prompts.
        n: number of pictures.
    """
    return torch.full((n,), torch.nan) if pair is None else F.cosine_similarity(*pair, dim=1)
