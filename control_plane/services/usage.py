"""GET /usage: sums of a time, by what people ask for."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Table, and_, false, or_, select, true
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.usage_tables import DIMENSIONS, MEASURES, usage
from control_plane.plane import Act, Plane
from control_plane.pure import histogram
from control_plane.pure.records import BILLED, DAY, HOUR
from control_plane.pure.roles import Scope
from control_plane.pure.times import shown
from control_plane.services import reports, sums
from control_plane.services.sums import Cover, Piece

# Groups in `rows` and in `series`; the others are one.
MOST_ROWS, MOST_SERIES = 50, 7
BUCKETS = {"1h": HOUR, "1d": DAY}
# Milliseconds: an answer is shown again for as long as it took to make, times _REPEATS, and this at most.
OLDEST = 25_000
_REPEATS = 20
# Sums that are read at once; of more groups only the largest are read
MOST_SUMS = 40_000
# Groups whose histograms are kept
FEW_GROUPS = 3_000
SHOWN = (
    "requests",
    "errors",
    "input_tokens",
    "cached_input_tokens",
    "output_tokens",
    "cost_nanos",
    "unpriced",
)
_POINT = ("requests", "errors", "input_tokens", "output_tokens", "cost_nanos")
_OTHER = object()
Group = tuple[str | None, ...]
Kept = TypeVar("Kept", bound=Sized)


@dataclass(frozen=True)
class Question:
    """`start`, `end`: Unix milliseconds. `filters`: (dimension, value), None: without one.

    `among`: values of the first dimension of `group_by`; rows with others are left out. None: all.
    """

    start: int
    end: int
    bucket: str = "1d"
    group_by: tuple[str, ...] = ()
    filters: tuple[tuple[str, str | None], ...] = ()
    kinds: tuple[str, ...] = BILLED
    among: tuple[str, ...] | None = None


def reached(table: Table, scope: Scope, user: str | None) -> ColumnElement[bool]:
    """The rows that a caller may see: of whole organisations, and of the own keys in others."""
    return true() if scope.everything else or_(false(), *parts_reached(table, scope, user))


def parts_reached(table: Table, scope: Scope, user: str | None) -> list[ColumnElement[bool]]:
    """The same for a caller who does not see everything, by organisation: what an index finds in the order of time."""
    found: list[ColumnElement[bool]] = [table.c.organisation == name for name in sorted(scope.organisations)]
    return found + [and_(table.c.organisation == name, table.c.user == user) for name in sorted(scope.own)]


async def report(plane: Plane, act: Act, question: Question, most_sums: int = MOST_SUMS) -> dict[str, Any]:
    """The answer, at most half a minute old. Raises StorageUnavailable."""
    scope = act.principal.scope("usage.see")
    key = "usage", question, scope, act.principal.user
    report = _Report(plane, question, scope, act.principal.user, most_sums)
    return await plane.kept.get(key, act.at, OLDEST, report.make, _REPEATS)


class _Report:
    """One answer in the making."""

    def __init__(self, plane: Plane, question: Question, scope: Scope, user: str | None, most_sums: int) -> None:
        self._plane = plane
        self._most_sums = most_sums
        self._question = question
        self._scope = scope
        self._user = user
        self._columns = [DIMENSIONS[name] for name in question.group_by]
        self._made: Mapping[tuple[int, int], int] = {}

    async def make(self) -> dict[str, Any]:
        question = self._question
        dropped = await self._dropped()
        async with self._plane.database.usage.read() as connection:
            await sums.begin(connection)
            coarse = await sums.cover(connection, question.start, question.end)
            fine = coarse
            if question.bucket == "1h":
                fine = await sums.cover(connection, question.start, question.end, by_day=False)
            self._made = await sums.read_made(connection, question.start, question.end)
            by_bucket = await self._by_bucket(connection, fine)
            if by_bucket is None:
                points = await self._sums(connection, fine)
                total = _added(points.values())
                rows = await self._top(connection, coarse, total)
                series = await self._series(connection, fine, list(rows)[:MOST_SERIES], points)
            else:
                total, rows, series = _arranged(by_bucket)
            few = by_bucket is not None and len(by_bucket) <= FEW_GROUPS
            latency = await self._histograms(connection, coarse, set(rows), few)
        return self._answer(total, rows, series, latency, dropped)

    def _where(self, table: Table) -> Iterable[ColumnElement[bool]]:
        yield table.c.kind.in_(self._question.kinds)
        yield reached(table, self._scope, self._user)
        for name, value in self._question.filters:
            yield table.c[DIMENSIONS[name]].is_not_distinct_from(value)
        if self._question.among is not None:
            yield table.c[self._columns[0]].in_(self._question.among)

    async def _by_bucket(
        self, connection: AsyncConnection, cover: Cover
    ) -> dict[Any, dict[int, dict[str, int]]] | None:
        """Sums by group and bucket, of all pieces; None if there are too many."""
        found: dict[Any, dict[int, list[int]]] = {} if self._columns else {(): {}}
        width, count = len(self._columns), 0
        for piece in sums.pieces(cover):
            rows = await self._measured(connection, piece)
            if rows is None:
                return None
            for row in rows:
                buckets = found.setdefault(tuple(row[:width]), {})
                known = buckets.get(row[width])
                if known is None:
                    buckets[row[width]] = list(row[width + 1 :])
                    count += 1
                else:
                    for place, value in enumerate(row[width + 1 :]):
                        known[place] += value
            if count > self._most_sums:
                return None
        return {
            group: {at: dict(zip(MEASURES, buckets[at], strict=True)) for at in sorted(buckets)}
            for group, buckets in found.items()
        }

    async def _measured(self, connection: AsyncConnection, piece: Piece) -> Sequence[Sequence[Any]] | None:
        """Rows of group, bucket and MEASURES; None if there are too many."""
        bucket = BUCKETS[self._question.bucket]
        query = sums.grouped(piece.cover, self._where, self._columns, bucket).limit(self._most_sums + 1)

        async def read() -> Sequence[Sequence[Any]]:
            return [tuple(row) for row in await connection.execute(query)]

        rows = await self._kept(("measures", bucket), piece, read)
        return None if len(rows) > self._most_sums else rows

    async def _kept(self, what: Any, piece: Piece, read: Callable[[], Awaitable[Kept]]) -> Kept:
        """What was read of the sums of a piece, as long as they are not made anew. Rows are read each time."""
        if piece.table is usage:
            return await read()
        question, version = self._question, piece.version(self._made)
        of = question.group_by, question.filters, question.kinds, question.among
        key = what, of, self._scope, None if self._scope.everything else self._user, piece
        found: Kept | None = self._plane.usage.pieces.get(key, version)
        if found is None:
            found = await read()
            self._plane.usage.pieces.put(key, version, found, len(found) + 1)
        return found

    async def _sums(self, connection: AsyncConnection, cover: Cover) -> dict[Any, dict[str, int]]:
        """By the begin of a bucket."""
        query = sums.grouped(cover, self._where, (), BUCKETS[self._question.bucket])
        found = {row.bucket: _measures(row._mapping) for row in await connection.execute(query.order_by("bucket"))}
        return {at: one for at, one in found.items() if one["records"]}

    async def _top(
        self, connection: AsyncConnection, cover: Cover, total: Mapping[str, int]
    ) -> dict[Any, dict[str, int]]:
        """The groups with the most records, and what the others have together."""
        if not self._columns:
            return {(): dict(total)}
        query = sums.grouped(cover, self._where, self._columns)
        found = query.subquery()
        by = [found.c[name] for name in self._columns]
        listed = select(found).order_by(found.c.records.desc(), *by).limit(MOST_ROWS)
        rows = {self._group(row._mapping): _measures(row._mapping) for row in await connection.execute(listed)}
        return _with_rest(rows, total)

    async def _series(
        self, connection: AsyncConnection, cover: Cover, groups: list[Any], points: Mapping[int, Mapping[str, int]]
    ) -> dict[Any, dict[int, dict[str, int]]]:
        """By group and bucket."""
        if not self._columns:
            return {(): {at: dict(one) for at, one in points.items()}}
        groups = [group for group in groups if group is not _OTHER]

        def where(table: Table) -> Iterable[ColumnElement[bool]]:
            yield from self._where(table)
            yield or_(false(), *(self._is(table, group) for group in groups))

        found: dict[Any, dict[int, dict[str, int]]] = {group: {} for group in groups}
        query = sums.grouped(cover, where, self._columns, BUCKETS[self._question.bucket]).order_by("bucket")
        for row in await connection.execute(query):
            found[self._group(row._mapping)][row.bucket] = _measures(row._mapping)
        rest = {}
        for at, all_of in points.items():
            left = _less(all_of, [found[group][at] for group in groups if at in found[group]])
            if left["records"]:
                rest[at] = left
        return found | ({_OTHER: rest} if rest else {})

    async def _histograms(
        self, connection: AsyncConnection, cover: Cover, groups: set[Any], few: bool
    ) -> dict[Any, tuple[int, int]]:
        """Latency and TTFT by group; what is in no group is in _OTHER. `few`: they are not too many to be kept."""
        found: dict[Any, tuple[int, int]] = {}
        for piece in sums.pieces(cover):
            if few:
                shapes = await self._kept("shapes", piece, partial(self._shapes, connection, piece, None))
            else:
                shapes = await self._shapes(connection, piece, groups)
            for group, (latency, ttft) in shapes.items():
                place = group if group in groups else _OTHER
                of_latency, of_ttft = found.get(place, (0, 0))
                found[place] = of_latency + histogram.load(latency), of_ttft + histogram.load(ttft)
        return found

    async def _shapes(
        self, connection: AsyncConnection, piece: Piece, groups: set[Any] | None
    ) -> dict[Any, tuple[bytes | None, bytes | None]]:
        """As they are stored, by group; of `groups` and, together, of all others."""
        found: dict[Any, tuple[histogram.Sum, histogram.Sum]] = {}
        for query in sums.histograms(piece.cover, self._where, self._columns):
            result = await connection.stream(query)
            async for part in result.partitions(2000):
                for *names, latency, ttft, number in part:
                    group: Any = tuple(names)
                    if groups is not None and group not in groups:
                        group = _OTHER
                    known = found.get(group)
                    if known is None:
                        known = found[group] = histogram.Sum(), histogram.Sum()
                    if piece.table is usage:
                        known[0].count(latency, number)
                        known[1].count(ttft, number)
                    else:
                        known[0].add(latency)
                        known[1].add(ttft)
        return {
            group: (histogram.dump(latency.total), histogram.dump(ttft.total))
            for group, (latency, ttft) in found.items()
        }

    async def _dropped(self) -> int:
        """Records that routers could not deliver, by their last reports; nobody knows whose they were."""
        if not self._scope.everything:
            return 0
        found = (await reports.seen(self._plane)).reported
        return sum(one.report["usage"]["dropped"] for one in found if one.at >= self._question.start)

    def _answer(
        self,
        total: Mapping[str, int],
        rows: Mapping[Any, Mapping[str, int]],
        series: Mapping[Any, Mapping[int, Mapping[str, int]]],
        latency: Mapping[Any, tuple[int, int]],
        dropped: int,
    ) -> dict[str, Any]:
        question = self._question
        everything = sum(one for one, _ in latency.values()), sum(one for _, one in latency.values())
        received = total["records"]
        return {
            "start": shown(question.start),
            "end": shown(question.end),
            "bucket": question.bucket,
            "currency": self._plane.settings.currency,
            "group_by": list(question.group_by),
            "totals": _shown(total, everything),
            "series": [
                {**self._named(group), "points": [_point(at, one) for at, one in points.items()]}
                for group, points in series.items()
            ],
            "rows": [{**self._named(group), **_shown(one, latency.get(group))} for group, one in rows.items()],
            "coverage": {
                "received": received,
                "dropped": dropped,
                "share": round(received / (received + dropped), 4) if received + dropped else 1.0,
                "estimated": round(total["estimated"] / received, 4) if received else 0.0,
            },
        }

    def _group(self, row: Mapping[Any, Any]) -> Group:
        return tuple(row[name] for name in self._columns)

    def _is(self, table: Table, group: Group) -> ColumnElement[bool]:
        pairs = zip(self._columns, group, strict=True)
        return and_(*(table.c[name].is_not_distinct_from(value) for name, value in pairs))

    def _named(self, group: Any) -> dict[str, Any]:
        if group is _OTHER:
            return {"group": None, "other": True}
        return {"group": dict(zip(self._question.group_by, group, strict=True))}


def _arranged(
    by_bucket: dict[Any, dict[int, dict[str, int]]],
) -> tuple[dict[str, int], dict[Any, dict[str, int]], dict[Any, dict[int, dict[str, int]]]]:
    """Total, rows and series, of sums by group and bucket."""
    of_group = {group: _added(points.values()) for group, points in by_bucket.items()}
    order = sorted(of_group, key=lambda group: (-of_group[group]["records"], [name or "" for name in group]))
    total = _added(of_group.values())
    rows = _with_rest({group: of_group[group] for group in order[:MOST_ROWS]}, total)
    series = {group: by_bucket[group] for group in order[:MOST_SERIES]}
    left: dict[int, list[dict[str, int]]] = {}
    for group in order[MOST_SERIES:]:
        for at, one in by_bucket[group].items():
            left.setdefault(at, []).append(one)
    rest = {at: _added(left[at]) for at in sorted(left)}
    return total, rows, series | ({_OTHER: rest} if rest else {})


def _measures(row: Mapping[Any, Any]) -> dict[str, int]:
    return {name: row[name] for name in MEASURES}


def _added(sums: Iterable[Mapping[str, int]]) -> dict[str, int]:
    found = dict.fromkeys(MEASURES, 0)
    for one in sums:
        for name in MEASURES:
            found[name] += one[name]
    return found


def _less(total: Mapping[str, int], parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    taken = _added(parts)
    return {name: total[name] - taken[name] for name in MEASURES}


def _with_rest(rows: dict[Any, dict[str, int]], total: Mapping[str, int]) -> dict[Any, dict[str, int]]:
    rest = _less(total, list(rows.values()))
    return rows | ({_OTHER: rest} if rest["records"] else {})


def _shown(sums: Mapping[str, int], latency: tuple[int, int] | None) -> dict[str, Any]:
    of_latency, of_ttft = latency or (0, 0)
    return {
        **{name: sums[name] for name in SHOWN},
        "latency_ms": histogram.percentiles(of_latency),
        "ttft_ms": histogram.percentiles(of_ttft),
    }


def _point(at: int, sums: Mapping[str, int]) -> dict[str, Any]:
    return {"at": shown(at), **{name: sums[name] for name in _POINT}}
