import logging
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from registry_stub.database import Database, StoreError

INSERT = "INSERT INTO models (name, entry) VALUES (?, ?)"


def test_a_commit_waits_for_the_disk(database: Path) -> None:
    with closing(Database(database, 5)) as opened:
        assert str(opened.read("PRAGMA synchronous")) == "[(2,)]"
        assert str(opened.read("PRAGMA journal_mode")) == "[('wal',)]"


def test_several_rows_are_written_all_or_none(database: Path) -> None:
    with closing(Database(database, 5)) as opened:
        with pytest.raises(StoreError, match="UNIQUE"):
            opened.write(INSERT, ("a", "{}"), ("b", "{}"), ("a", "{}"))
        assert opened.read("SELECT name, entry FROM models") == []
        opened.write(INSERT, ("a", "{}"))
        assert opened.read("SELECT name, entry FROM models") == [("a", "{}")]


def test_a_second_opening_is_refused_until_the_first_is_closed(database: Path) -> None:
    with closing(Database(database, 5)), pytest.raises(StoreError, match=r"registry\.sqlite3' is in use .* stop that"):
        Database(database, 5)
    Database(database, 5).close()


def test_another_name_of_the_same_file_meets_the_same_lock(database: Path) -> None:
    link = database.with_name("link")
    link.symlink_to(database)
    with closing(Database(database, 5)), pytest.raises(StoreError, match="link' is in use"):
        Database(link, 5)


def test_a_failed_opening_releases_the_lock(database: Path) -> None:
    database.write_text("not a database, only some text that is long enough to be taken for a header" * 20)
    with pytest.raises(StoreError, match=r"registry\.sqlite3' failed: file is not a database; check"):
        Database(database, 5)
    database.unlink()
    Database(database, 5).close()


def test_a_database_of_another_program_is_refused_and_left_as_it_was(database: Path) -> None:
    with closing(sqlite3.connect(database)) as other:
        other.execute("CREATE TABLE models (id INTEGER)")
    before = database.read_bytes()
    with pytest.raises(StoreError, match="belongs to another program"):
        Database(database, 5)
    assert database.read_bytes() == before


def test_a_database_of_a_later_release_is_refused(database: Path) -> None:
    Database(database, 5).close()
    with closing(sqlite3.connect(database)) as later:
        later.execute("PRAGMA user_version = 2")
    with pytest.raises(StoreError, match="newer release"):
        Database(database, 5)


def test_a_missing_directory_is_named_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nowhere/r\.db' cannot be locked .*: No such file .* existing directory"):
        Database(tmp_path / "nowhere" / "r.db", 5)


def test_a_directory_is_not_a_database(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="folder' failed: unable to open"):
        Database(tmp_path / "folder", 5)


def test_a_write_that_another_program_blocks_fails_with_a_reason(database: Path) -> None:
    with closing(Database(database, 0.01)) as opened, closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="database is locked"):
            opened.write(INSERT, ("a", "{}"))
        other.rollback()
        opened.write(INSERT, ("a", "{}"))


# Without shared memory


def no_shared_memory(database: Path) -> None:
    """The index of a write-ahead log can be made here by nobody, as on a network file system."""
    database.with_name(f"{database.name}-shm").symlink_to("/nowhere/at-all")


def test_a_volume_without_shared_memory_gets_a_rollback_journal(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    no_shared_memory(database)
    with closing(Database(database, 5)) as opened:
        opened.write(INSERT, ("a", "{}"))
        assert str(opened.read("PRAGMA journal_mode")) == "[('truncate',)]"
        assert str(opened.read("PRAGMA synchronous")) == "[(2,)]"
        with closing(sqlite3.connect(database)) as backup:
            assert backup.execute("SELECT name FROM models").fetchall() == [("a",)]
    assert [record.message for record in caplog.records if "shares no memory" in record.message] == [caplog.messages[0]]


def test_a_write_ahead_log_that_is_moved_to_such_a_volume_loses_nothing(tmp_path: Path, database: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / database.name
    with closing(Database(database, 5)) as opened:
        opened.write(INSERT, ("a", "{}"))
        # What was not yet written back, as after a kill.
        for name in (database.name, f"{database.name}-wal"):
            shutil.copy(database.with_name(name), moved.with_name(name))
    no_shared_memory(moved)
    with closing(Database(moved, 5)) as opened:
        assert opened.read("SELECT name, entry FROM models") == [("a", "{}")]
    moved.with_name(f"{moved.name}-shm").unlink()
    with closing(Database(moved, 5)) as opened:
        assert str(opened.read("PRAGMA journal_mode")) == "[('wal',)]"
        assert opened.read("SELECT name, entry FROM models") == [("a", "{}")]
