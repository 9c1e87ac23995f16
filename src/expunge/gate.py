"""Gates on scores, such as "ua>=0.95,ira>=0.95", and seeds such as "0-7,12": small languages of the command line."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .errors import SettingError, nearest
from .records import Score

COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_RULE = re.compile(r"^\s*([a-z][a-z0-9_]*)\s*(>=|<=|>|<)\s*([-+0-9.eE]+)\s*$")
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Rule:
    """One condition on one metric."""

    metric: str
    sign: str
    bound: float

    def failure(self, scores: Iterable[Score]) -> str:
        """Return why the rule fails, "" when it holds. A metric that was not measured fails."""
        found = {s.metric: s for s in scores}
        if self.metric not in found:
            hint = nearest(self.metric, found) or f" Measured: {', '.join(found)}."
            return f"{self} fails: {self.metric} was not measured.{hint}"
        value = found[self.metric].value
        if value is None:
            return f"{self} fails: {self.metric} could not be scored ({found[self.metric].errors} errors)."
        return "" if COMPARE[self.sign](value, self.bound) else f"{self} fails: {self.metric} is {value:.6g}."

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.bound:g}"


def parse(text: str) -> tuple[Rule, ...]:
    """Read a gate: rules separated by commas.

    Raises:
        SettingError: a rule that cannot be read.
    """
    rules = []
    for part in text.split(","):
        match = _RULE.match(part)
        try:
            metric, sign, bound = match.groups() if match else ("", "", "")
            rules.append(Rule(metric, sign, float(bound)))
        except ValueError as error:
            raise SettingError(
                f"cannot read {part.strip()!r} in the gate {text!r}. A rule is METRIC SIGN NUMBER with one of "
                f"{' '.join(COMPARE)}, rules are separated by commas: ua>=0.95,ira>=0.95."
            ) from error
    return tuple(rules)


def seeds(text: str) -> tuple[int, ...]:
    """Read seeds: numbers and ranges, both ends included, separated by commas.

    Raises:
        SettingError: no such list.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,15})(?:-(\d{1,15}))?\s*", part)
        if not match:
            raise SettingError(f"cannot read {part!r} in --seeds {text!r}. Give numbers and ranges from 0 up: 0-7,12.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= MOST_SEEDS:
            raise SettingError(
                f"the range {part.strip()} in --seeds is empty or too long (at most {MOST_SEEDS} seeds)."
            )
        found += range(first, last + 1)
    return tuple(dict.fromkeys(found))
