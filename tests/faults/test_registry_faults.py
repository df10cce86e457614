"""A registry that is down, hangs, lies, or is asked by everybody at once: requests never notice."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from inference_api.app import build
from inference_api.application import Application
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import Catalogue
from inference_api.routing.fleet import Fleet
from inference_api.routing.registry import Registry
from inference_api.server.server import listen, ops_thread
from inference_api.settings import Settings
from tests.conftest import serving
from tests.fakes import FakeEngine, Line, Received, Script, ScriptedServer, hang, json_response, raw, until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


@pytest.fixture
async def registry() -> AsyncIterator[Callable[[Script], Any]]:
    """`await registry(script)` -> a registry on a real port that answers every request so."""
    async with AsyncExitStack() as stack:

        async def start(script: Script) -> ScriptedServer:
            server = ScriptedServer(script)
            await stack.enter_async_context(server)
            return server

        yield start


def listing(*engines: FakeEngine, name: str = "m") -> Script:
    return raw(json_response({"models": [{"name": name, "backends": [{"url": engine.url} for engine in engines]}]}))


async def drip(request: Received, line: Line) -> None:
    await line.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
    while not line.writer.is_closing():
        await line.send(b" ")
        await asyncio.sleep(0.02)


DOWN: dict[str, Script] = {
    "hangs": hang,
    "drips": drip,
    "closes": raw(close=True),
    "500": raw(json_response({"error": "no"}, "500 Internal Server Error")),
    "garbage": raw(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n<html"),
    "no HTTP": raw(b"SSH-2.0-OpenSSH_9.9\r\n", close=True),
    "a redirect": raw(json_response({}, "302 Found", b"location: http://169.254.169.254/models\r\n")),
}


@pytest.mark.parametrize("fault", DOWN)
async def test_t55_requests_go_on_while_the_registry_is_down(
    fault: str, start_engine: Start, start_router: Start, registry: Start
) -> None:
    engine = await start_engine()
    server = await registry(listing(engine, name="live"))
    served = await start_router(registry_url=server.url, registry_refresh=0.05)
    at_once, most = 0, 0

    async def script(request: Received, line: Line) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        try:
            await DOWN[fault](request, line)
        finally:
            at_once -= 1

    server.script = script
    looks = len(server.requests)
    await until(lambda: len(server.requests) > looks)
    answered = await served.metric("inference_api_registry_last_success_timestamp_seconds")
    answers = [await served.chat(model="live") for _ in range(20)]

    assert [response.status_code for response in answers] == [200] * 20
    # One look at a time, however long it takes.
    assert most == 1
    await until(lambda: served.router.core.registry.source == "stale")
    ready = await served.client.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "catalogue": "stale", "models": 1})
    assert await served.metric("inference_api_registry_last_success_timestamp_seconds") == answered
    assert await served.metric("inference_api_registry_models", source="stale") == 1


async def test_t55_an_empty_list_is_believed_only_when_it_is_said_twice_in_a_row(
    start_engine: Start, start_router: Start, registry: Start
) -> None:
    empty = raw(json_response({"models": []}))
    server = await registry(empty)
    served = await start_router(await start_engine(), registry_url=server.url, registry_refresh=3600)
    # The first answer ever is no exception: the static catalogue is served on.
    assert (await served.chat()).status_code == 200
    assert (await served.client.get("/readyz")).json()["catalogue"] == "static"
    server.script = raw(close=True)
    await served.router.core.registry.refresh()
    server.script = empty
    await served.router.core.registry.refresh()
    assert (await served.chat()).status_code == 200

    await served.router.core.registry.refresh()
    assert (await served.chat()).status_code == 404
    assert (await served.client.get("/readyz")).json() == {"status": "ready", "catalogue": "registry", "models": 0}


async def test_t55_an_hour_without_a_registry_costs_it_few_looks() -> None:
    """In the time of a clock of our own: looks are up to 30 s apart, and go on for ever."""
    looks, now = 0, 0.0

    def refuse(request: httpx.Request) -> httpx.Response:
        nonlocal looks
        looks += 1
        raise httpx.ConnectError("refused")

    rand = random.Random(55)
    async with httpx.AsyncClient(transport=httpx.MockTransport(refuse), base_url="http://registry") as client:
        registry = Registry(Fleet(make_balancer), Catalogue(), client, clock=lambda: now, rand=rand.random)
        await registry.start()
        while now < 3600:
            now += registry._pause()
            await registry.refresh()

    # One in 15 s on average, and a few more in the first half minute.
    assert 180 < looks < 320
    assert registry.status().failures == {"connect": looks}


async def test_t55_a_cold_start_is_not_ready_before_the_registry_has_been_tried(
    start_engine: Start, registry: Start, tmp_path: Path
) -> None:
    """As on OPS_PORT, whose probes answer from the first moment: 503 for as long as the first look takes."""
    engine, answering = await start_engine(), asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        await answering.wait()
        line.close()

    server = await registry(script)
    catalogue = tmp_path / "catalogue.json"
    catalogue.write_bytes(orjson.dumps({"models": [{"name": "m", "backends": [{"url": engine.url}]}]}))
    settings = Settings(catalogue=catalogue, registry_url=server.url, ops_port=1)
    router = build(settings)
    with listen("127.0.0.1", 0, "OPS_PORT") as listener, ops_thread(router.ops, listener):
        url = "http://127.0.0.1:{1}".format(*listener.getsockname())
        async with httpx.AsyncClient(base_url=url, trust_env=False) as probe:
            starting = asyncio.create_task(started(router, settings, probe))
            await until(lambda: server.requests)
            ready = await probe.get("/readyz")
            assert (ready.status_code, ready.json()["status"]) == (503, "starting")
            assert (await probe.get("/healthz")).status_code == 200
            answering.set()

            assert await starting == (200, "static", 200)


@pytest.mark.parametrize(
    ("models", "required", "ready"), [(["m"], "off", 200), (["m"], "on", 503), ([], "off", 503), ([], "on", 503)]
)
async def test_t55_a_name_is_denied_only_after_the_registry_has_answered(
    models: list[str], required: str, ready: int, start_engine: Start, start_router: Start, registry: Start
) -> None:
    """404 is final for a client; and a pod that cannot serve what the older ones do must not take their place."""
    engine, away = await start_engine(), True

    async def script(request: Received, line: Line) -> None:
        if away:
            line.close()
        else:
            await line.send(json_response({"models": [{"name": "other"}]}))

    server = await registry(script)
    static = [{"name": name, "aliases": ["alias"], "backends": [{"url": engine.url}]} for name in models]
    served = await start_router(
        models=static, registry_url=server.url, registry_refresh=0.05, registry_required=required
    )

    answer = await served.chat(model="nope")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "registry_unavailable")
    assert (answer.json()["error"]["param"], answer.headers["retry-after"]) == ("model", "5")
    assert "nope" in answer.json()["error"]["message"]
    assert (await served.client.get("/v1/models/nope")).status_code == 503
    assert [(await served.chat(model=name)).status_code for name in models + ["alias"] * len(models)] == [200] * (
        2 * len(models)
    )
    assert [card["id"] for card in (await served.client.get("/v1/models")).json()["data"]] == models
    probe = await served.client.get("/readyz")
    assert (probe.status_code, probe.json()["status"]) == (ready, "ready" if ready == 200 else "registry_unavailable")

    away = False
    await until(lambda: not served.router.core.registry.awaited)
    assert (await served.chat(model="nope")).json()["error"]["code"] == "model_not_found"
    probe = await served.client.get("/readyz")
    assert (probe.json()["status"], probe.json()["models"]) == ("ready", 1)


async def started(router: Application, settings: Settings, probe: httpx.AsyncClient) -> tuple[int, str, int]:
    """Readiness, the catalogue, and what a request gets, once the router takes requests."""
    async with serving(router, settings) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        ready = await probe.get("/readyz")
        answer = await client.post("/v1/score", json={"model": "m"})
        return ready.status_code, ready.json()["catalogue"], answer.status_code


async def test_t56_two_thousand_requests_at_the_time_of_a_look_are_one_look(
    start_engine: Start, start_router: Start, registry: Start
) -> None:
    answering, looks = asyncio.Event(), 0
    engine = await start_engine()

    async def script(request: Received, line: Line) -> None:
        nonlocal looks
        looks += 1
        if looks > 1:
            await answering.wait()
        await listing(engine)(request, line)

    server = await registry(script)
    served = await start_router(registry_url=server.url, registry_refresh=3600)
    herd = [asyncio.create_task(served.router.core.registry.refresh()) for _ in range(2000)]
    await until(lambda: looks == 2)
    # None of these asks for one, and none waits for the one that is under way.
    for _ in range(20):
        assert (await served.chat()).status_code == 200
    assert not any(task.done() for task in herd)
    answering.set()
    await asyncio.gather(*herd)

    assert looks == 2


async def test_t56_routers_do_not_look_in_step() -> None:
    rand = random.Random(56)
    routers = [Registry(Fleet(make_balancer), Catalogue(), refresh=15, rand=rand.random) for _ in range(20)]
    pauses = sorted(registry._pause() for registry in routers)

    assert all(12 <= pause <= 18 for pause in pauses)
    assert pauses[-1] - pauses[0] > 4


async def test_t57_hostile_entries_are_refused_alone_and_nobody_connects_to_them(
    start_engine: Start, start_router: Start, registry: Start, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await start_engine()
    urls = [
        "http://169.254.169.254/",
        "http://user:pw@x",
        "file:///etc/passwd",
        "http://allowed\\@evil/",
        "http://[::ffff:169.254.169.254]",
        "http://0x7f.1:6443",
        "http://metadata.google.internal",
        f"{engine.url}/?token=x",
    ]
    hostile = [
        *({"name": f"evil{number}", "backends": [{"url": url}]} for number, url in enumerate(urls)),
        {"name": "many", "backends": [{}] * 1_000_000},
        {"name": 'a\nb{le="1"}'},
        {"name": "m", "backends": [{"url": "http://10.9.9.9"}]},
        {"name": "n", "aliases": ["m"]},
        {"name": "k" * 1_000_000},
        {"name": "owner", "owner": "o" * 1_000_000},
    ]
    good = [{"name": name, "backends": [{"url": engine.url}]} for name in ("m", "last")]
    server = await registry(raw(json_response({"models": [good[0], *hostile, good[1]]})))
    served = await start_router(registry_url=server.url, registry_refresh=3600)

    await until(lambda: list(served.router.core.fleet.models) == ["m", "last"])
    refused = [message for message in caplog.messages if "is refused" in message]
    assert len(refused) == len(hostile)
    assert all("\n" not in line and len(line) < 2000 and "pw" not in line for line in refused)
    assert [(await served.chat(model=name)).status_code for name in ("m", "last", "n")] == [200, 200, 404]
    assert list(served.router.core.transport._pools) == [engine.url]


async def test_t57_a_million_models_are_no_catalogue(
    start_engine: Start, start_router: Start, registry: Start, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await start_engine()
    server = await registry(listing(engine))
    served = await start_router(registry_url=server.url, registry_refresh=3600)
    server.script = raw(json_response({"models": [{}] * 1_000_000}))
    began = time.monotonic()
    await served.router.core.registry.refresh()

    assert time.monotonic() - began < 20
    assert (await served.chat()).status_code == 200
    assert await served.metric("inference_api_registry_sync_failures_total", reason="garbage") == 1
    assert len(caplog.messages) == 1
    assert "it lists 1000000 models; the limit is 20000" in caplog.messages[0]


async def test_t57_an_answer_without_an_end_is_cut(start_engine: Start, start_router: Start, registry: Start) -> None:
    sent = 0

    async def pour(request: Received, line: Line) -> None:
        nonlocal sent
        await line.send(b"HTTP/1.1 200 OK\r\n\r\n")
        with suppress(ConnectionError):
            while not line.writer.is_closing():
                await line.send(b" " * 2**20)
                sent += 1

    server = await registry(listing(await start_engine()))
    served = await start_router(registry_url=server.url, registry_refresh=3600)
    server.script = pour
    await served.router.core.registry.refresh()

    assert (await served.chat()).status_code == 200
    assert await served.metric("inference_api_registry_sync_failures_total", reason="garbage") == 1
    await until(lambda: server.open == 0)
    assert sent < 64


async def test_t57_series_do_not_pile_up_with_models_that_come_and_go(
    start_engine: Start, start_router: Start, registry: Start
) -> None:
    engine = await start_engine()
    server = await registry(listing(engine))
    served = await start_router(registry_url=server.url, registry_refresh=3600)
    sizes, page = [], ""
    for number in range(30):
        server.script = listing(engine, name=f"model-{number}")
        await served.router.core.registry.refresh()
        assert (await served.chat(model=f"model-{number}")).status_code == 200
        await until(lambda expected=number + 1: len(served.lines) == expected)  # type: ignore[misc]
        page = (await served.client.get("/metrics")).text
        sizes.append(sum(line.startswith("inference_api_") for line in page.splitlines()))

    assert len(set(sizes)) == 1
    assert 'model_name="model-29"' in page
    assert 'model_name="model-28"' not in page
