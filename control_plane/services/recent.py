"""Requests, errors, tokens and times to the first token of the last minutes and hours, in short buckets, from rows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sqlalchemy import BigInteger, ColumnElement, literal_column, select
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

    def __init__(self) -> None:
        self.counts = dict.fromkeys(_MEASURES, 0)
        self.ttft = 0

    def add(self, other: "_Bucket") -> None:
        for name in _MEASURES:
            self.counts[name] += other.counts[name]
        self.ttft += other.ttft

    def point(self, at: int, milliseconds: int) -> Point:
        p50, p95 = histogram.quantiles(self.ttft, (0.5, 0.95))
        seconds = max(milliseconds, 1) / 1000
        counts = self.counts
        tokens = counts["output_tokens"]
        return Point(
            at, counts["requests"], counts["errors"], counts["input_tokens"], tokens, tokens / seconds, p50, p95
        )


_NONE = _Bucket()
_Buckets = dict[int, _Bucket]


async def _recent(plane: Plane, asked: Asked, scope: Scope, user: str | None, now: int) -> Recent:
    length, bucket = LENGTHS[asked.length]
    # The bucket of the present is one of them.
    start = now - now % bucket - length + bucket
    where = [*_conditions(asked, scope, user)]
    async with plane.database.usage.read() as connection:
        await sums.begin(connection)
        found = await _read(connection, asked, where, start, now, bucket)
        last = await _last_minute(connection, where, now)
    whole: _Buckets = {}
    for buckets in found.values():
        for at, one in buckets.items():
            whole.setdefault(at, _Bucket()).add(one)
    total = _Bucket()
    for one in whole.values():
        total.add(one)

    def points(buckets: _Buckets) -> tuple[Point, ...]:
        return tuple(
            buckets.get(at, _NONE).point(at, min(bucket, now - at)) for at in range(start, max(now, start + 1), bucket)
        )

    order = sorted(found, key=lambda group: (-_requests(found[group]), group or ""))
    groups = tuple((group, points(found[group])) for group in order[:MOST_GROUPS]) if asked.group_by else ()
    return Recent(start, now, bucket, points(whole), groups, total.point(start, now - start), last)


def _requests(buckets: _Buckets) -> int:
    return sum(one.counts["requests"] for one in buckets.values())


def _conditions(asked: Asked, scope: Scope, user: str | None) -> Iterable[ColumnElement[bool]]:
    yield usage.c.kind.in_(BILLED)
    yield reached(usage, scope, user)
    for name, value in asked.filters:
        yield usage.c[DIMENSIONS[name]] == value


async def _read(
    connection: AsyncConnection, asked: Asked, where: list[ColumnElement[bool]], start: int, end: int, bucket: int
) -> dict[str | None, _Buckets]:
    """By group and begin of the bucket: one look at the rows."""
    group = usage.c[DIMENSIONS[asked.group_by]] if asked.group_by else literal_column("NULL")
    begin = (usage.c.at - usage.c.at % literal_column(str(bucket), BigInteger)).label("begin")
    by = begin, usage.c.ttft_bucket, *((group,) if asked.group_by else ())
    query = select(group.label("of"), begin, usage.c.ttft_bucket, *sums.measures(usage, _MEASURES))
    query = query.where(usage.c.at >= start, usage.c.at < end, *where).group_by(*by)
    found: dict[str | None, _Buckets] = {}
    for row in await connection.execute(query):
        into = found.setdefault(row.of, {}).setdefault(row.begin, _Bucket())
        for name in _MEASURES:
            into.counts[name] += row._mapping[name]
        # None of another kind is in `requests`.
        if row.ttft_bucket is not None:
            into.ttft += histogram.single(row.ttft_bucket, row.requests)
    return found


async def _last_minute(connection: AsyncConnection, where: list[ColumnElement[bool]], now: int) -> Now:
    query = select(*sums.measures(usage, _MEASURES)).where(usage.c.at >= now - MINUTE, usage.c.at < now, *where)
    row: Any = (await connection.execute(query)).one()
    share = row.errors / row.requests if row.requests else 0.0
    return Now(row.requests, row.errors, row.requests / 60, share, row.output_tokens / 60)
