"""A model that is stopped: a real router holds its requests, a process starts, and it is stopped when it is idle."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import Served
from tests.control_plane.conftest import SERVICE_TOKEN, Clock, Running, starting
from tests.ports import free_port

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]
Start = Callable[..., Any]
DEPLOYMENT = {"driver": "processes", "object": "toy", "scale_to_zero": True}


class Ticking(Clock):
    """That of the routers and processes."""

    def __call__(self) -> int:
        return time.time_ns() // 1_000_000


@pytest.fixture
async def plane(sqlite_url: str, tmp_path: Path) -> AsyncIterator[Running]:
    """With a process that is a toy engine, and its model `m`."""
    port = free_port()
    engine = [sys.executable, "-m", "inference_api.demo.engine", "--model", "m", "--port", str(port)]
    path = tmp_path / "processes.yaml"
    one = {"name": "toy", "command": engine, "health": f"http://127.0.0.1:{port}/health", "cwd": str(tmp_path)}
    path.write_text(yaml.safe_dump({"processes": [one]}))
    path.chmod(0o600)
    async with starting(sqlite_url) as start:
        running: Running = await start(clock=Ticking(), processes=path)
        entry = {"name": "m", "backends": [f"http://127.0.0.1:{port}"], "hold": 100}
        await put(running, "models", entry)
        yield running


async def put(plane: Running, resource: str, body: dict[str, Any]) -> None:
    answer = await plane.admin.put(f"/api/v1/{resource}/m", json=body, headers={"if-none-match": "*"})
    assert answer.status_code == 201, answer.text


async def becomes(plane: Running, state: str) -> dict[str, Any]:
    async with asyncio.timeout(100):
        while True:
            found: dict[str, Any] = (await plane.admin.get("/api/v1/deployments/m")).json()
            if found["state"] == state:
                return found
            await asyncio.sleep(0.05)


async def backend_is(plane: Running, state: str) -> None:
    """Wait until the router says so."""
    async with asyncio.timeout(60):
        while True:
            rows = (await plane.admin.get("/api/v1/backends")).json()["data"]
            if [row["state"] for row in rows] == [state]:
                return
            await asyncio.sleep(0.05)


async def ask(router: Served) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    return await router.client.post("/v1/chat/completions", json=body, timeout=100)


async def audited(plane: Running, object: str) -> list[tuple[str, str, str | None]]:
    rows = (await plane.admin.get("/api/v1/audit", params={"object": object})).json()["data"]
    return [(row["action"], row["actor"]["kind"], row["reason"]) for row in reversed(rows)]


async def test_requests_start_a_model_and_it_stops_when_it_is_idle(plane: Running, start_router: Start) -> None:
    await put(plane, "deployments", {**DEPLOYMENT, "idle_seconds": 10})
    router = await start_router(
        registry_url=plane.url, registry_token=SERVICE_TOKEN, report_interval=0.2, registry_refresh=600
    )
    await backend_is(plane, "draining")

    first = await asyncio.gather(*(ask(router) for _ in range(5)))
    running = (await plane.admin.get("/api/v1/deployments/m")).json()
    stopped = await becomes(plane, "stopped")
    await backend_is(plane, "draining")
    again = await ask(router)

    assert [answer.status_code for answer in (*first, again)] == [200] * 6
    assert running["last_activation_at"] is not None
    assert stopped["was_ready_at"] is None
    deeds = await audited(plane, "model:m")
    assert [(action, actor) for action, actor, _ in deeds if action.startswith("deployment.")] == [
        ("deployment.start", "router"),
        ("deployment.stop", "system"),
        ("deployment.start", "router"),
    ]
    assert [reason for action, _, reason in deeds if action == "deployment.stop"] == ["idle for 10 s"]


async def test_a_model_that_was_stopped_by_hand_starts_at_its_next_request(plane: Running, start_router: Start) -> None:
    await put(plane, "deployments", DEPLOYMENT)
    router = await start_router(
        registry_url=plane.url, registry_token=SERVICE_TOKEN, report_interval=0.2, registry_refresh=600
    )
    await backend_is(plane, "draining")
    assert (await ask(router)).status_code == 200

    answer = await plane.admin.post("/api/v1/model-actions", json={"model": "m", "action": "stop", "reason": "night"})
    await becomes(plane, "stopped")
    await backend_is(plane, "draining")
    again = await ask(router)

    assert answer.status_code == 202
    assert again.status_code == 200
