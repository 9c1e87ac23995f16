"""A rating study: pictures, raters and answers in one folder.

study.sqlite        everything but the pictures (WAL: who reads never waits for who rates)
pictures/00001.png  the pictures

An item is what a rater answers at once: one picture ("concept", "not" or "unsure"), or two of them, of which the worse
is picked ("first", "second" or "unsure"). A study asks the one or the other; where single pictures are rated, an item
has its picture's id. A picture is planned before it is drawn, so the order of items stands from the beginning.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import BadStudy
from ..records import need_empty
from ..storage import replacing, sweep, write_atomic
from .data import (
    PAIRED,
    SINGLE,
    Item,
    Picture,
    Progress,
    Rating,
    check_answer,
    check_plan,
    clean,
    fold,
    now,
    question,
    rings,
)
from .database import SCHEMA, Database

DATABASE = "study.sqlite"
PICTURES = "pictures"
STOPPED = "drawing stopped"  # a note: pictures are missing, and nobody draws them any more
VERSION = 1
_JOIN = "INSERT OR IGNORE INTO raters (name, folded) VALUES (?, ?)"
_READY = """FROM items JOIN pictures p ON p.id = items.picture LEFT JOIN pictures o ON o.id = items.other
WHERE p.drawn AND (items.other IS NULL OR o.drawn)"""


class Study:
    """An open study. Its methods may be called from several threads, and several processes may have it open.

        with Study.open("studies/creepy") as study:
            labels = [(r.picture, r.answer) for r in study.ratings()]

    Attributes:
        folder: where it lies.
        ask: the question raters read.
        concept: what is asked for; a label.
        pairs: whether the worse of two is picked.
        blur: whether pictures are blurred until asked for.
        wanted: raters who shall rate everything.
        seed: decides every rater's order.
        source: where the pictures come from: "model" and how it samples, or "folder".
        created: when it was made, ISO 8601, UTC.
    """

    def __init__(self, folder: Path, db: Database, about: Mapping[str, Any]) -> None:
        self.folder, self._db = folder, db
        self.ask: str = about["ask"]
        self.concept: str = about["concept"]
        self.pairs: bool = about["pairs"]
        self.blur: bool = about["blur"]
        self.wanted: int = about["wanted"]
        self.seed: int = about["seed"]
        self.source: dict[str, Any] = about["source"]
        self.created: str = about["created"]

    @classmethod
    def create(
        cls,
        folder: str | Path,
        planned: Iterable[tuple[str, int | None]],
        *,
        concept: str = "",
        ask: str = "",
        pairs: bool = False,
        blur: bool = False,
        wanted: int = 1,
        seed: int = 0,
        files: Sequence[str] = (),
        source: Mapping[str, Any] | None = None,
    ) -> Self:
        """Make a study; its pictures come later, by `put`.

        Args:
            folder: empty, or not there yet.
            planned: (prompt, seed) of every picture.
            concept: a label of what is looked for.
            ask: the question raters read; by default made from the concept.
            pairs: let raters pick the worse of two pictures instead of marking one.
            blur: blur pictures until a rater hovers over them, touches them or asks for them by key.
            wanted: raters who shall rate everything; more may come.
            seed: decides every rater's order, and who meets whom in pairs.
            files: names of the pictures; by default their numbers.
            source: where the pictures come from, for those who draw them.

        Raises:
            BadStudy: no pictures, one picture only to be paired, or names that are no file names or not unique.
            BadRun: the folder is not empty.
        """
        rows, folder = list(planned), Path(folder)
        names = list(files) or [f"{i:05d}.png" for i in range(1, len(rows) + 1)]
        check_plan(len(rows), names, pairs)
        if folder.is_dir():
            sweep(folder)
        need_empty(folder)
        items = rings(len(rows), seed) if pairs else [(i, None) for i in range(1, len(rows) + 1)]
        about = {"version": VERSION, "ask": ask or question(concept, pairs), "concept": concept, "pairs": pairs,
                 "blur": blur, "wanted": wanted, "seed": seed, "source": dict(source or {}),
                 "created": now()}  # fmt: skip
        with replacing(folder / DATABASE) as temp, closing(Database(temp)) as database, database.change() as db:
            for table in SCHEMA.split(";"):
                db.execute(table)
            db.executemany("INSERT INTO about VALUES (?, ?)", ((k, json.dumps(v)) for k, v in about.items()))
            db.executemany(
                "INSERT INTO pictures (file, prompt, seed) VALUES (?, ?, ?)",
                ((f, p, s) for f, (p, s) in zip(names, rows, strict=True)),
            )
            db.executemany("INSERT INTO items (picture, other) VALUES (?, ?)", items)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a study.

        Raises:
            BadStudy: there is none, it is damaged, or a newer version of Expunge made it.
        """
        path = Path(folder) / DATABASE
        if not path.is_file():
            raise BadStudy(
                f"there is no study at {folder}: {DATABASE} is missing. Make one: `expunge rate MODEL --out {folder}`."
            )
        db = None
        try:
            db = Database(path)
            about = {k: json.loads(v) for k, v in db.rows("SELECT key, value FROM about")}
            if about["version"] != VERSION:
                raise BadStudy(f"{path} has version {about['version']}, this Expunge reads {VERSION}. Update Expunge.")
            return cls(Path(folder), db, about)
        except (sqlite3.DatabaseError, KeyError, ValueError, BadStudy) as error:
            if db:
                db.close()
            if isinstance(error, BadStudy):
                raise
            raise BadStudy(f"{path} is no study of Expunge, or is damaged: {error}.") from error

    def close(self) -> None:
        """Close the database; the study cannot be used afterwards."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers a rater may give."""
        return PAIRED if self.pairs else SINGLE

    # ---------------------------------------------------------------------------------------------------- pictures

    def pictures(self) -> list[Picture]:
        """Return every picture, drawn or planned, by id."""
        rows = self._db.rows("SELECT id, file, prompt, seed, drawn FROM pictures ORDER BY id")
        return [Picture(i, f, p, s, bool(d)) for i, f, p, s, d in rows]

    def path(self, picture: int) -> Path:
        """Return where a picture's file is, or will be.

        Raises:
            BadStudy: the study has no such picture.
        """
        rows = self._db.rows("SELECT file FROM pictures WHERE id = ?", (picture,))
        if not rows:
            raise BadStudy(f"the study has no picture {picture}. Pictures: 1 to {len(self.pictures())}.")
        return self.folder / PICTURES / str(rows[0][0])

    def put(self, picture: int, png: bytes) -> None:
        """Store a picture's PNG file, whole or not at all; from then on raters may see it."""
        write_atomic(self.path(picture), png)
        with self._db.change() as db:
            db.execute("UPDATE pictures SET drawn = 1 WHERE id = ?", (picture,))

    def note(self, key: str, value: Any) -> None:
        """Keep a JSON value under a name of one's own; None removes it."""
        with self._db.change() as db:
            db.execute("DELETE FROM about WHERE key = ?", (f"note:{key}",))
            if value is not None:
                db.execute("INSERT INTO about VALUES (?, ?)", (f"note:{key}", json.dumps(value)))

    def noted(self, key: str) -> Any:
        """Return what `note` kept, None if nothing."""
        rows = self._db.rows("SELECT value FROM about WHERE key = ?", (f"note:{key}",))
        return json.loads(rows[0][0]) if rows else None

    # ------------------------------------------------------------------------------------------------------- items

    def items(self) -> list[Item]:
        """Return every item, by id."""
        return [Item(*row) for row in self._db.rows("SELECT id, picture, other FROM items ORDER BY id")]

    def order(self, rater: str) -> list[int]:
        """Return every item's id in a rater's order, which the study's seed and the rater's name alone decide."""
        return sorted((i for (i,) in self._db.rows("SELECT id FROM items")), key=self._rank(rater, "order"))

    def upcoming(self, rater: str, n: int = 1) -> list[Item]:
        """Return up to n items to answer next: in the rater's order, unanswered, with their pictures drawn."""
        rows = self._db.rows(
            f"SELECT items.id, items.picture, items.other {_READY} AND items.id NOT IN "
            "(SELECT item FROM answers JOIN raters ON raters.id = rater WHERE folded = ?)",
            (fold(rater),),
        )
        rank = self._rank(rater, "order")
        return sorted((Item(*row) for row in rows), key=lambda item: rank(item.id))[:n]

    def swapped(self, rater: str, item: int) -> bool:
        """Return whether a rater sees the second picture of a pair on the left, so that no side is favoured."""
        return self._rank(rater, "side")(item)[0] % 2 == 1

    # ------------------------------------------------------------------------------------------------------ raters

    def join(self, name: str) -> str:
        """Enter a rater, unless known already (case does not matter), and return the name as the study spells it.

        Raises:
            BadStudy: the name is empty, too long, or does not begin with a letter or a number.
        """
        tidy = clean(name)
        with self._db.change() as db:
            db.execute(_JOIN, (tidy, fold(tidy)))
        return str(self._db.rows("SELECT name FROM raters WHERE folded = ?", (fold(tidy),))[0][0])

    def raters(self) -> list[str]:
        """Return the raters' names, in the order in which they came."""
        return [name for (name,) in self._db.rows("SELECT name FROM raters ORDER BY id")]

    # ----------------------------------------------------------------------------------------------------- answers

    def rate(self, rater: str, item: int, answer: str, milliseconds: int = 0, time: str = "") -> bool:
        """Store an answer; a rater who is not known yet joins.

        What is stored stays until it is undone: an answer sent twice (a lost reply, two windows) counts once.

        Args:
            rater: name.
            item: its id; where single pictures are rated, the picture's.
            answer: one of `answers`.
            milliseconds: time taken.
            time: ISO 8601, UTC; now by default.

        Returns:
            Whether it was new.

        Raises:
            BadStudy: no such item or answer, its picture is not drawn, or an impossible time.
        """
        return self.rate_all([(rater, item, answer, milliseconds, time)]) == 1

    def rate_all(self, answers: Iterable[tuple[str, int, str, int, str]]) -> int:
        """Store (rater, item, answer, milliseconds, time) many times over, all or none; return how many were new.

        Raises:
            BadStudy: as `rate`.
        """
        rows = list(answers)
        for _, _, answer, milliseconds, _ in rows:
            check_answer(answer, milliseconds, self.answers)
        with self._db.change() as db:
            ready = {i for (i,) in db.execute(f"SELECT items.id {_READY}")}
            if strange := [item for _, item, *_ in rows if item not in ready]:
                raise BadStudy(f"no answer to {strange[0]} can be stored: no such item, or it is not drawn yet.")
            names = {clean(name): None for name, *_ in rows}
            db.executemany(_JOIN, ((name, fold(name)) for name in names))
            before = db.total_changes
            db.executemany(
                "INSERT OR IGNORE INTO answers (rater, item, answer, milliseconds, time) "
                "SELECT id, ?, ?, ?, ? FROM raters WHERE folded = ?",
                ((item, answer, ms, time or now(), fold(name)) for name, item, answer, ms, time in rows),
            )
            return db.total_changes - before

    def last(self, rater: str) -> Item | None:
        """Return what a rater answered last, None before the first answer."""
        rows = self._db.rows(
            "SELECT items.id, picture, other FROM answers JOIN items ON items.id = item "
            "JOIN raters ON raters.id = rater WHERE folded = ? ORDER BY answers.id DESC LIMIT 1",
            (fold(rater),),
        )
        return Item(*rows[0]) if rows else None

    def undo(self, rater: str, item: int | None = None) -> Item | None:
        """Take a rater's last answer back.

        Args:
            rater: name.
            item: what the answer is thought to be about; if it is about another item, nothing happens, so that an undo
                that is sent twice takes one answer back.

        Returns:
            What had been answered, None when nothing was taken back.
        """
        with self._db.change() as db:
            last = self.last(rater)
            if last is None or item not in (None, last.id):
                return None
            db.execute(
                "DELETE FROM answers WHERE item = ? AND rater = (SELECT id FROM raters WHERE folded = ?)",
                (last.id, fold(rater)),
            )
            return last

    def ratings(self) -> list[Rating]:
        """Return every answer, in the order in which they were given."""
        rows = self._db.rows(
            "SELECT raters.name, items.id, items.picture, items.other, prompt, seed, answer, milliseconds, time "
            "FROM answers JOIN raters ON raters.id = rater JOIN items ON items.id = item "
            "JOIN pictures ON pictures.id = items.picture ORDER BY answers.id"
        )
        keys = ("rater", "item", "picture", "other", "prompt", "seed", "answer", "milliseconds", "time")
        return [Rating(**dict(zip(keys, row, strict=True))) for row in rows]

    def progress(self) -> Progress:
        """Return how far the study is."""
        ((pictures, drawn),) = self._db.rows("SELECT count(*), coalesce(sum(drawn), 0) FROM pictures")
        ((items,),) = self._db.rows("SELECT count(*) FROM items")
        ((ready,),) = self._db.rows(f"SELECT count(*) {_READY}")
        answered = self._db.rows(
            "SELECT name, count(answers.id) FROM raters LEFT JOIN answers ON rater = raters.id "
            "GROUP BY raters.id ORDER BY raters.id"
        )
        return Progress(pictures, drawn, items, ready, {n: k for n, k in answered}, self.wanted)

    def _rank(self, rater: str, purpose: str) -> Callable[[int], bytes]:
        start = hashlib.sha256(f"{self.seed}:{purpose}:{fold(rater)}:".encode())

        def rank(item: int) -> bytes:
            digest = start.copy()
            digest.update(str(item).encode())
            return digest.digest()

        return rank
