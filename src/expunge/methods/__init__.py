"""The table of methods; a method's file is imported when it is asked for."""

from __future__ import annotations

from dataclasses import asdict, fields
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from ..effort import cost
from ..errors import SettingError, nearest

if TYPE_CHECKING:
    from ..papers import Paper
    from .base import Needs

METHODS: dict[str, str] = {
    "allbutone": "AllButOne",
    "ant": "ANT",
    "ap": "AP",
    "erasediff": "EraseDiff",
    "esd": "ESD",
    "fewshot": "FewShot",
    "hfi": "HFI",
    "itd": "ItD",
    "neggrad": "NegGrad",
    "rece": "RECE",
    "salun": "SalUn",
    "sdd": "SDD",
    "sfd": "SFD",
    "speed": "SPEED",
    "spm": "SPM",
    "ssd": "SSD",
    "tuce": "TUCE",
    "uce": "UCE",
}

# CONTRIBUTING.md asks this of every method
PROVENANCE = "written from the paper's equations; no code of the authors"

# needs that go without saying
USUAL = ("concept", "steps")


def names() -> tuple[str, ...]:
    """Return the methods' names; imports nothing."""
    return tuple(METHODS)


def get(name: str) -> type[Any]:
    """Return a method's class.

    Raises:
        SettingError: no such method.
    """
    if name not in METHODS:
        raise SettingError(f"unknown method {name!r}. Methods: {', '.join(METHODS)}.{nearest(name, METHODS)}")
    method: type[Any] = getattr(import_module(f".{name}", __name__), METHODS[name])
    return method


def paper(name: str) -> Paper:
    """Return the publication that a method comes from, or one that a method implements by a setting (`age`, `sara`).

    Raises:
        SettingError: no such method or publication.
    """
    also: dict[str, Paper] = import_module("..papers", __name__).ALSO
    found: Paper = also[name] if name in also else get(name).paper
    return found


def describe(name: str) -> dict[str, Any]:
    """Return what is known of a method, as plain data: paper, needs, settings and the paragraphs of its docstring."""
    method = get(name)
    doc = import_module(f".{name}", __name__).__doc__ or ""
    hints = get_type_hints(method, include_extras=True)
    settings = [
        {
            "name": f.name,
            "type": spelled(hints[f.name].__origin__),
            "default": f.default,
            "help": next(m for m in hints[f.name].__metadata__ if isinstance(m, str)),
        }
        for f in fields(method)
    ]
    return {
        "name": name,
        "family": method.family,
        "summary": doc.split("\n", 1)[0].rstrip("."),
        "paper": method.paper.title,
        "arxiv": method.paper.arxiv,
        "needs": [k for k, v in asdict(method.needs).items() if v and k not in USUAL],
        "backbones": backbones(method.needs),
        "cost": cost(name, method),
        "provenance": PROVENANCE,
        "limits": " ".join(section(doc, "Limits").split()),
        "settings": settings,
    }


def backbones(needs: Needs) -> list[str]:
    """Return the kinds of models that offer what a method needs."""
    kinds = {"text-to-image": True, "class-conditional": not needs.text, "one-step": not needs.steps}
    return [kind for kind, fits in kinds.items() if fits]


def spelled(kind: Any) -> str:
    """Return a setting's type as people write it: its name, or the words it may be."""
    if get_origin(kind) is Annotated:
        return spelled(kind.__origin__)
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return " or ".join(map(spelled, get_args(kind))) or str(kind.__name__)


def section(doc: str, title: str) -> str:
    """Return the text of one entry ("Limits", "Reference") of a method's docstring."""
    lines, inside = [], False
    for line in doc.split("\n"):
        if line and not line[0].isspace():
            inside = line.split(None, 1)[0] == title
        if inside:
            lines.append(line.removeprefix(title))
    return "\n".join(lines).strip()
