"""What a study is made of, and what it accepts: pictures, items, ratings, names."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ..errors import BadStudy, nearest

SINGLE = ("concept", "not", "unsure")
PAIRED = ("first", "second", "unsure")
UNSURE = "unsure"
# rings of pairs: each compares every picture twice and connects all of them
RINGS = 2
LONGEST_NAME = 40
LONGEST_TIME = 24 * 3600 * 1000  # milliseconds

_FILE = re.compile(r"[^/\\\x00-\x1f]{1,200}")


@dataclass(frozen=True)
class Picture:
    """A picture of a study.

    Attributes:
        id: from 1 on.
        file: its name in the folder `pictures`.
        prompt: what it was made from; "" when unknown.
        seed: None when unknown.
        drawn: whether the file is there.
    """

    id: int
    file: str
    prompt: str
    seed: int | None
    drawn: bool


@dataclass(frozen=True)
class Item:
    """What a rater answers at once: a picture, or a picture and another one (ids)."""

    id: int
    picture: int
    other: int | None


@dataclass(frozen=True, kw_only=True)
class Rating:
    """One answer of one rater.

    Attributes:
        rater: name.
        item: id of what was asked; of single pictures, the picture's id.
        picture: id of the (first) picture.
        other: id of the second one, None where single pictures are rated.
        prompt, seed: of `picture`.
        answer: one of `SINGLE`, or of `PAIRED`: which of `picture` (first) and `other` (second) is the worse.
        milliseconds: from the picture's appearance to the answer.
        time: ISO 8601, UTC.
    """

    rater: str
    item: int
    picture: int
    other: int | None = None
    prompt: str
    seed: int | None
    answer: str
    milliseconds: int
    time: str

    @property
    def worse(self) -> int | None:
        """Id of the worse of two pictures; None when the rater was unsure, or one picture was asked about."""
        return {"first": self.picture, "second": self.other}.get(self.answer)


@dataclass(frozen=True)
class Progress:
    """How far a study is.

    Attributes:
        pictures, drawn: pictures planned, and those whose files are there.
        items, ready: items planned, and those whose pictures are drawn.
        answered: rater -> items answered.
        wanted: raters who shall rate everything.
    """

    pictures: int
    drawn: int
    items: int
    ready: int
    answered: dict[str, int]
    wanted: int

    @property
    def finished(self) -> int:
        """Raters who have answered everything."""
        return sum(n == self.items for n in self.answered.values())


def now() -> str:
    """Return the time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def question(concept: str, pairs: bool) -> str:
    """Return what raters are asked when nobody says what to ask."""
    if pairs:
        return f"Which shows more of “{concept}”?" if concept else "Which one is worse?"
    return f"Does this show “{concept}”?" if concept else "Should this be erased?"


def rings(n: int, seed: int) -> list[tuple[int, int]]:
    """Return pairs of the pictures 1 to n: random rings, so that any two pictures are linked by comparisons."""
    rng = random.Random(seed)
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for _ in range(RINGS):
        ring = list(range(1, n + 1))
        rng.shuffle(ring)
        for a, b in zip(ring, [*ring[1:], ring[0]], strict=True):
            found.setdefault((min(a, b), max(a, b)), (a, b))
    return list(found.values())


def fold(name: str) -> str:
    """Return the key of a rater's name: spelling with other case or spaces is the same person."""
    return " ".join(unicodedata.normalize("NFKC", name).split()).casefold()


def clean(name: str) -> str:
    """Return a rater's name without spare spaces.

    Raises:
        BadStudy: empty, too long, with control characters, or not beginning with a letter or a number.
    """
    tidy = " ".join(unicodedata.normalize("NFC", name).split())
    printable = all(unicodedata.category(c)[0] != "C" for c in tidy)
    # a spreadsheet takes "=..." for a formula
    if not printable or not 1 <= len(tidy) <= LONGEST_NAME or not tidy[0].isalnum():
        raise BadStudy(
            f"{tidy[:LONGEST_NAME]!r} cannot be a rater's name. Give 1 to {LONGEST_NAME} characters that begin with a "
            "letter or a number."
        )
    return tidy


def check_answer(answer: str, milliseconds: int, allowed: Sequence[str]) -> None:
    """Check an answer.

    Raises:
        BadStudy: the answer is not one of `allowed`, or the time is impossible.
    """
    if answer not in allowed:
        raise BadStudy(f"{answer!r} is no answer here. Answers: {', '.join(allowed)}.{nearest(answer, allowed)}")
    if not 0 <= milliseconds <= LONGEST_TIME:
        raise BadStudy(f"an answer after {milliseconds} ms is impossible. Allowed: 0 to {LONGEST_TIME} (a day).")


def check_plan(n: int, files: Sequence[str], pairs: bool) -> None:
    """Check what a study shall be made of.

    Raises:
        BadStudy: too few pictures; file names that are none, or not one for every picture.
    """
    least = 2 if pairs else 1
    if n < least:
        raise BadStudy(f"a study {'of pairs ' if pairs else ''}needs {least} pictures or more, not {n}. Plan more.")
    if len(files) != n or len(set(files)) != n:
        raise BadStudy(f"{len(set(files))} different file names for {n} pictures. Give each picture one of its own.")
    if bad := [f for f in files if not _FILE.fullmatch(f) or f.startswith(".")]:
        raise BadStudy(f"{bad[0]!r} cannot be a picture's file name: it must be a plain name, without folders.")
