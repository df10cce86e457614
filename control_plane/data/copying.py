"""Copies one database to another, of the same or the other kind: the way from SQLite to PostgreSQL, and the backup.

Each part is read in one transaction, so that the copy is of one moment while others write. Sessions and the reports of
routers are left out: they come again by themselves.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import Column, Integer, Table, func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data import partitions, schema
from control_plane.data.database import Database, DatabaseError
from control_plane.data.tables import login_states, revisions, routers, sessions
from control_plane.data.usage_tables import usage, usage_ids

# A migrated database has its own revisions: they say what its replicas have in memory. Ids come with their rows.
_LEFT_OUT = frozenset({sessions, login_states, routers, revisions, usage_ids})
# Rows per statement; PostgreSQL takes 32,767 values in one.
_BATCH = 500
_DAY = 24 * 3600 * 1000


async def copy(source: Database, target: Database, say: Callable[[str], None]) -> None:
    """Copy all rows into an empty database. `say` gets a line per table. Raises DatabaseError."""
    if source.url == target.url:
        raise DatabaseError("--from and --to are the same database")
    for database in (source, target):
        schema.check(await schema.standings(database.url))
    for part in schema.PARTS:
        theirs, ours = (database.usage if part == "usage" else database.main for database in (source, target))
        kept = [table for table in schema.METADATA[part].sorted_tables if table not in _LEFT_OUT]
        async with theirs.read(at_once=True) as reader, ours.write() as writer:
            for table in kept:
                await _refuse_rows(writer, table)
            for table in kept:
                say(f"{table.name}: {await _copy_table(reader, writer, table)} rows")


async def _refuse_rows(connection: AsyncConnection, table: Table) -> None:
    if (await connection.execute(select(1).select_from(table).limit(1))).first() is not None:
        raise DatabaseError(f"the table {table.name!r} of the database in --to has rows; copy into an empty one")


async def _copy_table(reader: AsyncConnection, writer: AsyncConnection, table: Table) -> int:
    total = 0
    order = [column for column in table.primary_key.columns]
    result = await reader.stream(select(table).order_by(*order))
    days: set[int] = set()
    async for rows in result.mappings().partitions(_BATCH):
        batch: list[dict[str, Any]] = [dict(row) for row in rows]
        if table is usage and writer.dialect.name == "postgresql":
            new = {row["at"] - row["at"] % _DAY for row in batch} - days
            await partitions.make(writer, new)
            days |= new
            await writer.execute(insert(usage_ids), [{"id": row["id"], "at": row["at"]} for row in batch])
        await writer.execute(insert(table), batch)
        total += len(batch)
    await _continue_numbers(writer, table)
    return total


async def _continue_numbers(connection: AsyncConnection, table: Table) -> None:
    """On PostgreSQL a sequence does not see the numbers that were given."""
    number: Column[Any] | None = table.autoincrement_column
    if number is None or connection.dialect.name != "postgresql" or not isinstance(number.type, Integer):
        return
    last = (await connection.execute(select(func.max(number)))).scalar_one()
    if last is not None:
        sequence = text("SELECT setval(pg_get_serial_sequence(:table, :column), :last)")
        await connection.execute(sequence, {"table": table.name, "column": number.name, "last": last})
