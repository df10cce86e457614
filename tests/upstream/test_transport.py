"""The transport: which connection a request goes out on, what it says there, and that nothing is ever left behind."""

import asyncio
import errno
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from inference_api.discovery.resolver import Resolver
from inference_api.upstream.connection import BackendConnection
from inference_api.upstream.deadlines import Timeout
from inference_api.upstream.dial import Dialer
from inference_api.upstream.failures import Closed, Disconnected, TotalTimeout
from inference_api.upstream.pool import Pool
from inference_api.upstream.response import ResponseStream
from inference_api.upstream.transport import Transport, request_head
from tests.fakes import (
    COMPLETION,
    LAST_CHUNK,
    SSE_HEAD,
    FakeEngine,
    Line,
    Received,
    answer,
    ask,
    body_of,
    chunk,
    event,
    full_listener,
    hang,
    json_response,
    raw,
    request_for,
    until,
)

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

OK = json_response(COMPLETION)
BODY = OK.partition(b"\r\n\r\n")[2]


async def begin(transport: Transport, engine: FakeEngine, **extensions: Any) -> ResponseStream:
    response = await transport.handle_async_request(request_for(engine, **extensions))
    assert isinstance(response.stream, ResponseStream)
    return response.stream


@asynccontextmanager
async def plain_server(answer: bytes = b"", reads: int = 2**30) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A port where each connection is answered at its first bytes, of which only `reads` are read; and its end.

    What comes until the end must be less than 16 MiB.
    """

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        with suppress(ConnectionError, asyncio.CancelledError):
            await reader.read(reads)
            writer.write(answer)
            await asyncio.sleep(0.1)
            size = 0
            while data := await reader.read(65536):
                size += len(data)
                assert size < 2**24
        gone.set()
        writer.transport.abort()

    tasks: list[asyncio.Task[None]] = []
    gone = asyncio.Event()
    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=1024)
    yield server.sockets[0].getsockname()[1], gone
    server.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks)


# What goes out


async def test_a_request_goes_out_as_it_is(start_engine: Start, transport: Transport) -> None:
    engine = await start_engine()
    url = engine.url + "/a/../b%2Fc?x=%20&y=1"
    headers = [("Host", "h"), ("X-A", "1"), ("x-a", "2"), ("content-length", "3")]

    await transport.handle_async_request(httpx.Request("POST", url, headers=headers, content=b"abc"))

    received = engine.requests[0]
    assert received.method == "POST"
    assert received.target == httpx.URL(url).raw_path.decode()
    assert received.headers == headers
    assert received.body == b"abc"


async def test_an_httpx_client_can_use_it(start_engine: Start, transport: Transport) -> None:
    engine = await start_engine()

    client = httpx.AsyncClient(transport=transport)
    async with client, client.stream("POST", engine.url + "/v1/completions", json={"a": 1}) as response:
        assert response.status_code == 200
        assert await body_of(response.aiter_raw()) == BODY

    assert engine.requests[0].body == b'{"a":1}'


@pytest.mark.parametrize("size", [0, 1, 16 * 1024, 3 * 2**20])
async def test_a_body_of_any_size_arrives_whole(size: int, start_engine: Start, transport: Transport) -> None:
    engine, body = await start_engine(), os.urandom(size)

    assert await ask(transport, engine, body) == (200, BODY)

    assert engine.requests[0].body == body
    assert "0 active, 1 idle" in repr(transport)


@pytest.mark.parametrize(
    "header", [(b"x", b"a\r\nx-inject: b"), (b"x", b"a\nb"), (b"x", b"a\rb"), (b"x\r\ny", b"a"), (b"x", b"\0")]
)
async def test_a_header_that_would_start_another_line_is_refused(
    header: tuple[bytes, bytes], start_engine: Start, transport: Transport
) -> None:
    engine = await start_engine()

    with pytest.raises(httpx.LocalProtocolError, match="line break"):
        await transport.handle_async_request(httpx.Request("POST", engine.url, headers=[header]))

    assert engine.connections == 0


async def test_a_target_that_would_start_another_line_is_refused(start_engine: Start, transport: Transport) -> None:
    engine = await start_engine()

    with pytest.raises(httpx.LocalProtocolError):
        await ask(transport, engine, target=b"/ HTTP/1.1\r\nx-inject: b\r\nx:")

    assert engine.connections == 0


# Reuse


async def test_a_connection_is_reused(start_engine: Start, transport: Transport) -> None:
    engine = await start_engine()

    for _ in range(20):
        assert await ask(transport, engine) == (200, BODY)

    assert engine.connections == 1
    assert "0 active, 1 idle" in repr(transport)


async def test_a_connection_in_use_is_not_shared(start_engine: Start, transport: Transport) -> None:
    engine = await start_engine(raw(SSE_HEAD))
    streams = [await begin(transport, engine) for _ in range(3)]

    assert engine.connections == 3
    assert "3 active, 0 idle" in repr(transport)
    for stream in streams:
        await stream.aclose()
    assert "0 active, 0 idle" in repr(transport)


async def test_the_last_used_connection_is_reused_first(start_engine: Start, transport: Transport) -> None:
    async def script(request: Received, line: Line) -> None:
        await gates[int(request.body)].wait()
        await line.send(OK)

    gates = [asyncio.Event() for _ in range(4)]
    engine = await start_engine(script)
    asking = [asyncio.create_task(ask(transport, engine, b"%d" % i)) for i in range(3)]
    await until(lambda: len(engine.requests) == 3)
    by_body = {int(request.body): request.connection for request in engine.requests}
    for i in (2, 0, 1):
        gates[i].set()
        await asking[i]

    gates[3].set()
    await ask(transport, engine, b"3")

    assert engine.requests[3].connection == by_body[1]


async def two_idle(transport: Transport, engine: FakeEngine) -> None:
    """Use two connections at once, one after the other falling idle."""
    gates = [asyncio.Event(), asyncio.Event()]

    async def script(request: Received, line: Line) -> None:
        await gates[int(request.body)].wait()
        await line.send(OK)

    engine.script = script
    asking = [asyncio.create_task(ask(transport, engine, body)) for body in (b"0", b"1")]
    await until(lambda: len(engine.requests) == 2)
    for gate, task in zip(gates, asking, strict=True):
        gate.set()
        await task
    engine.script = answer


async def test_idle_connections_are_closed_in_time(start_engine: Start) -> None:
    transport, engine = Transport(keepalive=2), await start_engine()
    await two_idle(transport, engine)
    await asyncio.sleep(1)
    await ask(transport, engine)
    assert "0 active, 2 idle" in repr(transport)

    await until(lambda: "1 idle" in repr(transport))
    await until(lambda: engine.open == 0)

    assert await ask(transport, engine) == (200, BODY)
    assert engine.connections == 3
    await transport.aclose()


async def test_a_connection_that_is_too_old_is_not_reused_even_if_there_was_no_time_to_close_it(
    start_engine: Start,
) -> None:
    transport, engine = Transport(keepalive=0.05), await start_engine()
    await two_idle(transport, engine)

    time.sleep(0.06)  # noqa: ASYNC251 - a busy loop is what this is about
    assert await ask(transport, engine) == (200, BODY)

    assert engine.connections == 3
    assert "0 active, 1 idle" in repr(transport)
    await transport.aclose()


async def test_a_connection_that_the_backend_closes_is_forgotten(start_engine: Start, transport: Transport) -> None:
    engine = await start_engine(raw(OK, close=True))
    await ask(transport, engine)
    await until(lambda: "0 idle" in repr(transport))

    assert await ask(transport, engine) == (200, BODY)
    assert engine.connections == 2


async def test_a_connection_that_ends_in_the_same_turn_of_the_loop_is_a_stale_one(transport: Transport) -> None:
    loop = asyncio.get_running_loop()
    bell, ringer = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener, bell, ringer:
        listener.setblocking(False)
        request = httpx.Request("GET", f"http://127.0.0.1:{listener.getsockname()[1]}/")
        asking = asyncio.create_task(transport.handle_async_request(request))
        backend, _ = await loop.sock_accept(listener)
        await loop.sock_recv(backend, 65536)
        await loop.sock_sendall(backend, OK)
        assert await body_of((await asking).stream) == BODY  # type: ignore[arg-type]

        rung = loop.create_future()
        loop.add_reader(bell, rung.set_result, None)
        await asyncio.sleep(0.01)
        ringer.send(b"x")
        backend.close()
        await rung
        assert "1 idle" in repr(transport)
        loop.remove_reader(bell)
        with pytest.raises(Disconnected) as caught:
            await transport.handle_async_request(request)

    assert (caught.value.received, caught.value.reused) == (0, True)


@pytest.mark.parametrize("unasked", [OK, b"x", b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n"])
async def test_an_idle_connection_that_speaks_is_closed(
    unasked: bytes, start_engine: Start, transport: Transport
) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.send(OK)
        if len(engine.requests) == 1:
            await until(lambda: "1 idle" in repr(transport))
            await line.send(unasked)

    engine: FakeEngine = await start_engine(script)
    await ask(transport, engine)
    # Long before it is too old to be kept.
    await until(lambda: "0 active, 0 idle" in repr(transport))

    assert await ask(transport, engine) == (200, BODY)
    assert engine.connections == 2


# Leaving


async def test_backends_that_are_gone_lose_their_idle_connections(start_engine: Start, transport: Transport) -> None:
    stays, goes = await start_engine(), await start_engine()
    for engine in (stays, goes):
        await ask(transport, engine, origin=engine.url)

    transport.retain({stays.url})

    await until(lambda: goes.open == 0)
    assert stays.open == 1
    assert str(goes.port) not in repr(transport)
    assert await ask(transport, goes, origin=goes.url) == (200, BODY)


async def test_a_stream_of_a_backend_that_is_gone_runs_to_its_end(start_engine: Start, transport: Transport) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD)
        await gate.wait()
        await line.send(chunk(event()) + LAST_CHUNK)

    gate, engine = asyncio.Event(), await start_engine(script)
    stream = await begin(transport, engine, origin=engine.url)

    transport.retain(set())
    gate.set()

    assert await body_of(stream) == event()


async def test_closing_ends_everything(start_engine: Start, transport: Transport) -> None:
    idle, busy = await start_engine(), await start_engine(raw(SSE_HEAD + chunk(event())))
    await ask(transport, idle)
    stream = await begin(transport, busy)
    silent: FakeEngine = await start_engine(hang)
    waiting = asyncio.create_task(ask(transport, silent))
    await until(lambda: silent.requests)

    await transport.aclose()

    with pytest.raises(Closed):
        await body_of(stream)
    with pytest.raises(Closed):
        await waiting
    await until(lambda: idle.open == busy.open == silent.open == 0)
    assert repr(transport) == "<Transport []>"


# Connecting


@pytest.mark.parametrize(
    ("url", "port"), [("http://127.0.0.9", 80), ("https://127.0.0.9", 443), ("https://127.0.0.9:80", 80)]
)
async def test_a_url_without_a_port_means_that_of_its_scheme(
    url: str, port: int, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect(pool: Pool, seconds: float | None) -> BackendConnection:
        raise httpx.ConnectError(f"{pool.host} {pool.port}")

    monkeypatch.setattr(Pool, "connect", connect)

    with pytest.raises(httpx.ConnectError, match=f"^127.0.0.9 {port}$"):
        await transport.handle_async_request(httpx.Request("GET", url))


async def test_a_refused_connection(start_engine: Start, transport: Transport) -> None:
    engine = await start_engine()
    await engine.stop()

    with pytest.raises(httpx.ConnectError):
        await ask(transport, engine)

    assert "0 active, 0 idle" in repr(transport)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL])
async def test_a_lack_of_our_own_is_not_the_backends_fault(number: int) -> None:
    """Seen with a limit of open files (tests/faults) and in a network namespace of ten ports; here it is raised."""

    async def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    loop: Any = SimpleNamespace(create_connection=refuse)
    pool = Pool("127.0.0.1", 9, 3.0, Dialer("127.0.0.1", Resolver()), None, loop)

    with pytest.raises(httpx.PoolTimeout):
        await pool.connect(1.0)

    assert (pool.active, pool.idle) == (0, 0)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 64 + ".test", "[::1]"])
async def test_a_host_that_cannot_be_found(host: str, transport: Transport) -> None:
    with pytest.raises(httpx.ConnectError):
        await transport.handle_async_request(httpx.Request("GET", f"http://{host}:9/"))

    assert "0 active, 0 idle" in repr(transport)


async def test_nobody_answers_the_call(transport: Transport) -> None:
    with full_listener() as url, pytest.raises(httpx.ConnectTimeout):
        await transport.handle_async_request(httpx.Request("GET", url, extensions={"timeout": {"connect": 0.05}}))

    assert "0 active, 0 idle" in repr(transport)


async def test_the_time_to_connect_ends_with_the_deadline(transport: Transport) -> None:
    extensions = {"timeout": {"connect": 30}, "deadline": asyncio.get_running_loop().time() + 0.05}
    with full_listener() as url, pytest.raises(TotalTimeout):
        await transport.handle_async_request(httpx.Request("GET", url, extensions=extensions))

    assert "0 active, 0 idle" in repr(transport)


@pytest.mark.parametrize("extensions", [{}, {"timeout": {"connect": 30}}])
async def test_a_deadline_that_has_passed_makes_no_connection(
    extensions: dict[str, Any], start_engine: Start, transport: Transport
) -> None:
    engine = await start_engine()

    with pytest.raises(TotalTimeout):
        await ask(transport, engine, deadline=asyncio.get_running_loop().time() - 1, **extensions)

    assert engine.requests == []
    assert "0 active, 0 idle" in repr(transport)


# TLS


@pytest.fixture
async def secure_engine(certificate: Path) -> AsyncIterator[FakeEngine]:
    async with FakeEngine(certificate=certificate) as engine:
        yield engine


async def test_a_backend_behind_tls(secure_engine: FakeEngine, certificate: Path) -> None:
    transport = Transport(tls=lambda: ssl.create_default_context(cafile=certificate))
    body = os.urandom(2**20)

    for _ in range(2):
        assert await ask(transport, secure_engine, body) == (200, BODY)

    assert [request.body for request in secure_engine.requests] == [body] * 2
    assert secure_engine.connections == 1
    await transport.aclose()


@pytest.mark.parametrize("secure", [True, False])
async def test_a_body_in_pieces_arrives_whole(
    secure: bool, secure_engine: FakeEngine, start_engine: Any, certificate: Path
) -> None:
    chosen = secure_engine if secure else await start_engine()
    transport = Transport(tls=lambda: ssl.create_default_context(cafile=certificate))
    body = os.urandom(2**22)
    pieces = (memoryview(body)[:2_000_001], b"between", memoryview(body)[2_000_001:])
    head = request_head("POST", b"/v1/x", b"host: a\r\ncontent-length: %d\r\n" % (len(body) + 7))

    url = httpx.URL(chosen.url)
    stream = await transport.send(chosen.url, url, head, pieces, Timeout(5, 5, 5), None, False)

    assert stream.status == 200
    assert chosen.requests[0].body == b"".join(pieces)
    await stream.aclose()
    await transport.aclose()


async def test_a_certificate_that_nobody_vouches_for_is_refused(
    secure_engine: FakeEngine, transport: Transport
) -> None:
    with pytest.raises(httpx.ConnectError):
        await ask(transport, secure_engine)

    assert secure_engine.requests == []
    assert "0 active, 0 idle" in repr(transport)


async def test_a_certificate_for_another_name_is_refused(secure_engine: FakeEngine, certificate: Path) -> None:
    transport = Transport(tls=lambda: ssl.create_default_context(cafile=certificate))

    with pytest.raises(httpx.ConnectError):
        await transport.handle_async_request(httpx.Request("GET", f"https://localhost:{secure_engine.port}/"))

    assert secure_engine.requests == []
    await transport.aclose()


async def test_a_handshake_belongs_to_the_time_to_connect(transport: Transport) -> None:
    async with plain_server() as (port, gone):
        request = httpx.Request("GET", f"https://127.0.0.1:{port}/", extensions={"timeout": {"connect": 0.05}})
        with pytest.raises(httpx.ConnectTimeout):
            await transport.handle_async_request(request)

        await asyncio.wait_for(gone.wait(), 20)
    assert "0 active, 0 idle" in repr(transport)


async def test_a_cancelled_handshake_leaves_nothing(transport: Transport) -> None:
    async with plain_server() as (port, gone):
        request = httpx.Request("GET", f"https://127.0.0.1:{port}/")
        asking = asyncio.create_task(transport.handle_async_request(request))
        await until(lambda: "1 active" in repr(transport))

        await cancelled(asking)

        await asyncio.wait_for(gone.wait(), 20)
    assert "0 active, 0 idle" in repr(transport)


# Cancelled


async def cancelled(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_while_it_connects(transport: Transport) -> None:
    with full_listener() as url:
        asking = asyncio.create_task(transport.handle_async_request(httpx.Request("GET", url)))
        await until(lambda: "1 active" in repr(transport))

        await cancelled(asking)

        assert "0 active, 0 idle" in repr(transport)


async def test_cancelled_while_it_waits_for_the_head(start_engine: Start, transport: Transport) -> None:
    engine: FakeEngine = await start_engine(hang)
    asking = asyncio.create_task(ask(transport, engine))
    await until(lambda: engine.busy)

    await cancelled(asking)

    assert "0 active, 0 idle" in repr(transport)
    await until(lambda: engine.open == 0)


async def test_cancelled_while_the_request_goes_out(transport: Transport) -> None:
    async with plain_server(reads=1000) as (port, gone):
        request = httpx.Request("POST", f"http://127.0.0.1:{port}/", content=bytes(2**25))
        asking = asyncio.create_task(transport.handle_async_request(request))
        await asyncio.sleep(0.05)

        await cancelled(asking)

        assert "0 active, 0 idle" in repr(transport)
        await asyncio.wait_for(gone.wait(), 20)


async def test_cancelled_in_the_middle_of_a_body(start_engine: Start, transport: Transport) -> None:
    async def read() -> None:
        stream = await begin(transport, engine)
        try:
            async for _ in stream:
                seen.set()
        finally:
            await stream.aclose()

    seen = asyncio.Event()
    engine: FakeEngine = await start_engine(raw(SSE_HEAD + chunk(event())))
    reading = asyncio.create_task(read())
    await seen.wait()

    await cancelled(reading)

    assert "0 active, 0 idle" in repr(transport)
    await until(lambda: engine.open == 0)


async def test_it_knows_when_a_backend_was_last_heard(start_engine: Callable[..., Any]) -> None:
    engine, silent = await start_engine(), await start_engine()
    loop = asyncio.get_running_loop()
    async with Transport() as transport:
        before = loop.time()
        await ask(transport, engine)
        assert before <= transport.last_read(engine.url) <= loop.time()
        assert transport.last_read(silent.url) == 0.0


async def test_a_name_that_leads_to_a_forbidden_address_gets_no_request(start_engine: Start) -> None:
    engine, asked = await start_engine(), []

    def may_reach(address: str) -> bool:
        asked.append(address)
        return False

    async with Transport(may_reach=may_reach) as transport:
        request = httpx.Request("POST", f"http://localhost:{engine.port}/v1/completions", content=b"{}")
        with pytest.raises(httpx.ConnectError, match="address"):
            await transport.handle_async_request(request)

    assert set(asked) <= {"127.0.0.1", "::1"}
    assert asked
    assert engine.requests == []
