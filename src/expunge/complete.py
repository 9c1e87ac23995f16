"""Words for shell completion. A completion must answer at once, so nothing here imports torch."""

from __future__ import annotations

import ast
from pathlib import Path

from typer import Context

from . import methods
from .papers import ALSO
from .protocols import PROTOCOLS

DEFAULT = "sdd"
FASHION = Path(__file__).parent / "zoo" / "fashion" / "weights"
MODELS = {
    "emoji": "text to image, 64x64, shipped: emoji in eight drawing styles, no download",
    "fashion": "class to image, 32x32, shipped: ten kinds of clothing, no download",
    "fashion-one-step": "the same in one step, shipped: a generator distilled from fashion, no download",
    "tiny": "an untrained pipeline of 0.1 M weights that loads in a moment: for trying commands out",
}
if not (FASHION / "model_index.json").is_file():
    # its weights are made by `python -m expunge.zoo.fashion all`
    del MODELS["fashion"]
if not (FASHION / "one-step" / "card.json").is_file():
    del MODELS["fashion-one-step"]
FORMS = "Or: a diffusers folder, a hub id (owner/name), a single-file .safetensors checkpoint."


def models(incomplete: str) -> list[str]:
    """Return shipped models, and folders and checkpoints here."""
    here = [p.name for p in Path().iterdir() if (p / "model_index.json").is_file() or p.suffix == ".safetensors"]
    return [m for m in (*MODELS, *sorted(here)) if m.startswith(incomplete)]


def method_names(incomplete: str) -> list[str]:
    """Return the methods' names."""
    return [m for m in methods.names() if m.startswith(incomplete)]


def papers(incomplete: str) -> list[str]:
    """Return what can be cited."""
    return [m for m in (*methods.names(), *ALSO) if m.startswith(incomplete)]


def protocols(incomplete: str) -> list[str]:
    """Return the protocols' ids."""
    return [p for p in PROTOCOLS if p.startswith(incomplete)]


def concepts(ctx: Context, incomplete: str) -> list[str]:
    """Return the names of the shipped world, unless another model is given."""
    if ctx.params.get("model") in ("fashion", "fashion-one-step"):
        from .zoo.fashion.world import FASHION as source  # noqa: PLC0415 (a completion reads no more than it needs)

        return [n for n in source.classes if n.casefold().startswith(incomplete.casefold())]
    if ctx.params.get("model") not in (None, "emoji"):
        return []
    from .zoo.emoji import world  # noqa: PLC0415 (a completion reads no more than it needs)

    shipped = (world.WEIGHTS / "drawn.json").is_file()
    known = (*(world.drawn() if shipped else (o["name"] for o in world.objects())), *world.STYLES)
    return [n for n in known if n.casefold().startswith(incomplete.casefold())]


def settings(ctx: Context, incomplete: str) -> list[str]:
    """Return `key=` for every setting of the chosen method."""
    method = ctx.params.get("method") or DEFAULT
    return [f"{k}=" for k in fields(method) if k.startswith(incomplete)] if method in methods.names() else []


def fields(method: str) -> list[str]:
    """Return a method's settings from its source, because importing it would import torch."""
    source = (Path(methods.__file__).parent / f"{method}.py").read_text()
    wanted = methods.METHODS[method]
    body = next(n.body for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == wanted)
    declared = (n for n in body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation))
    return [n.target.id for n in declared if isinstance(n.target, ast.Name)]
