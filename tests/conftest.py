"""What every test needs, before torch is imported: quiet, offline, and a cache of its own."""

import os
import shutil
import tempfile

import pytest

os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that spin at barriers slow every other process down
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

OWN_CACHE = "" if "EXPUNGE_CACHE" in os.environ else tempfile.mkdtemp(prefix="expunge-tests-")
if OWN_CACHE:
    os.environ["EXPUNGE_CACHE"] = OWN_CACHE


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache, if this process made it."""
    if OWN_CACHE:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)
