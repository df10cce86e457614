"""Configuration that changes under a router at work: SIGHUP and new files, and nothing that is in flight notices."""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.command import Command, closed, command, log_of, ready
from tests.fakes import (
    CHAT,
    DONE,
    LAST_CHUNK,
    STREAM,
    FakeEngine,
    Line,
    Received,
    ScriptedServer,
    chunk,
    event,
    hang,
    json_response,
    raw,
    sse,
    until,
)
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"


def write(path: Path, *models: dict[str, Any]) -> None:
    """Replace a catalogue file whole."""
    new = path.with_suffix(".new")
    new.write_bytes(orjson.dumps({"models": models}))
    new.rename(path)


def entry(name: str, *engines: FakeEngine, **more: Any) -> dict[str, Any]:
    return {"name": name, "backends": [{"url": engine.url} for engine in engines], **more}


async def names(router: Command) -> list[str]:
    return [card["id"] for card in (await router.client.get("/v1/models")).json()["data"]]


async def served(router: Command, *wanted: str, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while True:
            if await names(router) == list(wanted):
                return
            await asyncio.sleep(0.02)


def gated(go_on: asyncio.Event) -> Callable[[Received, Line], Any]:
    """One event, and the rest of the stream when it may."""

    async def script(request: Received, line: Line) -> None:
        await sse(event("first"))(request, line)
        await go_on.wait()
        await line.send(chunk(DONE) + LAST_CHUNK)

    return script


@pytest.mark.parametrize("ops", [False, True])
async def test_sighup_reads_the_catalogue_again_and_cuts_nothing(
    ops: bool, tmp_path: Path, start_engine: Start
) -> None:
    go_on = asyncio.Event()
    engine, other = await start_engine(gated(go_on)), await start_engine()
    path = tmp_path / "models.json"
    write(path, entry("m", engine))
    more: dict[str, Any] = {"ops_port": free_port()} if ops else {}
    async with command(tmp_path, catalogue=path, **more) as router:
        await ready(router.client)
        async with router.client.stream("POST", URL, json=STREAM) as response:
            chunks = response.aiter_raw()
            assert await anext(chunks) == event("first")
            # Its own model is gone, and another one has come.
            write(path, entry("n", other))
            for _ in range(20):
                router.process.send_signal(signal.SIGHUP)
            await served(router, "n")
            assert (await router.client.post(URL, json=CHAT | {"model": "n"})).status_code == 200
            assert (await router.client.post(URL, json=CHAT)).status_code == 404
            go_on.set()
            assert b"".join([data async for data in chunks]) == DONE
        code, out, err = await router.stop()

    assert (code, err) == (0, "")
    # At once, and not when the change would have been seen.
    assert "reloading the configuration" in out
    assert [line["outcome"] for line in log_of(out) if line["event"] == "request" and line.get("stream")] == ["ok"]


async def test_a_bad_file_changes_nothing_and_is_told_once(tmp_path: Path, start_engine: Start) -> None:
    engine = await start_engine()
    path = tmp_path / "models.json"
    write(path, entry("m", engine))
    async with command(tmp_path, catalogue=path) as router:
        await ready(router.client)
        path.write_text("{ this is no catalogue")
        # By itself, and when it is told to.
        await until(lambda: "the previous one stays" in router.output)
        for _ in range(5):
            router.process.send_signal(signal.SIGHUP)
            assert (await router.client.post(URL, json=CHAT)).status_code == 200
        write(path, entry("m", engine), entry("n", engine))
        router.process.send_signal(signal.SIGHUP)
        await served(router, "m", "n")
        _, out, err = await router.stop()

    assert err == ""
    assert out.count("the previous one stays") == 1


async def test_a_changed_file_is_read_within_five_seconds_as_the_kubelet_changes_it(
    tmp_path: Path, start_engine: Start
) -> None:
    engine = await start_engine()
    volume = tmp_path / "volume"
    for version, model in (("..one", "m"), ("..two", "n")):
        (volume / version).mkdir(parents=True)
        write(volume / version / "catalogue.json", entry(model, engine))
    (volume / "..data").symlink_to("..one")
    (volume / "catalogue.json").symlink_to("..data/catalogue.json")
    async with command(tmp_path, catalogue=volume / "catalogue.json") as router:
        await ready(router.client)
        await served(router, "m")
        (volume / "..tmp").symlink_to("..two")
        (volume / "..tmp").rename(volume / "..data")

        # Twice as long, for a machine that stands still.
        await served(router, "n", seconds=10)
        assert (await router.client.post(URL, json=CHAT | {"model": "n"})).status_code == 200


async def test_sighup_during_a_drain_cuts_nothing_either(tmp_path: Path, start_engine: Start) -> None:
    go_on = asyncio.Event()
    engine = await start_engine(gated(go_on))
    path = tmp_path / "models.json"
    write(path, entry("m", engine))
    async with command(tmp_path, catalogue=path) as router:
        await ready(router.client)
        async with router.client.stream("POST", URL, json=STREAM) as response:
            chunks = response.aiter_raw()
            assert await anext(chunks) == event("first")
            router.tell(signal.SIGTERM)
            await closed(router.port)
            for _ in range(20):
                router.process.send_signal(signal.SIGHUP)
                await asyncio.sleep(0.01)
            go_on.set()
            assert b"".join([data async for data in chunks]) == DONE
        code, _, err = await router.stop()

    assert (code, err) == (0, "")


async def test_sighup_while_it_starts_ends_nothing(tmp_path: Path, start_engine: Start) -> None:
    """It waits for a registry that hangs, and its probes answer already."""
    engine, ops_port = await start_engine(), free_port()
    path = tmp_path / "models.json"
    write(path, entry("m", engine))
    async with ScriptedServer(hang) as registry:
        settings: dict[str, Any] = {"catalogue": path, "registry_url": registry.url, "ops_port": ops_port}
        async with command(tmp_path, **settings) as router:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ops_port}", trust_env=False) as ops:
                await ready(ops, "/healthz")
                write(path, entry("m", engine), entry("n", engine))
                for _ in range(5):
                    router.process.send_signal(signal.SIGHUP)
                await ready(ops, "/readyz")
            await served(router, "m", "n")
            code, _, err = await router.stop()

    assert (code, err) == (0, "")


async def test_with_a_registry_in_charge_the_file_is_read_and_not_served(tmp_path: Path, start_engine: Start) -> None:
    engine, registry = await start_engine(), await start_engine()
    registry.page = raw(json_response({"models": [entry("r", engine)]}))
    path = tmp_path / "models.json"
    write(path, entry("m", engine))
    settings: dict[str, Any] = {"catalogue": path, "registry_url": registry.url, "registry_refresh": 0.2}
    async with command(tmp_path, **settings) as router:
        await ready(router.client)
        assert await names(router) == ["r"]
        write(path, entry("m", engine), entry("n", engine))
        router.process.send_signal(signal.SIGHUP)
        await until(lambda: "the static catalogue was reloaded" in router.output)
        assert await names(router) == ["r"]


async def test_a_token_that_is_replaced_goes_with_the_next_request(tmp_path: Path, start_engine: Start) -> None:
    engine, path = await start_engine(), tmp_path / "models.json"
    token = tmp_path / "BACKEND_ONE"
    token.write_text("first\n")
    write(path, entry("m", engine, credentials={"file": str(token)}))
    async with command(tmp_path, catalogue=path) as router:
        await ready(router.client)

        async def seen() -> str | None:
            assert (await router.client.post(URL, json=CHAT)).status_code == 200
            header: str | None = engine.requests[-1].header("authorization")
            return header

        assert await seen() == "Bearer first"
        token.write_text("second\n")
        async with asyncio.timeout(20):
            while True:
                if await seen() == "Bearer second":
                    break
                await asyncio.sleep(0.05)
        token.unlink()
        router.process.send_signal(signal.SIGHUP)
        assert await seen() == "Bearer second"
        # A model that comes with a file of its own has its token from the first request on.
        other = tmp_path / "BACKEND_TWO"
        other.write_text("other")
        write(path, entry("m", engine, credentials={"file": str(other), "header": "x-api-key"}), entry("n", engine))
        router.process.send_signal(signal.SIGHUP)
        await served(router, "m", "n")
        assert await seen() is None
        assert engine.requests[-1].header("x-api-key") == "other"
        _, out, err = await router.stop()

    assert err == ""
    for secret in ("first", "second", "other"):
        assert secret not in out


async def test_what_is_known_of_backends_outlives_a_new_catalogue(
    tmp_path: Path, start_engine: Start, start_router: Start
) -> None:
    go_on = asyncio.Event()
    engine, dead = await start_engine(gated(go_on)), await start_engine()
    await dead.stop()
    running = await start_router(models=[entry("m", engine), entry("d", dead)], breaker_failures=1)
    assert (await running.chat(model="d")).status_code == 503
    fleet = running.router.core.fleet
    (before,), (broken,) = fleet.models["m"].backends, fleet.models["d"].backends
    async with running.client.stream("POST", URL, json=STREAM) as response:
        chunks = response.aiter_raw()
        await anext(chunks)
        third = await start_engine()
        write(tmp_path / "catalogue.json", entry("d", dead, version="2"), entry("m", engine, third))
        running.router.reload()
        await until(lambda: len(fleet.models["m"].backends) == 2)

        assert (fleet.models["m"].backends[0], before.in_flight) == (before, 1)
        assert fleet.models["d"].backends == (broken,)
        assert broken in fleet.models["d"].open
        go_on.set()
        assert b"".join([data async for data in chunks]) == DONE
    await until(lambda: before.in_flight == 0)
