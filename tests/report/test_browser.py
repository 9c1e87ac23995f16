"""The page in a real Chromium without a network: what a reader meets."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from expunge.records import Run
from expunge.report import build

LOADED = "() => [...document.images].map(i => i.complete && i.naturalWidth > 0)"
# contrast of every element that holds text of its own, against the nearest opaque ground
FAINT = """() => {
  const rgb = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                       return .2126 * r + .7152 * g + .0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
                          if (c.length == 3 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
  return [...document.querySelectorAll('body *:not(svg *)')].filter(e => e.getClientRects().length &&
    [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())).map(e => {
      const a = light(rgb(getComputedStyle(e).color).slice(0, 3)), b = light(ground(e));
      return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.className + ': ' + e.textContent.slice(0, 30)];
    }).filter(x => x[0] < 4.5);
}"""

TABLES = """() => [...document.querySelectorAll('table')].map(t => !!t.querySelector('thead th[scope=col]') &&
  [...t.tBodies[0].rows].every(r => r.querySelector('th[scope=row]')))"""
BEYOND = """width => [...document.querySelectorAll('p, h1, h2, h3, h4, img, svg, figure, dl, pre, .scroll')]
  .filter(e => e.getBoundingClientRect().right > width && !e.closest('.scroll table'))
  .map(e => e.outerHTML.slice(0, 80))"""


class Visit:
    """An opened page, and everything it asked for or complained about."""

    def __init__(self, browser: Browser, html: str, folder: Path, width: int = 1280, **options) -> None:
        file = folder / "report.html"
        file.write_text(html)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        # context-wide, and before the page is opened: nothing escapes the count
        context.on("request", lambda r: self.asked.append(r.url))
        self.failed: dict[str, str | None] = {}
        context.on("requestfailed", lambda r: self.failed.update({r.url: r.failure}))
        context.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        context.on("weberror", lambda e: self.complaints.append(str(e.error)))
        self.page: Page = context.new_page()
        self.page.goto(file.as_uri(), wait_until="load")

    def outside(self) -> list[str]:
        return [u for u in self.asked if not u.startswith(("file:", "data:"))]


@pytest.fixture(scope="module")
def html(whole):
    return build([Run(whole)])


@pytest.fixture
def visit(chromium, tmp_path):
    opened = []

    def start(html: str, **options) -> Visit:
        opened.append(Visit(chromium, html, tmp_path, **options))
        return opened[-1]

    yield start
    for v in opened:
        v.page.context.close()


def test_complete_in_itself(html, visit):
    v = visit(html, java_script_enabled=True)
    loaded = v.page.evaluate(LOADED)
    assert len(loaded) == 52
    assert all(loaded)
    assert v.outside() == []
    assert v.complaints == []


def test_the_count_of_requests_can_fail(html, visit):
    open_door = html.replace("default-src 'none'; ", "").replace("img-src data:; ", "")
    assert open_door != html
    v = visit(open_door.replace("</main>", '<img src="https://example.org/x.png" alt=""></main>'))
    assert v.outside() == ["https://example.org/x.png"]
    assert v.complaints
    assert not all(v.page.evaluate(LOADED))


def test_the_page_forbids_requests_and_scripts(html, visit):
    more = '<img src="https://example.org/x.png" alt=""><script>document.title = "run"</script>'
    v = visit(html.replace("</main>", f"{more}</main>"))
    assert v.failed == {"https://example.org/x.png": "csp"}
    assert v.page.title() != "run"
    assert sum("Content Security Policy" in c for c in v.complaints) == 2


def test_readable_without_scripts(html, visit):
    v = visit(html, java_script_enabled=False)
    said = v.page.locator(".sentence").first.inner_text().replace("\u00a0", " ")
    assert said.startswith("bomb: recognised in 46 of 48 pictures before, in 1 of 48 after (UA 97.9 %")
    assert v.page.locator(".plot svg").count() == 2


def test_no_sideways_scrolling(make_run, visit):
    run = make_run()
    long = "an_unbroken_word_" * 8
    run.write_card(replace(run.card, base_hash=long * 3, settings={"group": long}, model="/models/" + long))
    runs = [run, make_run("b", long, seed=1), make_run("c", "syringe", audited=False)]
    for runs_shown in (runs[:1], runs):
        v = visit(build(runs_shown), width=360)
        for width in (360, 768):
            v.page.set_viewport_size({"width": width, "height": 800})
            assert v.page.evaluate("document.documentElement.scrollWidth") == width
            assert v.page.evaluate(BEYOND, width) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_in_both_colour_schemes(make_run, visit, scheme):
    v = visit(build([make_run(), make_run("c", "syringe", audited=False)]), color_scheme=scheme)
    ground = v.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(252, 252, 251)", "dark": "rgb(20, 23, 26)"}[scheme]
    assert v.page.evaluate(FAINT) == []


def test_structure_for_a_screen_reader(make_run, visit):
    v = visit(build([make_run(), make_run("b", "dagger", seed=1)]))
    levels = v.page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert v.page.evaluate("[...document.images].every(i => i.alt.includes('seed'))")
    assert v.page.evaluate(TABLES) == [True] * 5
    assert v.page.locator("[role=img]").count() == 3
    v.page.keyboard.press("Tab")
    assert v.page.evaluate("document.activeElement.className") == "skip"


def test_prints_on_a_few_pages_in_ink_on_white(html, visit):
    v = visit(html, color_scheme="dark")
    pdf = v.page.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF")
    assert 2 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 8
    v.page.emulate_media(media="print", color_scheme="dark")
    assert v.page.evaluate("getComputedStyle(document.body).color") == "rgb(26, 29, 33)"


def test_a_veiled_picture_is_unveiled_by_a_click_or_a_key(make_run, visit):
    v = visit(build([make_run()], sensitive=True), java_script_enabled=True)
    blur = "n => getComputedStyle(document.images[n]).filter"
    assert "blur" in v.page.evaluate(blur, 0)
    v.page.locator(".veil").first.click()
    assert v.page.evaluate(blur, 0) == "none"
    v.page.keyboard.press("Tab")
    v.page.keyboard.press("Space")
    assert v.page.evaluate(blur, 1) == "none"
    assert "blur" in v.page.evaluate(blur, 2)


def test_a_hostile_name_is_only_read(make_run, visit):
    run = make_run()
    nasty = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    run.write_card(replace(run.card, concept={**run.card.concept, "name": nasty}))
    html = build([run])
    # were the escaping at fault, the page's own policy must not be what saves this test
    v = visit(html.replace("http-equiv", "data-was"))
    assert v.page.locator("h1").inner_text() == f"Erasing {nasty}"
    assert v.page.evaluate("document.scripts.length") == 0
    assert v.outside() == []
    assert v.complaints == []
