"""Sums of usage: from days and hours that are summed already, and from rows where those are not up to date."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    SmallInteger,
    Subquery,
    Table,
    and_,
    case,
    cast,
    false,
    func,
    literal_column,
    or_,
    select,
    text,
    union_all,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.usage_tables import MEASURES, usage, usage_changed, usage_day, usage_hour, usage_made
from control_plane.pure.records import DAY, FINE, HOUR
from control_plane.services.ingest import read_kept_from

# Conditions of a question, for each of the three tables
Where: TypeAlias = Callable[[Table], Iterable[ColumnElement[bool]]]


class Span(NamedTuple):
    """Unix milliseconds; without `end`."""

    start: int
    end: int


class Cover(NamedTuple):
    """Which table has which part of a time: together they have each record once."""

    days: tuple[Span, ...]
    hours: tuple[Span, ...]
    rows: tuple[Span, ...]

    @property
    def parts(self) -> list[tuple[Table, tuple[Span, ...]]]:
        parts = [(usage_day, self.days), (usage_hour, self.hours), (usage, self.rows)]
        return [(table, spans) for table, spans in parts if spans]


class Piece(NamedTuple):
    """A part of a Cover that is read at a time: of hours those of a UTC day, as only today's change."""

    table: Table
    spans: tuple[Span, ...]

    @property
    def cover(self) -> Cover:
        of = {self.table: self.spans}
        return Cover(of.get(usage_day, ()), of.get(usage_hour, ()), of.get(usage, ()))

    def version(self, made: Mapping[tuple[int, int], int]) -> tuple[int | None, ...]:
        """`made`: as of `read_made`."""
        step = DAY if self.table is usage_day else HOUR
        return tuple(made.get((step, at)) for span in self.spans for at in range(span.start, span.end, step))


def pieces(cover: Cover) -> list[Piece]:
    found: list[Piece] = []
    if cover.days:
        found.append(Piece(usage_day, cover.days))
    by_day: dict[int, list[Span]] = {}
    for span in cover.hours:
        at = span.start
        while at < span.end:
            day = at - at % DAY
            end = min(span.end, day + DAY)
            by_day.setdefault(day, []).append(Span(at, end))
            at = end
    found += [Piece(usage_hour, tuple(spans)) for spans in by_day.values()]
    return found + ([Piece(usage, cover.rows)] if cover.rows else [])


async def read_made(connection: AsyncConnection, start: int, end: int) -> dict[tuple[int, int], int]:
    """How often the sums of (span, begin) were made, around a time."""
    query = select(usage_made).where(usage_made.c.at > start - DAY, usage_made.c.at < end)
    return {(span, at): number for span, at, number in await connection.execute(query)}


async def begin(connection: AsyncConnection) -> None:
    """All statements of this transaction see the same rows: what is summed meanwhile is not counted twice."""
    if connection.dialect.name == "postgresql":
        await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))


async def cover(connection: AsyncConnection, start: int, end: int, by_day: bool = True) -> Cover:
    """Where to find the records of a time. Without `by_day` sums of days are not used."""
    kept_from = await read_kept_from(connection)
    query = select(usage_changed.c.span, usage_changed.c.at).distinct()
    query = query.where(usage_changed.c.at > start - DAY, usage_changed.c.at < end)
    changed = {(span, at) for span, at in (await connection.execute(query)).all()}
    days = {at for span, at in changed if span == DAY} | {at - at % DAY for span, at in changed if span == HOUR}
    hours = {at for span, at in changed if span == HOUR}
    found: tuple[list[Span], list[Span], list[Span]] = [], [], []
    at = start
    while at < end:
        hour = at - at % HOUR
        if by_day and at % DAY == 0 and at + DAY <= end and at not in days:
            kind, span = 0, Span(at, at + DAY)
        elif hour not in hours and (hour < kept_from or (at == hour and hour + HOUR <= end)):
            # Of an hour whose rows are gone there is only the whole.
            kind, span = 1, Span(hour, hour + HOUR)
        else:
            kind, span = 2, Span(at, min(end, hour + HOUR))
        _append(found[kind], span)
        at = span.end
    return Cover(tuple(found[0]), tuple(found[1]), tuple(found[2]))


def _append(spans: list[Span], span: Span) -> None:
    if spans and spans[-1].end == span.start:
        spans[-1] = Span(spans[-1].start, span.end)
    else:
        spans.append(span)


# A row that is counted in `errors`
FAILED: ColumnElement[bool] = and_(usage.c.kind == "request", or_(usage.c.status >= 500, usage.c.outcome.not_in(FINE)))


def _of_rows() -> dict[str, ColumnElement[int]]:
    request = usage.c.kind == "request"
    # Not what was refused before a backend was asked, as in the routers' own count
    counted = and_(request, or_(usage.c.code.is_(None), usage.c.attempts > 0))
    return {
        "records": literal_column("1", BigInteger),
        "requests": _one_if(request),
        "errors": _one_if(FAILED),
        "input_tokens": func.coalesce(usage.c.input_tokens, 0),
        "cached_input_tokens": func.coalesce(usage.c.cached_input_tokens, 0),
        "output_tokens": func.coalesce(usage.c.output_tokens, 0),
        "cost_nanos": func.coalesce(usage.c.cost_nanos, 0),
        "unpriced": _one_if(usage.c.cost_nanos.is_(None)),
        "estimated": _one_if(usage.c.usage_source == "counted"),
        "counted": _one_if(counted),
    }


def _one_if(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return case((condition, literal_column("1", BigInteger)), else_=literal_column("0", BigInteger))


_OF_ROWS = _of_rows()


def total(column: ColumnElement[Any]) -> ColumnElement[int]:
    """PostgreSQL's sum of integers is a decimal."""
    return cast(func.coalesce(func.sum(column), 0), BigInteger)


def measures(table: Table, names: Sequence[str] = MEASURES) -> list[ColumnElement[int]]:
    """The sums of MEASURES, by their names."""
    found: list[ColumnElement[int]] = []
    for name in names:
        found.append(total(_OF_ROWS[name] if table is usage else table.c[name]).label(name))
    return found


def within(table: Table, spans: Sequence[Span]) -> ColumnElement[bool]:
    return or_(false(), *(and_(table.c.at >= span.start, table.c.at < span.end) for span in spans))


def grouped(cover: Cover, where: Where, group: Sequence[str], bucket: int | None = None) -> Select[Any]:
    """Sums by columns, and by `bucket` milliseconds from `at`."""
    queries = []
    for table, spans in cover.parts:
        by: list[ColumnElement[Any]] = [table.c[name] for name in group]
        if bucket is not None:
            # A literal, since PostgreSQL takes two parameters for two values.
            by.append((table.c.at - table.c.at % literal_column(str(bucket), BigInteger)).label("bucket"))
        query = select(*by, *measures(table)).where(within(table, spans), *where(table))
        queries.append(query.group_by(*by) if by else query)
    found: Subquery = union_all(*queries).subquery()
    names = [*group, *(["bucket"] if bucket is not None else [])]
    outer = [found.c[name] for name in names]
    query = select(*outer, *(total(found.c[name]).label(name) for name in MEASURES))
    return query.group_by(*outer) if outer else query


def histograms(cover: Cover, where: Where, group: Sequence[str]) -> list[Select[Any]]:
    """By columns: histograms `latency` and `ttft`; of rows as buckets, one of them NULL, and `number` of rows in it."""
    found: list[Select[Any]] = []
    for table, spans in cover.parts:
        by: list[ColumnElement[Any]] = [table.c[name] for name in group]
        condition = and_(within(table, spans), table.c.kind == "request", *where(table))
        if table is usage:
            found += [one.where(condition) for one in of_buckets(by)]
        else:
            found.append(
                select(*by, table.c.latency, table.c.ttft, literal_column("0").label("number")).where(condition)
            )
    return found


def of_buckets(by: Sequence[ColumnElement[Any]]) -> list[Select[Any]]:
    """How many rows are in each bucket of `latency`, then of `ttft`, by columns."""
    number = func.count().label("number")
    latency, ttft, nothing = usage.c.latency_bucket, usage.c.ttft_bucket, literal_column("NULL", SmallInteger)
    return [
        select(*by, latency.label("latency"), nothing.label("ttft"), number).group_by(*by, latency),
        select(*by, nothing.label("latency"), ttft.label("ttft"), number).where(ttft.is_not(None)).group_by(*by, ttft),
    ]
