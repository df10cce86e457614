"""Takes usage records of routers: each id is stored once, with its price, and is acknowledged when it is on disk."""

import asyncio
import logging
from typing import Any, NamedTuple

from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data import partitions
from control_plane.data.tables import keys
from control_plane.data.usage_tables import usage, usage_changed, usage_state
from control_plane.errors import StorageUnavailable
from control_plane.plane import Plane
from control_plane.pure.histogram import bucket
from control_plane.pure.prices import PriceList
from control_plane.pure.records import BILLED, DAY, FIELDS, HOUR, Refusal, UsageRecord, check, skew
from control_plane.services import prices

log = logging.getLogger(__name__)

# Batches that are stored at a time; routers keep what is refused, and send it again.
MOST_WORKING = 8
# Seconds that a batch may take: routers wait for 10.
PATIENCE = 8.0
# Advisory lock of PostgreSQL: `kept_from` does not move while a batch is stored.
KEPT_LOCK = 0x7573_6167_0002
_TAKE_IDS = text(
    "INSERT INTO usage_ids (id, at) SELECT * FROM unnest(CAST(:ids AS text[]), CAST(:times AS bigint[])) "
    "ON CONFLICT (id) DO NOTHING RETURNING id"
)
KEPT_FROM = "kept_from"


class Stored(NamedTuple):
    """What became of the records of a batch: each is in one of the three."""

    accepted: int
    duplicates: int
    refused: list[Refusal]


async def store(plane: Plane, records: list[Any], patience: float = PATIENCE) -> Stored:
    """Returns when all is on disk. Raises StorageUnavailable: nothing is stored then, or the answer was late.

    `patience`: seconds.
    """
    state = plane.usage
    if state.working >= MOST_WORKING:
        raise StorageUnavailable(seconds=1)
    state.working += 1
    try:
        async with asyncio.timeout(patience):
            found = await _store(plane, records)
    except TimeoutError:
        log.error("the database did not store a batch of usage within %s s", patience)
        raise StorageUnavailable from None
    finally:
        state.working -= 1
    counts = plane.metrics.usage_records
    for result, count in (
        ("accepted", found.accepted),
        ("duplicate", found.duplicates),
        ("refused", len(found.refused)),
    ):
        counts.labels(result).inc(count)
    return found


async def _store(plane: Plane, records: list[Any]) -> Stored:
    now = plane.clock()
    # Ten microseconds each: a batch must not hold the event loop.
    taken, refused = await asyncio.to_thread(check, records, now)
    names = await _key_names(plane, {record.key_id for _, record in taken if record.key_id is not None})
    if plane.database.dialect == "postgresql":
        await _make_partitions(plane, {record.at - record.at % DAY for _, record in taken})
    rows = await asyncio.to_thread(_rows, [record for _, record in taken], prices.current(plane), names, now)
    async with plane.database.usage.write() as connection:
        await _hold(connection)
        kept_from = await read_kept_from(connection)
        for place, record in taken:
            if record.at < kept_from:
                message = skew(record.at, now, now - kept_from)
                refused.append(Refusal(place, record.id, "clock_skew", message))
        held = [row for row in rows if row["at"] >= kept_from]
        new = await _new(connection, plane, held)
        if new:
            await connection.execute(insert(usage), new)
            await _mark(connection, {row["at"] - row["at"] % HOUR for row in new})
    return Stored(len(new), len(held) - len(new), sorted(refused))


async def _mark(connection: AsyncConnection, hours: set[int]) -> None:
    """Their sums are to be made."""
    if connection.dialect.name == "sqlite":
        # With one writer a mark that is there stays until these rows are; on PostgreSQL it may be going right now.
        of_hours = usage_changed.c.span == HOUR, usage_changed.c.at.in_(hours)
        hours = hours - set((await connection.execute(select(usage_changed.c.at).where(*of_hours))).scalars())
    if hours:
        await connection.execute(insert(usage_changed), [{"span": HOUR, "at": hour} for hour in sorted(hours)])


async def read_kept_from(connection: AsyncConnection) -> int:
    """Unix milliseconds: records of an earlier time are refused, their rows may be deleted."""
    query = select(usage_state.c.value).where(usage_state.c.name == KEPT_FROM)
    return (await connection.execute(query)).scalar_one_or_none() or 0


async def _key_names(plane: Plane, ids: set[str]) -> dict[str, str]:
    if not ids:
        return {}
    async with plane.database.main.read() as connection:
        found = await connection.execute(select(keys.c.id, keys.c.name).where(keys.c.id.in_(sorted(ids))))
        return {row.id: row.name for row in found}


async def _make_partitions(plane: Plane, days: set[int]) -> None:
    known = plane.usage.days
    if days <= known:
        return
    async with plane.database.usage.write() as connection:
        await partitions.make(connection, days)
    known |= days


async def _hold(connection: AsyncConnection) -> None:
    """Keep `kept_from` where it is until the end of the transaction: on SQLite there is one at a time."""
    if connection.dialect.name == "postgresql":
        await connection.execute(text(f"SELECT pg_advisory_xact_lock_shared({KEPT_LOCK})"))


async def _new(connection: AsyncConnection, plane: Plane, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose id is not stored, whatever the time of the stored one is; the first of each id."""
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row["id"], row)
    if plane.database.dialect == "postgresql":
        # In one order: two batches that have the same ids wait for each other, and never in a circle.
        ids = sorted(first)
        taken = await connection.execute(_TAKE_IDS, {"ids": ids, "times": [first[id]["at"] for id in ids]})
        new = set(taken.scalars())
    else:
        known = await connection.execute(select(usage.c.id).where(usage.c.id.in_(list(first))))
        new = first.keys() - set(known.scalars())
    return [row for id, row in first.items() if id in new]


def _rows(
    records: list[UsageRecord], known: PriceList, names: dict[str, str], received_at: int
) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        row = {name: getattr(record, name) for name in FIELDS}
        if record.attempt_details is not None:
            row["attempt_details"] = [one.model_dump() for one in record.attempt_details]
        if record.cost_nanos is None and record.kind in BILLED:
            tokens = record.input_tokens, record.cached_input_tokens, record.output_tokens
            row["cost_nanos"] = known.cost(record.model, record.at, *tokens)
        row["key_name"] = names.get(record.key_id or "")
        row["received_at"] = received_at
        row["latency_bucket"] = bucket(record.latency_ms)
        row["ttft_bucket"] = None if record.ttft_ms is None else bucket(record.ttft_ms)
        rows.append(row)
    return rows
