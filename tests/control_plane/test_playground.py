"""The playground: keys that it lends, and a router that is asked with them."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
import pytest
from sqlalchemy import select, update

from control_plane.clients.router import Router, RouterAway
from control_plane.data.tables import audit, keys
from control_plane.errors import Forbidden, Refused
from control_plane.plane import Act, Plane
from control_plane.pure.roles import SYSTEM
from control_plane.services import lending, playground
from control_plane.services.keys import Filters, listed
from tests.control_plane.acts import act_of
from tests.control_plane.conftest import SERVICE_TOKEN, Clock, Running, starting
from tests.control_plane.teams import organisation
from tests.fakes import (
    LAST_CHUNK,
    SSE_HEAD,
    Line,
    Received,
    ScriptedServer,
    chunk,
    hang,
    json_response,
    raw,
    until,
)
from tests.ports import free_port

pytestmark = pytest.mark.anyio
MINUTE = 60_000
BODY = orjson.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": "hello"}]})


async def lend(plane: Plane, act: Act, organisation: str | None) -> lending.Loan:
    return await lending.lend(plane, act, playground.borrower(act, organisation))


async def rows(plane: Running) -> list[Any]:
    async with plane.plane.database.main.read() as connection:
        return list(await connection.execute(select(keys).order_by(keys.c.created_at)))


async def test_a_key_is_lent_until_a_minute_before_its_end_and_then_gets_another_secret(plane: Running) -> None:
    await organisation(plane, "team-a")

    async def lent() -> lending.Loan:
        return await lend(plane.plane, act_of(plane, "max", team_a="member"), "team-a")

    first, *same = await asyncio.gather(*(lent() for _ in range(5)))
    plane.clock.advance(13 * 60 + 59)
    still = await lent()
    plane.clock.advance(1)
    second = await lent()

    assert {one.key for one in (*same, still)} == {first.key} != {second.key}
    (row,) = await rows(plane)
    assert (row.id, row.name, row.organisation, row.user) == (first.id, "playground", "team-a", "max")
    assert first.expires + 14 * MINUTE == second.expires == row.expires_at
    # Another process may still use the one before it.
    assert (row.previous_digest is not None, row.previous_until) == (True, first.expires)
    plane.clock.advance(3600)
    await lent()
    (row,) = await rows(plane)
    assert (row.previous_digest, row.previous_until) == (None, None)


async def test_who_may_use_prompts_is_lent_a_key_there(plane: Running) -> None:
    await organisation(plane, "team-a")
    await organisation(plane, "team-b", ended_at=1)

    async def refusal(where: str | None, platform_role: str | None = None, **roles: str) -> str:
        try:
            await lend(plane.plane, act_of(plane, "max", platform_role, **roles), where)
        except Refused as exc:
            return exc.code
        return ""

    assert [await refusal("team-a", team_a=role) for role in ("owner", "admin", "member", "viewer")] == [
        "",
        "",
        "",
        "forbidden",
    ]
    assert await refusal("team-a", team_c="owner") == await refusal("team-b", "admin") == "not_found"
    assert await refusal("nowhere", "operator") == "not_found"
    assert [await refusal(None, role) for role in ("admin", "operator", "viewer")] == ["", "", "forbidden"]
    assert await refusal(None, team_a="owner") == "forbidden"
    assert {(row.organisation, row.playground) for row in await rows(plane)} == {("team-a", True), (None, True)}
    assert len(await rows(plane)) == 2


async def test_an_ended_key_is_followed_by_another_and_a_disabled_one_by_none(plane: Running) -> None:
    await organisation(plane, "team-a")
    act = act_of(plane, "max", team_a="member")
    first = await lend(plane.plane, act, "team-a")
    etag = (await plane.admin.get(f"/api/v1/keys/{first.id}")).headers["etag"]
    ended = await plane.admin.delete(f"/api/v1/keys/{first.id}", headers={"if-match": etag})
    assert ended.status_code == 204
    lending.forget(plane.plane, act, playground.borrower(act, "team-a"))

    second = await lend(plane.plane, act, "team-a")
    async with plane.plane.database.main.write() as connection:
        await connection.execute(update(keys).where(keys.c.id == second.id).values(disabled=True))
    lending.forget(plane.plane, act, playground.borrower(act, "team-a"))

    assert second.id != first.id
    with pytest.raises(Forbidden):
        await lend(plane.plane, act, "team-a")


async def test_the_system_has_a_key_of_its_own_for_each_thing_that_it_asks(plane: Running) -> None:
    act = Act(SYSTEM, plane.clock())
    tests = await lending.lend(plane.plane, act, lending.Borrower("system:tests"))
    others = await lending.lend(plane.plane, act, lending.Borrower("system:triage"))

    assert {(row.id, row.name, row.user, row.organisation, row.created_by) for row in await rows(plane)} == {
        (tests.id, "system:tests", None, None, None),
        (others.id, "system:triage", None, None, None),
    }
    async with plane.plane.database.main.read() as connection:
        assert await lending.ids(connection, "system:tests") == {tests.id}
        assert await lending.ids(connection) == {tests.id, others.id}


async def test_lent_keys_are_listed_apart_and_their_secrets_are_nowhere(
    plane: Running, caplog: pytest.LogCaptureFixture
) -> None:
    await organisation(plane, "team-a")
    made = (await plane.admin.post("/api/v1/keys", json={"name": "batch", "organisation": "team-a"})).json()
    with caplog.at_level(logging.DEBUG):
        loan = await lend(plane.plane, act_of(plane, "max", team_a="member"), "team-a")
    admin = act_of(plane, platform_role="admin")

    async def ids(playground: bool | None) -> set[str]:
        found = await listed(plane.plane, admin, 50, None, Filters(playground=playground))
        return {one.row.id for one in found}

    assert [await ids(False), await ids(True), await ids(None)] == [{made["id"]}, {loan.id}, {made["id"], loan.id}]
    assert [one["id"] for one in (await plane.admin.get("/api/v1/keys")).json()["data"]] == [made["id"]]
    async with plane.plane.database.main.read() as connection:
        written = (await connection.execute(select(audit).where(audit.c.object_id == loan.id))).all()
    assert [(row.action, row.actor, row.organisation) for row in written] == [("key.create", "max", "team-a")]
    secret = loan.key.rpartition("-")[2]
    assert secret not in repr((loan, written, plane.plane.loans, await rows(plane))) + caplog.text


@pytest.fixture
async def real(sqlite_url: str) -> AsyncIterator[Running]:
    """A control plane with the clock of the routers."""
    async with starting(sqlite_url) as start:
        yield await start(clock=Clock(time.time_ns() // 1_000_000))


async def test_a_router_is_asked_with_a_key_that_it_learns_of(
    real: Running, start_router: Callable[..., Any], start_engine: Callable[..., Any]
) -> None:
    await organisation(real, "team-a", models=["m"])
    engine = await start_engine()
    await real.admin.put("/models/m", json={"name": "m", "backends": [engine.url]})
    served = await start_router(
        models=[],
        auth="keys",
        policy="registry",
        registry_url=real.url,
        registry_token=SERVICE_TOKEN,
        usage="registry",
    )
    router = Router(served.url)
    loan = await lend(real.plane, act_of(real, "max", team_a="member"), "team-a")

    async with router.ask(loan.key, BODY) as answer:
        content = b"".join([part async for part in answer.body])
    async with router.ask(loan.key, BODY.replace(b'"m"', b'"other"')) as refused:
        reason = orjson.loads(b"".join([part async for part in refused.body]))
    await router.close()

    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert content.endswith(b"data: [DONE]\n\n")
    assert (refused.status, reason["error"]["code"], "x-request-id" in refused.headers) == (
        403,
        "model_not_found",
        True,
    )
    line = next(line for line in served.lines if line["status"] == 200)
    assert (line["key_id"], line["organisation"], line["user"]) == (loan.id, "team-a", "max")


async def test_who_leaves_ends_the_request(start_router: Callable[..., Any], start_engine: Callable[..., Any]) -> None:
    engine = await start_engine()
    engine.script = hang
    served = await start_router(engine)
    router = Router(served.url)

    async def ask() -> None:
        async with router.ask("sk-x", BODY) as answer:
            async for _ in answer.body:
                pass

    asking = asyncio.create_task(ask())
    await until(lambda: engine.busy == 1)
    asking.cancel()
    await until(lambda: engine.busy == 0)
    await router.close()


async def test_a_key_that_stays_unknown_is_a_401_after_a_while() -> None:
    unknown = json_response({"error": {"code": "invalid_api_key"}}, "401 Unauthorized")
    async with ScriptedServer(raw(unknown)) as server:
        router = Router(server.url, patience=0.3)
        async with router.ask("sk-x", BODY) as answer:
            content = b"".join([part async for part in answer.body])
        await router.close()

    assert (answer.status, orjson.loads(content)["error"]["code"]) == (401, "invalid_api_key")
    assert 2 <= len(server.requests) <= 4
    assert {one.body for one in server.requests} == {BODY}


async def test_another_refusal_is_passed_at_once() -> None:
    busy = json_response(
        {"error": {"code": "overloaded"}}, "503 Service Unavailable", b"retry-after: 3\r\nset-cookie: a=b\r\n"
    )
    async with ScriptedServer(raw(busy)) as server:
        router = Router(server.url)
        async with router.ask("sk-x", BODY) as answer:
            content = b"".join([part async for part in answer.body])
        await router.close()

    assert (answer.status, answer.headers["retry-after"], len(server.requests)) == (503, "3", 1)
    assert "set-cookie" not in answer.headers
    assert orjson.loads(content)["error"]["code"] == "overloaded"


async def test_a_router_that_is_away_is_named_without_its_address() -> None:
    port = free_port()
    router = Router(f"http://127.0.0.1:{port}")
    with pytest.raises(RouterAway) as away:
        async with router.ask("sk-x", BODY):
            pass
    await router.close()

    assert str(port) not in str(away.value)


async def test_a_router_is_not_asked_once_the_process_stops() -> None:
    async with ScriptedServer() as server:
        router = Router(server.url)
        router.stop()
        with pytest.raises(RouterAway):
            async with router.ask("sk-x", BODY):
                pass
        await router.close()

    assert server.requests == []


async def test_a_redirect_of_the_router_is_not_followed() -> None:
    async with ScriptedServer() as other:
        head = (
            f"HTTP/1.1 307 Temporary Redirect\r\nlocation: {other.url}/v1/chat/completions\r\ncontent-length: 0\r\n\r\n"
        )
        async with ScriptedServer(raw(head.encode())) as server:
            router = Router(server.url)
            async with router.ask("sk-x", BODY) as answer:
                content = b"".join([part async for part in answer.body])
            await router.close()

    assert (answer.status, content, len(server.requests)) == (307, b"", 1)
    assert other.requests == []


async def test_a_refusal_of_unknown_length_is_passed_on_as_it_comes() -> None:
    received = asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD.replace(b"200 OK", b"401 Unauthorized"), chunk(b"first"))
        await received.wait()
        await line.send(chunk(b"last"), LAST_CHUNK)

    async with ScriptedServer(script) as server:
        router = Router(server.url)
        async with asyncio.timeout(10), router.ask("sk-x", BODY) as answer:
            first = await anext(answer.body)
            received.set()
            rest = b"".join([part async for part in answer.body])
        await router.close()

    assert (answer.status, answer.unknown_key) == (401, False)
    assert (first, rest) == (b"first", b"last")


async def test_an_answer_that_breaks_off_says_so() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n5\r\ndata:\r\n"
    async with ScriptedServer(raw(head, close=True)) as server:
        router = Router(server.url)
        parts: list[bytes] = []

        async def ask() -> None:
            async with router.ask("sk-x", BODY) as answer:
                async for part in answer.body:
                    parts.append(part)

        with pytest.raises(RouterAway):
            await ask()
        await router.close()

    assert parts == [b"data:"]


async def test_what_an_answer_cost_betrays_no_model_of_others(sqlite_plane: Running) -> None:
    for name in ("open-model", "hidden-model"):
        entry = {"backends": [{"url": "http://10.0.0.11:8000"}], "price": {"input": 1, "output": 2}}
        assert (await sqlite_plane.admin.put(f"/models/{name}", json={"name": name, **entry})).status_code == 201
        price = {"model": name, "input": 1, "output": 2}
        assert (await sqlite_plane.admin.post("/api/v1/prices", json=price)).status_code == 201
    await organisation(sqlite_plane, "team-a", models=["open-model"])
    member = act_of(sqlite_plane, "max", team_a="member")

    async def cost(name: str) -> int | None:
        return (await playground.cost(sqlite_plane.plane, member, "none-0815", name, None, 1000, 0, 1000)).nanos

    assert await cost("open-model") is not None
    assert await cost("hidden-model") is await cost("no-model") is None
