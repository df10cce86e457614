"""How long usage stays: rows go, sums of them stay, and what is late for a time whose rows go is refused."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, insert, select

from control_plane.data.partitions import listed
from control_plane.data.tables import keys
from control_plane.data.usage_tables import usage, usage_day, usage_hour
from control_plane.services.keeper import Keeper, note_use
from control_plane.services.retention import make_partitions, retain
from control_plane.services.rollup import roll_up
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.test_together import eventually
from tests.control_plane.usage import DAY, HOUR, record, rows, taken

pytestmark = pytest.mark.anyio
MONTH = {"start": "2026-11-01T00:00:00Z", "end": "2026-12-20T00:00:00Z"}


async def requests(plane: Running) -> int:
    plane.plane.kept.clear()
    found: int = (await plane.admin.get("/api/v1/usage", params=MONTH)).json()["totals"]["requests"]
    return found


async def retained(plane: Running, **bounds: Any) -> None:
    """All of it: the keeper of the control plane may be at it, too."""
    await eventually(lambda: retain(plane.plane, **bounds))


async def test_rows_go_and_their_sums_stay(start_plane: Callable[..., Any]) -> None:
    plane: Running = await start_plane(usage_days=2)
    old, new = [record(at=NOON - DAY - number) for number in range(7)], [record()]
    await taken(plane, *old, *new)
    await retained(plane)
    assert len(await rows(plane)) == 8
    plane.clock.advance(1.5 * 86400)

    # In batches, of which none is the last one
    await retained(plane, batch=2)

    assert [row.id for row in await rows(plane)] == [new[0]["id"]]
    assert await requests(plane) == 8


async def test_a_turn_that_has_no_time_left_is_continued_by_the_next(sqlite_plane: Running) -> None:
    await taken(sqlite_plane, *(record() for _ in range(7)))
    sqlite_plane.clock.advance(9 * 86400)

    assert not await retain(sqlite_plane.plane, batch=2, patience=0)
    assert len(await rows(sqlite_plane)) == 5
    assert await requests(sqlite_plane) == 7
    while not await retain(sqlite_plane.plane, batch=2, patience=0):
        assert await requests(sqlite_plane) == 7
    assert await rows(sqlite_plane) == []
    assert await requests(sqlite_plane) == 7


async def test_what_is_late_for_a_time_whose_rows_go_is_refused(start_plane: Callable[..., Any]) -> None:
    plane: Running = await start_plane(usage_days=2)
    await retained(plane)

    late = record(at=NOON - 4 * DAY)
    answer = await taken(plane, late, record(at=NOON - 2 * DAY + HOUR))

    assert answer["accepted"] == 1
    assert (answer["refused"][0]["id"], answer["refused"][0]["code"]) == (late["id"], "clock_skew")
    assert answer["refused"][0]["message"].startswith("at is 4 days in the past; records of -2 days")
    assert await requests(plane) == 1


async def test_sums_go_too_at_last(start_plane: Callable[..., Any]) -> None:
    plane: Running = await start_plane(usage_days=1, hourly_days=5)
    await taken(plane, record())
    plane.clock.advance(3 * 86400)
    await retained(plane)
    assert await requests(plane) == 1
    plane.clock.advance(4 * 86400)

    await retained(plane)

    assert await requests(plane) == 0
    async with plane.plane.database.usage.read() as connection:
        for table in (usage, usage_hour, usage_day):
            assert (await connection.execute(select(func.count()).select_from(table))).scalar_one() == 0


async def test_partitions_are_made_ahead_and_dropped(start_plane: Callable[..., Any]) -> None:
    plane: Running = await start_plane(usage_days=2)
    if plane.plane.database.dialect == "sqlite":
        pytest.skip("SQLite has no partitions")

    async def days() -> list[str]:
        async with plane.plane.database.usage.read() as connection:
            return sorted(name for name, _ in await listed(connection))

    await make_partitions(plane.plane)
    await make_partitions(plane.plane)
    assert await days() == ["usage_20261128", "usage_20261129", "usage_20261130", "usage_20261201"]
    plane.clock.advance(3 * 86400)
    await retained(plane)
    assert await days() == ["usage_20261129", "usage_20261130", "usage_20261201"]


async def test_the_last_use_of_a_key_is_noted_to_the_minute(plane: Running) -> None:
    async with plane.plane.database.main.write() as connection:
        for id in ("A" * 12, "B" * 12):
            await connection.execute(
                insert(keys).values(id=id, name="batch", digest=id, limits=[], created_at=NOON, revision=0)
            )
    await taken(plane, *(record(key_id="A" * 12, at=NOON - ago) for ago in (70_000, 90_000)))

    await note_use(plane.plane, NOON - HOUR)
    # What came before changes nothing.
    await taken(plane, record(key_id="A" * 12, at=NOON - 2 * HOUR))
    await note_use(plane.plane, NOON - 3 * HOUR)

    async with plane.plane.database.main.read() as connection:
        found = {row.id: row.last_used_at for row in await connection.execute(select(keys))}
    assert found == {"A" * 12: NOON - 120_000, "B" * 12: None}


async def test_a_turn_keeps_everything_by_itself(plane: Running) -> None:
    await taken(plane, record(at=NOON - 3 * HOUR))
    keeper = Keeper(plane.plane)

    # The control plane's own may hold the lock.
    async with asyncio.timeout(30):
        await keeper.turn()
        while keeper.unsummed:
            await keeper.turn()

    assert await roll_up(plane.plane) == 0
    async with plane.plane.database.usage.read() as connection:
        assert (await connection.execute(select(func.sum(usage_hour.c.requests)))).scalar_one() == 1
