"""Idempotency-Key: a POST that is sent again is not done again, in whatever replica."""

import asyncio
from typing import Any

import httpx
import orjson
import pytest
from sqlalchemy import func, select, update

from control_plane.data.tables import idempotency, overrides
from control_plane.http.idempotency import without_secrets
from tests.control_plane.conftest import Running, management_token

pytestmark = pytest.mark.anyio
DRAIN = {"backend": "10.0.0.1:8000", "action": "drain", "reason": "driver"}
KEY = {"idempotency-key": "5b2f-1"}


async def drain(running: Running, reason: str = "driver", **options: Any) -> httpx.Response:
    return await running.admin.post(
        "/api/v1/overrides", json={**DRAIN, "reason": reason}, **{"headers": KEY, **options}
    )


async def made(running: Running) -> int:
    async with running.plane.database.main.read() as connection:
        count: int = (await connection.execute(select(func.count()).select_from(overrides))).scalar_one()
    return count


async def test_the_same_request_gets_the_first_answer(plane: Running) -> None:
    first, again = await drain(plane), await drain(plane)

    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers.get("etag") == first.headers.get("etag")
    assert await made(plane) == 1


async def test_another_request_needs_another_key(plane: Running) -> None:
    await drain(plane)

    other = await drain(plane, reason="another")
    elsewhere = await plane.admin.post("/api/v1/organisations", json=DRAIN, headers=KEY)

    for answer in (other, elsewhere):
        assert answer.status_code == 422
        assert answer.json()["error"]["code"] == "idempotency_key_reused"
    assert await made(plane) == 1


async def test_another_request_is_refused_while_the_first_one_still_runs(plane: Running) -> None:
    await drain(plane)
    # As a replica leaves it while it works
    async with plane.plane.database.main.write() as connection:
        await connection.execute(update(idempotency).values(status=0))

    async with asyncio.timeout(10):
        other = await drain(plane, reason="another")

    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert await made(plane) == 1


async def test_a_key_belongs_to_who_sent_it(plane: Running) -> None:
    token = await management_token(plane.plane.database, "bob", "operator")
    await drain(plane)

    answer = await drain(plane, headers={**KEY, "authorization": f"Bearer {token}"})

    assert "idempotency-replayed" not in answer.headers


async def test_requests_at_the_same_moment_run_once(start_plane: Any, database_url: str) -> None:
    running = [await start_plane()]
    if database_url.startswith("postgresql"):
        running.append(await start_plane())
    for one in running:
        one.admin.headers = running[0].admin.headers

    answers = await asyncio.gather(*(drain(running[place % len(running)]) for place in range(8)))

    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert await made(running[0]) == 1


async def test_an_answer_is_kept_for_a_day(sqlite_plane: Running) -> None:
    first = await drain(sqlite_plane)
    sqlite_plane.clock.advance(86_399)
    assert (await drain(sqlite_plane)).json()["id"] == first.json()["id"]
    sqlite_plane.clock.advance(1)

    assert (await drain(sqlite_plane)).json()["id"] != first.json()["id"]


async def test_a_refusal_is_kept_too_but_not_one_of_rights(sqlite_plane: Running) -> None:
    token = await management_token(sqlite_plane.plane.database, "bob", "viewer")
    headers = {**KEY, "authorization": f"Bearer {token}"}
    invalid = [await drain(sqlite_plane, reason="") for _ in range(2)]
    denied = [await drain(sqlite_plane, headers=headers) for _ in range(2)]

    assert [answer.status_code for answer in invalid] == [422, 422]
    assert invalid[1].headers["idempotency-replayed"] == "true"
    assert [answer.status_code for answer in denied] == [403, 403]
    assert "idempotency-replayed" not in denied[1].headers


async def test_a_request_of_a_process_that_died_runs_again_after_a_minute(plane: Running) -> None:
    first = await drain(plane)
    async with plane.plane.database.main.write() as connection:
        await connection.execute(update(idempotency).values(status=0))
    plane.clock.advance(60)

    answer = await drain(plane)

    assert answer.status_code == 201
    assert answer.json()["id"] != first.json()["id"]


@pytest.mark.parametrize("key", ["", "two words", "x" * 256, "ä"])
async def test_a_key_is_one_word(sqlite_plane: Running, key: str) -> None:
    answer = await drain(sqlite_plane, headers=[("idempotency-key", key.encode())])

    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "Idempotency-Key"


async def test_a_key_of_nobody_is_not_looked_at(sqlite_plane: Running) -> None:
    answer = await sqlite_plane.client.post("/api/v1/overrides", json=DRAIN, headers=KEY)

    assert answer.status_code == 401


def test_a_kept_answer_has_no_secret() -> None:
    given = {"id": "k3v9Qm2XbT7a", "key": "sk-ia-", "token": "mt-ia-", "setup_url": "http://x", "limits": [{"key": 1}]}

    assert orjson.loads(without_secrets(orjson.dumps(given))) == {
        "id": "k3v9Qm2XbT7a",
        "key": None,
        "token": None,
        "setup_url": None,
        "limits": [{"key": 1}],
    }
    assert without_secrets(b"") == b""
