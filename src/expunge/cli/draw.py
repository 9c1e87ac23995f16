"""The process that draws a study's pictures: `python -m expunge.cli.draw STUDY DEVICE`. No command of its own.

It keeps torch out of the server's process, and ends with its standard input, so that it never outlives the server that
started it, however that one ended.
"""

from __future__ import annotations

import os
import sys
import threading

import typer

from ..errors import ExpungeError
from ..feedback.study import STOPPED, Study
from .options import resolve

NICER = 5  # a rater's click goes before a picture
FAILED = 2


def main(folder: str, device: str) -> int:
    """Draw what is missing, as long as standard input is open."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(NICER)
    with Study.open(folder) as study:
        return work(study, device)


def work(study: Study, device: str) -> int:
    """Draw what is missing; if that fails, the page is told so, and the terminal why."""
    try:
        from ..backbones import load
        from ..draw import draw

        draw(study, load(study.source["model"], device=resolve(device)))
    except ExpungeError as error:
        typer.echo(f"error: no pictures are drawn: {error}", err=True)
        study.note(STOPPED, True)
        return FAILED
    except Exception:
        study.note(STOPPED, True)
        raise
    return 0


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
