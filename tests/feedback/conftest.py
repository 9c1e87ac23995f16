"""Small studies of drawn pictures."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image, ImageDraw

from expunge.feedback import Study
from expunge.feedback.server import application, listen

MakeStudy = Callable[..., Study]


def png(number: int, side: int = 64) -> bytes:
    """Return a picture of its own for every number: a round face on a coloured ground, some with an open mouth."""
    image = Image.new("RGB", (256, 256), f"hsl({number * 47 % 360}, 45%, 82%)")
    pen = ImageDraw.Draw(image)
    x, y, r = 128 + number * 7 % 30 - 15, 128 + number * 11 % 24 - 12, 78 + number % 5 * 4
    pen.ellipse([x - r, y - r, x + r, y + r], fill=f"hsl({(number * 83 + 40) % 360}, 70%, 60%)")
    for side_of in (-1, 1):
        pen.ellipse([x + side_of * 30 - 9, y - 32, x + side_of * 30 + 9, y - 8], fill="#23272b")
    if number % 3 == 0:
        pen.ellipse([x - 26, y + 8, x + 26, y + 52], fill="#4a1f24")
    else:
        pen.arc([x - 34, y - 10, x + 34, y + 42], 20, 160, fill="#23272b", width=8)
    data = io.BytesIO()
    image.resize((side, side), Image.Resampling.LANCZOS).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="session")
def pngs() -> list[bytes]:
    """Sixty different pictures."""
    return [png(n) for n in range(1, 61)]


@pytest.fixture
def make_study(tmp_path: Path, pngs: list[bytes]) -> Iterator[MakeStudy]:
    """Return a function that makes a study of n pictures, `drawn` of which are there."""
    opened = []

    def make(n: int = 6, *, drawn: int | None = None, name: str = "study", **options: Any) -> Study:
        planned = [(f"prompt {i}", i) for i in range(1, n + 1)]
        study = Study.create(tmp_path / name, planned, **{"concept": "open mouth", **options})
        opened.append(study)
        for picture in study.pictures()[:drawn]:
            study.put(picture.id, pngs[picture.id - 1])
        return study

    yield make
    for study in opened:
        study.close()


@pytest.fixture(scope="session")
def serving() -> Callable[[Study, str], AbstractContextManager[tuple[int, str]]]:
    """Return a context manager that serves a study in a thread, and gives the port and the name of the cookie."""

    @contextmanager
    def serve(study: Study, token: str) -> Iterator[tuple[int, str]]:
        with listen("127.0.0.1", 0) as sock:
            app = application(study, token)
            server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, server_header=False))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
            thread.start()
            try:
                yield sock.getsockname()[1], app.cookie
            finally:
                server.should_exit = True
                thread.join(20)
            assert not thread.is_alive()

    return serve
