"""Figures: inline SVG that follows the page, the same bytes for the same numbers."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from expunge.report import plots
from expunge.report.plots import Point

ONE = Point("1", 0.98, 0.92, (0.89, 0.996), (0.87, 0.956), (0.04, 0.94))
TWO = Point("2", 0.5, 0.3, (0.4, 0.6), (0.2, 0.4), (0.1, 0.95))
BARE = Point("3", 1.0, 1.0, None, None, None)


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", svg)


@pytest.mark.parametrize("points", [[ONE], [ONE, TWO], [BARE], [ONE, BARE]])
def test_plane_is_small_wellformed_and_reproducible(points):
    svg = plots.plane(points, "a")
    ElementTree.fromstring(svg)
    assert svg == plots.plane(points, "a")
    assert len(svg) < 25_000
    assert "http" not in svg.replace("http://www.w3.org/", "")
    assert "erased: UA, %" in texts(svg)


def test_colours_are_the_page_s_own():
    svg = plots.plane([ONE, TWO], "a") + plots.losses({"erase": [2.0, 1.0]}, 2, "b")
    assert "var(--accent)" in svg
    assert not re.findall(r"#[0-9a-f]{6}", svg)


def test_ids_of_two_figures_differ():
    a, b = (set(re.findall(r'\bid="([^"]+)"', plots.plane([ONE], name))) for name in "ab")
    assert a
    assert not a & b
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', plots.plane([ONE], "a")):
        assert target in a


def test_the_axis_reaches_down_to_the_worst_point():
    assert "20" in texts(plots.plane([ONE, TWO], "a"))
    assert min(int(t) for t in texts(plots.plane([ONE], "a")) if t.isdigit() and int(t) > 0) == 20  # of the x axis
    assert {"85", "90", "95"} <= set(texts(plots.plane([ONE], "a")))


def test_several_points_carry_numbers_and_one_its_word():
    assert "edited" in texts(plots.plane([ONE], "a"))
    assert {"1", "2"} <= set(texts(plots.plane([ONE, TWO], "a")))


@pytest.mark.parametrize(
    ("curves", "log"),
    [
        ({"a": [1.0, 0.001]}, True),
        ({"a": [1.0, 0.9]}, False),
        ({"a": [1.0, 0.0]}, False),
        ({"a": [0.5]}, False),
        ({"a": [math.nan, 1.0], "b": [-1.0, 1.0]}, False),
    ],
)
def test_losses_are_drawn_whatever_they_are(curves, log):
    svg = plots.losses(curves, 300, "a")
    ElementTree.fromstring(svg)
    assert "$" not in svg  # no mathtext source
    assert ({"0.001", "0.01", "0.1"} <= set(texts(svg))) is log
