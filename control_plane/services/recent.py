"""Requests, errors, tokens and times to the first token of the last minutes and hours, in short buckets, from rows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sqlalchemy import BigInteger, ColumnElement, false, literal_column, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.usage_tables import DIMENSIONS, usage
from control_plane.plane import Act, Plane
from control_plane.pure import histogram
from control_plane.pure.records import BILLED, HOUR, MINUTE
from control_plane.pure.roles import Scope
from control_plane.services import sums
from control_plane.services.usage import reached

Length = Literal["15m", "1h", "6h"]
# Milliseconds that are shown, and of a bucket
LENGTHS: Mapping[Length, tuple[int, int]] = {
    "15m": (15 * MINUTE, MINUTE),
    "1h": (HOUR, MINUTE),
    "6h": (6 * HOUR, 5 * MINUTE),
}
# Milliseconds for which an answer is shown again
KEPT = 5_000
# Models, backends and so on that are shown apart; those with the fewest requests are not
MOST_GROUPS = 7
_MEASURES = ("requests", "errors", "input_tokens", "output_tokens")


@dataclass(frozen=True)
class Asked:
    """`filters`: (dimension, value) of DIMENSIONS. `group_by`: one of them."""

    length: Length = "1h"
    filters: tuple[tuple[str, str], ...] = ()
    group_by: str | None = None


class Point(NamedTuple):
    """A bucket; of the last one a part is still to come. `at`: its begin. `ttft_*`: milliseconds; None: of no request.

    `tokens_per_second`: of the part that has passed.
    """

    at: int
    requests: int
    errors: int
    input_tokens: int
    output_tokens: int
    tokens_per_second: float
    ttft_p50: float | None
    ttft_p95: float | None


class Now(NamedTuple):
    """The last minute."""

    requests: int
    errors: int
    requests_per_second: float
    error_share: float
    tokens_per_second: float


class Recent(NamedTuple):
    """`start` to `end`, Unix milliseconds; `bucket`: milliseconds. `points`: every bucket, those without requests, too.

    `groups`: by the value of `group_by`, the most requests first. `totals`: as of GET /usage from `start` to `end`.
    """

    start: int
    end: int
    bucket: int
    points: tuple[Point, ...]
    groups: tuple[tuple[str | None, tuple[Point, ...]], ...]
    totals: Point
    now: Now


async def recent(plane: Plane, act: Act, asked: Asked = Asked()) -> Recent:
    """What the caller may see of it, at most KEPT old. Raises StorageUnavailable."""
    scope, user = act.principal.scope("usage.see"), act.principal.user
    key = "recent", asked, scope, None if scope.everything else user
    return await plane.kept.get(key, act.at, KEPT, lambda: _recent(plane, asked, scope, user, act.at))


class _Bucket:
    """What is counted of one bucket."""

    __slots__ = ("errors", "input_tokens", "output_tokens", "requests", "ttft")

    def __init__(self) -> None:
        self.requests = self.errors = self.input_tokens = self.output_tokens = 0
        self.ttft = 0

    def add(self, requests: int, errors: int, input_tokens: int, output_tokens: int, ttft: int) -> None:
        self.requests += requests
        self.errors += errors
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens
        self.ttft += ttft

    def point(self, at: int, milliseconds: int) -> Point:
        p50, p95 = histogram.quantiles(self.ttft, (0.5, 0.95))
        seconds = max(milliseconds, 1) / 1000
        tokens = self.output_tokens
        return Point(at, self.requests, self.errors, self.input_tokens, tokens, tokens / seconds, p50, p95)


_Buckets = dict[int, _Bucket]


class _Span(NamedTuple):
    """What is read: `start` to `end`, by `bucket` milliseconds."""

    start: int
    end: int
    bucket: int

    def points(self, found: _Buckets) -> tuple[Point, ...]:
        none = _Bucket()
        return tuple(
            found.get(at, none).point(at, min(self.bucket, self.end - at))
            for at in range(self.start, max(self.end, self.start + 1), self.bucket)
        )


async def _recent(plane: Plane, asked: Asked, scope: Scope, user: str | None, now: int) -> Recent:
    length, bucket = LENGTHS[asked.length]
    # The bucket of the present is one of them.
    span = _Span(now - now % bucket - length + bucket, now, bucket)
    where = [*_conditions(asked, scope, user)]
    async with plane.database.usage.read() as connection:
        await sums.begin(connection)
        whole = (await _read(connection, None, where, span)).get(None, {})
        found = await _groups(connection, asked.group_by, where, span) if asked.group_by else {}
        last = await _last_minute(connection, where, now)
    total = _Bucket()
    for one in whole.values():
        total.add(one.requests, one.errors, one.input_tokens, one.output_tokens, one.ttft)
    groups = tuple((group, span.points(buckets)) for group, buckets in found.items())
    return Recent(span.start, now, bucket, span.points(whole), groups, total.point(span.start, now - span.start), last)


def _conditions(asked: Asked, scope: Scope, user: str | None) -> Iterable[ColumnElement[bool]]:
    yield usage.c.kind.in_(BILLED)
    yield reached(usage, scope, user)
    for name, value in asked.filters:
        yield usage.c[DIMENSIONS[name]] == value


async def _groups(
    connection: AsyncConnection, name: str, where: list[ColumnElement[bool]], span: _Span
) -> dict[str | None, _Buckets]:
    """Those with the most requests, in that order."""
    group = usage.c[DIMENSIONS[name]]
    (requests,) = sums.measures(usage, ("requests",))
    query = select(group).where(usage.c.at >= span.start, usage.c.at < span.end, *where).group_by(group)
    order = list((await connection.execute(query.order_by(requests.desc(), group).limit(MOST_GROUPS))).scalars())
    of_those = or_(false(), *(group.is_not_distinct_from(value) for value in order))
    found = await _read(connection, group, [*where, of_those], span)
    return {value: found[value] for value in order}


async def _read(
    connection: AsyncConnection, group: ColumnElement[Any] | None, where: list[ColumnElement[bool]], span: _Span
) -> dict[str | None, _Buckets]:
    """By group and begin of the bucket: one look at the rows."""
    begin = (usage.c.at - usage.c.at % literal_column(str(span.bucket), BigInteger)).label("begin")
    by = (begin, usage.c.ttft_bucket) if group is None else (group, begin, usage.c.ttft_bucket)
    of = literal_column("NULL") if group is None else group
    query = select(of, begin, usage.c.ttft_bucket, *sums.measures(usage, _MEASURES))
    query = query.where(usage.c.at >= span.start, usage.c.at < span.end, *where).group_by(*by)
    found: dict[str | None, _Buckets] = {}
    for value, at, index, requests, errors, taken, made in await connection.execute(query):
        # None of another kind is in `requests`.
        ttft = 0 if index is None else histogram.single(index, requests)
        found.setdefault(value, {}).setdefault(at, _Bucket()).add(requests, errors, taken, made, ttft)
    return found


async def _last_minute(connection: AsyncConnection, where: list[ColumnElement[bool]], now: int) -> Now:
    query = select(*sums.measures(usage, _MEASURES)).where(usage.c.at >= now - MINUTE, usage.c.at < now, *where)
    row: Any = (await connection.execute(query)).one()
    share = row.errors / row.requests if row.requests else 0.0
    return Now(row.requests, row.errors, row.requests / 60, share, row.output_tokens / 60)
