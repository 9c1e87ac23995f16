"""Human feedback: a study of pictures, the page where people rate them, and how far they agree. No torch."""

from __future__ import annotations

from .data import PAIRED, SINGLE, Item, Picture, Progress, Rating
from .study import Study

__all__ = ["PAIRED", "SINGLE", "Item", "Picture", "Progress", "Rating", "Study"]
