"""Three real routers and a control plane: what operators order for a backend holds at all of them, and is reported."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from tests.conftest import Served
from tests.control_plane.conftest import SERVICE_TOKEN, Clock, Running, starting
from tests.fakes import FakeEngine, hang, until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
OVERRIDES = "/api/v1/overrides"


@pytest.fixture
async def plane(sqlite_url: str) -> AsyncIterator[Running]:
    """Its clock is that of the routers."""
    async with starting(sqlite_url) as start:
        yield await start(clock=Clock(time.time_ns() // 1_000_000))


async def ordered(plane: Running, engine: FakeEngine, action: str, **more: Any) -> dict[str, Any]:
    body = {"backend": engine.url[7:], "model": None, "action": action, "reason": "driver", **more}
    answer = await plane.admin.post(OVERRIDES, json=body)
    assert answer.status_code in (200, 201), answer.text
    found: dict[str, Any] = answer.json()
    return found


async def obeyed(plane: Running, id: str) -> None:
    """Wait until the control plane knows that all routers have it."""
    wanted = {"routers": 3, "of": 3, "missing": []}
    async with asyncio.timeout(20):
        while (await plane.admin.get(f"{OVERRIDES}/{id}")).json()["acknowledged"] != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def states(plane: Running) -> dict[str, tuple[str, str]]:
    found = (await plane.admin.get("/api/v1/backends")).json()["data"]
    return {row["backend"]: (row["state"], row["agree"]) for row in found}


async def test_a_drained_backend_gets_no_request_of_any_router(
    plane: Running, start_engine: Start, start_router: Start
) -> None:
    one, two = await start_engine(), await start_engine()
    entry = {"name": "m", "backends": [one.url, two.url]}
    assert (await plane.admin.put("/api/v1/models/m", json=entry, headers={"if-none-match": "*"})).status_code == 201
    routers: list[Served] = [
        await start_router(
            registry_url=plane.url, registry_token=SERVICE_TOKEN, report_interval=0.2, registry_refresh=600, port=port
        )
        for port in (8001, 8002, 8003)
    ]

    async def asked(times: int = 5) -> list[httpx.Response]:
        return list(await asyncio.gather(*(router.chat() for router in routers for _ in range(times))))

    began = time.monotonic()
    drain = await ordered(plane, one, "drain", expires_in=600)
    await obeyed(plane, drain["id"])
    # 5 s is the promise.
    assert time.monotonic() - began < 5
    before = len(one.requests)
    assert {answer.status_code for answer in await asked()} == {200}
    assert len(one.requests) == before
    assert (await states(plane))[one.url[7:]] == ("draining", "3/3")

    # The last usable backend: only by force.
    body = {"backend": two.url[7:], "model": None, "action": "out", "reason": "x", "expires_in": 600}
    assert (await plane.admin.post(OVERRIDES, json=body)).json()["error"]["code"] == "last_backend"
    two.script = hang
    waiting = [asyncio.create_task(router.chat()) for router in routers]
    await until(lambda: two.busy == 3)
    await obeyed(plane, (await ordered(plane, two, "out", expires_in=600, force=True))["id"])
    assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {503}

    assert (await ordered(plane, one, "return", expires_in=None))["ended"] == [drain["id"]]
    async with asyncio.timeout(20):
        while {answer.status_code for answer in await asked(1)} != {200}:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    for router in routers:
        assert await router.metric("inference_api_report_failures_total") == 0
