"""The database file: locked for one process, checked before use, and opened for durable commits."""

import fcntl
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger("registry_stub")

# In the file's header, to recognise databases of other programs. ASCII "mreg".
_APPLICATION_ID = 0x6D726567
_SCHEMA_VERSION = 1
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS models (position INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, entry TEXT NOT NULL)"
)

# A write-ahead log needs shared memory through a file, which network file systems lack.
_NO_SHARED_MEMORY = ("SQLITE_IOERR_SHM", "SQLITE_CANTOPEN", "SQLITE_PROTOCOL")


class StoreError(Exception):
    """The database cannot be opened or written; the message is for the operator and names the file and the fix."""


class Database:
    """A SQLite connection with an exclusive lock. Any thread may use it, one at a time."""

    def __init__(self, path: Path, busy_timeout: float) -> None:
        self._path = path
        with ExitStack() as stack:
            stack.enter_context(_lock(path))
            with self._explained():
                self._connection = stack.enter_context(closing(self._open(busy_timeout)))
            self.close = stack.pop_all().close

    def read(self, statement: str) -> list[tuple[str, str]]:
        with self._explained():
            return self._connection.execute(statement).fetchall()

    def write(self, statement: str, *rows: tuple[str, ...]) -> None:
        """Run the statement once per row, in one transaction. On disk when this returns."""
        with self._explained(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(statement, rows)

    def _open(self, busy_timeout: float) -> sqlite3.Connection:
        """Open with a write-ahead log if the file system supports one; decided at each start."""
        try:
            return self._connect(busy_timeout, _write_ahead_log)
        except sqlite3.OperationalError as exc:
            if not exc.sqlite_errorname.startswith(_NO_SHARED_MEMORY):
                raise
            connection = self._connect(busy_timeout, _rollback_journal)
            log.info(
                "database %s: its file system shares no memory (%s), so a rollback journal takes the place of the "
                "write-ahead log",
                self._path,
                exc.sqlite_errorname,
            )
            return connection

    def _connect(self, busy_timeout: float, set_journal: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
        with ExitStack() as stack:
            # Autocommit: each statement is a transaction of its own.
            connection = sqlite3.connect(
                self._path, timeout=busy_timeout, isolation_level=None, check_same_thread=False
            )
            stack.callback(connection.close)
            if set_journal is _rollback_journal:
                # With exclusive access, an existing write-ahead log can be read without shared memory.
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._check_owner(connection)
            set_journal(connection)
            _prepare(connection)
            stack.pop_all()
        return connection

    def _check_owner(self, connection: sqlite3.Connection) -> None:
        """Refuse databases of other programs and of later releases."""
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        name = str(self._path)
        if tables and application != _APPLICATION_ID:
            raise StoreError(f"database {name!r} belongs to another program; give --database another file")
        if version > _SCHEMA_VERSION:
            raise StoreError(f"database {name!r} was written by a newer release of the registry; run that release")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise StoreError(
                f"database {str(self._path)!r} failed: {exc}; check that it is a registry database, "
                "that its disk has free space and that this user can write to it"
            ) from exc


def _write_ahead_log(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")


def _rollback_journal(connection: sqlite3.Connection) -> None:
    # Not DELETE: FULL below makes a truncation durable, but not a deletion.
    connection.execute("PRAGMA journal_mode = TRUNCATE")
    # Others may read the file again, for a backup.
    connection.execute("PRAGMA locking_mode = NORMAL")


def _prepare(connection: sqlite3.Connection) -> None:
    # FULL: a commit is on the disk before the answer, so that a power cut loses nothing.
    connection.execute("PRAGMA synchronous = FULL")
    with connection:
        # Written at every start, to detect a read-only file before the first PUT.
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(_SCHEMA)
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")


def _lock(path: Path) -> BinaryIO:
    """Lock the database for this process. The kernel releases the lock when the process ends, however it ends.

    The lock is on a file of its own: SQLite's locks on the database die when any descriptor of it is closed.
    """
    # realpath: two names of one database share one lock.
    name = os.path.realpath(path) + ".lock"
    try:
        with ExitStack() as stack:
            lock = stack.enter_context(open(name, "ab"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stack.pop_all()
    except BlockingIOError:
        raise StoreError(
            f"database {str(path)!r} is in use by another registry; stop that one or give --database another file"
        ) from None
    except OSError as exc:
        raise StoreError(
            f"database {str(path)!r} cannot be locked through {name!r}: {exc.strerror}; "
            "give --database a file in an existing directory that this user can write to"
        ) from None
    return lock
