"""Line and bar charts as inline SVG, so that a page needs no other files.

Series differ in colour (the colour-blind safe palette of Okabe and Ito) and in dash pattern, and
have a legend. Text and axes have the colours of the page.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from markupsafe import Markup

from handler.web.page import templates

HERE = Path(__file__).parent

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 24, 14, 40
# Additional height for long labels, which are rotated.
ASLANT = 50
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
DASHES = ("", "6 3", "2 3", "8 3 2 3")

Points = Sequence[tuple[float, float]]


def line_chart(
    title: str, series: Mapping[str, Points], x_label: str, marks: Mapping[str, float] | None = None
) -> str:
    """A line chart of named series of (x, y) points; `marks` are named vertical lines."""
    drawn = {name: points for name, points in series.items() if points}
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    if not xs:
        return ""
    axes = _Axes((min(xs), max(xs)), (min(0.0, *ys), max(ys)))
    parts = [axes.grid(x_label)]
    for name, x in (marks or {}).items():
        px = axes.x(x)
        parts.append(f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        beside = f'x="{px + 4:.1f}"' if px < WIDTH / 2 else f'x="{px - 4:.1f}" text-anchor="end"'
        parts.append(f'<text {beside} y="{TOP + 10}">{escape(name)}</text>')
    for number, points in enumerate(drawn.values()):
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" {_stroke(number)}/>')
        if len(points) <= 40:
            parts += [
                f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3" '
                f'fill="{COLOURS[number]}"><title>{x:g}: {y:.4g}</title></circle>'
                for x, y in points
            ]
    keys = {
        name: f'<line x1="1" x2="25" y1="5" y2="5" {_stroke(number)}/>'
        for number, name in enumerate(drawn)
    }
    return _figure(title, parts, keys)


def bar_chart(
    title: str, labels: Sequence[str], series: Mapping[str, Sequence[float]], x_label: str
) -> str:
    """A bar chart with one group of bars per label; values (0 to 1) are shown in percent."""
    axes = _Axes((0, len(labels)), (0.0, max(max(values) for values in series.values())), True)
    parts = [axes.grid(x_label, x_ticks=False)]
    width = 0.8 / len(series)
    slanted = len(labels) > 12 and any(len(label) > 3 for label in labels)
    for number, (name, values) in enumerate(series.items()):
        for index, value in enumerate(values):
            x0, x1 = (axes.x(index + 0.1 + (number + end) * width) for end in (0, 1))
            top = axes.y(value)
            parts.append(
                f'<rect x="{x0:.1f}" y="{top:.1f}" width="{x1 - x0 - 0.5:.1f}" '
                f'height="{HEIGHT - BOTTOM - top:.1f}" fill="{COLOURS[number]}">'
                f"<title>{escape(name)}, {escape(labels[index])}: {value:.1%}</title></rect>"
            )
    for index, label in enumerate(labels):
        x, y = axes.x(index + 0.5), HEIGHT - BOTTOM + 14
        turn = f' transform="rotate(-60 {x:.1f} {y})" text-anchor="end"' if slanted else ""
        anchor = "" if slanted else ' text-anchor="middle"'
        parts.append(f'<text x="{x:.1f}" y="{y}"{turn}{anchor}>{escape(label)}</text>')
    keys = {
        name: f'<rect x="8" width="10" height="10" fill="{COLOURS[number]}"/>'
        for number, name in enumerate(series)
    }
    return _figure(title, parts, keys, HEIGHT + (ASLANT if slanted else 0))


class _Axes:
    """Converts values to coordinates of the drawing and draws round ticks."""

    def __init__(
        self, across: tuple[float, float], up: tuple[float, float], percent: bool = False
    ) -> None:
        self.x_low, self.x_high = across
        self.y_low, self.y_high = up
        if self.x_high == self.x_low:  # a single validation
            self.x_low, self.x_high = self.x_low - 1, self.x_high + 1
        self.y_high = max(self.y_high, self.y_low + 1e-9)
        self.percent = percent

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def grid(self, x_label: str, x_ticks: bool = True) -> str:
        parts = []
        for tick in _ticks(self.y_low, self.y_high):
            y = self.y(tick)
            digits = 0 if self.y_high > 0.05 else 1
            text = f"{tick:.{digits}%}" if self.percent else f"{tick:g}"
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        if x_ticks:
            for tick in _ticks(self.x_low, self.x_high):
                x, y = self.x(tick), HEIGHT - BOTTOM + 14
                parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{tick:g}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        label = f'<text x="{middle}" y="{HEIGHT - 2}" text-anchor="middle">{escape(x_label)}</text>'
        return "".join([*parts, label])


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between low and high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5.5)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _stroke(number: int) -> str:
    dash = f' stroke-dasharray="{DASHES[number]}"' if DASHES[number] else ""
    return f'fill="none" stroke="{COLOURS[number]}" stroke-width="2"{dash}'


def _figure(title: str, parts: Sequence[str], keys: Mapping[str, str], height: int = HEIGHT) -> str:
    """The chart with its legend; `keys` are the samples of line or bar for each name."""
    content = {
        "title": title,
        "keys": {name: Markup(key) for name, key in keys.items()},
        "drawing": Markup("".join(parts)),
        "width": WIDTH,
        "height": height,
    }
    return Markup(templates(HERE / "templates").get_template("chart.html").render(content))
