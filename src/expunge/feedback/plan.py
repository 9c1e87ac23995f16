"""Which pictures a study shall hold: of prompts, of a concept in a model's world, or of a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..concept import Concept, World
from ..errors import BadStudy
from .study import Study

SHEET = "sheet.png"  # the overview that `expunge generate` leaves beside its pictures
_SEED = re.compile(r"[0-9]{1,18}")  # numbers that a study can hold


@dataclass(frozen=True)
class Plan:
    """What `Study.create` is given.

    Attributes:
        planned: (prompt, seed) of every picture.
        files: their names; empty for numbers.
        source: where they come from.
    """

    planned: list[tuple[str, int | None]]
    files: list[str] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)


def of_prompts(prompts: Sequence[str], n: int) -> list[tuple[str, int | None]]:
    """Return n (prompt, seed) pairs: every prompt with seed 0, then 1, ...; of too many, evenly spaced ones."""
    p = len(prompts)
    if n < p:
        return [(prompts[i * p // n], 0) for i in range(n)]
    return [(prompts[i % p], i // p) for i in range(n)]


def of_concept(name: str, world: World | None, n: int) -> list[tuple[str, int | None]]:
    """Return n (prompt, seed) pairs for finding a concept: half of them ask for it, half for something else.

    Raters need pictures with and without it. What no word of the model's world names is looked for in everything that
    the world holds; in an unknown world every prompt asks for it, since nothing else is known.
    """
    known = world.canonical(name) if world else ""
    concept = Concept(name, kind="style" if world and known in world.styles else "object").resolved(world)
    if world and not known:
        return of_prompts(concept.keeps(world), n)
    asking = of_prompts(concept.prompts(world), n if world is None else -(-n // 2))
    if world is None:
        return asking
    return list(chain.from_iterable(zip(asking, of_prompts(concept.keeps(world), len(asking)), strict=True)))[:n]


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one a line; empty lines are left out, and repeated ones.

    Raises:
        BadStudy: the file cannot be read, or holds none.
    """
    try:
        lines = path.read_text().split("\n")
    except (OSError, ValueError) as error:
        raise BadStudy(f"{path} cannot be read: {error}. Give a text file with a prompt a line.") from error
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise BadStudy(f"{path} holds no prompts. Write one a line.")
    return found


def of_folder(folder: Path) -> Plan:
    """Return the PNG files of a folder, by name, with the prompt and seed that `expunge generate` leaves in them.

    Raises:
        BadStudy: no such folder, no PNG files in it, or a damaged one.
    """
    found = sorted(p for p in folder.glob("*") if p.suffix.lower() == ".png" and p.name != SHEET)
    if not found:
        raise BadStudy(f"there are no PNG files in {folder}. Give a folder that holds the pictures themselves.")
    rows = [_about(path) for path in found]
    return Plan(rows, [p.name for p in found], {"folder": str(folder.resolve())})


def fill(study: Study) -> None:
    """Copy the pictures that a study takes from a folder and does not have yet.

    Raises:
        BadStudy: one is not there any more.
    """
    if folder := study.source.get("folder"):
        for picture in study.pictures():
            path = Path(folder) / picture.file
            if not picture.drawn:
                _about(path)
                study.put(picture.id, path.read_bytes())


def _about(path: Path) -> tuple[str, int | None]:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            text = {k: str(v) for k, v in image.info.items() if k in ("prompt", "seed")}
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadStudy(f"{path} is no PNG picture that can be read: {error}. Take it out, or make it again.") from error
    seed = text.get("seed", "")
    return text.get("prompt", ""), int(seed) if _SEED.fullmatch(seed) else None
