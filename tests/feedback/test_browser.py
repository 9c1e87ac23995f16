"""The page in a real Chromium: three people rate at once, the network and the server fail, nothing is lost or doubled.

With EXPUNGE_PICTURES_OF_DOCS set, the pictures of docs/howto/rate.md are made anew.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from playwright.sync_api import Page, expect

from expunge.cli import main
from expunge.feedback import Study
from expunge.feedback.server import listen
from expunge.feedback.study import STOPPED

DOCS = Path(__file__).parents[2] / "docs" / "img"
PHONE = {"viewport": {"width": 390, "height": 760}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
DESK = {"viewport": {"width": 1180, "height": 820}}
READY = "#main[aria-busy=false]"
SEEN = """async () => {
  while (!document.querySelector('#main[aria-busy=false]')) await new Promise(done => setTimeout(done, 5));
  return [new URL(document.querySelector('#stage img').src).pathname, document.getElementById('count').textContent];
}"""
# contrast of every element that holds text of its own, against the nearest opaque ground
FAINT = """() => {
  const rgb = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                       return .2126 * r + .7152 * g + .0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
                          if (c.length == 3 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
  return [...document.querySelectorAll('body *')].filter(e => e.getClientRects().length &&
    [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())).map(e => {
      const a = light(rgb(getComputedStyle(e).color).slice(0, 3)), b = light(ground(e));
      return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.className + ': ' + e.textContent.slice(0, 30)];
    }).filter(x => x[0] < 4.5);
}"""
SIZES = "() => [...document.querySelectorAll('button, input, .raters a')].filter(e => e.getClientRects().length)" \
    ".map(e => e.getBoundingClientRect()).map(r => [r.width, r.height, r.right, r.bottom])"  # fmt: skip
SOURCES = "all => all.map(i => +new URL(i.src).pathname.split('/').pop())"
BEYOND = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


def shoot(page, name):
    """Make a picture of the documentation, where that is asked for."""
    if "EXPUNGE_PICTURES_OF_DOCS" in os.environ:
        DOCS.mkdir(exist_ok=True)
        page.screenshot(path=DOCS / f"{name}.png")


class Server:
    """`expunge rate` in a process of its own, that can be killed and started again."""

    def __init__(self, study: Path, *options: str) -> None:
        self.study = study
        with listen("127.0.0.1", 0) as free:
            self.port = free.getsockname()[1]
        self.command = [
            sys.executable,
            "-m",
            "expunge.cli",
            "rate",
            "--out",
            str(study),
            "--port",
            str(self.port),
            *options,
        ]
        self.url = self.start()

    def start(self) -> str:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        assert line.startswith("Open "), self.process.communicate()
        return line.split()[1]

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        assert self.process.returncode == -signal.SIGKILL

    def stop(self) -> str:
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=20)[1]


@dataclass
class Site:
    """A study that is served in a thread."""

    study: Study
    url: str


@pytest.fixture
def serve(make_study, serving):
    """Return a function that serves a study."""
    with ExitStack() as running:

        def start(n=6, **options) -> Site:
            study = make_study(n, **options)
            port, _ = running.enter_context(serving(study, "token"))
            return Site(study, f"http://127.0.0.1:{port}/?token=token")

        yield start


@pytest.fixture(scope="module")
def browsers(chromium):
    """Return a function that gives a browser of its own kind, or one that no other has: opening one is dear."""
    found, alone = {}, []

    def get(fresh, options):
        # animations are much of what Chromium does without a graphics card
        make = partial(chromium.new_context, **{**DESK, "reduced_motion": "reduce", **options})
        if fresh:
            alone.append(make())
            return alone[-1]
        key = repr(sorted(options.items()))
        if key not in found:
            found[key] = make()
        return found[key]

    yield get
    for context in (*found.values(), *alone):
        context.close()


@pytest.fixture
def visit(browsers):
    """Return a function that opens an address as a new person; what the pages complain about fails the test."""
    pages, complaints, asked = [], [], []

    def start(url, *, quiet=True, fresh=False, **options):
        context = browsers(fresh, options)
        context.clear_cookies()
        page = context.new_page()
        pages.append(page)
        page.on("request", lambda r: asked.append(r.url))
        if quiet:
            page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto(url)
        # the address with the token leads on to one without
        page.wait_for_selector("main")
        page.wait_for_load_state("load")
        return page

    yield start
    for page in pages:
        page.close()
    assert complaints == []
    assert [u for u in asked if not re.match(r"(http://(127\.0\.0\.1|localhost):|data:)", u)] == []


def join(page, name):
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Start").click()
    page.wait_for_selector(READY)


def seen(page) -> tuple[int, str]:
    """Return the picture that a rater sees, once it can be answered, and how far the page says the rater is."""
    picture, count = page.evaluate(SEEN)
    return int(picture.rpartition("/")[2]), count


def shown(page) -> int:
    """Return the picture that a rater sees, once it can be answered."""
    return seen(page)[0]


# --------------------------------------------------------------------------------------------------------- the whole


def press(keys, page, answer):
    page.keyboard.press(keys[answer])


def touch(page, answer):
    label = {"concept": "Yes", "not": "No", "unsure": "Unsure", "undo": "Undo"}[answer]
    x, y = page.evaluate(PLACE, label)
    page.touchscreen.tap(x, y)


NUMBERS = partial(press, {"concept": "1", "not": "2", "unsure": "3", "undo": "u"})
ARROWS = partial(press, {"concept": "ArrowLeft", "not": "ArrowRight", "unsure": "ArrowDown", "undo": "u"})
PLACE = """label => {
  const button = [...document.querySelectorAll('button')].find(b => b.querySelector('span')?.textContent === label);
  const box = button.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
}"""


@dataclass
class Rater:
    """A person with a browser and a way to answer."""

    name: str
    say: Callable[..., None]
    page: Page

    def means(self, picture: int) -> str:
        """Return what this person will say: most agree on which faces have an open mouth, and some err."""
        if (picture * 7 + len(self.name)) % 13 == 0:
            return "unsure"
        return "concept" if (picture % 3 == 0) != ((picture * 5 + ord(self.name[0])) % 11 == 0) else "not"

    def rate(self, turn: int) -> int:
        """Answer what is shown, and return which picture that was."""
        picture, count = seen(self.page)
        assert count == f"{turn} of 60"
        if turn == 20:
            self.say(self.page, "unsure" if self.means(picture) == "not" else "not")
            assert seen(self.page)[1] == "21 of 60"
            self.say(self.page, "undo")
            assert seen(self.page) == (picture, "20 of 60")
        if turn == 30:
            self.page.reload()
            assert shown(self.page) == picture
        self.say(self.page, self.means(picture))
        return picture


def die_and_come_back(server, rater):
    """Kill the server, take an answer back and give it again while it is dead, and start it anew."""
    problem = rater.page.locator("#problem")
    picture = shown(rater.page)
    server.kill()
    rater.say(rater.page, "undo")
    expect(problem).to_have_text("No reply from the server. Trying again; your answer is kept.")
    rater.say(rater.page, "unsure")  # nothing can be answered now
    server.start()
    expect(problem).to_have_text("")
    before = shown(rater.page)
    assert before != picture
    rater.say(rater.page, rater.means(before))
    assert shown(rater.page) == picture


def look_in(page, url):
    """Open the first page while people rate."""
    page.goto(url)
    facts = page.locator(".facts")
    expect(facts).to_contain_text("0 of 3 done")
    expect(facts).to_contain_text("s alpha over")
    shoot(page, "rate-start")
    page.close()


def test_three_raters_lose_and_double_nothing_through_undo_reload_and_kill(tmp_path, pngs, visit, capsys):
    pictures, folder = tmp_path / "pictures", tmp_path / "study"
    pictures.mkdir()
    for number, data in enumerate(pngs, 1):
        (pictures / f"{number:03d}.png").write_bytes(data)
    server = Server(folder, "--pictures", str(pictures), "--concept", "open mouth", "--raters", "3")
    ways = {"Ada": (NUMBERS, DESK), "Bo": (touch, PHONE), "Cleo": (ARROWS, DESK)}
    # the console tells of requests that fail while the server is dead
    plain = {"quiet": False, "device_scale_factor": 1, "fresh": True}
    raters = [Rater(n, say, visit(server.url, **{**options, **plain})) for n, (say, options) in ways.items()]
    for rater in raters:
        join(rater.page, rater.name)

    rated: dict[str, list[int]] = {rater.name: [] for rater in raters}
    for turn in range(60):
        if turn == 45:
            die_and_come_back(server, raters[0])
        for rater in raters:
            rated[rater.name].append(rater.rate(turn))
        if turn == 23:
            shown(raters[0].page)
            shoot(raters[0].page, "rate-page")
        if turn == 40:
            server.kill()  # with answers on their way
            assert server.start() == server.url
        if turn == 50:
            look_in(raters[0].page.context.new_page(), server.url)

    for rater in raters:
        expect(rater.page.get_by_role("heading", name="Thank you, that was all")).to_be_focused()
        assert rater.page.locator("#count").inner_text() == "60 of 60"
    with Study.open(folder) as study:
        ratings, orders = study.ratings(), {name: study.order(name) for name in ways}
    assert len(ratings) == len({(r.rater, r.picture) for r in ratings}) == 180
    means = {rater.name: rater.means for rater in raters}
    assert [r for r in ratings if r.answer != means[r.rater](r.picture)] == []
    assert {name: [r.picture for r in ratings if r.rater == name] for name in ways} == rated == orders
    assert Counter(r.answer for r in ratings)["concept"] > 40
    assert all(0 < r.milliseconds < 60_000 for r in ratings)

    page = raters[0].page
    page.get_by_role("link", name="See how far you agree").click()
    expect(page.locator(".facts")).to_contain_text("3 of 3 done")
    expect(page.locator(".facts")).to_contain_text("over 60 pictures")
    assert "180 ratings" in server.stop()
    assert server.process.returncode == 0

    # what the documentation shows of these raters
    assert main(["feedback", str(folder)]) == 0
    (sample,) = re.findall(r"```text\n(agreement.*?)```", (DOCS.parent / "howto/rate.md").read_text(), re.DOTALL)
    assert capsys.readouterr().out.endswith(sample)


# ------------------------------------------------------------------------------------------------------------ coming in


class Elsewhere(BaseHTTPRequestHandler):
    """Another site, with a link to the study and a form that would rate in it."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        url, form = self.server.url, self.server.url.partition("?")[0] + "api/1/answers"
        self.wfile.write(
            f"<a href='{url}'>rate</a><form method=post enctype=text/plain action='{form}'>"
            """<input name='{"item": 1, "answer": "not", "milliseconds": 1, "x' value='": 1}'><button>go</button>"""
            "</form>".encode()
        )

    def log_message(self, *arguments):
        pass


@pytest.fixture
def elsewhere():
    """Return a function that serves a foreign page, and returns its address."""
    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()

        def about(url):
            server.url = url
            # to a browser a site of its own: another name
            return f"http://localhost:{server.server_port}/"

        yield about
        server.shutdown()
        thread.join()


def test_a_link_on_another_site_lets_in_and_a_form_there_does_nothing(serve, visit, elsewhere):
    server = serve()
    page = visit(server.url, quiet=False)
    assert page.url == server.url.partition("?")[0]
    join(page, "Ada")

    other = page.context.new_page()
    other.goto(elsewhere(server.url))
    other.get_by_role("link", name="rate").click()
    expect(other.get_by_label("Your name")).to_be_visible()

    other.goto(elsewhere(server.url))
    with other.expect_response("**/api/1/answers") as refused:
        other.get_by_role("button", name="go").click()
    assert refused.value.status == 403
    assert server.study.ratings() == []
    other.close()

    stranger = visit(server.url.partition("?")[0], quiet=False)
    expect(stranger.get_by_role("heading", name="Unauthorized")).to_be_visible()
    expect(stranger.locator("main")).to_contain_text("Open the whole address")


def test_a_name_is_asked_for_and_explained(serve, visit):
    server = serve(wanted=3)
    page = visit(server.url, quiet=False)
    expect(page.get_by_role("heading", name="Does this show “open mouth”?")).to_be_visible()
    page.get_by_label("Your name").fill("<b>")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("cannot be a rater's name")
    expect(page.get_by_label("Your name")).to_be_focused()
    name = "Ada <img src=x onerror=alert(1)>"
    join(page, name)
    assert page.locator("header a").inner_text() == name
    page.keyboard.press("1")
    expect(page.locator("#count")).to_have_text("1 of 6")
    page.locator("header a").click()
    assert page.get_by_role("link", name=name).locator(".count").inner_text() == "1 of 6"
    assert page.locator("img").count() == 0
    # who comes later is listed without a reload
    server.study.rate("Bo", 1, "not")
    expect(page.get_by_role("link", name="Bo")).to_be_visible()


# ---------------------------------------------------------------------------------------------------------- answering


def test_the_keyboard_alone_is_enough_and_is_heard(serve, visit):
    page = visit(serve().url)
    expect(page.get_by_label("Your name")).not_to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.type("Ada")
    page.keyboard.press("Enter")
    page.wait_for_selector(READY)
    said = page.get_by_role("status")
    expect(said).to_have_text("0 of 6.")
    page.keyboard.press("2")
    expect(said).to_have_text("Stored: No. 1 of 6.")
    page.wait_for_selector(READY)
    # through the buttons, as a screen reader would
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(said).to_have_text("Stored: Yes. 2 of 6.")
    page.wait_for_selector(READY)
    page.keyboard.press("Shift+U")
    expect(said).to_have_text("Taken back. 1 of 6.")
    # keys of the browser are not taken for answers
    page.wait_for_selector(READY)
    for key in ("Control+1", "Alt+1", "4", "q"):
        page.keyboard.press(key)
    expect(page.locator("#count")).to_have_text("1 of 6")


def test_what_is_not_seen_is_not_rated(serve, visit):
    server = serve()
    page = visit(server.url)
    join(page, "Ada")
    waiting = []
    page.route("**/pictures/*", lambda route: waiting.append(route))  # noqa: PLW0108 (playwright marks it)
    page.reload()
    page.wait_for_selector("#stage:not([hidden])")
    for key in ("1", "2", "3"):
        page.keyboard.press(key)
    page.get_by_role("button", name="Yes").click()
    expect(page.locator("#main")).to_have_attribute("aria-busy", "true")
    for route in waiting:
        route.continue_()
    page.unroute_all()
    page.wait_for_selector(READY)
    # a key that is held down answers once
    page.keyboard.down("1")
    page.keyboard.down("1")
    page.wait_for_selector(READY)
    page.keyboard.down("1")
    page.keyboard.up("1")
    page.wait_for_selector(READY)
    assert len(server.study.ratings()) == 1
    # one that presses a button as well
    page.get_by_role("button", name="No").focus()
    for _ in range(3):
        page.keyboard.down("Enter")
        page.wait_for_selector(READY)
    page.keyboard.up("Enter")
    assert [r.answer for r in server.study.ratings()] == ["concept", "not"]


def test_a_page_waits_for_pictures_and_tells_why(serve, visit, pngs):
    server = serve(n=3, drawn=1)
    page = visit(server.url)
    join(page, "Ada")
    page.keyboard.press("1")
    expect(page.get_by_role("heading", name="Waiting for pictures")).to_be_visible()
    expect(page.locator("#waiting")).to_contain_text("1 of 3 are there")
    server.study.note(STOPPED, True)
    expect(page.locator("#waiting")).to_contain_text("Drawing has stopped")
    server.study.put(3, pngs[2])
    expect(page.locator("#stage")).to_be_visible()
    assert shown(page) == 3


def test_the_worse_of_two(serve, visit):
    server = serve(n=8, pairs=True, concept="", ask="Which one is more unsettling?")
    page = visit(server.url)
    join(page, "Ada")
    shoot(page, "rate-pairs")
    for key, side in (("ArrowLeft", 0), ("2", 1), ("1", 0), ("ArrowRight", 1)):
        page.wait_for_selector(READY)
        sources = page.locator("#stage img").evaluate_all(SOURCES)
        done = page.locator("#count").inner_text()
        page.keyboard.press(key)
        expect(page.locator("#count")).not_to_have_text(done)
        assert server.study.ratings()[-1].worse == sources[side]


# ------------------------------------------------------------------------------------------------------------- looking


BLUR = "getComputedStyle(document.querySelector('#stage img')).filter"


def test_blurred_until_pointed_at_touched_or_asked_for(serve, visit):
    server = serve(blur=True)
    page = visit(server.url)
    page.mouse.move(5, 5)
    join(page, "Ada")
    assert "blur" in page.evaluate(BLUR)
    page.locator(".veil").hover()
    assert page.evaluate(BLUR) == "none"
    page.mouse.move(5, 5)
    assert "blur" in page.evaluate(BLUR)
    page.keyboard.press("v")
    assert page.evaluate(BLUR) == "none"
    expect(page.get_by_role("button", name="Show the picture to rate")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("1")
    expect(page.locator("#count")).to_have_text("1 of 6")
    page.wait_for_selector(READY)
    assert "blur" in page.evaluate(BLUR)

    phone = visit(server.url, **PHONE)
    join(phone, "Bo")
    assert "blur" in phone.evaluate(BLUR)
    phone.locator(".veil").tap()
    assert phone.evaluate(BLUR) == "none"


GROUND = "getComputedStyle(document.body).backgroundColor"
MOVING = "[...document.querySelectorAll('*')].filter(e => getComputedStyle(e).transitionDuration !== '0s').length"


def test_readable_in_both_colour_schemes_and_without_motion(serve, visit):
    server = serve(wanted=3)
    server.study.rate("Bo", 1, "not")
    page = visit(server.url)
    for place in ("start", "rate"):
        if place == "rate":
            join(page, "Ada")
            page.keyboard.press("1")
            expect(page.locator("#count")).to_have_text("1 of 6")
        for scheme, ground in (("light", "rgb(252, 252, 251)"), ("dark", "rgb(20, 23, 26)")):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate(GROUND) == ground
            assert page.evaluate(FAINT) == []
    assert page.evaluate(MOVING) == 0
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(MOVING) > 0


def test_on_phones_everything_is_in_reach(serve, visit):
    server = serve(n=8, wanted=3)
    page = visit(server.url, **PHONE)
    join(page, "Ada")
    shoot(page, "rate-phone")
    page.goto(server.url)
    join(page, "A name of exactly forty letters, and more")
    for width, height in ((390, 760), (320, 568), (760, 360)):
        page.set_viewport_size({"width": width, "height": height})
        sizes = page.evaluate(SIZES)
        assert len(sizes) == 4
        # WCAG 2.2 asks for 24 px, platforms for 44
        assert all(w >= 44 and h >= 44 and right <= width and bottom <= height for w, h, right, bottom in sizes)
        assert page.evaluate(BEYOND) == 0
        box = page.locator(".frame").bounding_box()
        assert min(box["width"], box["height"]) > 100
    page.goto(server.url.partition("?")[0])
    assert page.evaluate(BEYOND) == 0
    assert all(h >= 44 for _, h, _, _ in page.evaluate(SIZES))


def test_until_its_script_is_there_the_form_cannot_be_sent(serve, visit):
    page = visit(serve().url, quiet=False)
    button = page.get_by_role("button", name="Start")
    expect(button).to_be_enabled()
    page.route("**/start.js", lambda route: route.abort())
    page.reload()
    expect(button).to_be_disabled()


def test_structure_for_a_screen_reader(serve, visit):
    page = visit(serve().url)
    for _ in range(2):
        assert page.evaluate("document.documentElement.lang") == "en"
        assert page.locator("h1").count() == 1
        assert page.locator("main").count() == 1
        assert page.evaluate("[...document.images].every(i => i.alt)")
        named = "[...document.querySelectorAll('button, progress')].every(e => e.textContent.trim() || e.ariaLabel)"
        assert page.evaluate(named)
        if page.get_by_label("Your name").count():
            join(page, "Ada")
    assert page.get_by_role("group", name="Does this show").get_by_role("button").count() == 3
    assert page.get_by_role("progressbar", name="Progress").count() == 1
