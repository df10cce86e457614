"""The audit log: read by those who may, page by page, and exported."""

import json
import logging

import httpx
import pytest
from sqlalchemy import insert

from control_plane.data.tables import audit
from control_plane.pure.ids import new_id
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.people import acting_as, error, make_organisation, make_user

pytestmark = pytest.mark.anyio
PATH = "/api/v1/audit"
EXPORT = {"accept": "application/x-ndjson"}


async def fill(running: Running, count: int) -> list[str]:
    """Rows a second apart: of ana and bob in turn, of team-a and team-b."""
    rows = [
        {
            "id": new_id("aud", NOON + place * 1000),
            "at": NOON + place * 1000,
            "actor_kind": "user",
            "actor": ("ana", "bob")[place % 2],
            "action": ("key.create", "key.end", "model.update")[place % 3],
            "object_type": "key",
            "object_id": f"key-{place % 4}",
            "organisation": ("team-a", "team-b")[place // 2 % 2],
            "after": {"place": place},
        }
        for place in range(count)
    ]
    async with running.plane.database.main.write() as connection:
        await connection.execute(insert(audit), rows)
    return [str(row["id"]) for row in rows]


async def ids(client: httpx.AsyncClient, query: str = "") -> list[str]:
    """Of all pages."""
    found: list[str] = []
    after = ""
    while after is not None:
        body = (await client.get(f"{PATH}?limit=7{query}{after and f'&after={after}'}")).json()
        found += [row["id"] for row in body["data"]]
        after = body["next"]
    return found


async def test_a_row_says_who_has_done_what(sqlite_plane: Running) -> None:
    headers = {"x-request-id": "4bf92f3577b34da6"}
    body = {"name": "team-a", "title": "Team A"}
    await sqlite_plane.admin.post("/api/v1/organisations", json=body, headers=headers)

    (row,) = (await sqlite_plane.admin.get(f"{PATH}?action=organisation.create")).json()["data"]

    assert row.pop("id").startswith("aud_")
    assert row == {
        "at": "2026-11-28T12:00:00Z",
        "actor": {"kind": "token", "name": "ana"},
        "action": "organisation.create",
        "object": {"type": "organisation", "id": "team-a"},
        "organisation": "team-a",
        "before": None,
        "after": {**body, "disabled": False, "models": None, "limits": [], "budget": None},
        "reason": None,
        "address": "127.0.0.1",
        "request_id": "4bf92f3577b34da6",
    }


async def test_rows_are_found_by_all_that_they_say(plane: Running) -> None:
    made = await fill(plane, 40)
    newest = made[::-1]

    assert await ids(plane.admin) == newest
    assert await ids(plane.admin, "&actor=bob") == [id for id in newest if made.index(id) % 2]
    assert await ids(plane.admin, "&action=key.end") == [id for id in newest if made.index(id) % 3 == 1]
    assert await ids(plane.admin, "&object=key:key-2") == [id for id in newest if made.index(id) % 4 == 2]
    between = "&start=2026-11-28T12:00:05Z&end=2026-11-28T12:00:09Z"
    assert await ids(plane.admin, between) == made[5:9][::-1]
    assert await ids(plane.admin, f"{between}&actor=ana&action=model.update") == [made[8]]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("object=key", "object"),
        ("start=yesterday", "start"),
        ("end=1", "end"),
        ("after=x", "after"),
        ("limit=0", "limit"),
    ],
)
async def test_a_filter_that_cannot_be_read_is_refused(sqlite_plane: Running, query: str, param: str) -> None:
    assert error(await sqlite_plane.admin.get(f"{PATH}?{query}")) == (422, "validation_error", param)


async def test_all_rows_are_exported_a_line_each(plane: Running) -> None:
    made = await fill(plane, 1203)

    answer = await plane.admin.get(f"{PATH}?limit=2", headers=EXPORT)
    some = await plane.admin.get(f"{PATH}?actor=bob&end=2026-11-28T12:00:04Z", headers=EXPORT)

    rows = [json.loads(line) for line in answer.text.splitlines()]
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert [row["id"] for row in rows] == made[::-1]
    assert rows[0] == (await plane.admin.get(PATH)).json()["data"][0]
    assert [json.loads(line)["after"]["place"] for line in some.text.splitlines()] == [3, 1]


async def test_who_sees_which_rows(sqlite_plane: Running) -> None:
    for name in ("bob", "olga", "mia", "vic"):
        await make_user(sqlite_plane, name, password=None)
    await make_organisation(sqlite_plane, "team-a", olga="owner", bob="member", vic="viewer")
    made = await fill(sqlite_plane, 40)
    places: dict[str, list[int]] = {}
    exports: dict[str, int] = {}
    for name, role in (("olga", None), ("bob", None), ("oscar", "operator"), ("vera", "viewer")):
        async with acting_as(sqlite_plane, name, role) as client:
            places[name] = [made.index(id) for id in reversed(await ids(client)) if id in made]
            exports[name] = (await client.get(PATH, headers=EXPORT)).status_code
    for name in ("vic", "mia"):
        async with acting_as(sqlite_plane, name) as client:
            assert (await client.get(PATH)).status_code == 403

    assert places["olga"] == [place for place in range(40) if place // 2 % 2 == 0]
    assert places["bob"] == [place for place in range(40) if place % 2]
    assert places["oscar"] == places["vera"] == list(range(40))
    assert exports == {"olga": 200, "bob": 403, "oscar": 403, "vera": 403}


async def test_a_row_is_a_line_of_the_log_once_it_is_written(
    sqlite_plane: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "control_plane.services.audit"):
        await sqlite_plane.admin.post("/api/v1/organisations", json={"name": "team-a"})
        await sqlite_plane.admin.post("/api/v1/organisations", json={"name": "team-a"})

    lines = [record.__dict__["fields"] for record in caplog.records if record.message == "audit"]
    assert [(line["action"], line["actor"], line["object"]) for line in lines] == [
        ("organisation.create", "ana", "team-a")
    ]
