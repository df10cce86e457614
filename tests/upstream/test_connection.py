"""One exchange on a connection: what a backend may send, in what pieces, how late, and what comes of it."""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference_api.upstream.connection import BackendConnection
from inference_api.upstream.deadlines import Timeout
from inference_api.upstream.failures import Disconnected, FirstByteTimeout, Malformed
from inference_api.upstream.repeated_head import RepeatedHeads
from inference_api.upstream.response import ResponseStream
from inference_api.upstream.transport import Transport
from tests.fakes import (
    COMPLETION,
    LAST_CHUNK,
    FakeEngine,
    Line,
    Received,
    ask,
    body_of,
    chunk,
    hang,
    json_response,
    raw,
    request_for,
    until,
)

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
BLOCK = os.urandom(2**19)
DATA = chunk(BLOCK)


async def stream_of(transport: Transport, engine: FakeEngine, **extensions: Any) -> ResponseStream:
    response = await transport.handle_async_request(request_for(engine, **extensions))
    assert isinstance(response.stream, ResponseStream)
    return response.stream


async def read_into(read: list[bytes], stream: ResponseStream) -> None:
    """Pull a body that may break off."""
    async with asyncio.timeout(20):
        async for data in stream:
            read.append(data)


class Collected:
    """A sink that remembers what it was given."""

    def __init__(self) -> None:
        self.reads: list[bytes] = []
        self.complete = 0
        self.errors: list[httpx.TransportError] = []

    def data_received(self, data: bytes, complete: bool, frame: bytes | None = None) -> None:
        assert frame in (None, chunk(data))
        self.reads.append(data)
        self.complete += complete

    def broken(self, error: httpx.TransportError) -> None:
        self.errors.append(error)

    @property
    def data(self) -> bytes:
        return b"".join(self.reads)


# Framing


@pytest.mark.parametrize(
    "response",
    [
        OK,
        b"HTTP/1.1 200\r\nContent-Length:5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nconnection: Keep-Alive\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 5\r\n\r\nhello",
        CHUNKED + b"5\r\nhello\r\n0\r\n\r\n",
        CHUNKED + b"".join(chunk(b"%c" % byte) for byte in b"hello") + LAST_CHUNK,
        CHUNKED + b'5;name=value;quoted="a b"\r\nhello\r\n0;last\r\n\r\n',
        CHUNKED + b"00005\r\nhello\r\n0000\r\n\r\n",
        CHUNKED + b"5\r\nhello\r\n0\r\nx-trailer: 1\r\nauthorization: y\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: CHUNKED\r\n\r\nA\r\nhello\0\r\n\xff\n\r\n0\r\n\r\n",
    ],
)
@pytest.mark.parametrize("byte_by_byte", [False, True])
async def test_a_framed_response_leaves_the_connection_reusable(
    response: bytes, byte_by_byte: bool, start_engine: Start, transport: Transport
) -> None:
    parts = [response[i : i + 1] for i in range(len(response))] if byte_by_byte else [response]
    engine = await start_engine(raw(*parts))

    for _ in range(2):
        status, body = await ask(transport, engine)
        assert (status, body) == (200, b"hello\0\r\n\xff\n" if b"\0" in response else b"hello")

    assert engine.connections == 1
    assert "0 active, 1 idle" in repr(transport)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\n\r\n",
    ],
)
async def test_without_a_length_the_end_of_the_connection_is_the_end_of_the_body(
    head: bytes, start_engine: Start, transport: Transport
) -> None:
    engine = await start_engine(raw(head + b"hel", b"lo", close=True))

    assert await ask(transport, engine) == (200, b"hello")

    assert "0 active, 0 idle" in repr(transport)


async def test_without_a_length_a_reset_is_no_end(start_engine: Start, transport: Transport) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.send(b"HTTP/1.1 200 OK\r\n\r\nhel")
        await until(lambda: read)
        line.reset()

    read: list[bytes] = []
    stream = await stream_of(transport, await start_engine(script))

    with pytest.raises(Disconnected):
        await read_into(read, stream)

    assert read == [b"hel"]


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5", b"HTTP/1.0 200 OK\r\ncontent-length: 5"]
)
async def test_a_backend_that_says_close_is_not_asked_again_on_that_connection(
    head: bytes, start_engine: Start, transport: Transport
) -> None:
    engine = await start_engine(raw(head + b"\r\n\r\nhello"))

    assert [await ask(transport, engine) for _ in range(2)] == [(200, b"hello")] * 2

    assert engine.connections == 2
    assert "0 active, 0 idle" in repr(transport)


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_a_response_without_a_body_ends_with_its_head(
    status: bytes, start_engine: Start, transport: Transport
) -> None:
    engine = await start_engine(raw(b"HTTP/1.1 " + status + b"\r\netag: x\r\n\r\n"))

    assert [await ask(transport, engine) for _ in range(2)] == [(int(status[:3]), b"")] * 2
    assert engine.connections == 1


@pytest.mark.parametrize("head", [b"204 No Content\r\ncontent-length: 5", b"304 Not Modified\r\ncontent-length: 5"])
async def test_a_length_gives_no_body_to_a_status_without_one(
    head: bytes, start_engine: Start, transport: Transport
) -> None:
    engine = await start_engine(raw(b"HTTP/1.1 " + head + b"\r\n\r\n"))

    status, body = await ask(transport, engine, timeout={"first_byte": 1.0, "idle": 1.0})

    assert (status, body) == (int(head[:3]), b"")


@pytest.mark.parametrize(
    "interim",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\nx-secret: 1\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" * 50,
    ],
)
@pytest.mark.parametrize("apart", [False, True])
async def test_interim_responses_are_swallowed(
    interim: bytes, apart: bool, start_engine: Start, transport: Transport
) -> None:
    engine = await start_engine(raw(interim, OK) if apart else raw(interim + OK))

    response = await transport.handle_async_request(request_for(engine))

    assert response.status_code == 200
    assert response.headers.raw == [(b"content-length", b"5")]
    assert [data async for data in response.stream] == [b"hello"]  # type: ignore[union-attr]
    assert await ask(transport, engine) == (200, b"hello")
    assert engine.connections == 1


async def test_an_interim_response_does_not_frame_the_final_one(start_engine: Start, transport: Transport) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\ncontent-length: 0\r\n\r\n"
    engine = await start_engine(raw(interim + b"HTTP/1.1 200 OK\r\n\r\nhello", close=True))

    assert await ask(transport, engine) == (200, b"hello")


async def test_header_names_come_in_lower_case_and_in_order(start_engine: Start, transport: Transport) -> None:
    engine = await start_engine(
        raw(b"HTTP/1.1 200 OK\r\nX-B: 1\r\nx-A:  two\r\nX-b: \xe9\r\nContent-Length: 0\r\n\r\n")
    )

    response = await transport.handle_async_request(request_for(engine))

    assert response.headers.raw == [(b"x-b", b"1"), (b"x-a", b"two"), (b"x-b", b"\xe9"), (b"content-length", b"0")]


async def test_trailers_are_no_headers(start_engine: Start, transport: Transport) -> None:
    engine = await start_engine(raw(CHUNKED + b"0\r\nx-inject: 1\r\n\r\n"))

    response = await transport.handle_async_request(request_for(engine))

    assert response.headers.raw == [(b"transfer-encoding", b"chunked")]


# What is not HTTP/1.1


@pytest.mark.parametrize(
    "response",
    [
        b"SSH-2.0-OpenSSH_9\r\n",
        b"hello",
        b"\0\0\0\x12\x04\0\0\0\0\0",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        b"HTTP/1.1 999 Odd\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 600 Odd\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 99 Odd\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 2000 Odd\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5, 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx y: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\0b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\rx-inject: b\r\n\r\n",
    ],
)
@pytest.mark.parametrize("close", [False, True])
async def test_what_is_not_http_is_refused(
    response: bytes, close: bool, start_engine: Start, transport: Transport
) -> None:
    engine = await start_engine(raw(response, close=close))

    with pytest.raises(Malformed):
        await ask(transport, engine, timeout={"first_byte": 5})

    assert "0 active, 0 idle" in repr(transport)
    await until(lambda: engine.open == 0)


@pytest.mark.parametrize("bad", [b"zz\r\n", b"5\r\nhelloXX", b"FFFFFFFFFFFFFFFFF\r\n", b"-1\r\n"])
async def test_a_chunk_that_is_none_breaks_the_body(bad: bytes, start_engine: Start, transport: Transport) -> None:
    stream = await stream_of(transport, await start_engine(raw(CHUNKED + chunk(b"ab"), bad)))

    with pytest.raises(Malformed):
        await body_of(stream)

    assert "0 active, 0 idle" in repr(transport)


RESPONSES = [
    OK,
    CHUNKED + chunk(b"hello") + LAST_CHUNK,
    b"HTTP/1.1 103 Early\r\nlink: x\r\n\r\nHTTP/1.1 204 None\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\nhello",
]
SCRAPS = [
    b"",
    b"\r\n",
    b"\n",
    b"\0",
    b"HTTP/1.1 101 X\r\n",
    b"content-length: 3\r\n",
    b"connection: close\r\n",
    b"0\r\n\r\n",
]
SCRAPS += [
    b"transfer-encoding: chunked\r\n",
    b"connection: upgrade\r\nupgrade: h2c\r\n",
    b":",
    b"\xff",
    b"ffffffff\r\n",
]
changes = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 6), st.sampled_from(SCRAPS)), max_size=4)


@pytest.fixture
async def long_lived(start_engine: Start) -> FakeEngine:
    engine: FakeEngine = await start_engine()
    return engine


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(RESPONSES), changes, st.integers(0, 99), st.booleans())
async def test_whatever_comes_is_an_answer_or_an_error_and_leaves_nothing(
    long_lived: FakeEngine,
    transport: Transport,
    response: bytes,
    changes: list[tuple[int, int, bytes]],
    cut: int,
    close: bool,
) -> None:
    for at, length, scrap in changes:
        response = response[:at] + scrap + response[at + length :]
    long_lived.script = raw(response[:cut], response[cut:], close=close)

    with suppress(httpx.TransportError):
        await ask(transport, long_lived, timeout={"first_byte": 0.02, "idle": 0.02})

    assert " 0 active" in repr(transport)
    transport.retain(set())


LARGE = b"a" * 270_000
HEADS = {
    "one header": b"HTTP/1.1 200 OK\r\nx: " + LARGE + b"\r\n\r\n",
    "one name": b"HTTP/1.1 200 OK\r\n" + LARGE + b": x\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"x-name: value\r\n" * 8000 + b"\r\n",
    "unended": b"HTTP/1.1 200 OK\r\nx: " + LARGE,
    "interim": (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n") * 30_000 + OK,
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("piece", [1000, 10**9])
async def test_a_head_of_more_than_256_kib_is_refused(
    name: str, piece: int, start_engine: Start, transport: Transport
) -> None:
    head = HEADS[name]
    engine = await start_engine(raw(*(head[i : i + piece] for i in range(0, len(head), piece))))

    with pytest.raises(Malformed):
        await ask(transport, engine, timeout={"first_byte": 5})

    assert "0 active, 0 idle" in repr(transport)


async def test_a_head_of_240_kib_is_fine_whatever_comes_with_it(start_engine: Start, transport: Transport) -> None:
    head = b"HTTP/1.1 200 OK\r\nx: " + b"a" * 240_000 + b"\r\ncontent-length: 524288\r\n\r\n"
    engine = await start_engine(raw(head + BLOCK))

    assert await ask(transport, engine) == (200, BLOCK)


# Ends that come too early


@pytest.mark.parametrize("end", [Line.close, Line.reset])
async def test_a_backend_that_says_nothing_at_all(
    end: Callable[[Line], None], start_engine: Start, transport: Transport
) -> None:
    async def script(request: Received, line: Line) -> None:
        end(line)

    engine = await start_engine(script)

    with pytest.raises(Disconnected) as caught:
        await ask(transport, engine)

    assert (caught.value.received, caught.value.reused) == (0, False)
    assert "0 active, 0 idle" in repr(transport)


async def test_a_backend_that_goes_away_from_a_used_connection(start_engine: Start, transport: Transport) -> None:
    async def script(request: Received, line: Line) -> None:
        if len(engine.requests) == 1:
            await line.send(OK)
        else:
            line.close()

    engine: FakeEngine = await start_engine(script)
    await ask(transport, engine)

    with pytest.raises(Disconnected) as caught:
        await ask(transport, engine)

    assert (caught.value.received, caught.value.reused) == (0, True)
    assert caught.value.stale
    assert engine.connections == 1


@pytest.mark.parametrize(
    ("received", "reused", "waited", "stale"),
    [(0, True, 0.0, True), (0, True, 0.99, True), (0, True, 1.0, False), (0, False, 0.0, False), (1, True, 0.0, False)],
)
def test_what_a_stale_connection_is(received: int, reused: bool, waited: float, stale: bool) -> None:
    assert Disconnected("gone", received=received, reused=reused, waited=waited).stale == stale


@pytest.mark.parametrize("part", [b"H", b"HTTP/1.1 200 OK\r\n", OK[:30], b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_a_head_that_breaks_off(part: bytes, start_engine: Start, transport: Transport) -> None:
    with pytest.raises(Disconnected) as caught:
        await ask(transport, await start_engine(raw(part, close=True)))

    assert caught.value.received == len(part)


@pytest.mark.parametrize(
    "response", [OK[:-1], CHUNKED + b"5\r\nhell", CHUNKED + chunk(b"hell"), CHUNKED + b"4\r\nhell\r\n0\r\n"]
)
async def test_a_body_that_breaks_off(response: bytes, start_engine: Start, transport: Transport) -> None:
    stream = await stream_of(transport, await start_engine(raw(response, close=True)))
    read: list[bytes] = []

    with pytest.raises(Disconnected) as caught:
        await read_into(read, stream)

    assert b"".join(read) == b"hell"
    assert caught.value.received == len(response)


# Timers


async def test_no_head_in_time(start_engine: Start, transport: Transport) -> None:
    engine = await start_engine(hang)

    with pytest.raises(FirstByteTimeout):
        await ask(transport, engine, timeout={"first_byte": 0.05, "idle": 10})

    await until(lambda: engine.open == 0)
    assert "0 active, 0 idle" in repr(transport)


# Pulled


async def test_a_reader_that_waits_stops_the_backend(start_engine: Start, transport: Transport) -> None:
    sent = 0

    async def script(request: Received, line: Line) -> None:
        nonlocal sent
        await line.send(CHUNKED)
        for _ in range(64):
            await line.send(DATA)
            sent += 1
        await line.send(LAST_CHUNK)

    stream = await stream_of(transport, await start_engine(script), timeout={"first_byte": 10, "idle": 10})
    await _settled(lambda: sent)
    assert 0 < sent < 48

    assert crc32(await body_of(stream)) == crc32(BLOCK * 64)
    assert "0 active, 1 idle" in repr(transport)


async def _settled(value: Callable[[], int]) -> None:
    """Wait until the value has stopped growing."""
    before = -1
    while value() != before:
        before = value()
        await asyncio.sleep(0.06)


async def test_a_body_can_be_collected_up_to_a_limit(start_engine: Start, transport: Transport) -> None:
    engine = await start_engine(raw(CHUNKED, chunk(b"hel"), chunk(b"lo") + LAST_CHUNK))

    assert await (await stream_of(transport, engine)).collect(5) == (b"hello", True)
    assert "0 active, 1 idle" in repr(transport)


async def test_of_a_body_beyond_the_limit_the_rest_can_be_pulled(start_engine: Start, transport: Transport) -> None:
    engine = await start_engine(raw(CHUNKED, *[DATA] * 8, LAST_CHUNK))
    stream = await stream_of(transport, engine)

    begun, complete = await stream.collect(2**20)

    assert not complete
    assert 2**20 < len(begun) < 2**21
    assert begun + await body_of(stream) == BLOCK * 8


async def test_a_stream_closed_before_its_end_closes_the_connection(start_engine: Start, transport: Transport) -> None:
    engine = await start_engine(raw(CHUNKED + chunk(b"hello")))
    stream = await stream_of(transport, engine)

    await stream.aclose()
    await stream.aclose()

    assert "0 active, 0 idle" in repr(transport)
    await until(lambda: engine.open == 0)


async def test_a_stream_closed_after_its_end_leaves_the_connection(start_engine: Start, transport: Transport) -> None:
    engine = await start_engine(raw(OK))
    stream = await stream_of(transport, engine)
    await body_of(stream)

    await stream.aclose()
    await ask(transport, engine)
    await stream.aclose()

    assert "0 active, 1 idle" in repr(transport)


async def test_a_late_word_to_an_ended_stream_does_not_reach_the_next(
    start_engine: Start, transport: Transport
) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.send(OK if len(engine.requests) == 1 else CHUNKED)
        if len(engine.requests) == 2:
            await line.send(*[DATA] * 8, LAST_CHUNK)

    engine: FakeEngine = await start_engine(script)
    first = await stream_of(transport, engine)
    await body_of(first)
    second = await stream_of(transport, engine)

    first.pause()
    first.resume()
    await first.aclose()

    assert await body_of(second) == BLOCK * 8
    assert engine.connections == 1


# Pushed


async def test_a_sink_is_given_every_read(start_engine: Start, transport: Transport) -> None:
    pushed: asyncio.Event = asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        await line.send(CHUNKED + chunk(b"first "))
        await asyncio.wait_for(pushed.wait(), 20)
        await line.send(chunk(b"second ") + chunk(b"third"))
        await until(lambda: sink.data.endswith(b"third"))
        await line.send(LAST_CHUNK)

    sink = Collected()
    stream = await stream_of(transport, await start_engine(script))
    stream.push_to(sink)
    pushed.set()
    await until(lambda: sink.complete)

    assert sink.data == b"first second third"
    assert (sink.complete, sink.errors) == (1, [])
    assert "0 active, 1 idle" in repr(transport)


async def test_a_sink_is_not_given_reads_without_a_body_byte(start_engine: Start, transport: Transport) -> None:
    async def script(request: Received, line: Line) -> None:
        for part in (CHUNKED, b"5", b"\r\n", b"hello", b"\r\n", b"0\r\n", b"\r\n"):
            await line.send(part)
            await asyncio.sleep(0.005)

    sink = Collected()
    (await stream_of(transport, await start_engine(script))).push_to(sink)
    await until(lambda: sink.complete)

    assert sink.reads == [b"hello", b""]


async def test_a_sink_is_given_what_came_before_it(start_engine: Start, transport: Transport) -> None:
    sink = Collected()
    engine = await start_engine(raw(json_response(COMPLETION)))
    stream = await stream_of(transport, engine)
    await until(lambda: "0 active" in repr(transport))

    stream.push_to(sink)

    assert sink.reads == [json_response(COMPLETION).partition(b"\r\n\r\n")[2]]
    assert sink.complete == 1


async def test_a_sink_is_told_of_a_break(start_engine: Start, transport: Transport) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.send(CHUNKED + chunk(b"hello"))
        await until(lambda: sink.reads)
        line.reset()

    sink = Collected()
    (await stream_of(transport, await start_engine(script))).push_to(sink)
    await until(lambda: sink.errors)

    assert (sink.data, sink.complete) == (b"hello", 0)
    assert [type(error) for error in sink.errors] == [Disconnected]


async def test_a_sink_is_told_of_a_break_that_came_before_it(start_engine: Start, transport: Transport) -> None:
    sink = Collected()
    stream = await stream_of(transport, await start_engine(raw(CHUNKED + chunk(b"hello"), close=True)))
    await until(lambda: "0 active" in repr(transport))

    stream.push_to(sink)

    assert (sink.data, sink.complete, len(sink.errors)) == (b"hello", 0, 1)


async def test_a_sink_can_stop_the_backend(start_engine: Start, transport: Transport) -> None:
    sent = 0

    async def script(request: Received, line: Line) -> None:
        nonlocal sent
        await line.send(CHUNKED)
        for _ in range(64):
            await line.send(DATA)
            sent += 1
        await line.send(LAST_CHUNK)

    sink = Collected()
    stream = await stream_of(transport, await start_engine(script), timeout={"first_byte": 0.8, "idle": 0.8})
    stream.push_to(sink)
    stream.pause()
    await _settled(lambda: sent)
    held = len(sink.data)
    await asyncio.sleep(1)
    assert sent < 48
    assert len(sink.data) == held

    stream.resume()
    await until(lambda: sink.complete)
    assert crc32(sink.data) == crc32(BLOCK * 64)


async def test_a_paused_connection_is_reused_awake(start_engine: Start, transport: Transport) -> None:
    class Pausing(Collected):
        def data_received(self, data: bytes, complete: bool, frame: bytes | None = None) -> None:
            super().data_received(data, complete)
            stream.pause()

    engine = await start_engine(raw(OK[:-1], OK[-1:]))
    sink = Pausing()
    stream = await stream_of(transport, engine)
    stream.push_to(sink)
    while not sink.complete:
        stream.resume()
        await asyncio.sleep(0.005)

    assert await ask(transport, engine) == (200, b"hello")


# Whole chunks


@given(
    texts=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=12),
    upper=st.booleans(),
    together=st.lists(st.booleans(), min_size=12, max_size=12),
    cuts=st.lists(st.integers(0, 10_000), max_size=6),
)
@settings(max_examples=200)
def test_chunks_pass_whole_or_in_parts(texts: list[bytes], upper: bool, together: list[bool], cuts: list[int]) -> None:
    """Every way the reads may fall: the body is the same, and a frame is told only of what is one."""
    pieces = [CHUNKED, *((b"%X" if upper else b"%x") % len(t) + b"\r\n" + t + b"\r\n" for t in texts), LAST_CHUNK]
    reads = [pieces[0]]
    for piece, joined in zip(pieces[1:], [*together, *together][: len(pieces) - 1], strict=True):
        if joined:
            reads[-1] += piece
        else:
            reads.append(piece)
    for cut in cuts:
        at = cut % len(reads)
        half = (cut // 7) % (len(reads[at]) + 1)
        reads[at : at + 1] = [part for part in (reads[at][:half], reads[at][half:]) if part]

    loop = asyncio.new_event_loop()
    try:
        pool = SimpleNamespace(last_read=0.0, heads=RepeatedHeads(), release=lambda _: None, discard=lambda _: None)
        connection = BackendConnection(pool, loop)
        connection.connection_made(SimpleNamespace(write=lambda _: None, get_write_buffer_size=lambda: 0))  # type: ignore[arg-type]
        stream, sink = connection.exchange(b"", b"", Timeout(), None), Framed()
        for read in reads:
            connection.data_received(read)
            if stream.head.done() and stream.sink is None:
                stream.push_to(sink)
    finally:
        loop.close()

    assert (sink.data, sink.complete, sink.errors) == (b"".join(texts), 1, [])
    assert b"".join(sink.frames) == b"".join(sink.framed_reads)


class Framed(Collected):
    """A sink that keeps the frames, and what it was told is in them."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[bytes] = []
        self.framed_reads: list[bytes] = []

    def data_received(self, data: bytes, complete: bool, frame: bytes | None = None) -> None:
        if frame is not None:
            size, _, rest = frame.partition(b"\r\n")
            assert (int(size, 16), rest) == (len(data), data + b"\r\n")
            self.frames.append(rest[:-2])
            self.framed_reads.append(data)
        super().data_received(data, complete)


@pytest.mark.parametrize("size", [1, 9, 10, 15, 16, 240, 255, 256, 4095, 4096, 70_000])
def test_a_chunk_that_comes_alone_is_passed_on_as_it_is(size: int) -> None:
    loop = asyncio.new_event_loop()
    try:
        pool = SimpleNamespace(last_read=0.0, heads=RepeatedHeads(), release=lambda _: None, discard=lambda _: None)
        connection = BackendConnection(pool, loop)
        connection.connection_made(SimpleNamespace(write=lambda _: None, get_write_buffer_size=lambda: 0))  # type: ignore[arg-type]
        stream, sink = connection.exchange(b"", b"", Timeout(), None), Framed()
        connection.data_received(CHUNKED)
        stream.push_to(sink)
        for _ in range(3):
            connection.data_received(chunk(b"x" * size))
    finally:
        loop.close()

    # The first one shows that the parser stands between two; the largest are parsed, they cost more anyway.
    assert len(sink.frames) == (2 if size < 4096 else 0)
    assert sink.data == b"x" * size * 3
