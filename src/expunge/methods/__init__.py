"""The table of methods; a method's file is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

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

# samples that a network looks at for each sample of an update, by the defaults, with something to retain
LOOKS = {
    "allbutone": 6, "ant": 7, "ap": 8, "erasediff": 3, "esd": 6, "fewshot": 2, "hfi": 4, "neggrad": 2, "salun": 3,
    "sdd": 4, "sfd": 16, "spm": 5, "ssd": 4,
}  # fmt: skip
SHOWN = 64  # pictures of each set that are drawn, as in the documentation, for methods which learn from pictures
FEW = {"fewshot": 4}  # its paper's number

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
        "cost": cost(name),
        "provenance": PROVENANCE,
        "limits": " ".join(section(doc, "Limits").split()),
        "settings": settings,
    }


def backbones(needs: Needs) -> list[str]:
    """Return the kinds of models that offer what a method needs."""
    kinds = {"text-to-image": True, "class-conditional": not needs.text, "one-step": not needs.steps}
    return [kind for kind, fits in kinds.items() if fits]


def cost(name: str) -> str:
    """Return what a method does with its defaults; how long that takes is the machine's and the model's business."""
    method = get(name)
    s, needs = {f.name: f.default for f in fields(method)}, method.needs
    said = f"{s['steps']} updates of {s['batch']} samples" if "steps" in s else "no update"
    said += " by each of two networks" if "fake_lr" in s else ""
    if found := {k: n for k, n in evaluations(name, s).items() if n}:
        parts = ", ".join(f"{n:,} {k}" for k, n in found.items())
        said += f"; {sum(found.values()):,} evaluations of the network, a sample each" + f": {parts}" * (len(found) > 1)
    said += f"; samples are looked at every {s['probe']} updates" if "probe" in s else ""
    if needs.images:
        shown, also = FEW.get(name, SHOWN), " and as many to retain" if needs.retained else ""
        said += f"; {shown} pictures of the concept{also}, given or drawn"
    if "inversion" in s:
        said += f"; {s['inversion']} updates before, if the concept is given by pictures"
    if needs.sae:
        said += "; reads prompts through a sparse autoencoder, which is trained once"
    return said + (f"; reads {s['sample']} prompts to erase and as many to keep at most" if "sample" in s else "")


def evaluations(name: str, settings: Mapping[str, Any], shown: int = SHOWN) -> dict[str, int]:
    """Return how many samples the network looks at while a method erases one concept, by what for.

    Args:
        name: the method's.
        settings: all of them; what counts in an update counts as by default.
        shown: pictures of the concept, where the method learns from pictures.
    """
    s, looks = settings, LOOKS.get(name, 0)
    # gradients alone, each of one sample
    updates, batch = (s["draws"], 1) if name == "ssd" else (s.get("steps", 0), s.get("batch", 0))
    maps = s["maps"] if name == "ant" and s["density"] < 1 else 0
    # a map of the reversal alone, which asks four times
    for_maps = 4 * maps * batch
    if name == "salun" and s["threshold"] == "hard" and s["density"] < 1:
        for_maps = -(-s["draws"] * shown // batch) * batch
    searches, search = (max(0, updates - 1) // s["every"], s["adversary"]) if name == "ap" else (0, "")
    each = 2 * min(s["near"], s["candidates"]) if search == "exact" else 4 * s.get("ascent", 0)
    rolled = 0
    if "rollouts" in s and updates + maps:
        length, guided = s["rollouts"] * s["sampling_steps"], 2 if s["guidance"] > 1 else 1
        refreshes = -(-(updates + maps) // (length * s.get("reuse", 1) // batch))
        rolled = refreshes * length * guided * (2 if name == "ap" else 1)
    return {
        "in updates" if name != "ssd" else "for gradients": looks * updates * batch,
        "to sample what is trained on": rolled,
        "for the map of weights": for_maps,
        "to search adversaries": searches * each * batch,
    }


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
