"""Requests, one by one: usage records with the name of their key, and those that belong to the same request."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Row,
    Select,
    Table,
    func,
    literal_column,
    not_,
    or_,
    select,
    tuple_,
    union_all,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.usage_tables import DIMENSIONS, usage
from control_plane.errors import NotFound
from control_plane.plane import Act, Plane
from control_plane.pure.records import DAY, FIELDS, HOUR, MINUTE
from control_plane.pure.times import shown
from control_plane.services import sums
from control_plane.services.usage import parts_reached, reached

# Clients may send one request id again and again: related is what is near, and no more than so many.
_NEAR = HOUR
_MOST_RELATED = 1000
# Milliseconds before and after a request in which its backend is looked at, and how many others are shown
_WHILE, _NEIGHBOURS = 2 * MINUTE, 10
# Request ids of those that ended in one way
_EXAMPLES = 3
# Milliseconds of a bucket, of which people can read the times
_STEPS = (
    *(seconds * 1000 for seconds in (1, 2, 5, 10, 15, 30)),
    *(minutes * MINUTE for minutes in (1, 2, 5, 10, 15, 30)),
    *(hours * HOUR for hours in (1, 2, 3, 6, 12)),
    *(days * DAY for days in (1, 2, 7)),
)
_COUNTS = ("records", "errors")
# Sorts after every text with the same beginning.
_LAST = "\U0010ffff"


class Wanted(NamedTuple):
    """`id`: a request id or its beginning. `start`, `end`: Unix milliseconds. `filters`: by dimension; None: without.

    `failed`: whether it is one of the errors of GET /usage. `status_class`: 2 for 200 to 299. `retried`: with more than
    one attempt. `longer`: milliseconds that it took at least.
    """

    id: str | None = None
    start: int | None = None
    end: int | None = None
    filters: Mapping[str, str | None] = {}
    kinds: tuple[str, ...] = ()
    failed: bool | None = None
    status_class: int | None = None
    retried: bool = False
    longer: float | None = None

    @property
    def is_of_sums(self) -> bool:
        """Whether sums of hours know it: it asks for nothing that only rows have."""
        return (self.id, self.status_class, self.longer, self.retried) == (None, None, None, False)


class Bar(NamedTuple):
    """`at`: begin, Unix milliseconds."""

    at: int
    ok: int
    failed: int


class Histogram(NamedTuple):
    """Requests by time: every bucket from `start` to `end`, those without requests, too. `bucket`: milliseconds."""

    start: int
    end: int
    bucket: int
    bars: tuple[Bar, ...]


class Neighbour(NamedTuple):
    """Another request on the same backend, or an attempt of one."""

    id: str
    at: int
    request_id: str
    model: str
    outcome: str
    status: int
    latency_ms: float


class Around(NamedTuple):
    """What a backend did at the time of a request. `start`, `end`: Unix milliseconds.

    `outcomes`: of requests that ended there, and of attempts that did not, the most first, this request left out.
    """

    backend: str
    start: int
    end: int
    outcomes: tuple[tuple[str, int], ...]
    neighbours: tuple[Neighbour, ...]


class Ended(NamedTuple):
    """Requests that ended in one way. `code`: of the error. `first`, `last`: Unix milliseconds.

    `request_ids`: some of them, the newest first.
    """

    outcome: str
    code: str | None
    times: int
    first: int
    last: int
    request_ids: tuple[str, ...]


class Related(NamedTuple):
    id: str
    request_id: str
    at: int


async def listing(
    plane: Plane, act: Act, wanted: Wanted, after: list[str | int] | None, limit: int
) -> list[dict[str, Any]]:
    """The newest first, one more than `limit` at most."""
    conditions = [*_conditions(wanted)]
    if after is not None:
        conditions.append(tuple_(usage.c.at, usage.c.id) < tuple(after))
    query = _newest(act, select(usage), conditions, limit + 1)
    async with plane.database.usage.read() as connection:
        rows = (await connection.execute(query)).all()
        return await _shown(connection, act, rows)


def _newest(act: Act, chosen: Select[Any], conditions: Sequence[ColumnElement[bool]], limit: int) -> Select[Any]:
    """The newest that the caller may see.

    In several organisations the newest of each are found first: no index has the rows of some in the order of time.
    """
    order = usage.c.at.desc(), usage.c.id.desc()
    scope = act.principal.scope("requests.see")
    parts = [] if scope.everything else parts_reached(usage, scope, act.principal.user)
    if len(parts) < 2:
        return chosen.where(_reached(act), *conditions).order_by(*order).limit(limit)
    of_each = [
        select(select(usage.c.at, usage.c.id).where(part, *conditions).order_by(*order).limit(limit).subquery())
        for part in parts
    ]
    found = union_all(*of_each).subquery()
    joined = chosen.join(found, (found.c.at == usage.c.at) & (found.c.id == usage.c.id))
    return joined.order_by(*order).limit(limit)


async def one(plane: Plane, act: Act, id: str) -> dict[str, Any]:
    """By the id of a record, or the newest one with this request id. Raises NotFound."""
    newest = select(usage).where(_reached(act)).order_by(usage.c.at.desc(), usage.c.id.desc()).limit(1)
    async with plane.database.usage.read() as connection:
        for condition in (usage.c.id == id, (usage.c.request_id == id) & (usage.c.kind == "request")):
            rows = (await connection.execute(newest.where(condition))).all()
            if rows:
                return (await _shown(connection, act, rows))[0]
    raise NotFound("request", id)


async def histogram(plane: Plane, act: Act, wanted: Wanted, buckets: int = 60) -> Histogram:
    """Counts of what `listing` has, in at most `buckets` or one more.

    Without a start: of the last hour, or with an id from the first one on.
    """
    end = act.at if wanted.end is None else wanted.end
    async with plane.database.usage.read() as connection:
        await sums.begin(connection)
        start = min(await _first(connection, act, wanted, end), end - 1)
        bucket = next((step for step in _STEPS if (end - start) <= step * buckets), _STEPS[-1])
        if bucket % HOUR == 0 and wanted.is_of_sums:
            found = await _of_sums(connection, act, wanted, (start, end), bucket)
        else:
            found = await _of_rows(connection, act, wanted._replace(start=start, end=end), bucket)
    first = start - start % bucket
    return Histogram(start, end, bucket, tuple(Bar(at, *found.get(at, (0, 0))) for at in range(first, end, bucket)))


async def _first(connection: AsyncConnection, act: Act, wanted: Wanted, end: int) -> int:
    if wanted.start is not None:
        return wanted.start
    first: int | None = None
    if wanted.id is not None:
        query = select(func.min(usage.c.at)).where(_reached(act), *_conditions(wanted))
        first = (await connection.execute(query)).scalar_one()
    return end - HOUR if first is None else first


async def _of_rows(connection: AsyncConnection, act: Act, wanted: Wanted, bucket: int) -> dict[int, tuple[int, int]]:
    begin = (usage.c.at - usage.c.at % literal_column(str(bucket), BigInteger)).label("begin")
    query = select(begin, *sums.measures(usage, _COUNTS)).where(_reached(act), *_conditions(wanted)).group_by(begin)
    return {row.begin: (row.records - row.errors, row.errors) for row in await connection.execute(query)}


async def _of_sums(
    connection: AsyncConnection, act: Act, wanted: Wanted, span: tuple[int, int], bucket: int
) -> dict[int, tuple[int, int]]:
    """The same from sums of hours. Which of a sum have failed is known, so that `failed` is no condition."""

    def where(table: Table) -> Iterable[ColumnElement[bool]]:
        yield reached(table, act.principal.scope("requests.see"), act.principal.user)
        if wanted.kinds:
            yield table.c.kind.in_(wanted.kinds)
        for name, value in wanted.filters.items():
            yield table.c[DIMENSIONS[name]] == value

    cover = await sums.cover(connection, *span, by_day=False)
    found = {}
    for row in await connection.execute(sums.grouped(cover, where, (), bucket)):
        ok, failed = row.records - row.errors, row.errors
        found[row.bucket] = (0 if wanted.failed is True else ok, 0 if wanted.failed is False else failed)
    return found


async def failures(plane: Plane, act: Act, model: str, start: int, end: int, most: int = 20) -> list[Ended]:
    """Requests for a model, or that it got, which did not end well, by how they ended; the most first."""
    of_model = or_(usage.c.model == model, usage.c.asked_model == model)
    conditions = usage.c.at >= start, usage.c.at < end, usage.c.outcome != "ok", of_model, _reached(act)
    ways = usage.c.outcome, usage.c.code
    number = func.count().label("times")
    found = select(*ways, number, func.min(usage.c.at).label("first"), func.max(usage.c.at).label("last"))
    query = found.where(*conditions).group_by(*ways).order_by(number.desc(), *ways).limit(most)
    ended = []
    async with plane.database.usage.read() as connection:
        for row in (await connection.execute(query)).all():
            way = usage.c.outcome == row.outcome, usage.c.code.is_not_distinct_from(row.code)
            newest = select(usage.c.request_id).where(*conditions, *way).order_by(usage.c.at.desc(), usage.c.id.desc())
            ids = (await connection.execute(newest.limit(_EXAMPLES))).scalars()
            ended.append(Ended(row.outcome, row.code, row.times, row.first, row.last, tuple(ids)))
    return ended


async def around(plane: Plane, act: Act, request: Mapping[str, Any]) -> tuple[Around, ...]:
    """What happened at the backends of a request, as `one` shows it, at that time: as far as the caller may see it."""
    tried = [one["backend"] for one in request.get("attempt_details") or ()]
    backends = dict.fromkeys(one for one in (*tried, request["backend"]) if one is not None)
    found = []
    async with plane.database.usage.read() as connection:
        for backend in backends:
            found.append(await _around(connection, act, request, backend))
    return tuple(found)


async def _around(connection: AsyncConnection, act: Act, request: Mapping[str, Any], backend: str) -> Around:
    at: int = request["at"]
    start, end = at - _WHILE, at + _WHILE
    within = usage.c.at >= start, usage.c.at <= end, usage.c.id != request["id"], _reached(act)
    ended = select(usage.c.outcome, func.count().label("number")).where(*within, usage.c.backend == backend)
    rows = await connection.execute(ended.group_by(usage.c.outcome))
    counts = Counter({row.outcome: row.number for row in rows})
    # The failures of a backend are in requests that another one has answered.
    retried = select(usage.c.backend, usage.c.attempt_details).where(*within, usage.c.attempts > 1)
    for row in await connection.execute(retried.order_by(func.abs(usage.c.at - at)).limit(_MOST_RELATED)):
        last = len(row.attempt_details or ()) - 1
        for place, attempt in enumerate(row.attempt_details or ()):
            if attempt["backend"] == backend and not (place == last and row.backend == backend):
                counts[attempt["outcome"]] += 1
    columns = (usage.c[name] for name in Neighbour._fields)
    near = select(*columns).where(*within, usage.c.backend == backend).order_by(func.abs(usage.c.at - at), usage.c.id)
    neighbours = [Neighbour(*row) for row in await connection.execute(near.limit(_NEIGHBOURS))]
    return Around(backend, start, end, tuple(counts.most_common()), tuple(sorted(neighbours, key=lambda one: one.at)))


def _reached(act: Act) -> ColumnElement[bool]:
    return reached(usage, act.principal.scope("requests.see"), act.principal.user)


def _conditions(wanted: Wanted) -> Iterable[ColumnElement[bool]]:
    if wanted.id is not None:
        yield usage.c.request_id >= wanted.id
        yield usage.c.request_id < wanted.id + _LAST
    if wanted.start is not None:
        yield usage.c.at >= wanted.start
    if wanted.end is not None:
        yield usage.c.at < wanted.end
    if wanted.kinds:
        yield usage.c.kind.in_(wanted.kinds)
    for name, value in wanted.filters.items():
        yield usage.c[DIMENSIONS[name]] == value
    if wanted.failed is not None:
        yield sums.FAILED if wanted.failed else not_(sums.FAILED)
    if wanted.status_class is not None:
        yield usage.c.status >= wanted.status_class * 100
        yield usage.c.status < wanted.status_class * 100 + 100
    if wanted.retried:
        yield usage.c.attempts > 1
    if wanted.longer is not None:
        yield usage.c.latency_ms >= wanted.longer


async def _shown(connection: AsyncConnection, act: Act, rows: Sequence[Row[Any]]) -> list[dict[str, Any]]:
    if not rows:
        return []
    times = [row.at for row in rows]
    query = select(usage.c.id, usage.c.request_id, usage.c.at).where(
        usage.c.request_id.in_({row.request_id for row in rows}),
        usage.c.at >= min(times) - _NEAR,
        usage.c.at <= max(times) + _NEAR,
        _reached(act),
    )
    found = await connection.execute(query.order_by(usage.c.at, usage.c.id).limit(_MOST_RELATED))
    near = [Related(*row) for row in found]
    return [_view(row, near) for row in rows]


def _view(row: Row[Any], near: Iterable[Related]) -> dict[str, Any]:
    found = {name: row._mapping[name] for name in FIELDS}
    if found["attempt_details"] is None:
        del found["attempt_details"]
    related = [
        other.id
        for other in near
        if other.request_id == row.request_id and other.id != row.id and abs(other.at - row.at) <= _NEAR
    ]
    return {**found, "key_name": row.key_name, "received_at": shown(row.received_at), "related": related}
