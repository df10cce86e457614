"""The schema: migrated by Alembic, one history for the main tables and one for usage, on both databases.

A migration only adds (expand); what is no longer used goes a release later (contract), by a migration that says
`breaks = True`: release N runs on schema N + 1, so that the pods of an upgrade need not stop together, and a rollback
has what it needs. The database has the history, by which a release knows a schema that is later than its own. Two
that migrate at once are one: the second waits and finds nothing to do.
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
from alembic.runtime.migration import MigrationInfo
from alembic.script import ScriptDirectory
from sqlalchemy import (
    URL,
    Boolean,
    Column,
    Connection,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from control_plane.data import tables, usage_tables
from control_plane.data.database import DatabaseError, postgresql_engine, usage_file

log = logging.getLogger(__name__)
T = TypeVar("T")

Part = Literal["main", "usage"]
PARTS: tuple[Part, ...] = ("main", "usage")
METADATA: dict[Part, MetaData] = {"main": tables.metadata, "usage": usage_tables.metadata}
MIGRATIONS = Path(__file__).with_name("migrations")
# The migrations that a database has had, in their order; `breaks`: releases before it cannot use the schema.
history = Table(
    "schema_history",
    MetaData(),
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("part", String(16), nullable=False),
    Column("revision", String(32), nullable=False),
    Column("breaks", Boolean, nullable=False),
)
# Of the advisory lock of PostgreSQL
_LOCK = 0x696E_6672
_LOCK_TIMEOUT = 60.0


class Standing(NamedTuple):
    """`found`: revision of the schema, None if it is empty. `wanted`: of this release.

    `later`: it is that of a later release, which this one can use.
    """

    part: Part
    found: str | None
    wanted: str
    later: bool = False

    @property
    def fits(self) -> bool:
        return self.later or self.found == self.wanted


def scripts(part: Part, folder: Path = MIGRATIONS) -> ScriptDirectory:
    return ScriptDirectory(str(folder), version_locations=[str(folder / part)])


def context(connection: Connection, part: Part) -> MigrationContext:
    return MigrationContext.configure(
        connection,
        opts={"version_table": f"schema_{part}", "target_metadata": METADATA[part], "render_as_batch": True},
    )


async def standings(url: URL, folder: Path = MIGRATIONS) -> list[Standing]:
    """How far each part of the schema is. Raises DatabaseError if it is of another program, or too late a release."""
    found = []
    for part in PARTS:
        found.append(await _run(url, part, partial(_standing, part=part, folder=folder)))
    return found


async def migrate(
    url: URL, to: str = "head", patience: float = _LOCK_TIMEOUT, folder: Path = MIGRATIONS
) -> list[Standing]:
    """Upgrade (to `base`: downgrade) the schema under a lock. Returns how it was before.

    Raises DatabaseError if the lock is not free within `patience` seconds.
    """
    before = await standings(url, folder)
    if all(standing.fits for standing in before) and to == "head":
        return before
    async with _locked(url, patience):
        for part in PARTS:
            # Another one may have migrated while this one waited.
            standing = await _run(url, part, partial(_standing, part=part, folder=folder))
            if not standing.fits or to != "head":
                await _run(url, part, partial(_upgrade, part=part, to=to, folder=folder))
                log.info("schema %s: %s -> %s", part, standing.found or "empty", standing.wanted)
    return before


def check(found: list[Standing]) -> None:
    """Raises DatabaseError unless this release can use the schema."""
    for standing in found:
        if not standing.fits:
            state = f"is at {standing.found}" if standing.found else "is empty"
            raise DatabaseError(
                f"the schema of {standing.part} {state}, this release needs {standing.wanted}; "
                "run `control-plane migrate`"
            )


def _standing(connection: Connection, part: Part, folder: Path) -> Standing:
    wanted = scripts(part, folder).get_current_head()
    assert wanted is not None
    found = context(connection, part).get_current_revision()
    if found is None:
        foreign = set(inspect(connection).get_table_names()) & set(METADATA[part].tables)
        if foreign:
            raise DatabaseError(
                f"the database has a table {min(foreign)!r} that this program did not make; use another database"
            )
    elif found not in {script.revision for script in scripts(part, folder).walk_revisions()}:
        if _is_usable(connection, part, found, wanted):
            return Standing(part, found, wanted, later=True)
        raise DatabaseError(
            f"the schema of {part} is {found!r}, which this release cannot use; "
            "use the release that made it, or a later one"
        )
    return Standing(part, found, wanted)


def _is_usable(connection: Connection, part: Part, found: str, wanted: str) -> bool:
    """Whether the schema has had the last migration of this release, and since then only such as add."""
    if not inspect(connection).has_table(history.name):
        return False
    query = select(history.c.revision, history.c.breaks).where(history.c.part == part).order_by(history.c.number)
    had = [tuple(row) for row in connection.execute(query)]
    revisions = [revision for revision, _ in had]
    if found not in revisions or wanted not in revisions:
        return False
    return not any(breaks for _, breaks in had[revisions.index(wanted) + 1 :])


def _upgrade(connection: Connection, part: Part, to: str, folder: Path) -> None:
    directory = scripts(part, folder)

    def steps(current: object, _: MigrationContext) -> list[object]:
        if to == "base":
            return list(directory._downgrade_revs("base", current))  # type: ignore[arg-type]
        return list(directory._upgrade_revs("head", current))  # type: ignore[arg-type]

    ran = MigrationContext.configure(
        connection,
        opts={
            "version_table": f"schema_{part}",
            "fn": steps,
            "render_as_batch": True,
            "transactional_ddl": True,
            "on_version_apply": [partial(_note, part=part)],
        },
    )
    history.create(connection, checkfirst=True)
    with Operations.context(ran), ran.begin_transaction():
        ran.run_migrations()


def _note(*, ctx: MigrationContext, step: MigrationInfo, part: Part, **_: object) -> None:
    """Write a step into the history, or take it out again."""
    assert ctx.connection is not None
    if step.is_upgrade and step.up_revision is not None:
        breaks = bool(getattr(getattr(step.up_revision, "module", None), "breaks", False))
        row = insert(history).values(part=part, revision=step.up_revision_id, breaks=breaks)
        ctx.connection.execute(row)
    else:
        undone = delete(history).where(history.c.part == part, history.c.revision.in_(step.source_revision_ids))
        ctx.connection.execute(undone)


async def _run(url: URL, part: Part, call: Callable[[Connection], T]) -> T:
    if url.get_backend_name() == "sqlite":
        return await asyncio.to_thread(_run_sqlite, _file(url, part), call)
    engine = postgresql_engine(url, poolclass=NullPool)
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
    engine = postgresql_engine(url, poolclass=NullPool)
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
