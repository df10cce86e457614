"""`copy --from URL --to URL`: one database to another; from SQLite to SQLite it is the backup."""

import argparse
import asyncio
from contextlib import ExitStack
from pathlib import Path

from control_plane.data import copying, schema
from control_plane.data.database import Database, DatabaseError, parse_url


def add_to(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="source", metavar="URL", required=True, help="database that is read; it may be in use"
    )
    parser.add_argument("--to", dest="target", metavar="URL", required=True, help="migrated, empty database")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    source = _database("--from", arguments.source)
    if source.dialect == "sqlite" and not Path(source.url.database or "").is_file():
        # SQLite would make it.
        raise DatabaseError(f"--from: there is no file {source.url.database!r}")
    asyncio.run(_copy(source, _database("--to", arguments.target)))
    return 0


async def _copy(source: Database, target: Database) -> None:
    with ExitStack() as stack:
        if target.dialect == "sqlite":
            stack.enter_context(schema.file_lock(Path(target.url.database or "")))
        try:
            await copying.copy(source, target, print)
        finally:
            await source.close()
            await target.close()


def _database(option: str, value: str) -> Database:
    try:
        return Database(parse_url(value))
    except DatabaseError as exc:
        raise DatabaseError(f"{option}: {exc}") from None
