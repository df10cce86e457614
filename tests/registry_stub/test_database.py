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
