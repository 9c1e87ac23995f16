"""What the `emoji` world is made of: styles, backgrounds, objects and the targets of the bench. Pure data, no torch.

Objects are the emoji of `objects.json` (written by `python -m expunge.zoo.emoji data`), each drawn in all eight styles.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TypedDict

from ...concept import World

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"

# style -> npm package of the iconify project
STYLES: dict[str, str] = {
    "noto": "noto",
    "twemoji": "twemoji",
    "openmoji": "openmoji",
    "fluent": "fluent-emoji",
    "flat": "fluent-emoji-flat",
    "mono": "fluent-emoji-high-contrast",
    "emojione": "emojione",
    "blob": "noto-v1",
}

# sRGB in [0, 255]; light enough that the black lines of `mono` and `openmoji` stay visible
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "yellow": (255, 236, 150),
    "pink": (255, 196, 214),
    "blue": (160, 206, 255),
    "green": (176, 232, 176),
    "gray": (205, 205, 205),
    "orange": (255, 206, 150),
    "purple": (214, 190, 250),
}

# What people ask to remove (weapons, drugs, gestures, gambling, characters, landmarks), spread over shapes and colours.
BENCH_TARGETS: tuple[str, ...] = (
    "bomb",
    "dagger",
    "cigarette",
    "syringe",
    "skull",
    "middle finger",
    "Santa Claus",
    "Statue of Liberty",
    "beer mug",
    "pill",
    "coffin",
    "slot machine",
    "spider",
    "money bag",
    "police car",
    "pizza",
)
# Kept whatever their drawings' distance: the nearest relatives of targets.
KEPT: tuple[str, ...] = ("Mrs. Claus", "crossed swords", "ambulance", "wine glass", "thumbs up")
# One style with close neighbours (twemoji: emojione and flat resemble it), one that stands alone (fluent, shaded).
BENCH_STYLES: tuple[str, ...] = ("twemoji", "fluent")

# Prompts of training; {o} object or synonym, {s} style, {b} background. The first is the one protocols use.
TEMPLATES: tuple[str, ...] = (
    "a {s} style emoji of {o}",
    "a {s} style emoji of {o} on a {b} background",
    "{o}, {s}",
    "{o} in {s} style, {b} background",
    "an emoji of {o}",
    "a picture of {o}",
    "{o}",
    "{o} on a {b} background",
)


class Entry(TypedDict):
    """One object of the world."""

    name: str
    hexcode: str
    group: str
    synonyms: list[str]


@cache
def objects() -> tuple[Entry, ...]:
    """Return every object of the data, in the order of the judges' object head."""
    return tuple(json.loads((HERE / "objects.json").read_text()))


@cache
def drawn() -> tuple[str, ...]:
    """Return the objects that the shipped model was trained to draw."""
    return tuple(json.loads((WEIGHTS / "drawn.json").read_text()))


@cache
def world() -> World:
    """Return the shipped model's world: what it can draw, and the prompts that ask for it."""
    shown = [o for o in objects() if o["name"] in drawn()]
    forms = tuple(t.replace("{o}", "{c}").replace("{s}", "{x}") for t in TEMPLATES if "{b}" not in t)
    return World(
        name="emoji",
        objects=tuple(o["name"] for o in shown),
        styles=tuple(STYLES),
        synonyms={o["name"]: tuple(o["synonyms"]) for o in shown if o["synonyms"]},
        object_templates=forms,
        style_templates=("a {c} style emoji of {x}", "{x}, {c}"),
    )
