"""Charts as SVG: from values to text, with everything escaped, and colours, sizes and fonts left to the stylesheet.

No chart has a style attribute. Text is never scaled: labels stand at percents of the width, at their own size, and only
shapes are stretched (`svg.shapes`, whose viewBox has no fixed aspect). All of a chart is in `figure.chart`, whose width
is that of its container; labels of `.wide` are hidden where that is narrow. The y labels stand left of the plot and the
last values right of it: the stylesheet leaves margins for both.

From an answer of usage to a chart, and its numbers as a table:

    times = buckets(answer["start"], answer["end"], HOUR)
    series = [Series(name, spread(points, times, "requests")) for name, points in ...]
    chart = columns(times, series, title="Requests", unit_text="per hour", bucket_ms=HOUR)
    table = table_of(times, series, title="Requests per hour", bucket_ms=HOUR)

Money is in nanos, with the unit `axes.money("USD")`; shares are of 1, with `axes.SHARE`.

Classes, for the stylesheet (its section "Charts"):

- `figure.chart` (`.columns`, `.lines`, `.ended`: with last values, `.histogram`, `.waterfall`), in it `figcaption`
  with `.chart-title`, `.chart-unit`, `.chart-now`
- `svg.plot`, `svg.shapes`; `.rules`, `.base` (lines of the value axis), `.axis` (labels: `.y`, `.x`, `.day`, `.wide`),
  `.end` (last values), `.hit` (what a pointer finds), `.gap` (no data), `.nothing`
- `.s0` ... `.s7`, `.other`, `.ok`, `.failed`: colours of series, of `path.area`, `path.line`, `.swatch`, `.end`
- `ul.legend`, in it `.swatch`, `.of`, `.value`
- `svg.spark`: `path.line`
- `ol.waterfall`: `li` (`.scale`: the axis), in it `.backend`, `.state` (a pill, as everywhere), `svg.lane` with
  `.rules`, `.axis` (`.first`, `.last`), `.span` (and a State), `.mark` (the first byte); `.took`
- `table.numbers` with `.num`; `.visually-hidden`
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from markupsafe import Markup, escape

from control_plane.pure import axes, figures
from control_plane.pure.axes import COUNT, MILLISECONDS, Scale, Unit, span_text, time_ticks
from control_plane.pure.figures import When, unix_ms

MOST_POINTS, MOST_SERIES = 300, 8
OTHER = "other"
# Pixels: of the plot without its labels, of the room above it, and below it for the times
HEIGHT, _ABOVE, _BELOW = 150, 8, 20
# Shapes have two units for each pixel of height, so that numbers are whole.
_FINE = 2
# Bytes that the texts for pointers may have, and columns beyond which they are too narrow to be found
_MOST_HINTS, _MOST_HITS = 9_000, 120
# Columns beyond which the space between two is relatively wider, so that it is seen; and beyond which there is none
_MOST_DENSE, _MOST_SPACED = 31, 120
# Pixels between two labels of last values, and letters that there is room for
_LABEL, _LONGEST = 13, 9
NOTHING = Markup("")
State = Literal["ok", "failed", "refused", "left", "lost", "waited"]
Number = int | float
Values = tuple[Number | None, ...]


class Series(NamedTuple):
    """`values`: one per time; None: not known. `href`: where its name leads. `kind`: a class instead of `s0` ..."""

    name: str
    values: Values
    href: str | None = None
    kind: str | None = None


class Bin(NamedTuple):
    """A column of `histogram`: requests from `at`, Unix milliseconds, by how they ended. `href`: of these requests."""

    at: int
    ok: int
    failed: int
    href: str | None = None


class Bar(NamedTuple):
    """A row of `waterfall`. Milliseconds after the request head; `words`: how it ended; `first_byte_ms`: a mark."""

    label: str
    words: str
    state: State
    start_ms: float
    duration_ms: float
    first_byte_ms: float | None = None
    href: str | None = None


class Table(NamedTuple):
    """Numbers as text; in a page it is a table (`{{ table }}`). `rows`: the first cell of each is its head."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __html__(self) -> Markup:
        head = _all('<th scope="col">{}</th>', self.head[:1]) + _all(
            '<th scope="col" class="num">{}</th>', self.head[1:]
        )
        rows = NOTHING.join(
            Markup('<tr><th scope="row">{}</th>{}</tr>').format(row[0], _all('<td class="num">{}</td>', row[1:]))
            for row in self.rows
        )
        frame = '<table class="numbers"><caption>{}</caption><thead><tr>{}</tr></thead><tbody>{}</tbody></table>'
        return Markup(frame).format(self.caption, head, rows)


def _all(pattern: str, values: Iterable[Any]) -> Markup:
    return NOTHING.join(Markup(pattern).format(value) for value in values)


# Times and values


def buckets(start: When, end: When, bucket_ms: int) -> tuple[int, ...]:
    """The begins of all buckets of a time, in Unix milliseconds; the first one may begin before it."""
    first = unix_ms(start) // bucket_ms * bucket_ms
    return tuple(range(first, max(unix_ms(end), first + 1), bucket_ms))


def bucket_of(start: When, end: When, most: int = 60) -> int:
    """Milliseconds of a round bucket, so that a time has about `most` of them."""
    return axes.round_step(max(unix_ms(end) - unix_ms(start), 1), most)


def spread(points: Iterable[Mapping[str, Any]], times: Sequence[int], field: str, empty: Number | None = 0) -> Values:
    """`points` of an answer (`{"at": ..., field: ...}`) at these times; `empty` where there is none."""
    known = {unix_ms(point["at"]): point[field] for point in points}
    return tuple(known.get(at, empty) for at in times)


def top(series: Sequence[Series], most: int = MOST_SERIES) -> tuple[Series, ...]:
    """The largest first, and what is beyond as one: of ten series of 8, seven and `other`. Only for what adds up."""
    ordered = sorted(series, key=lambda one: -_total(one.values))
    named = [one for one in ordered if one.name != OTHER]
    if len(ordered) <= most:
        return tuple(named + [one._replace(kind=OTHER) for one in ordered if one.name == OTHER])
    kept, rest = named[: most - 1], [one for one in ordered if one not in named[: most - 1]]
    return (*kept, Series(OTHER, _added([one.values for one in rest]), kind=OTHER))


def _total(values: Iterable[Number | None]) -> Number:
    return sum(value for value in values if value is not None)


def _added(all_values: Sequence[Values]) -> Values:
    return tuple(None if all(one is None for one in each) else _total(each) for each in zip(*all_values, strict=True))


def _thinned(values: Values, factor: int, join: Callable[[list[Number]], Number]) -> Values:
    if factor == 1:
        return values
    parts = ([one for one in values[i : i + factor] if one is not None] for i in range(0, len(values), factor))
    return tuple(join(part) if part else None for part in parts)


class _Frame(NamedTuple):
    """The times of a chart: `size` buckets from `start`, of `bucket` milliseconds each."""

    start: int
    bucket: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.bucket * self.size

    def span(self, place: int) -> str:
        return span_text(self.start + place * self.bucket, self.start + (place + 1) * self.bucket)

    def percent(self, at: float) -> str:
        return _percent((at - self.start) / (self.end - self.start))


def _percent(share: float) -> str:
    return figures.trimmed(f"{100 * share:.2f}") + "%"


def _framed(
    times: Sequence[When], series: Sequence[Series], bucket_ms: int, join: Callable[[list[Number]], Number]
) -> tuple[_Frame, tuple[Series, ...]]:
    """At most MOST_POINTS times: neighbours are joined. Raises ValueError if a series has not a value per time."""
    for one in series:
        if len(one.values) != len(times):
            raise ValueError(f"{one.name}: {len(one.values)} values for {len(times)} times")
    factor = max(math.ceil(len(times) / MOST_POINTS), 1)
    frame = _Frame(unix_ms(times[0]) if times else 0, bucket_ms * factor, math.ceil(len(times) / factor))
    checked = tuple(one._replace(values=tuple(_clean(value) for value in one.values)) for one in series)
    return frame, tuple(one._replace(values=_thinned(one.values, factor, join)) for one in checked)


def _clean(value: Number | None) -> Number | None:
    """What can be drawn: nothing below 0, nothing infinite."""
    return None if value is None or not math.isfinite(value) else max(value, 0)


def _kind(one: Series, place: int) -> str:
    return one.kind or f"s{place % MOST_SERIES}"


# Charts of times


def columns(
    times: Sequence[When],
    series: Sequence[Series],
    *,
    title: str,
    bucket_ms: int,
    unit: Unit = COUNT,
    unit_text: str = "",
    description: str = "",
    empty: str = "Nothing in this time.",
    height: int = HEIGHT,
) -> Markup:
    """Stacked columns of what adds up (requests, tokens, money), the first series at the bottom.

    `times`: the begin of each bucket of `bucket_ms` milliseconds, without a hole (see `buckets`, `spread`). Of more
    than 8 series the largest are shown, and the others as one. `unit_text`: after the title, such as `per hour`.
    """
    frame, drawn = _framed(times, top(series) if len(series) > MOST_SERIES else series, bucket_ms, sum)
    totals = _added([one.values for one in drawn]) if drawn else ()
    axis = axes.scale(max((value for value in totals if value is not None), default=0), unit)
    legend = _legend((one, _kind(one, place), unit.shown(_total(one.values))) for place, one in enumerate(drawn))
    total = unit.shown(_total(totals)) if any(totals) else ""
    sentence = _columns_text(description, frame, drawn, unit)
    shapes = NOTHING.join(
        [_gaps(frame, totals, height), *_areas(drawn, axis, height), _hits(frame, drawn, unit, height, True)]
    )
    plot = _plot(frame, axis, shapes, title, sentence, height, "" if any(totals) else empty)
    return _figure("columns", title, unit_text, total, plot, legend if len(drawn) > 1 else NOTHING)


def _columns_text(description: str, frame: _Frame, drawn: Sequence[Series], unit: Unit) -> str:
    parts = [description] if description else []
    if frame.size:
        parts.append(f"{figures.stamp(frame.start)} to {figures.stamp(frame.end)} UTC.")
    parts += [f"{one.name}: {unit.shown(_total(one.values))}." for one in drawn]
    return " ".join(parts)


def _areas(drawn: Sequence[Series], axis: Scale, height: int) -> Iterator[Markup]:
    """One path per series: the stack up to it. The highest is drawn first, and covered by those below it."""
    spaced = bool(drawn) and len(drawn[0].values) <= _MOST_SPACED
    paths, below = [], [0] * (len(drawn[0].values) if drawn else 0)
    for place, one in enumerate(drawn):
        below = [
            min(under + axis.height(value or 0, height * _FINE), height * _FINE)
            for under, value in zip(below, one.values, strict=True)
        ]
        if any(one.values):
            paths.append(
                Markup('<path class="area {}" d="{}"/>').format(_kind(one, place), _skyline(below, height, spaced))
            )
    return reversed(paths)


def _skyline(heights: Sequence[int], height: int, spaced: bool) -> str:
    """Columns as one closed path; each is 10 units wide, with its space."""
    bottom, width, at = height * _FINE, _width(len(heights)), 0
    parts = [f"M{(10 - width) // 2} {bottom}"]
    for size in heights:
        if spaced:
            parts.append(f"V{bottom - size}h{width}V{bottom}h{10 - width}" if size else "h10")
        elif size == at:
            parts.append("h10")
        else:
            parts.append(f"V{bottom - size}h10")
            at = size
    return "".join([*parts, f"V{bottom}z"])


def _width(number: int) -> int:
    """Of a column, out of 10."""
    return 9 if number <= _MOST_DENSE else 8


def _gaps(frame: _Frame, totals: Values, height: int) -> Markup:
    """Where nothing is known."""
    runs: list[list[int]] = []
    for place, value in enumerate(totals):
        if value is None:
            if runs and runs[-1][1] == place:
                runs[-1][1] += 1
            else:
                runs.append([place, place + 1])
    if not runs or len(totals) == 1:
        return NOTHING
    path = "".join(f"M{10 * a} 0H{10 * b}V{height * _FINE}H{10 * a}z" for a, b in runs)
    return Markup('<path class="gap" d="{}"/>').format(path)


def _hits(frame: _Frame, drawn: Sequence[Series], unit: Unit, height: int, summed: bool) -> Markup:
    """A text for each column, which pointers find; nothing where there are too many. `summed`: begins with the sum."""
    if frame.size > _MOST_HITS:
        return NOTHING
    full, brief = [], []
    for place in range(frame.size):
        known = [(one.name, value) for one in drawn if (value := one.values[place]) is not None]
        head = frame.span(place)
        if summed or len(drawn) == 1:
            head += f": {unit.shown(_total(value for _, value in known))}"
        # As they are stacked: the first one is at the bottom.
        parts = [f"{name}: {unit.shown(value)}" for name, value in reversed(known) if value or not summed]
        if parts:
            brief.append(_hit(place, height, head))
            full.append(_hit(place, height, "\n".join([head, *parts])))
    found = "".join(full if len(drawn) > 1 else brief)
    if len(found) > _MOST_HINTS:
        found = "".join(brief) if summed else ""
    return Markup(f'<g fill="none" pointer-events="all">{found}</g>') if found else NOTHING


# Of whole numbers alone; `Markup.format` would take most of the time of a chart.
def _rect(kind: str, x: int, y: int, width: int, height: int, inside: str = "") -> str:
    path = f'<path class="{kind}" d="M{x} {y}h{width}v{height}h-{width}z"'
    return f"{path}>{inside}</path>" if inside else f"{path}/>"


def _hit(place: int, height: int, text: str) -> str:
    return _rect("hit", 10 * place, 0, 10, height * _FINE, f"<title>{escape(text)}</title>")


def lines(
    times: Sequence[When],
    series: Sequence[Series],
    *,
    title: str,
    bucket_ms: int,
    unit: Unit = MILLISECONDS,
    unit_text: str = "",
    description: str = "",
    empty: str = "Nothing was measured in this time.",
    height: int = HEIGHT,
) -> Markup:
    """A line per series, for what does not add up (percentiles, shares, rates); None leaves a gap.

    `times` as for `columns`. Eight series at most: the first ones are shown. Of more than 300 times, the largest value
    of neighbours.
    """
    frame, drawn = _framed(times, series[:MOST_SERIES], bucket_ms, max)
    known = [value for one in drawn for value in one.values if value is not None]
    axis = axes.scale(max(known, default=0), unit)
    last = [(one, _kind(one, place), _last(one.values)) for place, one in enumerate(drawn)]
    shown = [(one, kind, figures.MISSING if value is None else unit.shown(value)) for one, kind, value in last]
    legend = _legend(shown) if len(drawn) > 1 else NOTHING
    parts = [description] if description else []
    parts += [f"{figures.stamp(frame.start)} to {figures.stamp(frame.end)} UTC."] if frame.size else []
    parts += [f"{one.name}: last {text}, {_range(one.values, unit)}." for one, _, text in shown]
    shapes = NOTHING.join(
        Markup('<path class="line {}" d="{}"/>').format(_kind(one, place), _line(one.values, axis, height))
        for place, one in reversed(list(enumerate(drawn)))
        if any(value is not None for value in one.values)
    )
    shapes += _hits(frame, drawn, unit, height, False)
    ends = _ends([(kind, value) for _, kind, value in last if value is not None], axis, unit, height)
    plot = _plot(frame, axis, shapes, title, " ".join(parts), height, "" if known else empty, ends)
    return _figure("lines ended" if ends else "lines", title, unit_text, "", plot, legend)


def _last(values: Values) -> Number | None:
    """The value at the end; a line that has stopped has none."""
    return values[-1] if values else None


def _range(values: Values, unit: Unit) -> str:
    known = [value for value in values if value is not None]
    return f"from {unit.shown(min(known))} to {unit.shown(max(known))}" if known else "no values"


def _line(values: Values, axis: Scale, height: int) -> str:
    """Through the middles of the buckets, 10 units apart; a value between two gaps is a point."""
    parts: list[str] = []
    before: int | None = None
    for place, value in enumerate(values):
        if value is None:
            before = None
            continue
        y = height * _FINE - axis.height(value, height * _FINE)
        # A minus sign is a separator, too.
        parts.append(f"M{10 * place + 5} {y}h0" if before is None else f"l10 {y - before}".replace(" -", "-"))
        before = y
    return "".join(parts)


def _ends(last: Sequence[tuple[str, Number]], axis: Scale, unit: Unit, height: int) -> Markup:
    """The last values, right of their lines, without one on another; only of a few."""
    if len(last) > 3:
        return NOTHING
    placed: list[tuple[float, str, str]] = []
    floor = float("inf")
    for kind, value in sorted(last, key=lambda one: one[1]):
        y = min(height + _ABOVE - axis.height(value, height) + 4.0, floor - _LABEL)
        floor = y
        text = unit.shown(value)
        placed.append((y, kind, text if len(text) <= _LONGEST else unit.tick(value)))
    return NOTHING.join(
        Markup('<text class="end {}" x="100%" dx="6" y="{}">{}</text>').format(kind, f"{y:.0f}", text)
        for y, kind, text in placed
    )


def histogram(
    bins: Sequence[Bin],
    *,
    title: str,
    bucket_ms: int,
    unit_text: str = "",
    description: str = "",
    empty: str = "No requests in this time.",
    height: int = 72,
) -> Markup:
    """Requests over time, those that failed at the bottom. Each column that has some is a link.

    `bins`: without a hole, 60 or so (`bucket_of`, `buckets`): narrower columns cannot be hit.
    """
    frame = _Frame(bins[0].at if bins else 0, bucket_ms, len(bins))
    axis = axes.scale(max((one.ok + one.failed for one in bins), default=0), COUNT, 2)
    ok, failed = sum(one.ok for one in bins), sum(one.failed for one in bins)
    shapes = NOTHING.join(_bin(place, one, frame, axis, height) for place, one in enumerate(bins))
    parts = [description] if description else []
    if bins:
        parts.append(f"{figures.stamp(frame.start)} to {figures.stamp(frame.end)} UTC.")
    parts.append(f"{figures.count(ok)} without an error, {figures.count(failed)} failed.")
    plot = _plot(frame, axis, shapes, title, " ".join(parts), height, "" if ok + failed else empty, linked=True)
    legend = _legend(
        [
            (Series("failed", ()), "failed", figures.count(failed)),
            (Series("without an error", ()), "ok", figures.count(ok)),
        ]
    )
    return _figure("histogram", title, unit_text, figures.count(ok + failed), plot, legend)


def _bin(place: int, one: Bin, frame: _Frame, axis: Scale, height: int) -> Markup:
    total = one.ok + one.failed
    if not total:
        return NOTHING
    high = height * _FINE
    low = axis.height(one.failed, high)
    rest = min(axis.height(one.ok, high), high - low)
    text = f"{frame.span(place)}: {figures.count(total)} {'request' if total == 1 else 'requests'}"
    text += f", {figures.count(one.failed)} failed" if one.failed else ""
    parts = [_rect("hit", 10 * place, 0, 10, high)]
    if rest:
        parts.append(_rect("area ok", 10 * place + 1, high - low - rest, 8, rest))
    if low:
        parts.append(_rect("area failed", 10 * place + 1, high - low, 8, low))
    inside = f"<title>{escape(text)}</title>{''.join(parts)}"
    if one.href is None:
        return Markup(f"<g>{inside}</g>")
    # All columns would have to be passed by keyboard, one by one: only those with an error are stops.
    stop = "" if one.failed else ' tabindex="-1"'
    return Markup(f'<a href="{escape(one.href)}"{stop}>{inside}</a>')


def spark(values: Sequence[Number | None], title: str, kind: str = "s0") -> Markup:
    """A small line for a cell or a tile, from 0 to the largest value; `title` says what it is, in words."""
    found = tuple(_clean(value) for value in values)
    factor = max(math.ceil(len(found) / 60), 1)
    found = _thinned(found, factor, max)
    known = [value for value in found if value is not None]
    axis = Scale(max(known, default=0) or 1, ())
    path = _line(found, axis, 20)
    drawn = Markup('<path class="line {}" d="{}"/>').format(kind, path) if known else NOTHING
    return Markup(
        '<svg class="spark" role="img" width="96" height="20" viewBox="0 -2 {} 44" preserveAspectRatio="none">'
        "<title>{}</title>{}</svg>"
    ).format(max(10 * len(found), 10), title, drawn)


# What charts of times are made of


def _plot(
    frame: _Frame,
    axis: Scale,
    shapes: Markup,
    title: str,
    description: str,
    height: int,
    nothing: str,
    ends: Markup = NOTHING,
    linked: bool = False,
) -> Markup:
    """The picture. With links in it, it is a group: what is an image has no parts for a screen reader."""
    width = max(10 * frame.size, 10)
    labels = NOTHING.join([*_y_labels(axis, height), *_x_labels(frame, height)])
    sentence = NOTHING
    if nothing:
        sentence = Markup('<text class="nothing" x="50%" y="{}">{}</text>').format(_ABOVE + height // 2 + 4, nothing)
        description = f"{description} {nothing}".strip()
    return Markup(
        '<svg class="plot" role="{role}" width="100%" height="{all}"><title>{title}</title><desc>{desc}</desc>'
        '<svg class="shapes" role="none" y="{above}" width="100%" height="{height}" viewBox="0 0 {width} {high}" '
        'preserveAspectRatio="none">{grid}{shapes}<path class="base" d="M0 {high}H{width}"/></svg>'
        '<g aria-hidden="true">{labels}{ends}</g>{sentence}</svg>'
    ).format(
        role="group" if linked else "img",
        all=_ABOVE + height + _BELOW,
        title=title,
        desc=description,
        above=_ABOVE,
        height=height,
        width=width,
        high=height * _FINE,
        grid=_grid(axis, width, height),
        shapes=shapes,
        labels=labels,
        ends=ends,
        sentence=sentence,
    )


def _grid(axis: Scale, width: int, height: int) -> Markup:
    heights = [round(height * _FINE * (1 - value / axis.top)) for value, _ in axis.ticks[1:]]
    path = "".join(f"M0 {y}H{width}" for y in heights)
    return Markup('<path class="rules" d="{}"/>').format(path) if path else NOTHING


def _y_labels(axis: Scale, height: int) -> Iterator[Markup]:
    for value, text in axis.ticks:
        y = _ABOVE + round(height * (1 - value / axis.top)) + 4
        yield Markup('<text class="axis y" dx="-8" y="{}">{}</text>').format(y, text)


def _x_labels(frame: _Frame, height: int) -> Iterator[Markup]:
    if not frame.size:
        return
    for tick in time_ticks(frame.start, frame.end):
        share = (tick.at - frame.start) / (frame.end - frame.start)
        kinds = "axis x" + (" day" if tick.day else "") + ("" if tick.always else " wide")
        yield Markup('<text class="{}" x="{}" y="{}">{}</text>').format(
            kinds, _percent(share), _ABOVE + height + 15, tick.text
        )


def _legend(rows: Iterable[tuple[Series, str, str]]) -> Markup:
    """`rows`: (series, class, value)."""
    items = []
    for one, kind, text in rows:
        name = Markup('<a href="{}">{}</a>').format(one.href, one.name) if one.href else escape(one.name)
        items.append(
            Markup(
                '<li><span class="swatch {}"></span><span class="of">{}</span> <span class="value">{}</span></li>'
            ).format(kind, name, text)
        )
    return Markup('<ul class="legend">{}</ul>').format(NOTHING.join(items))


def _figure(kind: str, title: str, unit: str, now: str, plot: Markup, legend: Markup) -> Markup:
    parts = [Markup('<span class="chart-title">{}</span>').format(title)]
    if unit:
        parts.append(Markup('<span class="chart-unit">{}</span>').format(unit))
    if now:
        parts.append(Markup('<span class="chart-now">{}</span>').format(now))
    return Markup('<figure class="chart {}"><figcaption>{}</figcaption>{}{}</figure>').format(
        kind, Markup(" ").join(parts), plot, legend
    )


def table_of(
    times: Sequence[When],
    series: Sequence[Series],
    *,
    title: str,
    bucket_ms: int,
    unit: Unit = COUNT,
) -> Table:
    """The numbers of `columns` or `lines`: a row per time, a column per series; a dash for what is not known."""
    rows = []
    for place, at in enumerate(times):
        begin = unix_ms(at)
        cells = (one.values[place] for one in series)
        shown = (figures.MISSING if value is None else unit.shown(value) for value in cells)
        rows.append((span_text(begin, begin + bucket_ms), *shown))
    return Table(title, ("Time (UTC)", *(one.name for one in series)), tuple(rows))


# A request


# How pills of a state look
_KINDS: Mapping[State, str] = {
    "ok": "ok",
    "failed": "bad",
    "refused": "warn",
    "left": "off",
    "lost": "off",
    "waited": "info",
}


def waterfall(bars: Sequence[Bar], duration_ms: float, *, title: str, empty: str = "No backend was tried.") -> Markup:
    """What happened to one request, a row for each part, on an axis from 0 to `duration_ms`.

    A list in words, with a bar beside each: without the picture nothing is missing.
    """
    end = max([duration_ms, 0.001, *(bar.start_ms + bar.duration_ms for bar in bars)])
    axis = axes.scale(end, MILLISECONDS, 5)
    ticks = [(value, text) for value, text in axis.ticks if value <= end]
    head = Markup('<figure class="chart waterfall"><figcaption><span class="chart-title">{}</span></figcaption>')
    if not bars:
        return head.format(title) + Markup('<p class="nothing">{}</p></figure>').format(empty)
    labels = NOTHING.join(
        Markup('<text class="axis x{}" x="{}" y="12">{}</text>').format(
            _edge(value / end, place), _percent(value / end), text
        )
        for place, (value, text) in enumerate(ticks)
    )
    grid = NOTHING.join(
        Markup('<line class="rules" x1="{0}" x2="{0}" y1="0" y2="100%"/>').format(_percent(value / end))
        for value, _ in ticks
    )
    rows = NOTHING.join(_row(bar, end, grid) for bar in bars)
    return (
        head.format(title)
        + Markup('<ol class="waterfall"><li class="scale" aria-hidden="true">')
        + Markup('<svg class="lane" width="100%" height="16">{}</svg></li>{}</ol></figure>').format(labels, rows)
    )


def _edge(share: float, place: int) -> str:
    """Labels at the ends are not cut off; where there is little room, every other one is left out."""
    return (" first" if share < 0.04 else " last" if share > 0.94 else "") + (" wide" if place % 2 else "")


def _row(bar: Bar, end: float, grid: Markup) -> Markup:
    first = bar.first_byte_ms
    mark = NOTHING
    if first is not None and 0 <= first <= end:
        mark = Markup('<line class="mark" x1="{0}" x2="{0}" y1="2" y2="22"/>').format(_percent(first / end))
    label = Markup('<a href="{}">{}</a>').format(bar.href, bar.label) if bar.href else escape(bar.label)
    since = f"after {figures.ms(bar.start_ms)}, for {figures.ms(bar.duration_ms)}"
    since += f", first byte after {figures.ms(first)}" if first is not None else ""
    return Markup(
        '<li><span class="backend">{label}</span> '
        '<span class="state {kind}">{words}</span>'
        '<span class="visually-hidden">, {since}</span>'
        '<svg class="lane" aria-hidden="true" width="100%" height="24">{grid}'
        '<rect class="span {state}" x="{x}" width="{width}" y="5" height="14" rx="2"/>{mark}</svg>'
        '<span class="took" aria-hidden="true">{took}</span></li>'
    ).format(
        state=bar.state,
        label=label,
        kind=_KINDS[bar.state],
        words=bar.words,
        since=since,
        grid=grid,
        x=_percent(min(bar.start_ms / end, 1)),
        width=_percent(min(bar.duration_ms / end, 1)),
        mark=mark,
        took=figures.ms(bar.duration_ms),
    )
