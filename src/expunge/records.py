"""What a run leaves behind: its card, its scores, its pictures. Plain JSON in a folder, no torch.

card.json            what was done to which model, at what cost (written last: a card means a whole run)
edit.safetensors     the edit
state.safetensors    what an interrupted run goes on with; of a finished one that can go on, where that was wanted
lora/                low-rank edits only: what `pipe.load_lora_weights` reads
scores.json          list of Score
outcomes.jsonl       one line a picture pair
neighbours.json      retained concepts nearest to the target, by damage
reward.json          of concepts that people rated: how much was rated, and how good the reward model is
samples/index.json   picture pairs, the PNGs beside it, and sheet.png
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .errors import BadRun
from .storage import write_atomic, write_json

CARD = "card.json"
EDIT = "edit.safetensors"
CHECKPOINT = "state.safetensors"
SCORES = "scores.json"
OUTCOMES = "outcomes.jsonl"
NEIGHBOURS = "neighbours.json"
SAMPLES = "samples"
REWARD = "reward.json"

MOST_LOSSES = 200

Json = dict[str, Any]
R = TypeVar("R", "Card", "Score")


@dataclass(frozen=True, kw_only=True)
class Card:
    """Provenance of an edit.

    Attributes:
        method: name in the table of methods.
        settings: every setting of the method, defaults included.
        concept: the (first) erased concept, as `Concept.to_json` gives it; empty for a plain distillation.
        also: further concepts that the same edit erases.
        model: what the base was loaded from.
        base_hash: hash of the base's weights.
        seed: seed of the run.
        version: version of Expunge that made it.
        kind: "weights", "lowrank", "gated", "hook" or "generator".
        seconds: wall clock of the erasure, interruptions left out.
        peak_bytes: highest memory of the process (of the device, on a GPU) during the erasure.
        losses: term -> values over the run, at most 200 each.
        steps: updates made.
        created: ISO 8601, UTC.
        status: "complete", or "diverged at step 12".
        samples_seen: updates times batch size; 0 in closed form.
        make_images: pictures that were drawn of each concept, and as many to retain, for the method to learn from.
        contents: SHA-256 of what each file and folder held that the run learned from, by what it was given as.
        chosen: what the method chose for settings that were left to the model ("auto").
    """

    method: str
    settings: Json
    concept: Json
    also: list[Json] = field(default_factory=list)
    model: str
    base_hash: str
    seed: int
    version: str
    kind: str = "weights"
    seconds: float = 0.0
    peak_bytes: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)
    steps: int = 0
    created: str = ""
    status: str = "complete"
    samples_seen: int = 0
    make_images: int = 0
    contents: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)

    @property
    def concepts(self) -> list[Json]:
        """Every concept that the edit erases."""
        return [c for c in (self.concept, *self.also) if c]

    def to_json(self) -> Json:
        """Return the card as plain JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Card:
        """Read a card.

        Raises:
            BadRun: when a field is missing or unknown.
        """
        return _read(cls, data)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of a protocol.

    Attributes:
        protocol: id of the protocol, such as "emoji-v1".
        metric: its name, such as "ua".
        value: the number; None when nothing could be scored.
        low: lower end of the 95 % interval, None where the metric has none.
        high: upper end.
        n: pictures that were scored; those that could not be are not in it.
        errors: pictures that could not be scored. A rate is over n + errors, and errors count against the edit; a mean
            or a distance is over the n alone.
        base: the same number for the base model.
        p: two-sided p-value of the paired difference from the base.
    """

    protocol: str
    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    errors: int = 0
    base: float | None = None
    p: float | None = None

    def to_json(self) -> Json:
        """Return the score as plain JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Score:
        """Read a score.

        Raises:
            BadRun: when a field is missing or unknown.
        """
        return _read(cls, data)


@dataclass(frozen=True)
class Run:
    """A run's folder. Reading is lazy: every property reads its file."""

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open the folder of a finished run.

        Raises:
            BadRun: when the folder or its card is missing, with what was found instead.
        """
        run = cls(Path(folder))
        if not run.folder.is_dir():
            raise BadRun(
                f"there is no run at {folder}: no such folder. Make one with `expunge erase MODEL --out {folder}`."
            )
        if not (run.folder / CARD).is_file():
            there = ", ".join(sorted(p.name for p in run.folder.iterdir() if not p.name.startswith("."))[:8])
            raise BadRun(
                f"{folder} is not a finished run: {CARD} is missing (found: {there or 'nothing'}). "
                "If the erasure was interrupted, give the same `expunge erase` command again with --resume."
            )
        return run

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def card(self) -> Card:
        """The card."""
        data = self._json(CARD)
        if not isinstance(data, dict):
            raise BadRun(f"{self.folder / CARD} holds no JSON object.")
        try:
            return Card.from_json(data)
        except BadRun as error:
            raise BadRun(f"{self.folder / CARD}: {error}") from error

    @property
    def scores(self) -> list[Score]:
        """Every score; empty before the first audit."""
        return [Score.from_json(s) for s in self._rows(SCORES)]

    @property
    def edit_path(self) -> Path:
        """Where the edit lies.

        Raises:
            BadRun: when it does not.
        """
        path = self.folder / EDIT
        if not path.is_file():
            raise BadRun(f"{self.folder} holds no edit: {EDIT} is missing (status: {self.card.status}).")
        return path

    @property
    def samples(self) -> list[Json]:
        """Rows of samples/index.json: role, concept, prompt, seed, and the names of the two pictures."""
        return self._rows(f"{SAMPLES}/index.json")

    @property
    def neighbours(self) -> list[Json]:
        """Rows of neighbours.json, the most damaged first."""
        return self._rows(NEIGHBOURS)

    @property
    def reward(self) -> list[Json]:
        """Rows of reward.json, one a rating study; empty where the concept is no study."""
        return self._rows(REWARD)

    @property
    def outcomes(self) -> list[Json]:
        """Rows of outcomes.jsonl, one a picture pair; empty before the first audit.

        Raises:
            BadRun: a line is broken, with its number.
        """
        path = self.folder / OUTCOMES
        return list(_lines(path)) if path.is_file() else []

    def write_card(self, card: Card) -> None:
        """Write the card."""
        write_json(self.folder / CARD, card.to_json())

    def withdraw(self) -> None:
        """Remove the card, and what an audit said of the edit that another one is about to replace; the card first."""
        for name in (CARD, SCORES, OUTCOMES, NEIGHBOURS):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / SAMPLES, ignore_errors=True)

    def write_scores(self, scores: Sequence[Score]) -> None:
        """Write scores; they replace every earlier one of the same protocols."""
        new = {s.protocol for s in scores}
        kept = [s for s in self.scores if s.protocol not in new]
        write_json(self.folder / SCORES, [s.to_json() for s in (*kept, *scores)])

    def write_neighbours(self, rows: Sequence[Json]) -> None:
        """Write the neighbours, sorted by the damage done to them."""
        write_json(self.folder / NEIGHBOURS, sorted(rows, key=lambda r: -float(r.get("damage") or 0)))

    def write_outcomes(self, rows: Sequence[Json]) -> None:
        """Write one line a picture pair."""
        lines = (json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in rows)
        write_atomic(self.folder / OUTCOMES, "".join(lines).encode())

    def write_samples(self, rows: Sequence[Json]) -> None:
        """Write samples/index.json; the pictures are the caller's."""
        write_json(self.folder / SAMPLES / "index.json", list(rows))

    def _rows(self, name: str) -> list[Json]:
        rows = self._json(name) if (self.folder / name).is_file() else []
        if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
            raise BadRun(f"{self.folder / name} holds no list of JSON objects.")
        return rows

    def _json(self, name: str) -> Any:
        path = self.folder / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadRun(f"{path} cannot be read: {error}.") from error


def need_empty(folder: Path) -> None:
    """Check that a folder may be written to: it is empty, or does not exist.

    Raises:
        BadRun: when it holds files.
    """
    if folder.exists() and not folder.is_dir():
        raise BadRun(f"{folder} is a file. Give a folder that is empty or does not exist.")
    if folder.is_dir() and (there := sorted(p.name for p in folder.iterdir())):
        mend = "Add --resume to go on with the interrupted run in it" if CHECKPOINT in there else "Choose another"
        if {CARD, CHECKPOINT} <= {*there}:
            mend = "Add --resume and more steps (--set steps=...) to go on with the finished run in it"
        raise BadRun(f"the folder {folder} is not empty (it holds {', '.join(there[:4])}). {mend}, or empty it.")


def thin(values: Sequence[float], most: int = MOST_LOSSES) -> list[float]:
    """Return at most `most` of `values`, evenly spaced, the first and the last included."""
    n = len(values)
    if n <= most:
        return list(values)
    return [values[round(i * (n - 1) / (most - 1))] for i in range(most)]


def _lines(path: Path) -> Iterator[Json]:
    """Yield the objects of a file of JSON lines."""
    mend = "Audit the run again: `expunge audit` writes the file anew."
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadRun(f"{path} cannot be read: {error}. {mend}") from error
    # not splitlines: a prompt may hold one of the rarer line ends, which JSON leaves as they are
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadRun(f"{path}, line {number}, is broken: {error}. {mend}") from error
        if not isinstance(row, dict):
            raise BadRun(f"{path}, line {number}, holds no JSON object: {line[:40]!r}. {mend}")
        yield row


def _read(cls: type[R], data: Mapping[str, Any]) -> R:
    try:
        return cls(**data)
    except TypeError as error:
        known = ", ".join(f.name for f in fields(cls))
        raise BadRun(f"not a {cls.__name__.lower()}: {str(error).split(') ')[-1]}. Fields: {known}.") from error
