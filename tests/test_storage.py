"""Files appear whole or not at all: against a disk that really is full."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from expunge import checkpoint
from expunge.errors import StorageError
from expunge.storage import filling, need_space, replacing, sweep, write_atomic, write_json

LIMIT = 64 * 1024

WRITERS: dict[str, Callable[[Path], None]] = {
    "bytes": lambda p: write_atomic(p, b"x" * 1_000_000),
    "checkpoint": lambda p: checkpoint.save(p, {"w": torch.zeros(1_000_000)}),
}


def test_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_former_file_and_nothing_else(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"former")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        with pytest.raises(StorageError, match="the disk is full"):
            WRITERS[writer](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"former"
    assert os.listdir(tmp_path) == ["a"]


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "a") as temp:
            temp.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path) == []


def test_two_threads_write_the_same_file_without_meeting(tmp_path: Path) -> None:
    path, both_wrote = tmp_path / "a", Barrier(2, timeout=20)

    def write(text: str) -> str:
        with replacing(path) as temp:
            temp.write_text(text)
            both_wrote.wait()
            return temp.read_text()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(write, ("one", "two"))) == ["one", "two"]
    assert path.read_text() in ("one", "two")
    assert os.listdir(tmp_path) == ["a"]


def test_nan_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a", float("nan"))
    assert os.listdir(tmp_path) == []


def test_a_folder_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write"):
        write_atomic(tmp_path / "file" / "a", b"")


def test_sweep_removes_only_temporary_files(tmp_path: Path) -> None:
    (tmp_path / ".card.json.12.tmp").write_text("half")
    (tmp_path / "card.json").write_text("{}")
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["card.json"]


def test_sweep_removes_temporary_folders_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").write_text("")
    (tmp_path / ".pictures.12.ab.tmp").mkdir()
    (tmp_path / ".pictures.12.ab.tmp" / "000.png").write_text("half")
    (tmp_path / ".link.tmp").symlink_to(tmp_path / "kept")
    sweep(tmp_path)
    assert [p.name for p in sorted(tmp_path.rglob("*"))] == ["kept", "a"]
    sweep(tmp_path / "nowhere")
    sweep(tmp_path / "kept" / "a")
    assert (tmp_path / "kept" / "a").exists()


@pytest.fixture(params=["absent", "empty"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "out"
    if request.param == "empty":
        path.mkdir(parents=True)
    return path


def test_a_folder_is_filled_when_all_is_written(folder: Path) -> None:
    there = folder.exists() and folder.stat().st_ino
    with filling(folder) as temp:
        for name in ("b", "a"):
            (temp / name).write_text(name)
        assert not folder.exists() or not [p for p in folder.iterdir() if p != temp]
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"a": "a", "b": "b"}
    # one that may be a mount, or where a shell stands, stays the one it is
    assert there in (False, folder.stat().st_ino)
    assert os.listdir(folder.parent) == ["out"]


def test_a_folder_where_the_process_stands_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with filling(Path()) as temp:
        (temp / "a").write_text("")
    assert os.listdir(".") == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_failure_leaves_a_folder_as_it_was(folder: Path, error: type[BaseException]) -> None:
    there = folder.exists()

    def fail() -> None:
        with filling(folder) as temp:
            (temp / "a").write_text("whole")
            raise error

    with pytest.raises(error):
        fail()
    assert folder.exists() == there
    assert [p for p in folder.parent.rglob("*") if p != folder] == []


def test_a_full_disk_leaves_a_folder_as_it_was(folder: Path) -> None:
    there = folder.exists()

    def fill() -> None:
        with filling(folder) as temp:
            (temp / "a").write_bytes(b"x" * 1000)
            (temp / "b").write_bytes(b"x" * 1_000_000)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        with pytest.raises(StorageError, match=f"could not write {folder}: the disk is full"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folder.exists() == there
    assert [p for p in folder.parent.rglob("*") if p != folder] == []


def test_need_space(tmp_path: Path) -> None:
    need_space(tmp_path / "not" / "there", 1)
    with pytest.raises(StorageError, match="not enough disk space"):
        need_space(tmp_path / "not" / "there", 2**60)
