"""The database: SQLite files or PostgreSQL, by SQLAlchemy's asynchronous Core.

`main` has everything but usage; `usage` is a file of its own beside it on SQLite, and the same database on PostgreSQL.
A store gives one transaction at a time: `read` cannot write, `write` is serialised on SQLite, where a second writer
would only wait for the first.
"""

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import URL, event, make_url, text
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, ProgrammingError, TimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from control_plane.errors import StorageUnavailable

log = logging.getLogger(__name__)

Dialect = Literal["sqlite", "postgresql"]
_READERS = 4
# Milliseconds that a statement of a read may take on PostgreSQL; seconds to wait for a connection
_STATEMENT_TIMEOUT = 5_000
_POOL_TIMEOUT = 5.0
# Seconds that SQLite waits for the lock of another process
_BUSY_TIMEOUT = 5.0


# Of a connection: what is called once its transaction is in the database
_LATER = "after commit"


class DatabaseError(Exception):
    """The database cannot be used as configured; the message is one sentence with the fix."""


def after_commit(connection: AsyncConnection, call: Callable[[], None]) -> None:
    """Call this at the end of the transaction of a store, if it is committed."""
    connection.sync_connection.info[_LATER].append(call)  # type: ignore[union-attr]  # it has begun


async def serialise(connection: AsyncConnection, *names: str) -> None:
    """Let nobody else do what has one of these names until the transaction ends.

    Writers of SQLite wait for each other anyway.
    """
    if connection.dialect.name == "postgresql":
        statement = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")
        for name in sorted(names):
            await connection.execute(statement, {"name": name})


class Store:
    """Tables in one database. `writing`: makes writers wait for each other, on SQLite."""

    def __init__(self, dialect: Dialect, reader: AsyncEngine, writer: AsyncEngine) -> None:
        self.dialect = dialect
        self._reader = reader
        self._writer = writer
        self._writing = asyncio.Lock() if dialect == "sqlite" else None

    @asynccontextmanager
    async def read(self, at_once: bool = False) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads. `at_once`: all its statements see one moment. Raises StorageUnavailable."""
        with _explained():
            async with self._reader.connect() as connection:
                if self.dialect == "postgresql":
                    if at_once:
                        await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
                    await connection.execute(text(f"SET LOCAL statement_timeout = {_STATEMENT_TIMEOUT}"))
                yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction, committed at the end of the block. Raises StorageUnavailable."""
        later: list[Callable[[], None]] = []
        with _explained():
            async with self._writing or nullcontext(), self._writer.begin() as connection:
                connection.sync_connection.info[_LATER] = later  # type: ignore[union-attr]  # it has begun
                yield connection
        for call in later:
            call()

    async def close(self) -> None:
        await self._reader.dispose()
        await self._writer.dispose()


class Database:
    """The stores of one URL. Nothing is opened before the first transaction."""

    def __init__(self, url: URL) -> None:
        self.url = url
        if url.get_backend_name() == "postgresql":
            engine = _postgresql(url)
            self.main = self.usage = Store("postgresql", engine, engine)
        else:
            path = Path(url.database or "")
            self.main = _sqlite(path)
            self.usage = _sqlite(usage_file(path))

    @property
    def dialect(self) -> Dialect:
        return self.main.dialect

    async def close(self) -> None:
        """Close all connections: a thread of one that is left keeps the process from ending."""
        await self.main.close()
        if self.usage is not self.main:
            await self.usage.close()


def parse_url(value: str) -> URL:
    """Raises DatabaseError."""
    try:
        url = make_url(value)
    except ArgumentError:
        raise DatabaseError("must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME") from None
    match url.get_backend_name():
        case "sqlite" if url.database and url.database != ":memory:":
            return url.set(drivername="sqlite")
        case "postgresql" | "postgres":
            return url.set(drivername="postgresql")
    raise DatabaseError("must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME")


def usage_file(path: Path) -> Path:
    """`control-plane.usage.sqlite3` beside `control-plane.sqlite3`."""
    return path.with_name(f"{path.stem}.usage{path.suffix}")


class _explained:
    """Translates what a database reports when it is away, full or slow; faults of statements and values pass."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, DBAPIError | TimeoutError | OSError) or _is_of_a_statement(error):
            return
        # Not the statement and its parameters: they are data.
        reason = error.orig if isinstance(error, DBAPIError) else error
        log.error("the database failed: %s: %s", type(reason).__name__, reason)
        raise StorageUnavailable from error


def _is_of_a_statement(error: BaseException) -> bool:
    """Whether trying again later is of no use."""
    if isinstance(error, IntegrityError | ProgrammingError | DataError):
        return True
    reason = error.orig if isinstance(error, DBAPIError) else None
    # Of asyncpg, which SQLAlchemy does not sort out: SQLSTATE classes of data and syntax, and values it cannot send.
    state = getattr(reason, "sqlstate", None) or ""
    return state[:2] in ("22", "42") or "invalid input for query argument" in str(reason)


def postgresql_engine(url: URL, **options: Any) -> AsyncEngine:
    """Raises DatabaseError if the driver is not installed."""
    try:
        return create_async_engine(url.set(drivername="postgresql+asyncpg"), **options)
    except ModuleNotFoundError as exc:
        raise DatabaseError(f"the extra is not installed ({exc}); pip install 'inference-api[postgres]'") from None


def _postgresql(url: URL) -> AsyncEngine:
    return postgresql_engine(
        url,
        # An error in the log must not have names and digests in it.
        hide_parameters=True,
        pool_size=5,
        max_overflow=10,
        pool_timeout=_POOL_TIMEOUT,
        # A connection may have died with a restart or a failover.
        pool_pre_ping=True,
        connect_args={"timeout": _POOL_TIMEOUT, "command_timeout": 60},
    )


def _sqlite(path: Path) -> Store:
    url = URL.create("sqlite+aiosqlite", database=str(path))

    def engine(size: int, begin: str, *pragmas: str) -> AsyncEngine:
        made = create_async_engine(
            url,
            hide_parameters=True,
            poolclass=AsyncAdaptedQueuePool,
            pool_size=size,
            max_overflow=0,
            pool_timeout=_POOL_TIMEOUT,
            connect_args={"timeout": _BUSY_TIMEOUT, "isolation_level": None},
        )
        event.listen(made.sync_engine, "connect", _configure(pragmas))
        # The driver would begin a deferred transaction, which cannot wait for another writer.
        event.listen(made.sync_engine, "begin", lambda connection: connection.exec_driver_sql(begin) and None)
        return made

    return Store("sqlite", engine(_READERS, "BEGIN", "query_only = ON"), engine(1, "BEGIN IMMEDIATE"))


def _configure(pragmas: tuple[str, ...]) -> Callable[[Any, Any], None]:
    def configure(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        # FULL: what was acknowledged survives a power failure, usage too: routers forget it then.
        for pragma in ("foreign_keys = ON", "synchronous = FULL", *pragmas):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return configure


def sqlite_version() -> str:
    return sqlite3.sqlite_version
