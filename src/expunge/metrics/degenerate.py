"""Degenerate pictures: those in which a judge recognises nothing with confidence.

A model that draws noise "unlearns" everything; this share, printed beside the unlearning accuracy, exposes it.

Limits      a judge can be confident about nonsense: the share is a lower bound
"""

from __future__ import annotations

import numpy as np

from .rates import Array


def degenerate(confidence: Array, floor: float) -> Array:
    """Return outcomes (n,): 1 where the best object's probability is below `floor`, nan where there is none."""
    return np.where(np.isnan(confidence), np.nan, (confidence < floor).astype(np.float64))
