"""Ratings out of a study and into it: JSON lines, CSV or parquet, by the file's ending; values as they are.

A row of an export holds every field of a rating, and the files' names. A row to import holds

    rater, answer           required
    picture or file         the picture's id, or its file's name; in a study of pairs `other` or `other_file` too
    milliseconds, time      0 and now, if they are missing
    prompt, seed, item      checked against the study where they are given
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import BadStudy, NeedsError
from ..storage import replacing, write_atomic
from .data import Item, check_answer, clean, fold
from .study import Study

FIELDS = ("rater", "item", "picture", "file", "other", "other_file", "prompt", "seed", "answer", "milliseconds", "time")
NUMBERS = frozenset({"item", "picture", "other", "seed", "milliseconds"})
FORMATS = (".jsonl", ".csv", ".parquet")
SWAP = {"first": "second", "second": "first", "unsure": "unsure"}

Row = dict[str, Any]


def export(study: Study, path: Path) -> int:
    """Write every rating of a study, and return how many.

    Raises:
        BadStudy: the file's ending is not one of `FORMATS`.
        NeedsError: parquet without pyarrow.
    """
    _check_format(path)
    files = {p.id: p.file for p in study.pictures()}
    rows = [asdict(r) | {"file": files[r.picture], "other_file": files.get(r.other or 0)} for r in study.ratings()]
    rows = [{k: row[k] for k in FIELDS} for row in rows]
    if path.suffix == ".jsonl":
        write_atomic(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode())
    elif path.suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(path, text.getvalue().encode())
    else:
        _write_parquet(rows, path)
    return len(rows)


def load(study: Study, path: Path) -> tuple[int, int]:
    """Take ratings made elsewhere into a study: all of the file or, when anything in it is wrong, nothing.

    Returns:
        How many are new, and how many the study had already.

    Raises:
        BadStudy: a row that cannot be read or belongs to another study, with its number; one rater's two answers.
        NeedsError: parquet without pyarrow.
    """
    lookup = _Lookup(study)
    known = {(fold(r.rater), r.item): r.answer for r in study.ratings()}
    answers = []
    for number, row in enumerate(rows(path), 1):
        try:
            found = lookup.answer(row)
        except BadStudy as error:
            raise BadStudy(f"{path}, rating {number}: {error} Nothing was imported.") from error
        rater, item, answer, *_ = found
        if known.setdefault((fold(rater), item), answer) != answer:
            raise BadStudy(
                f"{path}, rating {number}: {rater} answered {known[fold(rater), item]!r} to item {item} elsewhere, and "
                f"{answer!r} here. Keep one of the two. Nothing was imported."
            )
        answers.append(found)
    new = study.rate_all(answers)
    return new, len(answers) - new


def rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON lines, CSV or parquet file; what is empty is None, numbers of `NUMBERS` are whole.

    Raises:
        BadStudy: missing, of another format, or with a row that cannot be read.
        NeedsError: parquet without pyarrow.
    """
    _check_format(path)
    try:
        if path.suffix == ".parquet":
            found = _arrow(path, "pyarrow.parquet").read_table(path).to_pylist()
        elif path.suffix == ".csv":
            found = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
        else:
            # not splitlines: a prompt may hold one of the rarer line ends, which JSON leaves as they are
            found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise BadStudy(f"{path} cannot be read: {error}.") from error
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict) or None in row:
            raise BadStudy(f"{path}, row {number}, is no row of names and values.")
        try:
            yield {k: _value(k, v) for k, v in row.items()}
        except ValueError as error:
            raise BadStudy(f"{path}, row {number}: {error}.") from error


class _Lookup:
    """What a study is asked for by rows that come from elsewhere."""

    def __init__(self, study: Study) -> None:
        self.answers = study.answers
        self.pairs = study.pairs
        self.pictures = {p.id: p for p in study.pictures()}
        self.ids = {p.file: p.id for p in study.pictures()}
        self.items = {(i.picture, i.other): i for i in study.items()}

    def answer(self, row: Row) -> tuple[str, int, str, int, str]:
        """Return what `Study.rate_all` takes, checked."""
        rater, answer = clean(str(row.get("rater") or "")), str(row.get("answer") or "")
        milliseconds = row.get("milliseconds") or 0
        check_answer(answer, milliseconds, self.answers)
        item, turned = self._item(row)
        picture = self.pictures[item.picture]
        own = {"item": item.id} if turned else {"item": item.id, "prompt": picture.prompt, "seed": picture.seed}
        for key, value in own.items():
            if row.get(key) not in (None, value):
                raise BadStudy(f"{key} {row[key]!r} is not that of picture {picture.id}, {value!r}.")
        return rater, item.id, SWAP[answer] if turned else answer, milliseconds, _time(row.get("time"))

    def picture(self, row: Mapping[str, Any], number: str = "picture", name: str = "file") -> int:
        """Return the id of the picture that a row names by number, by file, or by both."""
        by_file = self.ids.get(str(row.get(name)))
        found = by_file if row.get(number) is None else row[number]
        if found not in self.pictures or (row.get(name) is not None and by_file != found):
            said = ", ".join(f"{k} {row[k]!r}" for k in (number, name) if row.get(k) is not None) or f"no {number}"
            raise BadStudy(f"{said}: not a picture of this study (1 to {len(self.pictures)}).")
        return int(found)

    def _item(self, row: Row) -> tuple[Item, bool]:
        first = self.picture(row)
        if not self.pairs:
            return self.items[first, None], False
        second = self.picture(row, "other", "other_file")
        for key, turned in (((first, second), False), ((second, first), True)):
            if key in self.items:
                return self.items[key], turned
        raise BadStudy(f"pictures {first} and {second} are no pair of this study.")


def scores(study: Study, path: Path) -> dict[int, float]:
    """Read a detector's score of every picture: rows of `picture` or `file`, and `score`; returned by picture id.

    Raises:
        BadStudy: a row without a score, or of a picture that the study does not have, or has twice.
    """
    lookup = _Lookup(study)
    found: dict[int, float] = {}
    for number, row in enumerate(rows(path), 1):
        try:
            picture = lookup.picture(row)
        except BadStudy as error:
            raise BadStudy(f"{path}, row {number}: {error}") from error
        try:
            score = float(row["score"])
        except (KeyError, TypeError, ValueError):
            score = math.nan
        if math.isnan(score) or picture in found:
            what = "another score" if picture in found else "no number `score`"
            raise BadStudy(f"{path}, row {number}, holds {what} of picture {picture}. Give one for each picture.")
        found[picture] = score
    return found


def _value(name: str, value: Any) -> Any:
    if value in (None, ""):
        return None
    if name not in NUMBERS:
        return value
    try:
        return int(str(value))
    except ValueError:
        number = float(str(value))  # a spreadsheet's 1.0
    if not number.is_integer():
        raise ValueError(f"{name} is {value!r}, not a whole number")
    return int(number)


def _time(value: Any) -> str:
    if not value:
        return ""
    try:
        datetime.fromisoformat(str(value))
    except ValueError as error:
        raise BadStudy(f"time {value!r} is not as ISO 8601 has it, such as 2026-01-31T12:00:00+00:00.") from error
    return str(value)


def _check_format(path: Path) -> None:
    if path.suffix not in FORMATS:
        raise BadStudy(f"{path} ends in {path.suffix or 'nothing'!r}. Formats: {', '.join(FORMATS)}.")


def _arrow(path: Path, module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise NeedsError(
            f"{path} needs pyarrow, which is not installed. Install it: pip install 'expunge[parquet]', or write .csv."
        ) from error


def _write_parquet(rows: Sequence[Row], path: Path) -> None:
    arrow, parquet = _arrow(path, "pyarrow"), _arrow(path, "pyarrow.parquet")
    kinds = [(k, arrow.int64() if k in NUMBERS else arrow.string()) for k in FIELDS]
    with replacing(path) as temp:
        parquet.write_table(arrow.Table.from_pylist(list(rows), arrow.schema(kinds)), temp)
