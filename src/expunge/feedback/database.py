"""A study's SQLite file: its tables, and transactions that are on disk when they end."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import StorageError
from .data import LONGEST_TIME

BUSY = 20.0  # seconds to wait for another process that writes

SCHEMA = f"""
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE pictures (
    id INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, seed INTEGER,
    drawn INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE items (
    id INTEGER PRIMARY KEY, picture INTEGER NOT NULL REFERENCES pictures, other INTEGER REFERENCES pictures
) STRICT;
CREATE TABLE raters (id INTEGER PRIMARY KEY, name TEXT NOT NULL, folded TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    rater INTEGER NOT NULL REFERENCES raters, item INTEGER NOT NULL REFERENCES items, answer TEXT NOT NULL,
    milliseconds INTEGER NOT NULL CHECK (milliseconds BETWEEN 0 AND {LONGEST_TIME}), time TEXT NOT NULL,
    UNIQUE (rater, item)
) STRICT;
"""


class Database:
    """A connection that several threads share.

    Args:
        path: of the file; made, empty, if missing.

    Raises:
        sqlite3.DatabaseError: the file is no database.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.RLock()
        # transactions are begun by hand, and the lock stands where sqlite3 would ask for one thread
        self._db = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")  # an answer survives a power cut as well
            self._db.execute("PRAGMA foreign_keys = ON")
        except sqlite3.DatabaseError:
            self._db.close()
            raise

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return every row of a query."""
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """One transaction: on disk when it ends, or not at all.

        Raises:
            StorageError: it cannot be written.
        """
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    # a full disk has ended the transaction already
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                raise StorageError(f"could not write {self.path}: {error}. Nothing of it was stored.") from error

    def close(self) -> None:
        """Close the connection."""
        self._db.close()
