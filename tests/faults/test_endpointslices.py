"""Backends that come, go and drain as a cluster's API says, on real sockets: nothing is lost, or sent too late."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from inference_api.discovery.endpointslices import EndpointSlices
from inference_api.discovery.watch import Timing
from tests.conftest import Served
from tests.discovery.kube import FakeApi, document, endpoint
from tests.fakes import (
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    STREAM,
    FakeEngine,
    Line,
    Received,
    answer,
    chunk,
    event,
    until,
)
from tests.faults.lab import Pods
from tests.faults.quiescence import Quiescence

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[FakeApi]:
    async with FakeApi(tmp_path) as server:
        yield server


def put(api: FakeApi, *engines: FakeEngine, terminating: tuple[FakeEngine, ...] = ()) -> None:
    found = [endpoint(engine.host, engine.host) for engine in engines if engine not in terminating]
    going = [endpoint(one.host, one.host, ready=False, serving=True, terminating=True) for one in terminating]
    api.put(document("llama-1", "llama", *found, *going, ports=[("http", engines[0].port)]))


async def serve(start_router: Start, api: FakeApi, **more: Any) -> Served:
    # The Service's port is 80; what its pods listen at is for the API to say.
    entry = {"url": "http://llama.models.svc", "discovery": "dns"}
    served: Served = await start_router(models=[{"name": "m", "backends": [entry]}], cluster=api.cluster, **more)
    return served


def labels(served: Served) -> list[str]:
    return [backend.label for backend in served.router.core.fleet.models["m"].backends]


async def test_t54_a_pod_that_drains_ends_its_streams_and_gets_no_new_requests(
    api: FakeApi, pods: Pods, start_router: Start
) -> None:
    opened = asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        if b'"stream":true' not in request.body:
            await answer(request, line)
            return
        await line.send(SSE_HEAD, chunk(event("one")))
        await opened.wait()
        await line.send(chunk(event("two") + DONE) + LAST_CHUNK)

    engines = await pods(2, script)
    going, stays = engines
    put(api, going)
    served = await serve(start_router, api)
    async with served.client.stream("POST", "/v1/chat/completions", json=STREAM) as stream:
        put(api, *engines, terminating=(going,))
        await until(lambda: labels(served) == [f"{stays.host}:{stays.port}"])
        for _ in range(5):
            assert (await served.chat()).status_code == 200
        opened.set()
        body = await stream.aread()

    assert body.endswith(DONE)
    assert (len(going.requests), len(stays.requests)) == (1, 5)
    backend = f"{going.host}:{going.port}"
    assert await served.metric("inference_api_backend_up", backend=f"{stays.host}:{stays.port}") == 1
    assert await served.metric("inference_api_backend_up", backend=backend) == 0
    await until(lambda: going.open == 0)


async def test_t54_while_the_api_is_away_what_was_known_serves(api: FakeApi, pods: Pods, start_router: Start) -> None:
    engines = await pods(2)
    put(api, *engines)
    served = await serve(start_router, api)
    await api.stop()
    await until(lambda: served.router.core.discovery.failures["connect"])

    assert len(labels(served)) == 2
    for _ in range(5):
        assert (await served.chat()).status_code == 200
    assert await served.metric("inference_api_discovery_failures_total", reason="connect") >= 1
    assert (await served.client.get("/readyz")).status_code == 200


async def readiness(served: Served) -> tuple[int, str]:
    answer = await served.client.get("/readyz")
    return answer.status_code, answer.json()["status"]


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Timing(ready_within=1.0, poll=0.002, first_back_off=0.02, longest_back_off=0.02)
    monkeypatch.setattr("inference_api.core.EndpointSlices", partial(EndpointSlices, timing=timing))


async def test_t54_a_router_that_may_not_list_is_not_ready_until_it_may(
    api: FakeApi,
    pods: Pods,
    start_router: Start,
    hurry: None,
    quiescence: Quiescence,
    caplog: pytest.LogCaptureFixture,
) -> None:
    [engine] = await pods(1)
    put(api, engine)
    api.forbidden.add("models")
    served = await serve(start_router, api)

    assert await readiness(served) == (503, "starting")
    await until(lambda: "not ready: the Services of ['models'] have never been listed" in caplog.text)
    assert await readiness(served) == (503, "starting")
    api.forbidden.clear()
    await until(lambda: served.router.probes.state == "ready" and api.watches)
    # What stays is the watch, once it has begun on both sides.
    await asyncio.sleep(0.2)
    quiescence.begin()

    assert await readiness(served) == (200, "ready")
    assert labels(served) == [f"{engine.host}:{engine.port}"]


async def test_t54_one_namespace_that_may_not_be_listed_does_not_hold_up_the_others_for_ever(
    api: FakeApi, pods: Pods, start_router: Start, hurry: None
) -> None:
    [engine] = await pods(1)
    put(api, engine)

    api.forbidden.add("secret")
    hosts = {"m": "llama.models.svc", "other": "llama.secret.svc"}
    models = [{"name": m, "backends": [{"url": f"http://{host}", "discovery": "dns"}]} for m, host in hosts.items()]
    served = await start_router(models=models, cluster=api.cluster)

    assert await readiness(served) == (503, "starting")
    assert (await served.chat()).status_code == 200
    await until(lambda: served.router.probes.state == "ready")
    assert await readiness(served) == (200, "ready")


async def test_t54_a_router_that_is_told_to_stop_before_it_was_ready_does_not_become_so(
    api: FakeApi, start_router: Start, hurry: None, quiescence: Quiescence
) -> None:
    api.forbidden.add("models")
    served = await serve(start_router, api)
    served.router.drain()
    api.forbidden.clear()
    await until(lambda: api.watches)
    await asyncio.sleep(0.3)
    quiescence.begin()

    assert await readiness(served) == (503, "draining")


async def test_t54_a_service_that_the_registry_adds_is_watched_at_once(
    api: FakeApi, pods: Pods, start_router: Start
) -> None:
    engines = await pods(1)
    put(api, *engines)
    served = await serve(start_router, api)
    entry = {"url": "http://llama:80", "discovery": "dns"}
    fleet, catalogue = served.router.core.fleet, served.router.core.fleet.models["m"].entry
    other = catalogue.model_validate({"name": "n", "backends": [entry]})
    fleet.update({"m": catalogue, "n": other})
    served.router.core._catalogue_changed()

    await until(lambda: fleet.models["n"].backends)
    assert (await served.chat(model="n")).status_code == 200


async def test_t57_an_address_that_no_backend_may_have_is_not_connected_to(api: FakeApi, start_router: Start) -> None:
    """Whoever may write EndpointSlices must not aim the router at the cloud's metadata."""
    api.put(document("s", "llama", "169.254.169.254", ports=[("http", 80)]))
    served = await serve(start_router, api)

    assert labels(served) == []
    assert (await served.chat()).status_code == 503
