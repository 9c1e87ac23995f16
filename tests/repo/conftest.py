"""The repository as data: its files, and Python in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IGNORED = {".git", "__pycache__", "runs", "build", "dist", "node_modules", ".venv", "venv"}
CACHES = (".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".import_linter_cache", ".zoo")


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def files():
    """Every file that belongs to the repository, caches and products left out."""
    found = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if path.is_file() and not IGNORED & set(parts) and not any(p.startswith(CACHES) for p in parts):
            found.append(path)
    return found


@pytest.fixture
def python(tmp_path):
    """Run Python in a fresh process and folder; returns what it printed, fails when it fails."""

    def run(*arguments, timeout=120):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
