"""Prompts to learn from: those of a file, or what a world can draw. No torch."""

from __future__ import annotations

from pathlib import Path

from .concept import World
from .errors import SettingError


def read(path: Path | str) -> tuple[str, ...]:
    """Read a file of prompts, one a line.

    Raises:
        SettingError: the file cannot be read, or holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise SettingError(
            f"the prompts {path} cannot be read: {error}. Give a text file, one prompt a line."
        ) from error
    found = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise SettingError(f"the prompts {path} are empty. Give one prompt a line.")
    return found


def known(world: World) -> tuple[str, ...]:
    """Return the prompts of everything that a world draws: each object in every template, with every style it has."""
    found = [
        template.replace("{c}", name).replace("{x}", style)
        for name in world.objects
        for template in world.object_templates
        for style in (world.styles if "{x}" in template else ("",))
    ]
    return tuple(dict.fromkeys(found))
