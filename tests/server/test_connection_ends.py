"""How long a client's connection lasts: what keeps it, what ends it, and what still comes before it ends."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.conftest import Served
from tests.fakes import (
    CHAT,
    DONE,
    LAST_CHUNK,
    STREAM,
    Answer,
    FakeEngine,
    Line,
    Received,
    chunk,
    event,
    hang,
    post,
    raw_client,
    read_answer,
    sse,
    until,
)

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
MODELS = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"


async def ask(client: Line, *requests: bytes) -> list[Answer]:
    await client.send(*requests)
    async with asyncio.timeout(10):
        return [await read_answer(client.reader) for _ in requests]


async def ended(client: Line) -> bool:
    """Whether nothing more comes, and the connection ends."""
    async with asyncio.timeout(10):
        return await client.reader.read(-1) == b""


async def said_to_half_closed(port: int, sent: bytes) -> bytes:
    """Every byte that comes for this from a client that has closed its half behind it."""
    # In one turn of the loop: when the server looks, both are there, though it reads one after the other.
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(sent)
    sock.shutdown(socket.SHUT_WR)
    reader, writer = await asyncio.open_connection(sock=sock)
    async with asyncio.timeout(20):
        said = await reader.read(-1)
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    return said


# Closing one half


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n", 200),
        (MODELS, 200),
        (MODELS.replace(b"1.1", b"1.0"), 200),
        (post("/nope", CHAT), 404),
        (post(URL, {"model": "m"}), 422),
        (post(URL, {**CHAT, "model": "nope"}), 404),
        (post(URL, b"{"), 400),
    ],
)
async def test_what_needs_no_engine_is_answered_though_the_client_has_said_its_last(
    request_bytes: bytes, status: int, served: Served
) -> None:
    said = await said_to_half_closed(served.port, request_bytes)

    assert said.startswith(b"HTTP/1.1 %d " % status)
    assert said.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_but_a_generation_for_it_ends_if_it_begins_at_all(body: Any, served: Served, engine: FakeEngine) -> None:
    engine.script = hang
    assert await said_to_half_closed(served.port, post(URL, body)) == b""

    await until(lambda: served.lines)
    assert [(line["outcome"], line["status"]) for line in served.lines] == [("client_gone", 499)]
    assert served.router.core.admission.in_flight == 0
    await until(lambda: engine.busy == 0)


async def test_what_is_in_the_pipe_before_a_generation_is_answered(served: Served, engine: FakeEngine) -> None:
    engine.script = hang
    said = await said_to_half_closed(served.port, MODELS + post("/nope", CHAT) + post(URL, CHAT) + MODELS)

    assert [part[:3] for part in said.split(b"HTTP/1.1 ")[1:]] == [b"200", b"404"]
    await until(lambda: engine.busy == 0)


@pytest.mark.parametrize("half", [MODELS[:-1], post(URL, CHAT)[:-1]])
async def test_half_a_request_is_none_when_the_rest_will_not_come(half: bytes, served: Served) -> None:
    assert await said_to_half_closed(served.port, half) == b""
    said = await said_to_half_closed(served.port, MODELS + half)

    assert said.startswith(b"HTTP/1.1 200 ")
    assert said.count(b"HTTP/1.1 ") == 1


# HTTP/1.0


def older(request: bytes, *, keep: bool = True) -> bytes:
    line = b"connection: Keep-Alive\r\n\r\n" if keep else b"\r\n"
    return request.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"\r\n\r\n", b"\r\n" + line, 1)


async def test_an_older_client_may_keep_its_connection(served: Served, engine: FakeEngine) -> None:
    async with raw_client(served.port) as client:
        answers = []
        for request in [post(URL, CHAT)] * 5 + [MODELS, post("/nope", CHAT), post(URL, CHAT)]:
            answers += await ask(client, older(request))
        last = await ask(client, older(post(URL, CHAT), keep=False))
        assert await ended(client)

    assert [answer.headers["connection"] for answer in answers + last] == ["keep-alive"] * 8 + ["close"]
    assert [answer.status for answer in answers + last] == [200] * 6 + [404, 200, 200]
    assert len(engine.requests) == 7


async def test_an_older_client_loses_it_with_an_answer_that_has_no_length(served: Served) -> None:
    async with raw_client(served.port) as client:
        [answer] = await ask(client, older(post(URL, STREAM)))

    assert (answer.headers["connection"], answer.body[-len(DONE) :]) == ("close", DONE)


async def test_a_newer_client_is_not_told_that_its_connection_stays(served: Served) -> None:
    async with raw_client(served.port) as client:
        answers = await ask(client, MODELS.replace(b"\r\n\r\n", b"\r\nconnection: keep-alive\r\n\r\n"), MODELS)

    assert ["connection" in answer.headers for answer in answers] == [False, False]


# Closing beside an upgrade


@pytest.mark.parametrize("connection", [b"close, upgrade", b"upgrade, close", b"upgrade\r\nconnection: close"])
@pytest.mark.parametrize("request_bytes", [MODELS, post(URL, CHAT)], ids=["GET", "POST"])
async def test_a_client_that_wants_to_close_is_heard_beside_its_offer_to_upgrade(
    request_bytes: bytes, connection: bytes, served: Served, engine: FakeEngine
) -> None:
    offer = b"\r\nconnection: " + connection + b"\r\nupgrade: h2c\r\n\r\n"

    async with raw_client(served.port) as client:
        await client.send(request_bytes.replace(b"\r\n\r\n", offer, 1) + post(URL, CHAT))
        answer = await read_answer(client.reader)
        assert await ended(client)

    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert len(engine.requests) == (request_bytes != MODELS)


# Empty lines


@pytest.mark.parametrize("piece", [b"\r\n", b"\r\n" * 1000, b"\r\n" * 100_000], ids=len)
async def test_empty_lines_without_end_are_too_large_a_head(piece: bytes, served: Served) -> None:
    async with raw_client(served.port) as client:
        await ask(client, MODELS)
        sending = asyncio.create_task(flood(client, piece))
        answer = await read_answer(client.reader)
        await sending

    assert (answer.status, answer.headers["connection"]) == (431, "close")


async def flood(client: Line, piece: bytes) -> None:
    for _ in range(0, 64 * 1024, len(piece)):
        await client.send(piece)


async def test_empty_lines_behind_a_request_do_not_cost_it_its_answer(start_engine: Start, start_router: Start) -> None:
    go_on = asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        await sse(event("first"))(request, line)
        await go_on.wait()
        await line.send(chunk(DONE) + LAST_CHUNK)

    served = await start_router(await start_engine(script))
    async with raw_client(served.port) as client:
        await client.send(post(URL, STREAM))
        await client.reader.readuntil(b"first")
        await client.send(*[b"\r\n" * 1000] * 100, post(URL, STREAM))
        go_on.set()
        rest = await client.reader.read(-1)

    assert rest.endswith(LAST_CHUNK)
    assert len(served.lines) == 1


# Age


async def test_a_connection_ends_with_the_first_answer_after_its_time(start_engine: Start, start_router: Start) -> None:
    served = await start_router(await start_engine(), max_connection_age=1)
    loop = asyncio.get_running_loop()

    async with raw_client(served.port) as client:
        began = loop.time()
        answers: list[Answer] = []
        # Often enough for the head to be known by heart.
        while not answers or "connection" not in answers[-1].headers:
            answers += await ask(client, post(URL, CHAT))
            assert loop.time() - began < 10
            await asyncio.sleep(0.02)
        took = loop.time() - began
        assert await ended(client)

    assert answers[-1].headers["connection"] == "close"
    assert {answer.status for answer in answers} == {200}
    assert len(answers) > 1
    assert took > 0.85


async def test_a_stream_outlives_its_connections_time(start_engine: Start, start_router: Start) -> None:
    go_on = asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        await sse(event("first"))(request, line)
        await go_on.wait()
        await line.send(chunk(DONE) + LAST_CHUNK)

    served = await start_router(await start_engine(script), max_connection_age=0.2)

    async with raw_client(served.port) as client:
        await client.send(post(URL, STREAM))
        head = await client.reader.readuntil(b"\r\n\r\n")
        await client.reader.readuntil(b"first")
        await asyncio.sleep(0.3)
        go_on.set()
        await client.reader.readuntil(LAST_CHUNK)
        [following] = await ask(client, MODELS)
        assert await ended(client)

    assert b"connection:" not in head
    assert (following.status, following.headers["connection"]) == (200, "close")


async def test_an_answer_that_begins_after_that_time_says_so(start_engine: Start, start_router: Start) -> None:
    go_on = asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        await go_on.wait()
        await sse(event("first"), DONE + b"")(request, line)
        await line.send(LAST_CHUNK)

    served = await start_router(await start_engine(script), max_connection_age=0.2)

    async with raw_client(served.port) as client:
        await client.send(post(URL, STREAM))
        await asyncio.sleep(0.3)
        go_on.set()
        answer = await read_answer(client.reader)
        assert await ended(client)

    assert (answer.headers["connection"], answer.body[-len(DONE) :]) == ("close", DONE)


async def test_an_idle_connection_is_not_closed_for_its_age(start_engine: Start, start_router: Start) -> None:
    """A request may be on its way to it."""
    served = await start_router(await start_engine(hang), max_connection_age=0.1)

    async with raw_client(served.port) as client:
        await ask(client, MODELS)
        await asyncio.sleep(0.3)
        [answer] = await ask(client, MODELS)

    assert (answer.status, answer.headers["connection"]) == (200, "close")
