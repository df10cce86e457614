"""T83: the process is asked to stop. What is under way ends well, as far as there is time, and so does the process."""

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.command import closed, command, log_of, ready
from tests.fakes import (
    CHAT,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    STREAM,
    Answer,
    Line,
    Received,
    answer,
    chunk,
    event,
    hang,
    post,
    raw_client,
    read_answer,
    sse,
    until,
)
from tests.faults.lab import URL, flooding
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


async def slow_stream(request: Received, line: Line) -> None:
    """Three seconds of events; anything else is answered at once."""
    if b'"stream":true' not in request.body:
        return await answer(request, line)
    await line.send(SSE_HEAD)
    for _ in range(30):
        await line.send(chunk(event()))
        await asyncio.sleep(0.1)
    await line.send(chunk(DONE) + LAST_CHUNK)


async def draining(ops: httpx.AsyncClient) -> None:
    """Wait until readiness has ended."""
    async with asyncio.timeout(20):
        while (await ops.get("/readyz")).status_code == 200:
            pass


async def test_t83_a_restart_fails_no_request_and_cuts_no_stream(tmp_path: Path, start_engine: Start) -> None:
    ops_port = free_port()
    engine = await start_engine(slow_stream)
    async with command(tmp_path, engine, ops_port=ops_port, drain_delay=2) as router, AsyncExitStack() as stack:
        ops = httpx.AsyncClient(base_url=f"http://127.0.0.1:{ops_port}", timeout=5, trust_env=False)
        await stack.enter_async_context(ops)
        await ready(router.client)
        streams = [asyncio.create_task(router.client.post(URL, json=STREAM)) for _ in range(40)]
        await until(lambda: engine.busy == 40)
        idle = await stack.enter_async_context(raw_client(router.port))
        assert [(await ops.get(path)).status_code for path in ("/healthz", "/readyz")] == [200, 200]

        router.tell(signal.SIGTERM)
        await draining(ops)
        # As long as others still send here they are answered, and told to go elsewhere.
        answers = await asyncio.gather(*(ask_once(router.port) for _ in range(50)))
        assert {(reply.status, reply.headers.get("connection")) for reply in answers} == {(200, "close")}
        assert (await ops.get("/healthz")).status_code == 200
        await closed(router.port)
        # An idle connection is closed, and not waited for.
        assert await asyncio.wait_for(idle.reader.read(-1), 20) == b""
        whole = [await stream for stream in streams]
        code, out, err = await router.stop()

    assert {reply.content for reply in whole} == {event() * 30 + DONE}
    assert (code, err) == (0, "")
    assert {line["outcome"] for line in log_of(out) if line["event"] == "request"} == {"ok"}


async def ask_once(port: int) -> Answer:
    async with raw_client(port) as client:
        await client.send(post(URL, CHAT))
        return await read_answer(client.reader)


async def test_t83_a_stream_longer_than_the_deadline_is_told_and_the_process_ends(
    tmp_path: Path, start_engine: Start
) -> None:
    engine = await start_engine(sse(event(), then=Line.gone))
    async with command(tmp_path, engine, drain_timeout=1) as router:
        await ready(router.client)
        async with raw_client(router.port) as client:
            await client.send(post(URL, STREAM))
            await client.reader.readuntil(b"data: ")
            router.tell(signal.SIGTERM)
            rest = await asyncio.wait_for(client.reader.read(-1), 20)
        code, out, _ = await router.stop()

    assert b'"code":"router_shutting_down"' in rest
    assert b"[DONE]" not in rest
    assert not rest.endswith(LAST_CHUNK)
    assert code == 0
    await until(lambda: engine.busy == 0)
    assert log_of(out)[-1]["event"] == "stopped"
    assert [line["outcome"] for line in log_of(out) if line.get("stream")] == ["drain_timeout"]


async def test_t83_a_request_longer_than_the_deadline_is_told_to_come_back(tmp_path: Path, start_engine: Start) -> None:
    engine = await start_engine(hang)
    async with command(tmp_path, engine, drain_timeout=1) as router:
        await ready(router.client)
        async with raw_client(router.port) as client:
            await client.send(post(URL, CHAT))
            await until(lambda: engine.busy)
            router.tell(signal.SIGTERM)
            reply = await asyncio.wait_for(read_answer(client.reader), 20)
        code, out, _ = await router.stop()

    assert (reply.status, reply.headers["connection"], reply.headers["retry-after"]) == (503, "close", "1")
    assert (orjson.loads(reply.body)["error"]["code"], code) == ("shutting_down", 0)
    # It was with an engine: which one that was is what its operator asks first.
    [line] = [line for line in log_of(out) if line["event"] == "request" and line["route"] == "chat_completions"]
    assert (line["code"], line["attempts"]) == ("shutting_down", 1)
    assert line["backend"] == engine.url.removeprefix("http://")


async def test_t83_a_reader_that_stalls_does_not_hold_the_process(tmp_path: Path, start_engine: Start) -> None:
    engine = await start_engine(flooding(event("x" * 2**16), SSE_HEAD))
    async with command(tmp_path, engine, drain_timeout=1) as router:
        await ready(router.client)
        async with raw_client(router.port, receive_buffer=4096) as client:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await client.send(post(URL, STREAM))
            await until(lambda: engine.busy)
            # Long enough for every buffer on the way to be full.
            await asyncio.sleep(0.5)
            router.tell(signal.SIGTERM)
            code, out, _ = await router.stop(patience=20)

    assert code == 0
    assert log_of(out)[-1]["event"] == "stopped"
    await until(lambda: engine.busy == 0)


async def test_t83_a_second_signal_does_not_wait(tmp_path: Path, start_engine: Start) -> None:
    engine = await start_engine(sse(event(), then=Line.gone))
    async with command(tmp_path, engine) as router:
        await ready(router.client)
        async with raw_client(router.port) as client:
            await client.send(post(URL, STREAM))
            await client.reader.readuntil(b"data: ")
            router.tell(signal.SIGTERM)
            await closed(router.port)
            assert router.process.returncode is None

            told = time.monotonic()
            router.tell(signal.SIGTERM)
            rest = await asyncio.wait_for(client.reader.read(-1), 20)
            code, out, _ = await router.stop(patience=20)
            took = time.monotonic() - told

    assert (code, log_of(out)[-1]["event"]) == (0, "stopped")
    assert b'"code":"router_shutting_down"' in rest
    assert not rest.endswith(LAST_CHUNK)
    # Far below the minutes that the stream would have.
    assert took < 15


async def test_t83_a_second_signal_ends_the_delay_too(tmp_path: Path, start_engine: Start) -> None:
    engine = await start_engine(sse(event(), then=Line.gone))
    async with command(tmp_path, engine, drain_delay=60, drain_timeout=60) as router:
        await ready(router.client)
        async with raw_client(router.port) as client:
            await client.send(post(URL, STREAM))
            await client.reader.readuntil(b"data: ")
            router.tell(signal.SIGTERM)
            await draining(router.client)
            assert router.process.returncode is None

            router.tell(signal.SIGTERM)
            rest = await asyncio.wait_for(client.reader.read(-1), 20)
            code, out, _ = await router.stop(patience=20)

    assert (code, log_of(out)[-1]["event"]) == (0, "stopped")
    assert [line for line in log_of(out) if line["level"] == "error"] == []
    assert b'"code":"router_shutting_down"' in rest
    assert not rest.endswith(LAST_CHUNK)


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM, signal.SIGINT]])
async def test_t83_an_idle_process_ends_at_once_with_the_exit_code_of_success(
    signals: list[int], tmp_path: Path, start_engine: Start
) -> None:
    async with command(tmp_path, await start_engine()) as router:
        await ready(router.client)
        for number in signals:
            router.tell(number)
        code, _, err = await router.stop(patience=20)

    assert (code, err) == (0, "")
