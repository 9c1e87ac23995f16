"""Run folders -> one self-contained HTML page. Needs no torch, no model and no network."""

from __future__ import annotations

from .build import build

__all__ = ["build"]
