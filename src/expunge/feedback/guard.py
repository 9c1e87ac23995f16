"""What stands before the rating page: who may come in, how much they may send, what a browser may do with the answer.

- the secret token, in the printed address once and in a cookie from then on (HttpOnly, SameSite=Strict);
- on loopback, the names of this machine only (a foreign name that resolves to it is refused);
- a change must come from the page's own origin;
- a body is small and arrives soon;
- nothing is loaded from elsewhere, framed, sniffed or kept, and no script runs that is not a file of ours.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Collection
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

from markupsafe import escape
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 4096  # bytes
BODY_SECONDS = 10.0
OPEN = "/static/"  # files of the package, which hold no secret: the page that refuses needs its style
SAFE = frozenset({"GET", "HEAD"})

POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# a cookie set by an answer is not sent along a redirect that another site began, but is by a page of our own
ENTER = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=/">
<link rel="icon" href="/static/icon.svg"><title>Opening</title><p><a href="/">Open the study</a></p></html>"""


class Refused(Exception):
    """A request that goes no further."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Guard:
    """ASGI middleware.

    Args:
        app: what it guards.
        token: the secret.
        hosts: names by which the server may be called; empty for any.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: Collection[str] = ()) -> None:
        self.app, self.token, self.hosts = app, token, frozenset(hosts)
        # browsers share cookies between the ports of a machine, and two studies may be open
        self.cookie = f"expunge-{hashlib.sha256(token.encode()).hexdigest()[:12]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, pass on or refuse a request."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        send = _hardened(send)
        try:
            if answer := self._enter(scope):
                return await answer(scope, receive, send)
            body = await _body(Headers(scope=scope), receive)
        except Refused as refused:
            answer = refusal(refused.status, str(refused), scope["path"])
            answer.headers["Connection"] = "close"  # the rest of a refused body is not waited for
            return await answer(scope, receive, send)
        return await self.app(scope, body, send)

    def _enter(self, scope: Scope) -> Response | None:
        """Return the answer that sets the cookie, None for a request that may go on."""
        headers, safe = Headers(scope=scope), scope["method"] in SAFE
        host = headers.get("host", "")
        if self.hosts and _name(host) not in self.hosts:
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, "This server is not known by that name.")
        if not safe and headers.get("origin") != f"{scope['scheme']}://{host}":
            raise Refused(HTTPStatus.FORBIDDEN, "A rating must come from the study's own page.")
        given = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True).get("token", [])
        if safe and given and self._known(given[0]):
            answer = HTMLResponse(ENTER)
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", path="/", max_age=30 * 86400)
            return answer
        if given or not (scope["path"].startswith(OPEN) or self._known(self._kept(headers))):
            raise Refused(HTTPStatus.UNAUTHORIZED, "Open the whole address that `expunge rate` printed.")
        return None

    def _known(self, token: str) -> bool:
        return hmac.compare_digest(token.encode("utf-8", "surrogateescape"), self.token.encode())

    def _kept(self, headers: Headers) -> str:
        # not SimpleCookie: it gives up at a cookie of another server on this machine that it finds malformed
        return cookie_parser(headers.get("cookie", "")).get(self.cookie, "")


def _name(host: str) -> str | None:
    """Return the name in a Host header, without the port; None for what is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _hardened(send: Send) -> Send:
    """Return a `send` that adds the security headers to every answer."""

    async def harden(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(HEADERS)
            headers.setdefault("Cache-Control", "no-store")
        await send(message)

    return harden


async def _body(headers: Headers, receive: Receive) -> Receive:
    """Read a whole body, and return a `receive` that gives it again.

    Raises:
        Refused: it is too large, too slow, or cut off.
    """
    size = headers.get("content-length", "0")
    # what is not a number the server below has refused already
    if int(size) > LARGEST_BODY:
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"At most {LARGEST_BODY} bytes.")
    chunks, total, more = [], 0, True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(HTTPStatus.BAD_REQUEST, "The request ended too soon.")
                chunks.append(message.get("body", b""))
                total += len(chunks[-1])
                more = message.get("more_body", False)
                if total > LARGEST_BODY:
                    raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"At most {LARGEST_BODY} bytes.")
    except TimeoutError as error:
        raise Refused(HTTPStatus.REQUEST_TIMEOUT, "The request took too long.") from error
    whole: list[Message] = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]

    async def replay() -> Message:
        return whole.pop() if whole else await receive()

    return replay


def refusal(status: int, why: str, path: str) -> Response:
    """Return a sentence: as text for scripts of ours (paths under /api), as a page for people."""
    if path.startswith("/api/"):
        return PlainTextResponse(why, status)
    title = escape(HTTPStatus(status).phrase)
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<link rel="icon" href="/static/icon.svg"><link rel="stylesheet" href="/static/style.css"><title>{title}</title>
<main class="sheet"><h1>{title}</h1><p>{escape(why)}</p></main></html>"""
    return HTMLResponse(page, status)
