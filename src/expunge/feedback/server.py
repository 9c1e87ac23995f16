"""The rating page's server: pages, pictures and answers of one study. It draws nothing and imports no torch.

    GET  /                      who rates, how far they are, how far they agree
    POST /api/raters            {name}                        -> {url}
    GET  /rate/N                the page of the N-th rater
    GET  /api/N                                               -> state
    POST /api/N/answers         {item, answer, milliseconds}  -> state
    POST /api/N/undo            {item}                        -> state
    GET  /pictures/ID           a PNG file

A state says what to show next. Agreement is on the first page only: a number that moves with one's own answer would
betray the others'.
"""

from __future__ import annotations

import os
import secrets
import socket
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, Response
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from ..errors import BadStudy, SettingError, StorageError
from .agreement import krippendorff, table
from .data import LONGEST_TIME, UNSURE, Item
from .guard import Guard, refusal
from .study import STOPPED, Study

HERE = Path(__file__).parent
TOKEN = ".token"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
GOODBYE = 3  # seconds that open requests have when the server ends

_PAGES = Environment(
    loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Join(_Body):
    """A rater's name."""

    name: str = Field(max_length=200)


class Answer(_Body):
    """An answer, as the page sends it."""

    item: int
    answer: str = Field(max_length=20)
    milliseconds: int = Field(ge=0, le=LONGEST_TIME)


class Undo(_Body):
    """What the answer to take back is about."""

    item: int


def application(study: Study, token: str, hosts: tuple[str, ...] = LOOPBACK) -> ASGIApp:
    """Return the application of a study.

    Args:
        study: open; it must stay so.
        token: the secret that lets people in.
        hosts: names by which the server may be called; empty for any.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _pages(app, study)
    _answers(app, study)
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    for kind in (BadStudy, StorageError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _failed)
    return Guard(app, token, hosts)


def _pages(app: FastAPI, study: Study) -> None:
    @app.get("/")
    def start() -> HTMLResponse:
        progress, agreement = study.progress(), krippendorff(table(study.ratings()), interval=False)
        page = _PAGES.get_template("start.html.j2")
        return HTMLResponse(
            page.render(study=study, progress=progress, agreement=agreement, stopped=study.noted(STOPPED))
        )

    @app.get("/rate/{number}")
    def rating(number: int) -> HTMLResponse:
        page = _PAGES.get_template("rate.html.j2")
        return HTMLResponse(page.render(study=study, name=_rater(study, number), number=number))

    @app.get("/pictures/{picture}")
    def picture(picture: int) -> FileResponse:
        if picture not in {p.id for p in study.pictures() if p.drawn}:
            raise HTTPException(HTTPStatus.NOT_FOUND, "There is no such picture.")
        kept = {"Cache-Control": "private, max-age=86400, immutable"}
        return FileResponse(study.path(picture), media_type="image/png", headers=kept)


def _answers(app: FastAPI, study: Study) -> None:
    @app.post("/api/raters")
    def join(body: Join) -> dict[str, str]:
        name = study.join(body.name)
        return {"url": f"/rate/{study.raters().index(name) + 1}"}

    @app.get("/api/{number}")
    def show(number: int) -> dict[str, Any]:
        return state(study, _rater(study, number))

    @app.post("/api/{number}/answers")
    def answer(number: int, body: Answer) -> dict[str, Any]:
        rater = _rater(study, number)
        study.rate(rater, body.item, body.answer, body.milliseconds)
        return state(study, rater)

    @app.post("/api/{number}/undo")
    def undo(number: int, body: Undo) -> dict[str, Any]:
        rater = _rater(study, number)
        return state(study, rater, study.undo(rater, body.item))


def _rater(study: Study, number: int) -> str:
    names = study.raters()
    if not 1 <= number <= len(names):
        raise HTTPException(HTTPStatus.NOT_FOUND, "There is no such rater.")
    return names[number - 1]


def state(study: Study, rater: str, undone: Item | None = None) -> dict[str, Any]:
    """Return what a rater's page needs: what to show now, what to load meanwhile, how far the rater is.

    Args:
        study: the study.
        rater: name.
        undone: an item whose answer was taken back just now, to be shown first.
    """
    progress = study.progress()
    items = study.upcoming(rater, 2)
    if undone:
        items = [undone, *(i for i in items if i != undone)][:2]
    shown = [_view(study, rater, item) for item in items]
    last = study.last(rater)
    return {
        "answered": progress.answered[rater],
        "items": progress.items,
        "drawn": progress.drawn,
        "pictures": progress.pictures,
        "stopped": bool(study.noted(STOPPED)),
        "now": shown[0] if shown else None,
        "soon": shown[1]["pictures"] if len(shown) > 1 else [],
        "last": last.id if last else None,
    }


def _view(study: Study, rater: str, item: Item) -> dict[str, Any]:
    """Return an item as the page shows it: pictures from left to right, and the answers of its three buttons."""
    pictures, choices = [item.picture], list(study.answers)
    if item.other is not None:
        pictures.append(item.other)
        if study.swapped(rater, item.id):
            pictures.reverse()
            choices = [*choices[1::-1], UNSURE]
    # browsers keep pictures, and another study may have been at this address before
    mark = quote(study.created, safe="")
    return {"item": item.id, "pictures": [f"/pictures/{p}?{mark}" for p in pictures], "choices": choices}


def _failed(request: Request, error: Exception) -> Response:
    """Tell what is wrong; of a body that is not understood, nothing is repeated."""
    status, why = HTTPStatus.UNPROCESSABLE_ENTITY, "This request is not of the form that is wanted."
    if isinstance(error, HTTPException):
        status, why = HTTPStatus(error.status_code), error.detail
    elif isinstance(error, StorageError):
        status, why = HTTPStatus.INSUFFICIENT_STORAGE, str(error)
    elif isinstance(error, BadStudy):
        why = str(error)
    return refusal(status, why, request.url.path)


def secret(folder: Path) -> str:
    """Return a study's token, which outlives the server so that pages stay open over a restart; made if missing.

    Raises:
        BadStudy: the file of the token is empty, which would let everybody in.
    """
    path = folder / TOKEN
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if found := path.read_text().strip():
            return found
        raise BadStudy(f"{path} is empty: no token would protect the page. Delete it, and a new one is made.") from None
    token = secrets.token_urlsafe(24)
    with os.fdopen(handle, "w") as file:
        file.write(token)
    return token


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one.

    Raises:
        SettingError: the address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # "::" is printed as this machine's own address, which may be one of IPv4
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        raise SettingError(
            f"cannot listen at {host} port {port}: {error}. Give another --port (0 for a free one), or another --host."
        ) from error


def address(sock: socket.socket, token: str) -> str:
    """Return the address to open, token included; of a server that listens everywhere, this machine's own address."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = _own_address()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/?token={token}"


def serve(study: Study, sock: socket.socket, token: str) -> None:
    """Serve a study until the process is interrupted."""
    hosts = LOOPBACK if sock.getsockname()[0] in LOOPBACK else ()
    config = uvicorn.Config(
        application(study, token, hosts),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GOODBYE,
    )
    uvicorn.Server(config).run(sockets=[sock])


def _own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # nothing is sent: connecting a datagram socket only chooses the way out
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
