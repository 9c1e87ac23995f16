"""Run folder -> checked data. Whatever a later stage could trip over is refused here, with the file's name."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

from PIL import Image

from ..errors import BadRun
from ..records import CARD, NEIGHBOURS, OUTCOMES, REWARD, SAMPLES, SCORES, Card, Json, Run, Score

INDEX = f"{SAMPLES}/index.json"

# pictures up to this side go in byte for byte; larger ones (full-size models) as JPEG, or a report would be 20 MB
LARGEST_SIDE = 256
JPEG_QUALITY = 85

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """The same prompt and seed, drawn by the base model and by the edited one."""

    role: str
    concept: str
    prompt: str
    seed: int
    base: str
    edited: str
    size: tuple[int, int]
    reading: str
    wrong: bool


@dataclass(frozen=True)
class Neighbour:
    """A retained concept near the target; `base` and `edited`: the judge's mean probability of it over `n` pictures."""

    name: str
    base: float
    edited: float
    damage: float
    n: int
    text_similarity: float | None
    image_similarity: float | None


@dataclass(frozen=True)
class Auc:
    """How well a reward model tells what people reject, on pictures it has not seen, after so many ratings."""

    ratings: int
    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Ratings:
    """A rating study that a concept was learned from, and how good its reward model is."""

    concept: str
    study: str
    embedding: str
    pairs: bool
    raters: int
    rated: int
    rejected: int
    blind: bool
    auc: Auc
    calibration: float | None
    curve: list[Auc]


@dataclass(frozen=True)
class Contents:
    """Everything that the report shows of one run."""

    path: str
    name: str
    card: Card
    scores: list[Score]
    pairs: list[Pair]
    left_out: int
    neighbours: list[Neighbour]
    ratings: list[Ratings]


def read(run: Run, most_pairs: int) -> Contents:
    """Read a run, at most `most_pairs` picture pairs of each role.

    Raises:
        BadRun: when a file is broken; the message names it.
    """
    card = _file(run, CARD, lambda: run.card)
    _file(run, CARD, lambda: _check_card(card))
    scores = _file(run, SCORES, lambda: [_check_score(s) for s in run.scores])
    neighbours = _file(run, NEIGHBOURS, lambda: [_neighbour(r) for r in run.neighbours])
    ratings = _file(run, REWARD, lambda: [_ratings(r) for r in run.reward])
    readings = _file(run, OUTCOMES, lambda: _readings(run.outcomes))
    rows = _file(run, INDEX, lambda: [_sample(r) for r in run.samples])
    shown = _first(rows, most_pairs)
    return Contents(
        path=str(run.folder),
        name=run.name,
        card=card,
        scores=scores,
        pairs=[_pair(run, r, readings) for r in shown],
        left_out=len(rows) - len(shown),
        neighbours=sorted(neighbours, key=lambda n: (-n.damage, n.name)),
        ratings=ratings,
    )


def _file(run: Run, name: str, get: Callable[[], T]) -> T:
    """Call `get`; whatever is wrong with the data becomes a BadRun that names the file."""
    path = str(run.folder / name)
    try:
        return get()
    except BadRun as error:
        if path in str(error):
            raise
        raise BadRun(f"{path}: {error}") from error
    except KeyError as error:
        raise BadRun(f"{path}: a row lacks the field {error}.") from error
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise BadRun(f"{path} cannot be read: {error}.") from error


def _check_card(card: Card) -> None:
    if any(not isinstance(c["name"], str) for c in card.concepts):
        raise ValueError("a concept has no name")
    if not isinstance(card.settings, dict):
        raise ValueError("settings are not a JSON object")
    for term, values in card.losses.items():
        if not all(isinstance(v, (int, float)) for v in values):
            raise ValueError(f"the loss {term!r} is not a list of numbers")
    number(card.seconds), number(card.peak_bytes), number(card.steps), number(card.samples_seen)


def _check_score(score: Score) -> Score:
    for value in (score.value, score.low, score.high, score.base, score.p):
        if value is not None:
            number(value)
    number(score.n), number(score.errors)
    if not (isinstance(score.protocol, str) and isinstance(score.metric, str)):
        raise ValueError("protocol and metric must be text")
    return score


def number(value: Any) -> float:
    """Return a finite number.

    Raises:
        ValueError: when it is none. NaN is not a measurement; a missing one is null.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return value


def _neighbour(row: Json) -> Neighbour:
    def similarity(key: str) -> float | None:
        return None if row.get(key) is None else number(row[key])

    return Neighbour(
        name=str(row["name"]),
        base=number(row["base"]),
        edited=number(row["edited"]),
        damage=number(row["damage"]),
        n=int(number(row["n"])),
        text_similarity=similarity("text_similarity"),
        image_similarity=similarity("image_similarity"),
    )


def _ratings(row: Json) -> Ratings:
    def auc(found: Json, ratings: int) -> Auc:
        value, low, high = (None if found[k] is None else number(found[k]) for k in ("value", "low", "high"))
        return Auc(ratings, value, low, high, int(number(found["n"])))

    return Ratings(
        concept=str(row["concept"]),
        study=str(row["study"]),
        embedding=str(row["embedding"]),
        pairs=bool(row["pairs"]),
        raters=int(number(row["raters"])),
        rated=int(number(row["rated"])),
        rejected=int(number(row["rejected"])),
        blind=bool(row["blind"]),
        auc=auc(row["auc"], int(number(row["rated"]))),
        calibration=None if row["calibration"] is None else number(row["calibration"]),
        curve=[auc(r, int(number(r["ratings"]))) for r in row["curve"]],
    )


def _readings(rows: list[Json]) -> dict[tuple[str, int], tuple[str, str]]:
    """Map (prompt, seed) to what the scoring judge read in the base and in the edited picture, "" for nothing."""
    found: dict[tuple[str, int], tuple[str, str]] = {}
    for row in rows:
        head = "style" if row["role"] == "style" else "object"
        base, edited = (str((row[side] or {}).get(head) or "") for side in ("base", "edited"))
        found[(row["prompt"], row["seed"])] = (base, edited)
    return found


def _sample(row: Json) -> Json:
    for key in ("base", "edited"):
        name = row[key]
        # a report may be made of a stranger's run folder: it must not be able to embed files from outside of it
        if not isinstance(name, str) or name in ("", ".", "..") or PurePath(name).name != name or "\\" in name:
            raise ValueError(f"{name!r} is not the name of a picture beside it")
    return {k: row[k] for k in ("role", "concept", "prompt", "seed", "base", "edited")}


def _first(rows: list[Json], most: int) -> list[Json]:
    seen: dict[str, int] = {}
    shown = []
    for row in rows:
        role = str(row["role"])
        seen[role] = seen.get(role, 0) + 1
        if seen[role] <= most:
            shown.append(row)
    return shown


def _pair(run: Run, row: Json, readings: dict[tuple[str, int], tuple[str, str]]) -> Pair:
    base, size = picture(run.folder / SAMPLES / row["base"])
    edited, _ = picture(run.folder / SAMPLES / row["edited"])
    role, concept = str(row["role"]), str(row["concept"])
    before, after = readings.get((row["prompt"], row["seed"]), ("", ""))
    return Pair(
        role=role,
        concept=concept,
        prompt=str(row["prompt"]),
        seed=int(row["seed"]),
        base=base,
        edited=edited,
        size=size,
        reading=_arrow(before, after),
        wrong=bool(before) and (after == concept if role == "target" else before == concept != after),
    )


def _arrow(before: str, after: str) -> str:
    """Spell what was read in a pair."""
    if not before and not after:
        return ""
    if before == after:
        return f"read as {before} in both"
    return f"{before or 'not read'} \N{RIGHTWARDS ARROW} {after or 'not read'}"


def picture(path: Path) -> tuple[str, tuple[int, int]]:
    """Return a picture as a data URI, and its width and height in pixels.

    Raises:
        BadRun: when it is missing or broken.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
            opened.load()
            image = opened.convert("RGB") if max(opened.size) > LARGEST_SIDE else None
            size = opened.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow names its buffer, not our file
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a whole PNG picture"
        raise BadRun(f"{path} cannot be read: {why}. Make the pictures again with `expunge audit`.") from error
    kind = "png"
    if image is not None:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=JPEG_QUALITY)
        data, size, kind = out.getvalue(), image.size, "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", size


def value_text(value: Any) -> str:
    """Spell a setting as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
