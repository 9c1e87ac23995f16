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


@pytest.fixture
def one_thread():
    """Run on one thread: a sum's order depends on their number, and children that a test starts have one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache, if this process made it."""
    if OWN_CACHE:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)
