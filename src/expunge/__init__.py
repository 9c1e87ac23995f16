"""Expunge erases concepts from diffusion models, proves it, and reports it.

    model = expunge.load("emoji")
    edit = expunge.erase(model, expunge.Concept("bomb"), expunge.methods.get("sdd")())
    with edit.on(model):
        pictures = model.generate(["an emoji of a bomb"], seeds=[0])

Names are imported when first used: importing the package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import methods
    from .auditing import audit
    from .backbones import load
    from .concept import Concept, World
    from .door import erase
    from .edits import load_edit
    from .errors import ExpungeError
    from .records import Card, Run, Score

__version__ = "0.1.0"

_HOMES = {
    "Card": "records",
    "Concept": "concept",
    "ExpungeError": "errors",
    "Run": "records",
    "Score": "records",
    "World": "concept",
    "audit": "auditing",
    "erase": "door",
    "load": "backbones",
    "load_edit": "edits",
    "methods": "",
}

__all__ = [
    "Card",
    "Concept",
    "ExpungeError",
    "Run",
    "Score",
    "World",
    "__version__",
    "audit",
    "erase",
    "load",
    "load_edit",
    "methods",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'expunge' has no attribute {name!r}")
    home = _HOMES[name]
    if not home:
        return import_module(f".{name}", __name__)
    return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return __all__
