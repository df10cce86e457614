"""Charts of series of Prometheus, as sections of pages: by who exports them, each with its source, gaps and numbers."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from markupsafe import Markup

from control_plane.errors import Refused
from control_plane.http.console.shell import Visit
from control_plane.panels import Source, Unit, queries
from control_plane.pure import axes, charts
from control_plane.pure.charts import MOST_SERIES, Series, Table
from control_plane.pure.figures import ms
from control_plane.pure.series import highest
from control_plane.services import series
from control_plane.services.series import MISSING, Asked, Read

# Rows of a table at most
_MOST_ROWS = 60
# How values of a unit are drawn: by what they are multiplied, and what stands after the title
_UNITS: Mapping[Unit, tuple[axes.Unit, float, str]] = {
    "requests/s": (axes.PER_SECOND, 1, "requests per second"),
    "tokens/s": (axes.PER_SECOND, 1, "tokens per second"),
    "events/s": (axes.PER_SECOND, 1, "per second"),
    "bytes/s": (axes.BYTES, 1, "per second"),
    "bytes": (axes.BYTES, 1, ""),
    "seconds": (axes.MILLISECONDS, 1000, ""),
    "share": (axes.SHARE, 1, ""),
    "cores": (axes.SHARE, 1, "of one core"),
    "count": (axes.COUNT, 1, ""),
    "degrees": (axes.COUNT, 1, "\N{DEGREE SIGN}C"),
    "watts": (axes.COUNT, 1, "W"),
    "yes or no": (axes.COUNT, 1, ""),
}
_TITLES: Mapping[Source, str] = {
    "routers": "Routers",
    "engines": "Engines",
    "node exporter": "Hosts",
    "DCGM exporter": "GPUs",
}


class Chart(NamedTuple):
    """`left_out`: series that are not drawn, because others are higher."""

    name: str
    text: str
    drawn: Markup
    numbers: Table
    left_out: int


@dataclass
class Group:
    """The charts of one source. `missing`: which exporter or setting gives them, if none of them has a value."""

    title: str
    source: Source
    missing: str
    charts: list[Chart] = field(default_factory=list)


@dataclass
class Section:
    """What a page has of Prometheus. `configured`: whether there is one; `problem`: why it has no answer."""

    configured: bool
    groups: list[Group] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problem: str | None = None
    step: int = 0


async def section(visit: Visit, names: Sequence[str], asked: Asked) -> Section:
    """The queries of these names, in their order. Raises Refused only for what is asked, not for Prometheus."""
    if visit.plane.connections.prometheus is None:
        return Section(configured=False)
    every = await asyncio.gather(*(_read(visit, name, asked) for name in names))
    found = Section(configured=True)
    groups: dict[Source, Group] = {}
    for name, read in zip(names, every, strict=True):
        if isinstance(read, Refused):
            found.problem = read.message
            continue
        source = queries()[name].source
        group = groups.setdefault(source, Group(_TITLES[source], source, MISSING[source]))
        if read.missing is None:
            group.missing = ""
        group.charts.append(_chart(name, read))
        found.warnings += [warning for warning in read.warnings if warning not in found.warnings]
        found.step = read.times.step
    found.groups = list(groups.values())
    return found


async def _read(visit: Visit, name: str, asked: Asked) -> Read | Refused:
    try:
        return await series.read(visit.plane, visit.act, name, asked)
    except Refused as exc:
        if exc.status < 500:
            raise
        return exc


def _chart(name: str, read: Read) -> Chart:
    panel, at = read.query.panel, read.times
    unit, factor, unit_text = _UNITS[panel.unit]
    kept = highest(read.series, MOST_SERIES)
    shown = [Series(one.name, tuple(None if value is None else value * factor for value in one.values)) for one in kept]
    drawn = charts.lines(
        list(at.all),
        shown,
        title=panel.title,
        bucket_ms=at.step,
        unit=unit,
        unit_text=unit_text,
        description=panel.text,
        empty="No series in this time.",
    )
    numbers = _table(panel.title, at.all, shown, unit, at.step)
    return Chart(name, panel.text, drawn, numbers, len(read.series) - len(kept))


def _table(title: str, times: range, shown: Sequence[Series], unit: axes.Unit, step: int) -> Table:
    """Of many times every other one or fewer, the last one among them."""
    factor = math.ceil(len(times) / _MOST_ROWS)
    first = (len(times) - 1) % factor
    fewer = [one._replace(values=one.values[first::factor]) for one in shown]
    every = f"{title}, every {ms(step * factor)}"
    return charts.table_of(list(times[first::factor]), fewer, title=every, bucket_ms=step, unit=unit)
