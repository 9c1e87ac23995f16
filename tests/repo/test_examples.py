"""Every example is short and runs: on the tiny model, or on the shipped one where its judges are needed."""

from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
LINES = 30
# The tiny model reads 16 tokens, and every letter is one. Python reads -W before it knows where packages are installed,
# so that a category of ours has to be named later.
RUN = """
import runpy, sys, warnings
from expunge.errors import PromptCut
warnings.simplefilter("ignore", PromptCut)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ON_EMOJI = {"audit_and_report.py"}  # only a known world has judges


def test_there_are_six():
    assert len(EXAMPLES) == 6


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) < LINES


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.name not in ON_EMOJI], ids=lambda p: p.name)
def test_example_runs(path, python):
    assert python("-W", "error", "-c", RUN, path, "tiny").strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ON_EMOJI))
def test_example_runs_on_the_shipped_model(name, python, tmp_path, root):
    assert python(root / "examples" / name, timeout=600).strip()
    assert (tmp_path / "report.html").stat().st_size
