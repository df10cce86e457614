"""A control plane, three routers and two engines together: what people change is obeyed, what routers do is known."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from tests.conftest import Served
from tests.control_plane.conftest import SERVICE_TOKEN, Running
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
