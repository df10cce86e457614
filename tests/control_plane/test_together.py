"""A control plane, three routers and two engines together: what people change is obeyed, what routers do is known."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from control_plane.data.database import Database, parse_url
from control_plane.pure.times import shown
from tests.conftest import Served
from tests.control_plane.conftest import SERVICE_TOKEN, Running, management_token
from tests.control_plane.processes import served
from tests.fakes import FakeEngine
from tests.ports import free_port

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]


async def routers(start_router: Callable[..., Any], url: str, count: int = 3, **settings: Any) -> list[Served]:
    """Routers that have their models, usage and overrides from the control plane."""
    chosen = {
        "models": [], "registry_url": url, "registry_token": SERVICE_TOKEN, "registry_refresh": 0.5,
        "report_interval": 0.5, "usage": "registry", **settings,
    }  # fmt: skip
    # The port is a part of the name that a router reports under.
    started: list[Served] = [await start_router(**chosen, port=free_port()) for _ in range(count)]
    for router in started:
        await eventually(partial(_knows, router, "m"))
    return started


async def _knows(router: Served, model: str) -> bool:
    return model in [one["id"] for one in (await router.client.get("/v1/models")).json()["data"]]


async def eventually(condition: Callable[[], Awaitable[Any]], seconds: float = 30) -> Any:
    """What the condition is, once it is true."""
    async with asyncio.timeout(seconds):
        while True:
            if found := await condition():
                return found
            await asyncio.sleep(0.05)


async def serve_model(plane: Running, *engines: FakeEngine) -> list[str]:
    """Put the model `m`; the labels of its backends."""
    # Routers have the real time, by which overrides end.
    plane.clock.now = time.time_ns() // 1_000_000
    made = await plane.admin.put("/models/m", json={"name": "m", "backends": [{"url": one.url} for one in engines]})
    assert made.status_code == 201, made.text
    return [one.url.removeprefix("http://") for one in engines]


async def acknowledged(plane: Running, id: str, of: int) -> bool:
    found = (await plane.admin.get(f"/api/v1/overrides/{id}")).json()["acknowledged"]
    return bool(found["routers"] == found["of"] == of)


async def test_a_drained_backend_gets_no_requests_until_it_returns(
    plane: Running, start_engine: Callable[..., Any], start_router: Callable[..., Any]
) -> None:
    drained, other = await start_engine(), await start_engine()
    label, _ = await serve_model(plane, drained, other)
    asked = await routers(start_router, plane.url)

    body = {"backend": label, "action": "drain", "reason": "driver", "expires_in": 600}
    made = (await plane.admin.post("/api/v1/overrides", json=body)).json()
    await eventually(lambda: acknowledged(plane, made["id"], 3))
    before = len(drained.requests)
    answers = [await router.chat() for router in asked for _ in range(10)]
    row = next(one for one in (await plane.admin.get("/api/v1/backends")).json()["data"] if one["backend"] == label)

    assert {answer.status_code for answer in answers} == {200}
    assert len(drained.requests) == before
    assert [row["state"], row["agree"], row["override"]] == ["draining", "3/3", made["id"]]

    await plane.admin.post("/api/v1/overrides", json={"backend": label, "action": "return"})

    async def is_used() -> bool:
        for router in asked:
            await router.chat()
        return len(drained.requests) > before

    await eventually(is_used)


async def test_usage_is_what_the_routers_served(
    plane: Running, start_engine: Callable[..., Any], start_router: Callable[..., Any]
) -> None:
    await serve_model(plane, await start_engine())
    asked = await routers(start_router, plane.url)
    answers = [await router.chat() for router in asked for _ in range(7)]
    assert {answer.status_code for answer in answers} == {200}

    async def records() -> list[Any]:
        found = await plane.admin.get("/api/v1/requests", params={"model": "m", "limit": 50})
        assert found.status_code == 200, found.text
        data: list[Any] = found.json()["data"]
        return data if len(data) >= 21 else []

    listed = await eventually(records)
    # Sums are at most 30 seconds old.
    plane.clock.advance(31)
    start, end = (str(shown(plane.clock.now + hours * 3_600_000)) for hours in (-23, 1))
    found = (await plane.admin.get("/api/v1/usage", params={"start": start, "end": end, "bucket": "1d"})).json()

    assert len({one["id"] for one in listed}) == len(listed) == 21
    assert found["totals"]["requests"] == 21
    assert found["coverage"]["share"] == 1.0
    instances = {one["instance"] for one in (await plane.admin.get("/api/v1/routers")).json()["data"]}
    assert {one["router"] for one in listed} == instances


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_routers_go_on_while_the_control_plane_is_away(
    tmp_path: Path, start_engine: Callable[..., Any], start_router: Callable[..., Any], number: int
) -> None:
    engine = await start_engine()
    url = f"sqlite:///{tmp_path}/control-plane.sqlite3"
    port = free_port()
    async with served(tmp_path, url, port=port, service_token=SERVICE_TOKEN) as plane:
        manager = {"authorization": f"Bearer {await _token(url)}"}
        entry = {"name": "m", "backends": [{"url": engine.url}]}
        assert (await plane.client.put("/models/m", json=entry, headers=manager)).status_code == 201
        asked = await routers(start_router, f"http://127.0.0.1:{port}")
        first = [await router.chat() for router in asked for _ in range(5)]
        await plane.stop(number)
    during = [await router.chat() for router in asked for _ in range(5)]
    assert {answer.status_code for answer in [*first, *during]} == {200}

    async with served(tmp_path, url, port=port, service_token=SERVICE_TOKEN) as plane:

        async def records() -> list[Any]:
            found = await plane.client.get("/api/v1/requests?limit=200", headers=manager)
            assert found.status_code == 200, found.text
            data: list[Any] = found.json()["data"]
            return data if len(data) >= 30 else []

        listed = await eventually(records, 60)
    assert len({one["id"] for one in listed}) == len(listed) == 30


async def _token(url: str) -> str:
    """A management token of a platform admin, written beside the running control plane."""
    database = Database(parse_url(url))
    try:
        return await management_token(database, "ana", "admin")
    finally:
        await database.close()
