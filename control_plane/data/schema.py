"""The schema: migrated by Alembic, one history for the main tables and one for usage, on both databases.

A migration only adds (expand); what is no longer used goes a release later (contract): release N runs on schema N + 1,
so that the pods of an upgrade need not stop together. Two that migrate at once are one: the second waits and finds
nothing to do.
"""

import asyncio
import fcntl
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, MetaData, create_engine, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from control_plane.data import tables, usage_tables
from control_plane.data.database import DatabaseError, usage_file

log = logging.getLogger(__name__)
T = TypeVar("T")

Part = Literal["main", "usage"]
PARTS: tuple[Part, ...] = ("main", "usage")
METADATA: dict[Part, MetaData] = {"main": tables.metadata, "usage": usage_tables.metadata}
# Of the advisory lock of PostgreSQL
_LOCK = 0x696E_6672
_LOCK_TIMEOUT = 60.0


class Standing(NamedTuple):
    """`found`: revision of the schema, None if it is empty. `wanted`: of this release."""

    part: Part
    found: str | None
    wanted: str

    @property
    def fits(self) -> bool:
        return self.found == self.wanted


def scripts(part: Part) -> ScriptDirectory:
    folder = Path(__file__).with_name("migrations")
    return ScriptDirectory(str(folder), version_locations=[str(folder / part)])


def context(connection: Connection, part: Part) -> MigrationContext:
    return MigrationContext.configure(
        connection,
        opts={"version_table": f"schema_{part}", "target_metadata": METADATA[part], "render_as_batch": True},
    )


async def standings(url: URL) -> list[Standing]:
    """How far each part of the schema is. Raises DatabaseError if it is of another program or a later release."""
    found = []
    for part in PARTS:
        found.append(await _run(url, part, partial(_standing, part=part)))
    return found


async def migrate(url: URL, to: str = "head", patience: float = _LOCK_TIMEOUT) -> list[Standing]:
    """Upgrade (or with a revision of one part downgrade) the schema under a lock. Returns how it was before.

    Raises DatabaseError if the lock is not free within `patience` seconds.
    """
    before = await standings(url)
    if all(standing.fits for standing in before) and to == "head":
        return before
    async with _locked(url, patience):
        for part in PARTS:
            # Another one may have migrated while this one waited.
            standing = await _run(url, part, partial(_standing, part=part))
            if not standing.fits or to != "head":
                await _run(url, part, partial(_upgrade, part=part, to=to))
                log.info("schema %s: %s -> %s", part, standing.found or "empty", standing.wanted)
    return before


def check(found: list[Standing]) -> None:
    """Raises DatabaseError unless the schema is that of this release, or one later."""
    for standing in found:
        if not standing.fits:
            state = f"is at {standing.found}" if standing.found else "is empty"
            raise DatabaseError(
                f"the schema of {standing.part} {state}, this release needs {standing.wanted}; "
                "run `control-plane migrate`"
            )


def _standing(connection: Connection, part: Part) -> Standing:
    wanted = scripts(part).get_current_head()
    assert wanted is not None
    found = context(connection, part).get_current_revision()
    if found is None:
        foreign = set(inspect(connection).get_table_names()) & set(METADATA[part].tables)
        if foreign:
            raise DatabaseError(
                f"the database has a table {min(foreign)!r} that this program did not make; use another database"
            )
    elif found not in {script.revision for script in scripts(part).walk_revisions()}:
        raise DatabaseError(
            f"the schema of {part} is {found!r}, which this release does not know; "
            "use the release that made it, or a later one"
        )
    return Standing(part, found, wanted)


def _upgrade(connection: Connection, part: Part, to: str) -> None:
    directory = scripts(part)

    def steps(current: object, _: MigrationContext) -> list[object]:
        if to == "base":
            return list(directory._downgrade_revs("base", current))  # type: ignore[arg-type]
        return list(directory._upgrade_revs("head", current))  # type: ignore[arg-type]

    ran = MigrationContext.configure(
        connection,
        opts={"version_table": f"schema_{part}", "fn": steps, "render_as_batch": True, "transactional_ddl": True},
    )
    with Operations.context(ran), ran.begin_transaction():
        ran.run_migrations()


async def _run(url: URL, part: Part, call: Callable[[Connection], T]) -> T:
    if url.get_backend_name() == "sqlite":
        return await asyncio.to_thread(_run_sqlite, _file(url, part), call)
    engine = create_async_engine(url.set(drivername="postgresql+asyncpg"), poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            return await connection.run_sync(call)
    except DBAPIError as exc:
        raise DatabaseError(f"the database cannot be used: {exc.orig}") from None
    except OSError as exc:
        raise DatabaseError(f"the database cannot be reached: {exc.strerror or exc}") from None
    finally:
        await engine.dispose()


def _run_sqlite(path: Path, call: Callable[[Connection], T]) -> T:
    engine = create_engine(URL.create("sqlite", database=str(path)), poolclass=NullPool)
    try:
        with engine.connect() as connection:
            # Stays in the file. Without shared memory (network file systems) the answer is another mode.
            mode = connection.exec_driver_sql("PRAGMA journal_mode = WAL").scalar_one()
            if mode != "wal":
                log.warning("%s has no write-ahead log (%s): readers wait for writers there", path, mode)
            connection.commit()
            with connection.begin():
                return call(connection)
    except DBAPIError as exc:
        raise DatabaseError(f"the database {str(path)!r} cannot be used: {exc.orig}") from None
    finally:
        engine.dispose()


def _file(url: URL, part: Part) -> Path:
    path = Path(url.database or "")
    return path if part == "main" else usage_file(path)


@asynccontextmanager
async def _locked(url: URL, patience: float) -> AsyncIterator[None]:
    if url.get_backend_name() == "sqlite":
        async with _file_locked(Path(url.database or ""), patience):
            yield
        return
    engine = create_async_engine(url.set(drivername="postgresql+asyncpg"), poolclass=NullPool)
    try:
        # Of the session: a lock of the transaction is lost by what cannot run in one.
        async with engine.connect() as connection:
            deadline = time.monotonic() + patience
            while not (await connection.execute(text(f"SELECT pg_try_advisory_lock({_LOCK})"))).scalar_one():
                if time.monotonic() > deadline:
                    raise DatabaseError("another migration holds the lock; wait for its end, or stop it")
                await connection.rollback()
                await asyncio.sleep(0.1)
            await connection.commit()
            yield
    finally:
        await engine.dispose()


@asynccontextmanager
async def _file_locked(path: Path, patience: float) -> AsyncIterator[None]:
    deadline = time.monotonic() + patience
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(file_lock(path, ".migrating"))
                break
            except DatabaseError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)
        yield


@contextmanager
def file_lock(path: Path, suffix: str = "") -> Iterator[None]:
    """Hold a lock beside a SQLite file: one process per file. Raises DatabaseError if another one has it."""
    name = path.with_name(f"{path.name}{suffix}.lock")
    try:
        lock = name.open("ab")
    except OSError as exc:
        raise DatabaseError(
            f"the database {str(path)!r} cannot be locked through {str(name)!r}: {exc.strerror}; "
            "choose a file in an existing directory that this user can write to"
        ) from None
    with closing(lock):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatabaseError(
                f"the database {str(path)!r} is in use by another control plane; stop that one, or choose another"
            ) from None
        yield
