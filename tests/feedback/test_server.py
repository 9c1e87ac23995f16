"""The server from outside, over real sockets: who may not come in, what may not go out, what must not stop it."""

from __future__ import annotations

import http.client
import json
import re
import socket
import stat
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from typing import Any

import pytest

from expunge.errors import BadStudy, SettingError
from expunge.feedback import Study, guard
from expunge.feedback.server import address, listen, secret
from expunge.feedback.study import STOPPED

TOKEN = "a-token-for-the-tests"
JSON = {"Content-Type": "application/json"}
SECRET = "PLAINLY SECRET"
NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@dataclass
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()


@dataclass
class Site:
    """A served study, and a client that normalises nothing."""

    study: Any
    port: int
    cookie: str

    def ask(self, method: str, path: str, body: Any = None, *, known: bool = True, **headers: str) -> Reply:
        sent = {"Host": f"127.0.0.1:{self.port}"}
        if known:
            sent["Cookie"] = f"{self.cookie}={TOKEN}"
        if method == "POST":
            sent |= {"Origin": f"http://127.0.0.1:{self.port}", **JSON}
        sent |= {k.replace("_", "-"): v for k, v in headers.items()}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in {**sent, **({"Content-Length": str(len(data))} if data is not None else {})}.items():
                connection.putheader(name, value)
            connection.endheaders(data)
            got = connection.getresponse()
            return Reply(got.status, got.headers, got.read())

    def get(self, path: str, **options: Any) -> Reply:
        return self.ask("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> Reply:
        return self.ask("POST", path, body, **options)

    def raw(self, data: bytes) -> bytes:
        """Send bytes as they are, and return whatever comes until the server closes, or resets."""
        chunks = []
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection,
            suppress(ConnectionResetError, BrokenPipeError),
        ):
            connection.sendall(data)
            while chunk := connection.recv(65536):
                chunks.append(chunk)
        return b"".join(chunks)

    def alive(self) -> bool:
        return self.get("/").status == 200


@pytest.fixture
def serve(make_study, serving):
    """Return a function that serves a study."""
    with ExitStack() as running:

        def start(study=None, **options) -> Site:
            study = study or make_study(**options)
            return Site(study, *running.enter_context(serving(study, TOKEN)))

        yield start


@pytest.fixture
def site(serve):
    site = serve()
    site.study.join("Ada")
    return site


@pytest.fixture(scope="module")
def wall(tmp_path_factory, pngs, serving):
    """A site that every request of the tests below bounces off: nothing may change, so all of them can share it."""
    folder = tmp_path_factory.mktemp("around")
    (folder / "secret.txt").write_text(SECRET)
    with Study.create(folder / "study", [("prompt", i) for i in range(6)], concept="open mouth") as study:
        for picture in study.pictures():
            study.put(picture.id, pngs[picture.id])
        study.join("Ada")
        with serving(study, TOKEN) as served:
            yield Site(study, *served)
        assert study.raters() == ["Ada"]
        assert study.ratings() == []


# ----------------------------------------------------------------------------------------------------------- the usual


def shown(now):
    """Return the ids of the pictures that a state shows."""
    return [int(re.fullmatch(r"/pictures/(\d+)\?\S+", url)[1]) for url in now["pictures"]]


def test_a_whole_rating(site):
    assert site.post("/api/raters", {"name": " Bob "}).json == {"url": "/rate/2"}
    assert site.post("/api/raters", {"name": "BOB"}).json == {"url": "/rate/2"}
    assert "Does this show “open mouth”?" in site.get("/rate/2").text
    order = site.study.order("Bob")
    state = site.get("/api/2").json
    assert (state["answered"], state["items"], state["last"]) == (0, 6, None)
    for n, item in enumerate(order):
        assert (state["now"]["item"], shown(state["now"])) == (item, [item])
        assert state["now"]["choices"] == ["concept", "not", "unsure"]
        picture = site.get(state["now"]["pictures"][0])
        assert (picture.headers["Content-Type"], picture.body) == ("image/png", site.study.path(item).read_bytes())
        state = site.post("/api/2/answers", {"item": item, "answer": "not", "milliseconds": 10 + n}).json
    assert state["now"] is None
    assert state["answered"] == 6
    assert [(r.rater, r.item, r.milliseconds) for r in site.study.ratings()] == [
        ("Bob", item, 10 + n) for n, item in enumerate(order)
    ]


def test_an_answer_twice_and_an_undo_twice(site):
    first, second = site.study.order("Ada")[:2]
    for item in (first, second):
        body = {"item": item, "answer": "not", "milliseconds": 1}
        assert site.post("/api/1/answers", body).json["answered"] == site.post("/api/1/answers", body).json["answered"]
    assert len(site.study.ratings()) == 2
    undone = site.post("/api/1/undo", {"item": second}).json
    assert (undone["now"]["item"], undone["last"], undone["answered"]) == (second, first, 1)
    again = site.post("/api/1/undo", {"item": second}).json
    assert (again["now"]["item"], again["answered"]) == (second, 1)


def test_what_was_taken_back_is_shown_next_though_others_were_drawn_meanwhile(serve, pngs):
    site = serve(n=12, drawn=2)
    order = [i for i in site.study.order("Ada") if i <= 2]
    site.study.rate("Ada", order[0], "not")
    for picture in range(3, 13):
        site.study.put(picture, pngs[picture - 1])
    assert site.study.order("Ada")[0] != order[0]
    assert site.post("/api/1/undo", {"item": order[0]}).json["now"]["item"] == order[0]


def test_pairs_are_shown_with_the_answers_of_their_sides(serve):
    site = serve(n=12, pairs=True)
    site.study.join("Ada")
    items = {i.id: i for i in site.study.items()}
    seen = Counter()
    for _ in items:
        now = site.get("/api/1").json["now"]
        item = items[now["item"]]
        left = shown(now)[0]
        swapped = left == item.other
        assert sorted(shown(now)) == sorted((item.picture, item.other))
        assert now["choices"] == (["second", "first", "unsure"] if swapped else ["first", "second", "unsure"])
        site.post("/api/1/answers", {"item": item.id, "answer": now["choices"][0], "milliseconds": 1})
        assert site.study.ratings()[-1].worse == left
        seen[swapped] += 1
    assert min(seen.values()) > 3


def test_no_browser_takes_the_pictures_of_another_study_for_this_one_s(serve):
    """It keeps them by their addresses, and studies are served at the same port one after the other."""
    seen = []
    for name in ("one", "two"):
        site = serve(n=6, name=name)
        site.study.join("Ada")
        seen.append({url for url in site.get("/api/1").json["now"]["pictures"]})
        assert "max-age" in site.get("/pictures/1").headers["Cache-Control"]
    assert {url.partition("?")[0] for url in seen[0]} == {url.partition("?")[0] for url in seen[1]}
    assert not seen[0] & seen[1]


def test_the_first_page_tells_how_far_it_is(serve):
    site = serve(n=6, drawn=5, wanted=3)
    assert "once two people have rated the same pictures" in site.get("/").text
    for item in (1, 2, 3, 4):
        site.study.rate("Ada", item, "concept" if item < 3 else "not")
        site.study.rate("Bob", item, "concept" if item < 3 else "not")
    page = site.get("/").text
    assert "4 of 6" in page
    assert "0 of 3 done" in page
    assert "5 of 6 drawn" in page
    assert re.search(r"<b>1\.00</b>.*over 4 pictures", page)
    site.study.note(STOPPED, True)
    assert "5 of 6 drawn; drawing has stopped" in site.get("/").text


def test_agreement_is_not_on_the_page_where_people_rate(site):
    site.study.rate("Bob", 1, "not")
    assert "agreement" not in (site.get("/rate/1").text + site.get("/api/1").text).lower()


# ------------------------------------------------------------------------------------------------------------ the token


def test_the_address_lets_in_once_and_the_cookie_from_then_on(site):
    entered = site.get(f"/?token={TOKEN}", known=False)
    assert entered.status == 200
    cookie = entered.headers["Set-Cookie"]
    assert cookie.startswith(f"{site.cookie}={TOKEN}; ")
    for part in ("HttpOnly", "SameSite=strict", "Path=/"):
        assert part in cookie
    # the token does not stay in the address bar
    assert 'http-equiv="refresh" content="0; url=/"' in entered.text
    assert TOKEN not in entered.text
    assert site.get("/", known=False, Cookie=cookie.partition(";")[0]).status == 200


PATHS = ["/", "/rate/1", "/api/1", "/pictures/1", "/nothing/here"]


@pytest.mark.parametrize("cookie", [None, "wrong", "", f"{TOKEN}x", "caf\u00e9", '"'])
def test_no_token_and_a_wrong_token_are_refused(wall, cookie):
    headers = {} if cookie is None else {"Cookie": f"{wall.cookie}={cookie}"}
    for path in PATHS:
        assert wall.get(path).status == (404 if "nothing" in path else 200)
        reply = wall.get(path, known=False, **headers)
        assert reply.status == 401
        assert b"Ada" not in reply.body
        assert b"open mouth" not in reply.body


@pytest.mark.parametrize("query", ["token=", "token=wrong", "token=%00", "token=%ff", "token=x&token=" + TOKEN])
def test_a_wrong_token_in_the_address_is_refused_even_with_the_cookie(wall, query):
    assert wall.get(f"/?{query}").status == 401


def test_nothing_is_changed_without_a_token(wall):
    for path, body in (
        ("/api/raters", {"name": "Eve"}),
        ("/api/1/answers", {"item": 1, "answer": "not", "milliseconds": 1}),
        ("/api/1/undo", {"item": 1}),
    ):
        assert wall.post(path, body, known=False).status == 401
        # a token in the address of a change is no way in either
        assert wall.post(f"{path}?token={TOKEN}", body, known=False).status == 401


def test_cookies_of_other_servers_on_this_machine_do_not_lock_out(wall):
    """A browser sends every port the same ones; some are not as the standard has them."""
    reply = wall.get("/", known=False, Cookie=f'other={{"a": 1}}; path; {wall.cookie}={TOKEN}')
    assert reply.status == 200


def test_an_empty_token_is_refused(make_study):
    study = make_study()
    (study.folder / ".token").write_text("\n")
    with pytest.raises(BadStudy, match="is empty.* Delete it"):
        secret(study.folder)


def test_the_token_is_of_the_study_and_for_its_owner_only(make_study):
    study = make_study()
    token = secret(study.folder)
    assert secret(study.folder) == token
    assert len(token) >= 32
    assert stat.S_IMODE((study.folder / ".token").stat().st_mode) == 0o600
    assert secret(make_study(name="other").folder) != token


# ------------------------------------------------------------------------------------------------------ other sites


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://127.0.0.1:1", "http://localhost:{port}", "null", "http://127.0.0.1", ""]
)
def test_a_post_from_another_site_is_refused(wall, origin):
    body = {"item": 1, "answer": "not", "milliseconds": 1}
    reply = wall.post("/api/1/answers", body, Origin=origin.format(port=wall.port))
    assert reply.status == 403


def test_a_post_that_does_not_say_where_it_comes_from_is_refused(wall):
    head = f"POST /api/1/undo HTTP/1.1\r\nHost: 127.0.0.1:{wall.port}\r\nCookie: {wall.cookie}={TOKEN}\r\n"
    answer = wall.raw(f"{head}Content-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode())
    assert answer.startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_foreign_form_could_send_is_refused(wall, kind):
    body = b'{"item": 1, "answer": "not", "milliseconds": 1}'
    assert wall.post("/api/1/answers", body, Content_Type=kind).status == 422


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::2]", "[::"])
def test_a_foreign_name_for_this_machine_is_refused(wall, host):
    assert wall.get("/", Host=host).status in (400, 421)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_other_methods_do_nothing(wall, method):
    assert wall.ask(method, "/api/1/answers").status == 403
    assert wall.ask(method, "/api/1/answers", Origin=f"http://127.0.0.1:{wall.port}").status == 405


# --------------------------------------------------------------------------------------------------------- reaching out


TRAVERSALS = [
    "../../{secret}", "..%2f..%2f{secret}", "%2e%2e/%2e%2e/{secret}", "..%5c..%5c{secret}", "....//....//{secret}",
    "%252e%252e%252f{secret}", "../study.sqlite", "../.token", "1/../../.token", "1%00.png", "/etc/passwd",
    "../../../../../../../../etc/passwd", "..%c0%af..%c0%af{secret}", "1e0", "-1", "0", "999999999999999999999999",
    "01/..", "1;x",
]  # fmt: skip


@pytest.mark.parametrize("path", TRAVERSALS)
def test_nothing_outside_the_study_is_given_out(wall, path):
    for room in ("/pictures/", "/static/", "/rate/", "/api/", "/"):
        reply = wall.get(room + path.format(secret="secret.txt"))
        assert reply.status in (400, 404, 422)
        for leak in (SECRET.encode(), b"root:", b"SQLite", TOKEN.encode(), str(wall.study.folder.parent).encode()):
            assert leak not in reply.body


def test_the_secret_could_have_been_found(wall):
    """The pictures lie two steps below the file that the test above looks for."""
    assert (wall.study.folder / "pictures" / "../../secret.txt").read_text() == SECRET


def test_a_picture_that_is_not_drawn_is_not_given_out(serve):
    site = serve(n=6, drawn=5)
    assert site.get("/pictures/5").status == 200
    assert site.get("/pictures/6").status == 404


def test_only_the_package_s_own_files_need_no_token(wall):
    for file, kind in (("style.css", "text/css"), ("rate.js", "text/javascript"), ("icon.svg", "image/svg+xml")):
        reply = wall.get(f"/static/{file}", known=False)
        assert reply.status == 200
        assert reply.headers["Content-Type"].startswith(kind)
    assert wall.get("/static/", known=False).status == 404


# ------------------------------------------------------------------------------------------------------------- too much


def test_a_large_body_is_refused_before_it_is_sent(wall):
    head = f"POST /api/raters HTTP/1.1\r\nHost: 127.0.0.1:{wall.port}\r\nOrigin: http://127.0.0.1:{wall.port}\r\n"
    head += f"Cookie: {wall.cookie}={TOKEN}\r\nContent-Type: application/json\r\n"
    declared = wall.raw(f"{head}Content-Length: 10000000000\r\n\r\n".encode())
    assert declared.startswith(b"HTTP/1.1 413")
    chunks = b"".join(b"400\r\n" + b"x" * 1024 + b"\r\n" for _ in range(6))
    chunked = wall.raw(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks)
    assert chunked.startswith(b"HTTP/1.1 413")
    assert wall.alive()


def test_the_largest_body_that_is_taken_is_not_enough_for_the_largest_that_is_refused(site):
    assert site.post("/api/raters", b" " * (guard.LARGEST_BODY - 16) + b'{"name": "Zoe"}').status == 200
    assert site.post("/api/raters", b" " * (guard.LARGEST_BODY - 8) + b'{"name": "Zed"}').status == 413
    assert site.study.raters() == ["Ada", "Zoe"]


def test_a_body_that_never_comes_is_not_waited_for(wall, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    head = f"POST /api/raters HTTP/1.1\r\nHost: 127.0.0.1:{wall.port}\r\nOrigin: http://127.0.0.1:{wall.port}\r\n"
    head += f"Cookie: {wall.cookie}={TOKEN}\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n{{"
    start = time.perf_counter()
    assert wall.raw(head.encode()).startswith(b"HTTP/1.1 408")
    assert time.perf_counter() - start < 5


def test_a_body_that_is_cut_off_is_not_taken_for_a_whole_one(wall):
    head = f"POST /api/raters HTTP/1.1\r\nHost: 127.0.0.1:{wall.port}\r\nOrigin: http://127.0.0.1:{wall.port}\r\n"
    head += f"Cookie: {wall.cookie}={TOKEN}\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    with socket.create_connection(("127.0.0.1", wall.port), timeout=30) as connection:
        connection.sendall(f'{head}{{"name": "Eve"}}'.encode())
        connection.shutdown(socket.SHUT_WR)
        assert b"200 OK" not in connection.recv(65536)
    assert wall.alive()
    assert "Eve" not in wall.study.raters()


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /api/raters HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /api/raters HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_garbage_is_refused(wall, data):
    answer = wall.raw(data)
    # closing before all is read makes the kernel reset the connection, at times before the answer arrives
    cut_off = len(data) > 65536 and not answer
    assert cut_off or re.match(rb"HTTP/1.1 4\d\d", answer)
    assert wall.alive()


def test_200_requests_at_a_time(serve):
    site = serve(n=50)
    raters = [f"rater {i}" for i in range(4)]
    for name in raters:
        site.study.join(name)

    def one(n: int) -> int:
        number, item = n % 4 + 1, n // 4 + 1
        return site.post(f"/api/{number}/answers", {"item": item, "answer": "not", "milliseconds": n}).status

    with ThreadPoolExecutor(200) as pool:
        statuses = Counter(pool.map(one, range(200)))
        assert statuses == {200: 200}
        mixed = pool.map(
            lambda n: site.get(["/", "/api/1", "/pictures/1", "/x"][n % 4], known=n % 8 < 4).status, range(200)
        )
        assert Counter(mixed) == {200: 75, 404: 25, 401: 100}
    ratings = site.study.ratings()
    assert len(ratings) == len({(r.rater, r.item) for r in ratings}) == 200
    assert site.alive()


# --------------------------------------------------------------------------------------------------------- what is told


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'{"item": 1}', b'{"item": "1", "answer": "not", "milliseconds": 1}',
        b'{"item": 1, "answer": "nope", "milliseconds": 1}', b'{"item": 1, "answer": "not", "milliseconds": -1}',
        b'{"item": 1, "answer": "not", "milliseconds": 1e99}', b'{"item": 99, "answer": "not", "milliseconds": 1}',
        b'{"item": 1, "answer": "not", "milliseconds": 1, "rater": "Bob"}', b"\xff\xfe", b"[" * 3000,
        b'{"item": 99999999999999999999999, "answer": "not", "milliseconds": 1}',
    ],
)  # fmt: skip
def test_an_impossible_answer_is_refused_in_a_sentence(wall, body):
    reply = wall.post("/api/1/answers", body)
    assert reply.status in (400, 422)
    assert reply.text.endswith((".", "'not'?", "body"))
    assert "Traceback" not in reply.text
    assert wall.alive()


def test_unknown_raters(wall):
    for number in (0, 2, -1, 10**30):
        assert wall.get(f"/api/{number}").status in (404, 422)
        assert wall.post(f"/api/{number}/undo", {"item": 1}).status in (404, 422)


def test_html_in_names_prompts_and_questions_is_text(serve, tmp_path, pngs):
    with Study.create(tmp_path / "nasty", [(NASTY, 1), (NASTY, 2)], concept=NASTY, ask=f"Is it {NASTY}?") as study:
        study.put(1, pngs[0])
        site = serve(study)
        name = f"A {NASTY}"[:40]
        assert site.post("/api/raters", {"name": name}).status == 200
        for page in ("/", "/rate/1"):
            html = site.get(page).text
            assert "<script>alert" not in html
            assert "<img src=x" not in html
            assert "A &lt;script&gt;alert" in html
        # raters judge by looks: the prompt is nowhere
        assert "alert" not in site.get("/api/1").text
        refused = site.post("/api/raters", {"name": NASTY})
        assert (refused.status, refused.headers["Content-Type"]) == (422, "text/plain; charset=utf-8")


def test_every_answer_forbids_scripts_frames_and_sniffing(wall):
    for path in ("/", "/rate/1", "/api/1", "/pictures/1", "/static/style.css", "/nothing"):
        for known in (True, False):
            headers = wall.get(path, known=known).headers
            assert "default-src 'none'" in headers["Content-Security-Policy"]
            assert "script-src 'self';" in headers["Content-Security-Policy"]
            assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
            assert "unsafe" not in headers["Content-Security-Policy"]
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Referrer-Policy"] == "same-origin"
            assert "Server" not in headers
    assert wall.get("/").headers["Cache-Control"] == "no-store"
    assert "private" in wall.get("/pictures/1").headers["Cache-Control"]


@pytest.mark.parametrize("page", ["/", "/rate/1"])
def test_pages_hold_no_inline_script_or_style_and_nothing_from_elsewhere(wall, page):
    html = wall.get(page).text
    assert not re.findall(r"<script(?![^>]*\bsrc=)[^>]*>|<style|\son\w+=|\sstyle=|javascript:", html)
    assert not re.findall(r"(?:src|href)=\"(?!/|#)", html)


def test_no_documentation_of_the_interface_is_served(wall):
    assert {wall.get(path).status for path in ("/docs", "/redoc", "/openapi.json")} == {404}


# ------------------------------------------------------------------------------------------------------------ addresses


def test_the_address_holds_port_and_token():
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert address(sock, "abc") == f"http://127.0.0.1:{port}/?token=abc"
        with pytest.raises(SettingError, match=rf"127.0.0.1 port {port}.*Give another --port"):
            listen("127.0.0.1", port)
    with listen("0.0.0.0", 0) as sock:
        assert re.fullmatch(r"http://\d+\.\d+\.\d+\.\d+:\d+/\?token=abc", address(sock, "abc"))
        assert "0.0.0.0" not in address(sock, "abc")
    with pytest.raises(SettingError, match="Give another"):
        listen("no.such.host.invalid", 0)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_the_address_of_a_server_that_listens_everywhere_is_one_that_it_answers():
    with listen("::", 0) as sock:
        host, _, port = address(sock, "abc").removeprefix("http://").partition("/")[0].rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass
