"""The database file: taken for one process, checked before it is touched, opened so that a commit is on the disk."""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import BinaryIO

# Written into the file's header, so that another program's database is recognised and left alone. ASCII "mreg".
_APPLICATION_ID = 0x6D726567
_SCHEMA_VERSION = 1
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS models (position INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, entry TEXT NOT NULL)"
)


class StoreError(Exception):
    """The database cannot be opened or written; the message is for the operator and names the file and the fix."""


class Database:
    """A SQLite connection and the lock that makes it the only one. Any thread may use it, one at a time."""

    def __init__(self, path: Path, busy_timeout: float) -> None:
        self._path = path
        with ExitStack() as stack:
            stack.enter_context(_lock(path))
            with self._explained():
                # Autocommit: each statement is a transaction of its own.
                connection = sqlite3.connect(path, timeout=busy_timeout, isolation_level=None, check_same_thread=False)
                self._connection = stack.enter_context(closing(connection))
                self._check_owner()
                self._prepare()
            self.close = stack.pop_all().close

    def read(self, statement: str) -> list[tuple[str, str]]:
        with self._explained():
            return self._connection.execute(statement).fetchall()

    def write(self, statement: str, *rows: tuple[str, ...]) -> None:
        """Run the statement once for each row, all or nothing. On disk when this returns."""
        with self._explained(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(statement, rows)

    def _check_owner(self) -> None:
        """An empty file or one of ours; not another program's and not a later release's."""
        (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        name = str(self._path)
        if tables and application != _APPLICATION_ID:
            raise StoreError(f"database {name!r} belongs to another program; give --database another file")
        if version > _SCHEMA_VERSION:
            raise StoreError(f"database {name!r} was written by a newer release of the registry; run that release")

    def _prepare(self) -> None:
        self._connection.execute("PRAGMA journal_mode = WAL")
        # FULL: a commit is on the disk before the client hears of it, so a power cut loses nothing.
        self._connection.execute("PRAGMA synchronous = FULL")
        with self._connection:
            # Written at every start, so that a read-only file is found out now and not by the first PUT.
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute(_SCHEMA)
            self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            self._connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise StoreError(
                f"database {str(self._path)!r} failed: {exc}; check that it is a registry database, "
                "that its disk has free space and that this user can write to it"
            ) from exc


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
