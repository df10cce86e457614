"""The schema: migrated once by whoever comes first, never guessed, equal to the tables in the code."""

import asyncio
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from sqlalchemy import Connection, Table, insert, select, text

from control_plane.data import schema
from control_plane.data.database import Database, DatabaseError, parse_url
from control_plane.data.tables import organisations
from tests.postgresql import PostgreSQL

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/control-plane.sqlite3"
    server: PostgreSQL = request.getfixturevalue("server")
    return server.url(server.create())


def differences(connection: Connection, part: schema.Part) -> list[Any]:
    """What autogeneration would change, but for tables of the other part, and partitions."""
    others = {name for other in schema.PARTS if other != part for name in schema.METADATA[other].tables}
    found = compare_metadata(schema.context(connection, part), schema.METADATA[part])
    return [one for one in found if not (str(one[0]).startswith("remove") and _of_others(_table(one[1]), others))]


def _table(thing: Any) -> str:
    return str(thing.name if isinstance(thing, Table) else thing.table.name)


def _of_others(name: str, others: set[str]) -> bool:
    return name in others or name.startswith(("schema_", "usage_"))


@pytest.mark.parametrize("part", schema.PARTS)
async def test_the_migrations_make_the_tables_of_the_code(empty_url: str, part: schema.Part) -> None:
    url = parse_url(empty_url)
    await schema.migrate(url)

    assert await schema._run(url, part, lambda connection: differences(connection, part)) == []


async def test_two_that_migrate_at_once_are_one(empty_url: str) -> None:
    url = parse_url(empty_url)
    await asyncio.gather(*(schema.migrate(url) for _ in range(4)))

    assert all(standing.fits for standing in await schema.standings(url))


async def test_a_downgrade_leaves_nothing_and_an_upgrade_follows(empty_url: str) -> None:
    url = parse_url(empty_url)
    await schema.migrate(url)
    await schema.migrate(url, to="base")
    before = await schema.standings(url)
    await schema.migrate(url)

    assert [standing.found for standing in before] == [None, None]
    assert all(standing.fits for standing in await schema.standings(url))


async def test_an_upgrade_keeps_the_rows(empty_url: str) -> None:
    url = parse_url(empty_url)
    await schema.migrate(url)
    database = Database(url)
    async with database.main.write() as connection:
        await connection.execute(
            insert(organisations).values(name="team-a", limits=[{"streams": 1}], disabled=False, created_at=1)
        )
    await schema.migrate(url)
    async with database.main.read() as connection:
        found = (await connection.execute(select(organisations.c.name, organisations.c.limits))).one()
    await database.close()

    assert tuple(found) == ("team-a", [{"streams": 1}])


def later_release(folder: Path, breaks: bool) -> Path:
    """The migrations of this release, and one more."""
    shutil.copytree(schema.MIGRATIONS, folder / "migrations")
    last = schema.scripts("main").get_current_head()
    lines = [
        "import sqlalchemy as sa",
        "from alembic import op",
        'revision = "main_next"',
        f"down_revision = {last!r}",
        f"breaks = {breaks}",
        "def upgrade():",
        '    op.create_table("of_the_next_release", sa.Column("id", sa.Integer, primary_key=True))',
        "def downgrade():",
        '    op.drop_table("of_the_next_release")',
    ]
    (folder / "migrations" / "main" / "m9999.py").write_text("\n".join(lines) + "\n")
    return folder / "migrations"


async def test_the_schema_of_the_next_release_is_usable(empty_url: str, tmp_path: Path) -> None:
    url, folder = parse_url(empty_url), later_release(tmp_path, breaks=False)
    await schema.migrate(url)
    await schema.migrate(url, folder=folder)

    found = await schema.standings(url)
    schema.check(found)
    assert [one.later for one in found] == [True, False]
    # A pod of this release that migrates changes nothing.
    await schema.migrate(url)
    assert next(one.found for one in await schema.standings(url, folder)) == "main_next"


async def test_a_schema_that_breaks_with_this_release_is_refused(empty_url: str, tmp_path: Path) -> None:
    url, folder = parse_url(empty_url), later_release(tmp_path, breaks=True)
    await schema.migrate(url)
    await schema.migrate(url, folder=folder)

    with pytest.raises(DatabaseError, match="'main_next', which this release cannot use"):
        await schema.standings(url)
    await schema.migrate(url, to="base", folder=folder)
    assert [one.found for one in await schema.standings(url)] == [None, None]


async def test_a_schema_of_a_later_release_is_refused(empty_url: str) -> None:
    url = parse_url(empty_url)
    await schema.migrate(url)
    await schema._run(
        url, "main", lambda connection: connection.execute(text("UPDATE schema_main SET version_num = 'main_9999'"))
    )

    with pytest.raises(DatabaseError, match="'main_9999', which this release cannot use"):
        await schema.standings(url)


async def test_a_database_of_another_program_is_refused(empty_url: str) -> None:
    url = parse_url(empty_url)
    await schema._run(url, "main", lambda connection: connection.execute(text("CREATE TABLE users (id INTEGER)")))

    with pytest.raises(DatabaseError, match="a table 'users' that this program did not make"):
        await schema.migrate(url)


async def test_an_empty_database_is_refused_where_it_is_only_checked(empty_url: str) -> None:
    with pytest.raises(DatabaseError, match="run `control-plane migrate`"):
        schema.check(await schema.standings(parse_url(empty_url)))


async def test_a_database_that_is_not_there_is_named(server: PostgreSQL) -> None:
    url = parse_url(server.url("nowhere"))

    with pytest.raises(DatabaseError, match=r"the database cannot be used: .*does not exist"):
        await schema.standings(url)


async def test_a_lock_that_is_not_free_is_named(server: PostgreSQL) -> None:
    url = parse_url(server.url(server.create()))
    async with schema._locked(url, 5):
        with pytest.raises(DatabaseError, match="another migration holds the lock"):
            await schema.migrate(url, patience=0.2)


def test_a_file_is_of_one_process(tmp_path: Path) -> None:
    path = tmp_path / "control-plane.sqlite3"
    with (
        schema.file_lock(path),
        pytest.raises(DatabaseError, match="in use by another control plane"),
        schema.file_lock(path),
    ):
        raise AssertionError


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "control-plane.sqlite3"
    path.write_bytes(b"this is not a database, " * 100)

    with pytest.raises(DatabaseError, match="cannot be used"):
        asyncio.run(schema.standings(parse_url(f"sqlite:///{path}")))


async def test_files_have_a_write_ahead_log(tmp_path: Path) -> None:
    path = tmp_path / "control-plane.sqlite3"
    await schema.migrate(parse_url(f"sqlite:///{path}"))

    for file in (path, tmp_path / "control-plane.usage.sqlite3"):
        connection = sqlite3.connect(file)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        connection.close()


@pytest.mark.parametrize("value", ["sqlite://", "mysql://h/x", "x", "sqlite:///:memory:"])
def test_other_databases_are_refused(value: str) -> None:
    with pytest.raises(DatabaseError, match="must be sqlite:///FILE or postgresql://"):
        parse_url(value)
