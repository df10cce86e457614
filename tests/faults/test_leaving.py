"""T08-T13, T16: clients that leave. The generation ends within a second, whatever it was doing."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from typing import Any

import pytest

from inference_api.discovery.engines import EngineFacts
from tests.conftest import Served
from tests.fakes import (
    CHAT,
    SSE_HEAD,
    STREAM,
    FakeEngine,
    Line,
    Received,
    event,
    hang,
    post,
    raw_client,
    sse,
    until,
)
from tests.faults.lab import URL, Lab, flooding, outcomes

pytestmark = pytest.mark.anyio
Leave = Callable[[Line], None]
# One second is the budget; a busy machine is given more.
SOON = 15.0


def half_close(line: Line) -> None:
    line.writer.write_eof()


async def left(lab: Lab) -> None:
    """The engines have nothing to do any more, and no connection of a request is kept for another one."""
    await until(lambda: not any(engine.busy for engine in lab.engines), SOON)
    await until(lambda: not any(engine.open for engine in lab.engines), SOON)


@pytest.mark.parametrize("leave", [Line.close, Line.reset])
async def test_t08_fifty_clients_that_leave_in_mid_stream_end_fifty_generations(leave: Leave, lab: Lab) -> None:
    engine = await lab.engine(sse(event(), then=Line.gone))
    served = await lab.router(engine, upstream_keepalive=0.05)

    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(raw_client(served.port)) for _ in range(50)]
        for client in clients:
            await client.send(post(URL, STREAM))
        for client in clients:
            await client.reader.readuntil(b"data: ")
        assert served.router.core.admission.in_flight == engine.busy == 50
        for client in clients:
            leave(client)
        await left(lab)
        await until(lambda: len(served.lines) == 50)

    assert set(outcomes(served)) == {"client_gone"}
    assert {line["status"] for line in served.lines} == {499}
    assert await served.metric("inference_api_stream_aborts_total", reason="client_disconnect") == 50


@pytest.mark.parametrize("leave", [Line.close, Line.reset])
@pytest.mark.parametrize("script", [hang, sse(then=Line.gone)], ids=["before the head", "after the head"])
async def test_t09_leaving_before_the_first_token_ends_the_generation(script: Any, leave: Leave, lab: Lab) -> None:
    engine = await lab.engine(script)
    served = await lab.router(engine, upstream_keepalive=0.05)

    async with raw_client(served.port) as client:
        await client.send(post(URL, STREAM))
        await until(lambda: engine.busy)
        leave(client)
        await left(lab)

    await until(lambda: outcomes(served) == ["client_gone"])
    assert tried(served) == [(1, engine.url.removeprefix("http://"))]
    # Of a stream that had begun; without a byte of its body, too.
    begun = script is not hang
    assert await served.metric("inference_api_stream_aborts_total", reason="client_disconnect") == begun


def tried(served: Served) -> list[tuple[int, str]]:
    return [(line["attempts"], line["backend"]) for line in served.lines]


async def half_an_answer(request: Received, line: Line) -> None:
    await line.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
    await line.gone()


@pytest.mark.parametrize("leave", [Line.close, Line.reset])
@pytest.mark.parametrize("script", [hang, half_an_answer])
async def test_t10_leaving_a_request_that_is_no_stream_ends_it(script: Any, leave: Leave, lab: Lab) -> None:
    engine = await lab.engine(script)
    served = await lab.router(engine, upstream_keepalive=0.05)

    async with raw_client(served.port) as client:
        await client.send(post(URL, CHAT))
        await until(lambda: engine.busy)
        leave(client)
        await left(lab)

    await until(lambda: outcomes(served) == ["client_gone"])
    assert tried(served) == [(1, engine.url.removeprefix("http://"))]


@pytest.fixture
def black_hole(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a place where connections are neither taken nor refused, as behind a firewall that drops."""
    # The router asks its engines for their facts as well, and would wait for these while the test waits for silence.
    monkeypatch.setattr("inference_api.core.EngineFacts", partial(EngineFacts, timeout=0.05))
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        # With its queue full, the kernel drops what else comes.
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def hole_and(*others: FakeEngine, hole: str) -> list[dict[str, Any]]:
    backends = [{"url": url} for url in (hole, *(engine.url for engine in others))]
    return [{"name": "m", "balancing": "least_in_flight", "backends": backends}]


async def test_t11_leaving_while_it_connects_is_the_end_of_it(black_hole: str, lab: Lab) -> None:
    served = await lab.router(models=hole_and(hole=black_hole), connect_timeout=30)

    async with raw_client(served.port) as client:
        await client.send(post(URL, CHAT))
        await until(lambda: served.router.core.fleet.models["m"].in_flight == 1)

    await until(lambda: outcomes(served) == ["client_gone"], SOON)


async def test_t11_leaving_while_it_sends_reaches_no_engine(lab: Lab) -> None:
    engine = await lab.engine()
    served = await lab.router(engine)

    async with raw_client(served.port) as client:
        await client.send(post(URL, {**CHAT, "x": "y" * 10_000})[:-1])
        await until(lambda: served.router.core.admission.buffered)

    await until(lambda: outcomes(served) == ["client_gone"], SOON)
    assert engine.requests == []


async def test_t12_leaving_on_the_way_to_the_second_backend_is_the_end_of_it(black_hole: str, lab: Lab) -> None:
    async def script(request: Received, line: Line) -> None:
        line.reset()

    engine = await lab.engine(script)
    served = await lab.router(models=hole_and(engine, hole=black_hole), connect_timeout=30)
    hole = served.router.core.fleet.models["m"].backends[0]

    # Whichever the first one meets first, the second one is sent to the engine, and from there to the hole.
    async with raw_client(served.port) as one, raw_client(served.port) as other:
        await one.send(post(URL, CHAT))
        await until(lambda: hole.in_flight == 1)
        await other.send(post(URL, CHAT))
        await until(lambda: hole.in_flight == 2)
        asked = len(engine.requests)

    await until(lambda: outcomes(served) == ["client_gone"] * 2, SOON)
    assert len(engine.requests) == asked > 0
    assert {line["backend"] for line in served.lines} == {hole.label}
    assert max(line["attempts"] for line in served.lines) == 2


@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_t13_half_closing_is_leaving(body: dict[str, Any], lab: Lab) -> None:
    engine = await lab.engine(hang)
    served = await lab.router(engine, upstream_keepalive=0.05)

    async with raw_client(served.port) as client:
        await client.send(post(URL, body))
        await until(lambda: engine.busy)
        half_close(client)
        await left(lab)
        # As for the engines behind us: nobody gets an answer.
        assert await client.reader.read(-1) == b""

    await until(lambda: outcomes(served) == ["client_gone"])


async def test_t16_a_flood_for_a_client_that_left_does_not_stop_the_others(lab: Lab) -> None:
    engine = await lab.engine(flooding(event("x" * 2**16), SSE_HEAD))
    served = await lab.router(engine, upstream_keepalive=0.05)
    probes = []

    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(raw_client(served.port)) for _ in range(5)]
        for client in clients:
            await client.send(post(URL, STREAM))
            await client.reader.readuntil(b"data: ")
        for client in clients:
            client.reset()
        for _ in range(20):
            began = time.perf_counter()
            assert (await served.client.get("/healthz")).status_code == 200
            probes.append(time.perf_counter() - began)
        await left(lab)

    assert sorted(probes)[10] < 1
    await until(lambda: set(outcomes(served)) == {"client_gone"})
