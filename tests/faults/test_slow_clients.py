"""T14, T15: clients that read slowly or not at all. They cost the engine its pace, and the router nothing."""

import asyncio
import tracemalloc
from typing import Any

import pytest

from tests.fakes import (
    CHAT,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    STREAM,
    Line,
    Received,
    answer,
    chunk,
    event,
    json_response,
    post,
    raw_client,
    until,
)
from tests.faults.lab import URL, Lab, flooding, outcomes

pytestmark = pytest.mark.anyio

EVENT = event("x" * 2**16)
MEGABYTE = 1 << 20


async def test_t14_a_slow_reader_slows_the_engine_and_fills_no_memory(lab: Lab) -> None:
    wire, count, sent = chunk(EVENT), 1000, 0

    async def script(request: Received, line: Line) -> None:
        nonlocal sent
        if b'"stream":true' not in request.body:
            return await answer(request, line)
        await line.send(SSE_HEAD)
        for _ in range(count):
            await line.send(wire)
            sent += 1
        await line.send(chunk(DONE) + LAST_CHUNK)

    served = await lab.router(script)
    async with raw_client(served.port, receive_buffer=4096) as client:
        tracemalloc.start()
        await client.send(post(URL, STREAM))
        for _ in range(20):
            await client.reader.readexactly(1024)
            assert (await served.chat()).status_code == 200
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # The rest of 64 MiB is still with the engine; what left it is in the kernel's buffers.
        assert 0 < sent < count // 2
        assert grown < 3 * MEGABYTE

    await until(lambda: outcomes(served).count("client_gone") == 1)


@pytest.mark.parametrize("body", [STREAM, CHAT])
async def test_t15_a_reader_that_stops_is_reset(body: dict[str, Any], lab: Lab) -> None:
    async def large(request: Received, line: Line) -> None:
        await line.send(json_response({"x": "y" * 64 * MEGABYTE}))

    engine = await lab.engine(flooding(EVENT, SSE_HEAD) if body is STREAM else large)
    served = await lab.router(engine, write_stall_timeout=0.3, upstream_keepalive=0.05)

    async with raw_client(served.port, receive_buffer=4096) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(post(URL, body))
        await until(lambda: engine.busy)
        await until(lambda: engine.busy == engine.open == 0)
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        # An orderly end would have waited for the client for ever.
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(client.reader.read(-1), 20)

    assert outcomes(served) == ["client_gone"]


async def test_t15_a_reader_that_goes_on_in_time_gets_everything(lab: Lab) -> None:
    events = [EVENT] * 100

    async def script(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD, *map(chunk, events), chunk(DONE) + LAST_CHUNK)

    served = await lab.router(script, write_stall_timeout=5, entry={"timeouts": {"idle": 1.0}})

    async with raw_client(served.port, receive_buffer=2**16) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(post(URL, STREAM))
        # The pause is the client's; that the engine is silent meanwhile is not the engine's fault.
        await asyncio.sleep(1.5)
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        received = b""
        while not received.endswith(LAST_CHUNK):
            received += await client.reader.read(2**20)

    assert received.count(EVENT[:40]) == 100
    assert outcomes(served) == ["ok"]
