"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_root() -> Path:
    """Return the folder where pictures of base models are kept between audits."""
    return Path(os.environ.get("EXPUNGE_CACHE") or Path.home() / ".cache" / "expunge")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; on success it becomes `path`, on failure it is removed.

    A process killed at any moment leaves either the former file or the new one. Use it for writers that want a path:

        with replacing(folder / "edit.safetensors") as temp:
            save_file(tensors, temp)

    Raises:
        StorageError: when the disk is full or the folder cannot be written.
    """
    temp = _temporary(path)
    with _undone(temp, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temp
        _sync(temp)
        os.replace(temp, path)
        _sync(path.parent)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Give a temporary folder; when all is written, its files appear in `folder`, on failure it is removed.

    A process killed at any moment leaves a folder that was not there before either whole or not there. Into one that
    was, files move one by one.

    Raises:
        StorageError: when the disk is full or the folder cannot be written.
    """
    folder = folder.absolute()
    there = folder.is_dir()
    # what may be a mount, or where a shell stands, cannot be replaced: files move into it, each at once
    temp = _temporary(folder / "files" if there else folder)
    with _undone(temp, folder):
        temp.parent.mkdir(parents=True, exist_ok=True)
        temp.mkdir()
        yield temp
        for written in (*temp.iterdir(), temp):
            _sync(written)
        if there:
            for file in sorted(temp.iterdir()):
                os.replace(file, folder / file.name)
            temp.rmdir()
        else:
            os.replace(temp, folder)
        _sync(temp.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all.

    Raises:
        StorageError: when the disk is full or the folder cannot be written; the former file is then still there.
    """
    with replacing(path) as temp:
        temp.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. NaN and infinity are refused: JSON has neither."""
    write_atomic(path, as_json(value))


def as_json(value: Any) -> bytes:
    """Return what `write_json` writes."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process left in `folder`."""
    for temp in folder.glob(".*.tmp"):
        _remove(temp)


def need_space(folder: Path, size: int) -> None:
    """Check that `size` bytes fit on the disk of `folder` (which need not exist yet).

    Raises:
        StorageError: when they do not.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < size:
        raise StorageError(
            f"not enough disk space for {folder}: about {size / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free. "
            "Make room or choose another --out."
        )


def _temporary(path: Path) -> Path:
    # a process's id alone would be shared by its threads, and by machines that share the disk
    return path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(6).hex()}.tmp")


@contextmanager
def _undone(temp: Path, path: Path) -> Iterator[None]:
    """Remove `temp` when what is to become `path` fails, and say why."""
    try:
        yield
    except BaseException as error:
        # removing can fail as well (read-only disk); the first error is the one to tell
        with _quiet():
            _remove(temp)
        if failure := _os_error(error):
            raise StorageError(_why(path, failure)) from error
        raise


def _remove(temp: Path) -> None:
    if temp.is_dir() and not temp.is_symlink():
        shutil.rmtree(temp)
    else:
        temp.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _quiet() -> Iterator[None]:
    try:
        yield
    except OSError:
        return


def _os_error(error: BaseException) -> OSError | None:
    """Find the system's error in `error`; safetensors wraps it in an error of its own that only its text betrays."""
    if isinstance(error, OSError):
        return error
    text = str(error)
    if type(error).__name__ == "SafetensorError" and ("os error" in text or "I/O error" in text):
        full = any(f"os error {code}" in text for code in _FULL)
        return OSError(errno.ENOSPC if full else errno.EIO, text)
    return None


def _why(path: Path, error: OSError) -> str:
    if error.errno in _FULL:
        return f"could not write {path}: the disk is full. Nothing half written was left; make room and try again."
    return f"could not write {path}: {error.strerror or error}. Nothing half written was left."
