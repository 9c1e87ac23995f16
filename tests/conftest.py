"""What every test needs, before torch is imported: quiet, offline, and a cache of its own."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that spin at barriers slow every other process down
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

CHROMIUM = Path("/usr/bin/chromium")
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


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """Start Chromium with every address but this machine's resolved to nowhere.

    Without Chromium this fails rather than skips: a page that nobody opened is not tested. One for all tests: a process
    can run Playwright's loop once at a time.
    """
    from playwright.sync_api import sync_playwright

    if not CHROMIUM.is_file():
        pytest.fail(
            f"{CHROMIUM} is missing; pages are tested in a real browser. Install it: apt-get install -y chromium",
            pytrace=False,
        )
    home = tmp_path_factory.mktemp("chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--disable-software-rasterizer",
             "--renderer-process-limit=1",
             "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"]  # fmt: skip
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=flags, env={"HOME": str(home), "PATH": "/usr/bin:/bin"}
        )
        yield browser
        browser.close()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache, if this process made it."""
    if OWN_CACHE:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)
