"""Engines in a cluster through /api/v1: looked at, scaled, refused, and their logs followed to the last connection."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.control_plane.conftest import Running
from tests.control_plane.fake_cluster import FakeCluster
from tests.fakes import until

pytestmark = pytest.mark.anyio
MODEL = "meta/llama-3-8b"


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with FakeCluster() as cluster:
        cluster.deployment("llama")
        cluster.settle()
        yield cluster


@pytest.fixture
async def plane(start_sqlite: Callable[..., Any], cluster: FakeCluster) -> Running:
    running: Running = await start_sqlite(
        kubernetes_namespace=cluster.namespace,
        kubernetes_url=cluster.url,
        kubernetes_scale="on",
        kubernetes_logs="on",
    )
    entry = {"name": MODEL, "backends": ["http://llama:8000"]}
    assert (await running.admin.put(f"/models/{MODEL}", json=entry)).status_code == 201
    body = {"driver": "kubernetes", "object": "llama", "max": 4}
    made = await running.admin.put(f"/api/v1/deployments/{MODEL}", json=body, headers={"if-none-match": "*"})
    assert made.status_code == 201, made.text
    return running


async def act(plane: Running, **action: Any) -> tuple[int, dict[str, Any]]:
    answer = await plane.admin.post("/api/v1/model-actions", json={"model": MODEL, **action})
    return answer.status_code, answer.json()


async def told(plane: Running, key: str, value: Any) -> dict[str, Any]:
    """The deployment, once it says so: a look may be two seconds old."""
    async with asyncio.timeout(30):
        while True:
            found: dict[str, Any] = (await plane.admin.get(f"/api/v1/deployments/{MODEL}")).json()
            if found[key] == value:
                return found
            await asyncio.sleep(0.1)


async def test_a_model_is_scaled(plane: Running, cluster: FakeCluster) -> None:
    status, before = await act(plane, action="scale", replicas=2, reason="a demo")
    stopped, after = await act(plane, action="stop")

    assert (status, before["state"], before["ready"], before["wanted"]) == (202, "ready", 1, 2)
    assert (stopped, after["wanted"]) == (202, 0)
    assert cluster.deployments["llama"].replicas == 0


async def test_a_model_that_keda_scales_is_left_to_it(plane: Running, cluster: FakeCluster) -> None:
    cluster.autoscaler("keda-hpa-llama", "llama", "llama")
    await told(plane, "owner", "ScaledObject llama")
    status, refused = await act(plane, action="stop")

    assert (status, refused["error"]["code"]) == (409, "owned")
    assert "ScaledObject llama" in refused["error"]["message"]
    assert cluster.deployments["llama"].replicas == 1


@pytest.mark.parametrize(
    ("how", "status"), [(403, 403), (404, 404), (409, 409), (429, 503), (500, 503), ("gone", 503), ("garbage", 502)]
)
async def test_what_the_cluster_refuses_is_told(
    how: int | str, status: int, plane: Running, cluster: FakeCluster
) -> None:
    cluster.break_("deployments/scale", how)
    answered, refused = await act(plane, action="scale", replicas=2)

    assert answered == status
    assert "10.0.0.1" not in str(refused)
    assert cluster.url not in str(refused)


async def test_a_cluster_that_is_away_hides_nothing_else(plane: Running, cluster: FakeCluster) -> None:
    await cluster.stop()
    found = await told(plane, "state", "unknown")

    assert found["instances"] == []
    assert "cannot be reached" in found["reason"]
    assert found["object"] == "llama"


async def test_a_log_is_followed_until_its_reader_leaves(plane: Running, cluster: FakeCluster) -> None:
    (pod,) = cluster.pods
    cluster.log(pod, "first")
    query = {"pod": pod, "model": MODEL, "follow": "true"}
    seen = []
    async with plane.admin.stream("GET", "/api/v1/logs", params=query) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                seen.append(line)
                cluster.log(pod, f"more {len(seen)}")
            if len(seen) == 3:
                break
    await until(lambda: cluster.following == 0)

    assert seen == ['data: "first"', 'data: "more 1"', 'data: "more 2"']


async def test_a_log_that_is_followed_does_not_hold_the_process(plane: Running, cluster: FakeCluster) -> None:
    (pod,) = cluster.pods
    cluster.log(pod, "first")
    query = {"pod": pod, "model": MODEL, "follow": "true"}
    async with plane.admin.stream("GET", "/api/v1/logs", params=query) as answer:
        lines = answer.aiter_lines()
        while await anext(lines) != 'data: "first"':
            pass
        plane.stop()
        rest = [line async for line in lines]

    assert "event: end" in rest
    await until(lambda: cluster.following == 0)
