"""Settings from text: types, ranges, near misses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from expunge import flags, methods
from expunge.errors import SettingError


def test_text_becomes_the_fields_types() -> None:
    method = flags.build(methods.get("sdd"), flags.parse(["steps=300", "lr=1e-3", "group=all"]))
    assert (method.steps, method.lr, method.group) == (300, 1e-3, "all")
    assert method == methods.get("sdd")(steps=300, lr=1e-3, group="all")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepz": 3}, "unknown setting 'stepz' of SDD.*Settings: group, .*Did you mean 'steps'"),
        ({"steps": -1}, "steps=-1 of SDD is refused.*greater than or equal to 0.*optimiser updates"),
        ({"steps": 10**9}, "less than or equal"),
        ({"steps": "many"}, "valid integer"),
        ({"steps": "1.5"}, "valid integer"),
        ({"lr": "nan"}, "refused"),
        ({"lr": "inf"}, "refused"),
        ({"lr": 0}, "greater than 0"),
        ({"decay": 1.0}, "less than 1"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        flags.build(methods.get("sdd"), settings)


def test_methods_made_in_python_are_checked_too() -> None:
    flags.check(methods.get("sdd")())
    with pytest.raises(SettingError, match="steps=-5"):
        flags.check(methods.get("sdd")(steps=-5))
    with pytest.raises(SettingError, match="must be int"):
        flags.check(methods.get("sdd")(steps="5"))


@pytest.mark.parametrize("pair", ["steps", "steps=", "=3", ""])
def test_malformed_pairs(pair: str) -> None:
    with pytest.raises(SettingError, match="not of the form key=value"):
        flags.parse([pair])


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(SettingError, match="given twice"):
        flags.parse(["steps=1", "steps=2"])


def test_recipes(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('method = "esd"\neta = 2.0\n')
    assert flags.recipe(path) == {"method": "esd", "eta": 2.0}
    path.write_text("[table]\na = 1\n")
    with pytest.raises(SettingError, match="flat"):
        flags.recipe(path)
    path.write_text("a = ")
    with pytest.raises(SettingError, match="cannot be read"):
        flags.recipe(path)
    with pytest.raises(SettingError, match="cannot be read"):
        flags.recipe(tmp_path / "none.toml")
