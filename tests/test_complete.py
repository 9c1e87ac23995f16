"""Shell completion, as a shell asks for it. The helpers alone are tested with the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from expunge import complete, protocols

HERE = Path(__file__).parent  # holds no model that a shell would offer
SCRIPT = Path(sys.executable).with_name("expunge")  # the installed command, which is what shells complete


def completed(words: str) -> list[str]:
    """Return what bash is offered for the last of the words."""
    asked = {"_EXPUNGE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run([SCRIPT], capture_output=True, text=True, check=True, env={**os.environ, **asked}, cwd=HERE)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("expunge erase em", ["emoji"]),
        ("expunge erase emoji --concept pizz", ["pizza"]),
        ("expunge erase emoji --method esd -s et", ["eta="]),
        ("expunge audit run --protocol emoji", ["emoji-v1"]),
        ("expunge erase qqq", []),
    ],
)
def test_bash_is_offered_what_begins_with_the_word(words: str, offered: list[str]) -> None:
    assert completed(words) == offered


def test_every_protocol_is_offered() -> None:
    assert complete.protocols("") == list(protocols.PROTOCOLS)
    assert complete.protocols("e") == ["emoji-v1"]
    assert complete.protocols("x") == []
