"""The database file: taken for one process, checked before it is touched, opened so that a commit is on the disk."""

import fcntl
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger("registry_stub")

# Written into the file's header, so that another program's database is recognised and left alone. ASCII "mreg".
_APPLICATION_ID = 0x6D726567
_SCHEMA_VERSION = 1
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS models (position INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, entry TEXT NOT NULL)"
)

# A write-ahead log needs an index in memory that is shared through a file, which network file systems do not offer.
_NO_SHARED_MEMORY = ("SQLITE_IOERR_SHM", "SQLITE_CANTOPEN", "SQLITE_PROTOCOL")


class StoreError(Exception):
    """The database cannot be opened or written; the message is for the operator and names the file and the fix."""


class Database:
    """A SQLite connection and the lock that makes it the only one. Any thread may use it, one at a time."""

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
        """Run the statement once for each row, all or nothing. On disk when this returns."""
        with self._explained(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(statement, rows)

    def _open(self, busy_timeout: float) -> sqlite3.Connection:
        """With a write-ahead log where the file system can have one, which is decided anew at each start."""
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
                # Who has the file alone reads a write-ahead log that is there already without shared memory.
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._check_owner(connection)
            set_journal(connection)
            _prepare(connection)
            stack.pop_all()
        return connection

    def _check_owner(self, connection: sqlite3.Connection) -> None:
        """An empty file or one of ours; not another program's and not a later release's."""
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
    # Not DELETE: what is truncated is on the disk by FULL below, what is deleted is not.
    connection.execute("PRAGMA journal_mode = TRUNCATE")
    # From here on others may read the file again, for a backup.
    connection.execute("PRAGMA locking_mode = NORMAL")


def _prepare(connection: sqlite3.Connection) -> None:
    # FULL: a commit is on the disk before the client hears of it, so a power cut loses nothing.
    connection.execute("PRAGMA synchronous = FULL")
    with connection:
        # Written at every start, so that a read-only file is found out now and not by the first PUT.
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(_SCHEMA)
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")


def _lock(path: Path) -> BinaryIO:
    """Take the database for this process. The kernel drops the lock with the process, however that ends.

    The lock is on a file of its own: SQLite's locks on the database die when any descriptor of it is closed.
    """
    # realpath: two names of one database must meet at one lock.
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
