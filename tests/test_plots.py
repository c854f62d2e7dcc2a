"""Charts: values land where they should, names are escaped, nothing is drawn of nothing."""

import re
import xml.etree.ElementTree as ET

from training.pages.plots import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, bar_chart, line_chart


def test_a_line_goes_from_corner_to_corner():
    chart = line_chart("rising", {"a": [(0, 0), (10, 2)]}, "step")
    ET.fromstring(chart)
    [points] = re.findall(r'points="([^"]*)"', chart)
    first, last = (tuple(map(float, point.split(","))) for point in points.split())
    assert first == (LEFT, HEIGHT - BOTTOM) and last == (WIDTH - RIGHT, TOP)


def test_bars_are_as_high_as_their_values():
    chart = bar_chart("shares", ["x", "y"], {"a": [0.5, 0.25], "b": [0.0, 0.5]}, "")
    bars = [bar for bar in ET.fromstring(chart).iter("rect") if bar.find("title") is not None]
    heights = [float(bar.get("height", 0)) for bar in bars]
    full = HEIGHT - TOP - BOTTOM
    assert heights == [full, full / 2, 0, full]
    assert [bar.findtext("title") for bar in bars][1] == "a, y: 25.0%"


def test_names_are_escaped_and_series_have_a_legend():
    chart = line_chart("<b>", {"a<b": [(0, 1)], "c&d": [(1, 1)]}, "<step>", {"<s>": 0})
    ET.fromstring(chart)
    assert "&lt;b&gt;" in chart and "a&lt;b" in chart and 'class="legend"' in chart


def test_no_points_no_chart():
    assert line_chart("empty", {"a": []}, "step") == ""


def test_a_constant_is_drawn():
    svg = line_chart("flat", {"a": [(3, 0), (3, 0)]}, "step")
    ET.fromstring(svg)
    across = re.findall(r'<text x="[0-9.]+" y="[0-9.]+" text-anchor="middle">([0-9.]+)</text>', svg)
    assert "3" in across and len(set(across)) == len(across)
