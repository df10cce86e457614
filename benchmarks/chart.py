"""Charts as SVG text: bars of candidates side by side, and points over a growing number of something."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH = 560
_GAP = 24
_COLUMNS = 2
_LABEL = 120
_VALUE = 90
_ROW = 22
_HEAD = 44
_PLOT = 170
# Beyond this, the small bars would not be seen beside the large ones.
_LOG_FROM = 12
_GREY, _BLUE, _PALE, _INK = "#b9c0c8", "#1f77b4", "#d6e6f2", "#222"


@dataclass(frozen=True, slots=True)
class Point:
    """A median, and the least and the most of what it was taken from."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart of a page."""

    title: str
    unit: str
    points: Sequence[Point]


def bars(title: str, panels: Sequence[Panel], highlight: str = "ours") -> str:
    """A page of bar charts: a bar per point, a whisker from the least to the most."""
    return _page(title, panels, lambda panel: _HEAD + _ROW * len(panel.points), lambda p: _bars(p, highlight))


def lines(title: str, panels: Sequence[Panel]) -> str:
    """A page of line charts from zero: the points at even distances, with a band from the least to the most."""
    return _page(title, panels, lambda _: _HEAD + _PLOT + 24, _lines)


def _page(
    title: str, panels: Sequence[Panel], height: Callable[[Panel], int], draw: Callable[[Panel], list[str]]
) -> str:
    below = [56] * _COLUMNS
    body: list[str] = []
    for panel in panels:
        column = below.index(min(below))
        x, y = _GAP + column * (_WIDTH + _GAP), below[column]
        body += [f'<g transform="translate({x},{y})">', *draw(panel), "</g>"]
        below[column] += height(panel) + _GAP
    width, total = _GAP + _COLUMNS * (_WIDTH + _GAP), max(below)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width}" height="{total}"'
            f' font-family="DejaVu Sans, sans-serif" font-size="12" fill="{_INK}">',
            f'<rect width="{width}" height="{total}" fill="#fff"/>',
            _text(_GAP, 30, title, size=16),
            *body,
            "</svg>\n",
        ]
    )


def _bars(panel: Panel, highlight: str) -> list[str]:
    values = [value for point in panel.points for value in (point.value, point.high) if value > 0]
    most, least = max(values, default=1.0), min(values, default=1.0)
    logarithmic = most / least > _LOG_FROM
    start = least / 3

    def length(value: float) -> float:
        if logarithmic:
            share = math.log(value / start) / math.log(most / start) if value > start else 0.0
        else:
            share = max(0.0, value) / most
        return share * (_WIDTH - _LABEL - _VALUE)

    note = f"{panel.unit}, logarithmic" if logarithmic else panel.unit
    out = _heading(panel.title, note)
    for number, point in enumerate(panel.points):
        y = _HEAD + number * _ROW
        color = _BLUE if point.name == highlight else _GREY
        left, right = _LABEL + length(point.low), _LABEL + length(point.high)
        out += [
            _text(_LABEL - 8, y + 12, point.name, anchor="end"),
            f'<rect x="{_LABEL}" y="{y}" width="{length(point.value):.1f}" height="{_ROW - 6}" fill="{color}"/>',
            f'<path d="M{left:.1f} {y + 8}H{right:.1f}" stroke="{_INK}" stroke-width="1.5"/>',
            _text(right + 6, y + 12, _number(point.value)),
        ]
    return out


def _lines(panel: Panel) -> list[str]:
    most = max(point.high for point in panel.points) * 1.15
    step = (_WIDTH - _LABEL) / max(1, len(panel.points) - 1)
    bottom = _HEAD + _PLOT

    def at(number: int, value: float) -> str:
        return f"{_LABEL / 2 + number * step:.1f},{bottom - value / most * _PLOT:.1f}"

    places = list(enumerate(panel.points))
    band = [at(n, point.high) for n, point in places] + [at(n, point.low) for n, point in places[::-1]]
    out = _heading(panel.title, panel.unit)
    out += [
        f'<path d="M{_LABEL / 2} {bottom}H{_WIDTH - _LABEL / 2}" stroke="{_GREY}"/>',
        f'<polygon points="{" ".join(band)}" fill="{_PALE}"/>',
        f'<polyline points="{" ".join(at(n, p.value) for n, p in places)}" fill="none" stroke="{_BLUE}"/>',
    ]
    for number, point in places:
        x, y = (float(part) for part in at(number, point.value).split(","))
        out += [
            f'<circle cx="{x}" cy="{y}" r="3" fill="{_BLUE}"/>',
            _text(x, y - 8, _number(point.value), anchor="middle"),
            _text(x, bottom + 16, point.name, anchor="middle"),
        ]
    return out


def _heading(title: str, unit: str) -> list[str]:
    return [_text(0, 14, title, size=14), _text(0, 32, unit, color="#777")]


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, color: str = _INK) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}"'
    return f"<text {where}>{escape(text)}</text>"


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
