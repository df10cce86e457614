"""`control-plane copy`: from one kind of database to the other, and as a backup while it serves."""

import os
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select

from control_plane.data import copying, schema
from control_plane.data.database import Database, DatabaseError, parse_url
from control_plane.data.tables import login_failures, models, sessions, users
from control_plane.data.usage_tables import usage
from tests.control_plane.conftest import NOON, Running, starting
from tests.control_plane.processes import run
from tests.postgresql import PostgreSQL

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]
GPT2 = {"name": "gpt2", "backends": [{"url": "http://10.0.0.1:8000"}]}
_DAY = 24 * 3600 * 1000


def a_record(number: int, at: int) -> dict[str, Any]:
    return {
        "at": at, "id": f"9f3c5a1e77b04d21-{number}", "kind": "request", "router": "r1", "request_id": f"q{number}",
        "asked_model": "m", "model": "m", "route": "chat_completions", "stream": True, "status": 200, "outcome": "ok",
        "attempts": 1, "attempt_details": [{"backend": "b"}] if number % 2 else None, "fallback": False,
        "usage_source": "reported", "latency_ms": 1.5, "queued_ms": 0.0, "bytes": 10, "received_at": at,
        "latency_bucket": 1, "cost_nanos": 2**40,
    }  # fmt: skip


async def fill(database: Database) -> None:
    async with database.main.write() as connection:
        await connection.execute(
            insert(users).values(name="max", email="max@example.org", disabled=False, created_at=NOON)
        )
        await connection.execute(
            insert(sessions).values(
                digest="d", id="s", user="max", rights="x", created_at=NOON, seen_at=NOON, expires_at=NOON
            )
        )
        await connection.execute(insert(login_failures), [{"account": "a", "address": "x", "at": NOON}] * 3)
        for number in range(1200):
            await connection.execute(
                insert(models).values(name=f"m{number}", entry=f'{{"name":"m{number}"}}', updated_at=NOON)
            )


async def rows(database: Database, *tables: Any) -> list[list[tuple[Any, ...]]]:
    found = []
    for table in tables:
        store = database.usage if table is usage else database.main
        async with store.read() as connection:
            got = await connection.execute(select(table).order_by(*table.primary_key.columns))
            found.append([tuple(row) for row in got])
    return found


async def test_a_copy_has_every_row_but_sessions(
    database_url: str, tmp_path: Path, server: PostgreSQL, template: str
) -> None:
    source, folder = Database(parse_url(database_url)), tmp_path / "copy"
    folder.mkdir()
    other = server.url(server.create(template)) if source.dialect == "sqlite" else f"sqlite:///{folder}/cp.sqlite3"
    target = Database(parse_url(other))
    await schema.migrate(target.url)
    try:
        await fill(source)
        if source.dialect == "sqlite":
            async with source.usage.write() as connection:
                await connection.execute(insert(usage), [a_record(one, NOON - one % 3 * _DAY) for one in range(1500)])
        lines: list[str] = []
        await copying.copy(source, target, lines.append)

        copied = (users, models, login_failures, usage)
        assert await rows(source, *copied) == await rows(target, *copied)
        assert await rows(target, sessions) == [[]]
        assert "models: 1200 rows" in lines
        # Numbers go on after those that were copied.
        async with target.main.write() as connection:
            await connection.execute(insert(models).values(name="next", entry="{}", updated_at=NOON))
        assert (await rows(target, models))[0][-1][1] == "next"
    finally:
        await source.close()
        await target.close()


async def test_a_database_with_rows_is_not_overwritten(sqlite_url: str, tmp_path: Path) -> None:
    source = Database(parse_url(sqlite_url))
    (tmp_path / "copy").mkdir()
    target = Database(parse_url(f"sqlite:///{tmp_path}/copy/cp.sqlite3"))
    await schema.migrate(target.url)
    try:
        await fill(source)
        await copying.copy(source, target, lambda line: None)
        with pytest.raises(DatabaseError, match="has rows; copy into an empty one"):
            await copying.copy(source, target, lambda line: None)
        with pytest.raises(DatabaseError, match="the same database"):
            await copying.copy(source, source, lambda line: None)
    finally:
        await source.close()
        await target.close()


async def test_a_backup_is_made_while_it_serves_and_can_be_served(sqlite_url: str, tmp_path: Path) -> None:
    (tmp_path / "backup").mkdir()
    backup = f"sqlite:///{tmp_path}/backup/cp.sqlite3"
    assert (await run("migrate", database_url=backup))[0] == 0
    async with starting(sqlite_url) as start:
        running: Running = await start()
        made = await running.admin.put("/models/gpt2", json=GPT2)
        code, out, err = await run("copy", "--from", sqlite_url, "--to", backup)
        after = await running.admin.put("/models/later", json=GPT2 | {"name": "later"})

    assert (code, err) == (0, "")
    assert "models: 1 rows" in out
    assert after.status_code == 201
    async with starting(backup, seeded=False) as start:
        restored: Running = await start()
        served = await restored.client.get("/models")
    assert served.json() == {"models": [made.json()]}


async def test_wrong_urls_are_named(tmp_path: Path) -> None:
    code, _, err = await run("copy", "--from", "mysql://x/y", "--to", f"sqlite:///{tmp_path}/x.sqlite3")
    missing, _, unknown = await run(
        "copy", "--from", f"sqlite:///{tmp_path}/a.sqlite3", "--to", f"sqlite:///{tmp_path}/b.sqlite3"
    )
    made = os.listdir(tmp_path)
    (tmp_path / "a.sqlite3").touch()
    empty, _, message = await run(
        "copy", "--from", f"sqlite:///{tmp_path}/a.sqlite3", "--to", f"sqlite:///{tmp_path}/b.sqlite3"
    )

    assert (code, missing, empty) == (2, 2, 2)
    assert unknown == f"control-plane: --from: there is no file '{tmp_path}/a.sqlite3'\n"
    assert made == []
    assert err.startswith("control-plane: --from: must be sqlite:///FILE")
    assert "run `control-plane migrate`" in message
