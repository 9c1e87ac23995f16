"""Settings of methods from `--set key=value` and TOML recipes; names and defaults are the dataclass's."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from .errors import SettingError, nearest


def build(method: type[Any], settings: Mapping[str, Any]) -> Any:
    """Return `method(**settings)`, every value converted to its field's type and checked against its range.

    Raises:
        SettingError: unknown name, value of another type, or out of range.
    """
    hints, allowed = get_type_hints(method, include_extras=True), [f.name for f in fields(method)]
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in allowed:
            known = f"Settings: {', '.join(allowed)}.{nearest(name, allowed)}"
            raise SettingError(f"unknown setting {name!r} of {method.__name__}. {known}")
        try:
            values[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            why = error.errors()[0]["msg"]
            note = next((m for m in hints[name].__metadata__ if isinstance(m, str)), "")
            raise SettingError(
                f"setting {name}={value} of {method.__name__} is refused: {why} ({name}: {note})."
            ) from error
    return method(**values)


def check(method: Any) -> None:
    """Check the settings of a method made in Python, where a dataclass takes any value.

    Raises:
        SettingError: wrong type or out of range.
    """
    built = build(type(method), asdict(method))
    for name, wanted in asdict(built).items():
        # build converts, as text needs; here a value of another type would go on into the method
        if (given := asdict(method)[name]) != wanted:
            raise SettingError(f"setting {name}={given!r} must be {type(wanted).__name__}, such as {wanted!r}.")


def parse(pairs: Iterable[str]) -> dict[str, str]:
    """Read `key=value` pairs.

    Raises:
        SettingError: a pair has no `=`, or a key comes twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        key, sign, value = (part.strip() for part in pair.partition("="))
        if not (key and sign and value):
            raise SettingError(f"--set {pair!r} is not of the form key=value, such as --set steps=300.")
        if key in found:
            raise SettingError(f"--set {key} is given twice: {found[key]} and {value}.")
        found[key] = value
    return found


def recipe(path: Path) -> dict[str, Any]:
    """Read a recipe: flat TOML, `method = "esd"` and settings.

    Raises:
        SettingError: the file is missing, no TOML, or nested.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(f"the recipe {path} cannot be read: {error}.") from error
    if nested := [k for k, v in found.items() if isinstance(v, dict)]:
        raise SettingError(f"the recipe {path} has a table [{nested[0]}]. Recipes are flat: method and settings.")
    return found
