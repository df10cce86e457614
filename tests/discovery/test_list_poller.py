"""Asking backends for their lists, over real sockets: those that answer, and those that hang, drip, flood or lie."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from inference_api.discovery.list_poller import ListPoller
from inference_api.discovery.lists import Lists
from inference_api.routing.backend import Backend
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.fleet import Fleet
from inference_api.upstream.transport import Transport
from tests.fakes import Line, Received, Script, hang, json_response, raw, until
from tests.listed import ListingEngine, card

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


def listing(*cards: Any) -> Script:
    return raw(json_response({"data": [*cards]}))


def fleet_of(*urls: str, **entry: Any) -> Fleet:
    fleet = Fleet(make_balancer)
    fleet.update(parse_catalogue({"models": [{"name": "m", "backends": [*urls], "discover": True, **entry}]}))
    return fleet


class Polling:
    """A poller that runs, and what it reports."""

    def __init__(self, fleet: Fleet, transport: Transport, every: float, **more: Any) -> None:
        self.fleet = fleet
        self.named: list[tuple[str, str | None]] = []
        self.missing: list[str] = []
        self.failures: dict[str, int] = {}
        self.lists = Lists(every, self.failures)
        fleet.discover(self.lists.find)
        self.poller = ListPoller(
            fleet,
            self.lists,
            transport,
            every,
            on_name=self._named,
            on_missing=lambda backend: self.missing.append(backend.url),
            failures=self.failures,
            tick=0.01,
            **more,
        )

    def _named(self, backend: Backend, lacks: str | None) -> None:
        backend.lacks = lacks
        self.named.append((backend.url, lacks))

    def holders(self, name: str) -> list[str]:
        model = self.fleet.by_name.get(name)
        return [] if model is None else [backend.url for backend in model.backends]


@asynccontextmanager
async def polling(fleet: Fleet, transport: Transport, every: float = 60.0, **more: Any) -> AsyncIterator[Polling]:
    made = Polling(fleet, transport, every, **more)
    task = asyncio.create_task(made.poller.run())
    try:
        yield made
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def endless(request: Received, line: Line) -> None:
    await line.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while not line.writer.is_closing():
        await line.send(b"10000\r\n" + b" " * 65536 + b"\r\n")


async def dripping(request: Received, line: Line) -> None:
    await line.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
    while not line.writer.is_closing():
        await line.send(b" ")
        await asyncio.sleep(0.02)


BAD: dict[str, Script] = {
    "hangs": hang,
    "drips": dripping,
    "floods": endless,
    "closes": raw(close=True),
    "breaks off": raw(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", close=True),
    "is no JSON": raw(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n<html"),
    "is no HTTP": raw(b"SSH-2.0-OpenSSH\r\n", close=True),
    "is no list": raw(json_response({"data": {"id": "m"}})),
    "refuses": raw(json_response({"data": [card("m"), card("x", "m")]}, "401 Unauthorized")),
    "fails": raw(json_response({"data": [card("m"), card("x", "m")]}, "500 Internal Server Error")),
    "redirects": raw(b"HTTP/1.1 307 Temporary Redirect\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n"),
    "is too long": raw(json_response({"data": [card("m"), card("x", "m")], "more": " " * (1 << 20)})),
}


@pytest.mark.parametrize("script", BAD.values(), ids=BAD)
async def test_an_engine_that_gives_no_list_is_counted_and_delays_nobody(
    start: Start, transport: Transport, script: Script
) -> None:
    bad, good = await start(script), await start(listing(card("m"), card("x", "m")))
    async with polling(fleet_of(bad.url, good.url), transport, timeout=0.8) as polled:
        await until(lambda: polled.failures.get("models") == 1)
        await until(lambda: polled.holders("x") == [good.url])

        await until(lambda: polled.poller.ready() is None)
        assert polled.missing == []
        assert [backend.url for backend in polled.fleet.models["m"].available] == [bad.url, good.url]
    await until(lambda: bad.open == 0)


async def test_lists_are_read_again_and_changes_apply(start: Start, transport: Transport) -> None:
    server = await start(listing(card("m")))
    async with polling(fleet_of(server.url), transport, every=0.02, rand=lambda: 0.5) as polled:
        await until(lambda: len(server.requests) >= 2)
        server.script = listing(card("m"), card("x", "m"))
        await until(lambda: polled.holders("x") == [server.url])
        server.script = listing(card("m"))
        await until(lambda: not polled.holders("x"))

    assert {(request.method, request.target) for request in server.requests} == {("GET", "/v1/models")}


async def test_a_new_backend_is_asked_at_once(start: Start, transport: Transport) -> None:
    one, two = await start(listing(card("m"))), await start(listing(card("m"), card("x", "m")))
    fleet = fleet_of(one.url)
    async with polling(fleet, transport, every=600.0) as polled:
        await until(lambda: len(one.requests) == 1)
        fleet.update(parse_catalogue({"models": [{"name": "m", "backends": [one.url, two.url], "discover": True}]}))
        await until(lambda: polled.holders("x") == [two.url])
        fleet.update(parse_catalogue({"models": [{"name": "m", "backends": [two.url], "discover": True}]}))
        await until(lambda: len(polled.poller._places) == 1)
        assert (len(one.requests), len(two.requests)) == (1, 1)
        # One that comes back, too.
        fleet.update(parse_catalogue({"models": [{"name": "m", "backends": [one.url, two.url], "discover": True}]}))
        await until(lambda: len(one.requests) == 2)
        assert len(two.requests) == 1


async def test_one_that_came_by_discovery_is_asked_at_once(start: Start, transport: Transport) -> None:
    server = await start(listing(card("m"), card("x", "m")))
    fleet = Fleet(make_balancer)
    dns = {"url": f"http://engines.test:{server.port}", "discovery": "dns"}
    fleet.update(parse_catalogue({"models": [{"name": "m", "backends": [dns], "discover": True}]}))
    async with polling(fleet, transport, every=600.0) as polled:
        await asyncio.sleep(0.05)
        fleet.resolve("engines.test", ["127.0.0.1"], ["m"])
        await until(lambda: len(polled.holders("x")) == 1)


async def test_one_look_is_for_all_models_of_an_address(start: Start, transport: Transport) -> None:
    server = await start(listing(card("m"), card("x", "m")))
    fleet = Fleet(make_balancer)
    models = [{"name": name, "backends": [server.url], "discover": True} for name in ("m", "n")]
    fleet.update(parse_catalogue({"models": models}))
    async with polling(fleet, transport) as polled:
        await until(lambda: polled.holders("x") and polled.missing)

    assert len(server.requests) == 1
    assert dict(polled.named) == {server.url: 'serves "m", "x"; set served_model_name to one of them'}
    assert [fleet.models[name].backends[0].lacks is None for name in ("m", "n")] == [True, False]


@pytest.mark.parametrize("engine", ["tgi", "llamacpp"])
async def test_engines_that_take_any_name_are_not_compared(start: Start, transport: Transport, engine: str) -> None:
    server = await start(listing(card("other")))
    async with polling(fleet_of(server.url, engine=engine), transport) as polled:
        await until(lambda: polled.named)

    assert (polled.named, polled.missing) == ([(server.url, None)], [])


async def test_a_wrong_name_does_not_keep_a_backend_out_for_ever(start: Start, transport: Transport) -> None:
    server = await start(listing(card("other")))
    async with polling(fleet_of(server.url), transport, every=0.05) as polled:
        backend = polled.fleet.models["m"].backends[0]
        await until(lambda: backend.lacks is not None)
        server.script = raw(json_response({}, "503 Service Unavailable"))
        await until(lambda: backend.lacks is None)


async def test_a_model_that_is_not_asked_any_more_is_not_out(start: Start, transport: Transport) -> None:
    server = await start(listing(card("other")))
    fleet = fleet_of(server.url)
    async with polling(fleet, transport, every=600.0) as polled:
        backend = fleet.models["m"].backends[0]
        await until(lambda: backend.lacks is not None)
        fleet.update(parse_catalogue({"models": [{"name": "m", "backends": [server.url]}]}))
        await until(lambda: backend.lacks is None)
        assert fleet.models["m"].backends[0] is backend
        assert polled.fleet.by_name.keys() == {"m"}


async def test_a_few_are_asked_at_a_time(start: Start, transport: Transport) -> None:
    busy: list[int] = []
    running = 0

    async def slow(request: Received, line: Line) -> None:
        nonlocal running
        running += 1
        busy.append(running)
        await asyncio.sleep(0.02)
        running -= 1
        await line.send(json_response({"data": [card("m")]}))

    server = await start(slow)
    fleet = fleet_of(*(f"{server.url}/{number}" for number in range(40)))
    async with polling(fleet, transport, concurrency=4):
        await until(lambda: len(server.requests) == 40)

    assert max(busy) == 4


async def test_a_model_without_discover_is_left_alone(start: Start, transport: Transport) -> None:
    server = await start(listing(card("m"), card("x", "m")))
    async with polling(fleet_of(server.url, discover=False, adapters=["y"]), transport) as polled:
        await asyncio.sleep(0.1)
        assert polled.poller.ready() is None

    assert server.requests == []
    assert polled.holders("y") == [server.url]


async def test_a_failure_nobody_thought_of_does_not_end_the_asking(
    transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    async with ListingEngine("x") as engine:
        fleet = fleet_of(engine.url)
        calls = 0

        def headers(entry: Any) -> dict[str, str]:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise RuntimeError("a bug")
            return {}

        async with polling(fleet, transport, every=0.05, headers=headers) as polled:
            await until(lambda: polled.holders("x"))
    assert "a list of models could not be read" in caplog.messages


async def test_nothing_is_left_at_the_end(start: Start, transport: Transport) -> None:
    servers = [await start(hang) for _ in range(5)]
    async with polling(fleet_of(*(server.url for server in servers)), transport):
        await until(lambda: all(server.requests for server in servers))

    await until(lambda: not any(server.open for server in servers))
