"""The table `usage` on PostgreSQL: a partition per UTC day, so that retention drops files instead of deleting rows."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.pure.records import DAY

# Advisory lock under which partitions are made and dropped
_LOCK = 0x7573_6167_0001
_NAME = re.compile(r"usage_(\d{8})")


async def make(connection: AsyncConnection, days: Iterable[int]) -> None:
    """Make the partitions of these days (Unix milliseconds of their begin) that are missing."""
    await connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
    known = {day for _, day in await listed(connection)}
    for day in sorted(set(days) - known):
        name = _name(day)
        # A table that is attached blocks neither readers nor writers of others, as `PARTITION OF` would.
        await connection.execute(text(f"CREATE TABLE {name} (LIKE usage INCLUDING ALL)"))
        bounds = f"FROM ({day}) TO ({day + DAY})"
        await connection.execute(text(f"ALTER TABLE usage ATTACH PARTITION {name} FOR VALUES {bounds}"))


async def listed(connection: AsyncConnection) -> list[tuple[str, int]]:
    """The partitions: name, and day in Unix milliseconds."""
    query = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'usage'::regclass"
    names: list[str] = list((await connection.execute(text(query))).scalars())
    return [(name, _day(found[1])) for name in names if (found := _NAME.fullmatch(name.rpartition(".")[2]))]


async def drop_before(connection: AsyncConnection, at: int) -> int:
    """Drop the partitions that end by then; returns how many."""
    await connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
    # Readers hold it for seconds at most; those that come later must not wait behind this.
    await connection.execute(text("SET LOCAL lock_timeout = '2s'"))
    old = [name for name, day in await listed(connection) if day + DAY <= at]
    for name in old:
        await connection.execute(text(f"DROP TABLE {name}"))
    return len(old)


def _name(day: int) -> str:
    return f"usage_{datetime.fromtimestamp(day // 1000, UTC):%Y%m%d}"


def _day(digits: str) -> int:
    return int(datetime.strptime(digits, "%Y%m%d").replace(tzinfo=UTC).timestamp()) * 1000
