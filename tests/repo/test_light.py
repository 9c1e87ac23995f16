"""What must start at once, and so without torch: the package, the help, the report."""

import json
import time

import pytest

HEAVY = ("torch", "diffusers", "transformers", "peft", "torchmetrics")
LOADED = f"import sys; print(sorted(set(sys.modules) & set({HEAVY!r})))"
# a process in which the heavy packages cannot be imported, wherever the import stands
BLOCK = f"""
import sys
from importlib.abc import MetaPathFinder
class Block(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise AssertionError(f"{{name}} was imported")
sys.meta_path.insert(0, Block())
"""
CLI = "from expunge.cli import main; sys.argv = ['expunge', *{arguments!r}]; main()"
STARTS = 5  # the fastest of so many: other processes only add
HELP_SECONDS = 0.3
HELP_LIMIT = 3 * HELP_SECONDS  # a loaded machine is slower than the promise is meant for


@pytest.fixture
def run_folder(tmp_path):
    """A run folder with one card and one score, written without torch."""
    from expunge.concept import Concept
    from expunge.records import Card, Run, Score

    folder = tmp_path / "run"
    folder.mkdir()
    run = Run(folder)
    card = {
        "method": "esd", "settings": {"eta": 1.0}, "concept": Concept("bomb").to_json(), "model": "tiny",
        "base_hash": "0" * 64,
        "seed": 0, "version": "0.1.0", "kind": "weights", "seconds": 1.0, "peak_bytes": 1,
        "losses": {"erase": [1.0, 0.5]}, "steps": 2, "created": "2026-01-01T00:00:00+00:00", "status": "complete",
        "samples_seen": 2,
    }  # fmt: skip
    run.write_card(Card.from_json(card))
    score = {"protocol": "emoji-v1", "metric": "ua", "value": 1.0, "low": 0.9, "high": 1.0, "n": 48, "errors": 0}
    run.write_scores([Score.from_json(json.loads(json.dumps(score)))])
    return folder


def test_importing_the_package_loads_nothing_heavy(python):
    assert python("-c", f"import expunge; {LOADED}") == "[]\n"


def test_the_check_sees_torch_once_it_is_loaded(python):
    assert "torch" in python("-c", f"import expunge; expunge.erase; {LOADED}")


@pytest.mark.parametrize("arguments", [["--help"], ["erase", "--help"], ["report", "--help"]])
def test_help_needs_nothing_heavy(python, arguments):
    assert "expunge" in python("-c", BLOCK + guarded(arguments)).lower()


def test_report_needs_nothing_heavy(python, run_folder, tmp_path):
    out = tmp_path / "report.html"
    python("-c", BLOCK + guarded(["report", str(run_folder), "-o", str(out)]))
    assert "bomb" in out.read_text()


def test_help_is_fast(python):
    def seconds():
        start = time.perf_counter()
        python("-c", f"import sys; {CLI.format(arguments=['--help'])}")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(STARTS)) < HELP_LIMIT


def guarded(arguments):
    return CLI.format(arguments=arguments)


def test_the_block_works(python):
    with pytest.raises(AssertionError, match="torch was imported"):
        python("-c", BLOCK + "import torch")
