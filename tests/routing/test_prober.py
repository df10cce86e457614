"""The prober against real servers: what passes, what fails, what is no verdict, and whom it asks."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest

from inference_api.routing.backend import Backend, Origin
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.fleet import Fleet
from inference_api.routing.prober import Prober
from inference_api.upstream.transport import Transport
from tests.fakes import Line, Received, hang, json_response, raw, until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
HEALTHY = raw(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")


class Round:
    """A Prober, the fleet it asks, and what it reported."""

    def __init__(self, transport: httpx.AsyncBaseTransport, *urls: str, **more: Any) -> None:
        self.fleet = Fleet(make_balancer)
        self.list(*urls)
        self.results: list[tuple[Origin, bool]] = []
        self.last_byte_at = 0.0
        settings = {"every": 0.02, "timeout": 5.0, **more}
        note = lambda backend, passed: self.results.append((backend, passed))  # noqa: E731
        self.prober = Prober(self.fleet, transport, note, lambda url: self.last_byte_at, **settings)

    def list(self, *urls: str, **more: Any) -> None:
        entry = {"name": "m", "backends": [{"url": url} for url in urls], **more}
        self.fleet.update(parse_catalogue({"models": [entry]}))

    @property
    def backends(self) -> tuple[Backend, ...]:
        return self.fleet.models["m"].backends

    async def check(self) -> bool | None:
        async with asyncio.timeout(20):
            return await self.prober.check(self.backends[0].origin)


@asynccontextmanager
async def running(prober: Prober) -> AsyncIterator[None]:
    task = asyncio.create_task(prober.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def watching() -> int:
    return sum("Prober._watch" in repr(task.get_coro()) for task in asyncio.all_tasks())


# One check


async def test_it_asks_for_health_on_a_connection_of_its_own(start: Start, transport: Transport) -> None:
    server = await start(HEALTHY)
    ward = Round(transport, server.url + "/base")

    assert [await ward.check(), await ward.check()] == [True, True]
    first, second = server.requests
    assert (first.method, first.target, first.body) == ("GET", "/base/health", b"")
    assert (first.header("host"), first.header("connection")) == (f"127.0.0.1:{server.port}", "close")
    assert first.header("authorization") is None
    assert first.connection != second.connection


@pytest.mark.parametrize(
    ("status", "passed"),
    [
        ("200 OK", True),
        ("204 No Content", True),
        ("307 Temporary Redirect", True),
        ("401 Unauthorized", True),
        ("404 Not Found", True),
        ("405 Method Not Allowed", True),
        ("500 Internal Server Error", False),
        ("502 Bad Gateway", False),
        ("503 Service Unavailable", False),
    ],
)
async def test_an_answer_below_500_passes(start: Start, transport: Transport, status: str, passed: bool) -> None:
    server = await start(raw(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n".encode()))

    assert await Round(transport, server.url).check() is passed


@pytest.mark.parametrize(
    "script", [raw(close=True), raw(b"SSH-2.0\r\n\r\n", close=True), Line.reset], ids=["closes", "not HTTP", "resets"]
)
async def test_no_answer_fails(start: Start, transport: Transport, script: Any) -> None:
    async def play(request: Received, line: Line) -> None:
        script(line) if script is Line.reset else await script(request, line)

    assert await Round(transport, (await start(play)).url).check() is False


async def test_a_refused_connection_fails(start: Start, transport: Transport) -> None:
    server = await start(HEALTHY)
    await server.stop()

    assert await Round(transport, server.url).check() is False


async def test_a_url_that_cannot_be_asked_fails(transport: Transport) -> None:
    ward = Round(transport)

    assert await ward.prober.check(Origin("http://[v1.x]")) is False


async def test_an_engine_that_hangs_fails_and_its_connection_is_closed(start: Start, transport: Transport) -> None:
    server = await start(hang)

    assert await Round(transport, server.url, timeout=0.1).check() is False
    await until(lambda: server.open == 0)


@pytest.mark.parametrize(("engine", "passed"), [("vllm", False), ("sglang", True), ("llamacpp", True)])
async def test_engines_that_take_their_time_are_given_it(
    start: Start, transport: Transport, engine: str, passed: bool
) -> None:
    async def slow(request: Received, line: Line) -> None:
        await asyncio.sleep(1.0)
        await HEALTHY(request, line)

    server = await start(slow)
    ward = Round(transport, timeout=0.1)
    ward.list(server.url, engine=engine)

    assert await ward.check() is passed


async def test_an_answer_that_never_ends_is_not_read(start: Start, transport: Transport) -> None:
    async def endless(request: Received, line: Line) -> None:
        await line.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            await line.send(b"10000\r\n" + b" " * 65536 + b"\r\n")

    server = await start(endless)

    assert await Round(transport, server.url).check() is True
    await until(lambda: server.open == 0)


async def test_a_timeout_while_bytes_of_other_answers_come_is_no_verdict(start: Start, transport: Transport) -> None:
    ward = Round(transport, (await start(hang)).url, timeout=0.1)
    before = asyncio.get_running_loop().time()
    ward.last_byte_at = before - 0.01
    assert await ward.check() is False

    ward.last_byte_at = before + 60

    assert await ward.check() is None


# Again and again


async def test_each_backend_is_asked_again_and_again_and_reported(start: Start, transport: Transport) -> None:
    good, bad = await start(HEALTHY), await start(raw(json_response({}, "503 Service Unavailable")))
    ward = Round(transport, good.url, bad.url)
    first, second = (backend.origin for backend in ward.backends)

    async with running(ward.prober):
        await until(lambda: ward.results.count((first, True)) >= 3 and ward.results.count((second, False)) >= 3)

    assert set(ward.results) == {(first, True), (second, False)}


async def test_an_address_is_asked_once_whatever_the_number_of_its_models(start: Start, transport: Transport) -> None:
    server = await start(HEALTHY)
    ward = Round(transport)
    models = [{"name": f"lora-{number}", "backends": [{"url": server.url}]} for number in range(50)]
    ward.fleet.update(parse_catalogue({"models": models}))

    async with running(ward.prober):
        await until(lambda: len(ward.results) >= 3)
        assert watching() == 1

    assert {origin for origin, _ in ward.results} == {ward.fleet.origins[server.url]}


async def test_what_is_no_verdict_is_not_reported(start: Start, transport: Transport) -> None:
    server = await start(hang)
    ward = Round(transport, server.url, timeout=0.05)
    ward.last_byte_at = float("inf")

    async with running(ward.prober):
        await until(lambda: len(server.requests) >= 3)

    assert ward.results == []


async def test_those_that_come_are_asked_and_those_that_left_are_not(start: Start, transport: Transport) -> None:
    stays, leaves, comes = await start(HEALTHY), await start(HEALTHY), await start(HEALTHY)
    ward = Round(transport, stays.url, leaves.url, enrol_every=0.02)

    async with running(ward.prober):
        await until(lambda: stays.requests and leaves.requests)
        ward.list(stays.url, comes.url)
        await until(lambda: comes.requests)
        asked, then = len(leaves.requests), len(stays.requests)
        await until(lambda: len(stays.requests) > then + 10)
        # One may have been under way.
        assert len(leaves.requests) <= asked + 1
        ward.list(stays.url, comes.url, leaves.url)
        await until(lambda: len(leaves.requests) > asked + 1)
        # The last to be let go is the one that left; it is another one that came back.
        await until(lambda: watching() == 3)
        assert repr(ward.prober) == "<Prober of 3 addresses>"


async def test_a_hung_backend_does_not_keep_the_others_from_being_asked(start: Start, transport: Transport) -> None:
    hung, good = await start(hang), await start(HEALTHY)
    ward = Round(transport, *(f"{hung.url}/{number}" for number in range(20)), good.url)

    async with running(ward.prober):
        await until(lambda: len(hung.requests) == 20 and len(good.requests) >= 5)

    await until(lambda: hung.open == 0)


async def test_no_more_than_a_few_are_asked_at_once(start: Start, transport: Transport) -> None:
    most = 0

    async def slow(request: Received, line: Line) -> None:
        nonlocal most
        most = max(most, server.open)
        await asyncio.sleep(0.005)
        await HEALTHY(request, line)
        line.close()

    server = await start(slow)
    ward = Round(transport, *(f"{server.url}/{number}" for number in range(40)), concurrency=4)

    async with running(ward.prober):
        await until(lambda: len({backend for backend, _ in ward.results}) == 40)

    # The server may learn of the end of one after it has seen the next one.
    assert 1 < most <= 8


async def test_the_first_checks_are_spread() -> None:
    asked: list[str] = []

    def respond(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        return httpx.Response(200)

    # A draw of 0 comes at once; of 0.9, after 0.9 of an hour.
    draws = iter([0.9, 0.0, 0.9])
    ward = Round(
        httpx.MockTransport(respond), "http://a", "http://b", first=3600.0, every=3600.0, rand=lambda: next(draws)
    )
    async with running(ward.prober):
        await until(lambda: asked)
        await asyncio.sleep(0.05)

    assert len(asked) == 1


async def test_a_failure_nobody_thought_of_does_not_end_the_checks(caplog: pytest.LogCaptureFixture) -> None:
    results: list[Exception | httpx.Response] = [httpx.Response(200), RuntimeError("the transport has a bug")]

    def respond(request: httpx.Request) -> httpx.Response:
        result = results.pop() if len(results) > 1 else results[0]
        if isinstance(result, Exception):
            raise result
        return result

    ward = Round(httpx.MockTransport(respond), "http://engine")

    async with running(ward.prober):
        await until(lambda: ward.results)

    assert ward.results[0] == (ward.backends[0].origin, True)
    assert [record.getMessage() for record in caplog.records] == ["a health check could not be made"]
