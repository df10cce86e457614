"""HTTP/1.1 as clients speak it, well and badly: framing, pipelines, upgrades, deadlines, and how a connection ends."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from starlette.types import Receive, Scope, Send

from inference_api.server.connection import ClientConnection
from inference_api.settings import Settings
from tests.conftest import Served, serving
from tests.fakes import (
    CHAT,
    COMPLETION,
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
    json_response,
    post,
    raw,
    raw_client,
    read_answer,
    sse,
    until,
)

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
GET = b"GET /echo HTTP/1.1\r\nhost: x\r\n\r\n"
# Java's HttpClient sends these with its first request to any http:// URL.
H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\n"
WEBSOCKET = b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: eA==\r\n"


class Application:
    """An ASGI application with one path per behaviour; `ended` are the paths whose request has ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for answer in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{answer}.complete"})
            return
        try:
            await getattr(self, scope["path"].strip("/"))(scope, receive, send)
        finally:
            self.ended.append(scope["path"])

    async def echo(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Say what came."""
        message = await receive()
        body = message.get("body", b"")
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        if message["type"] == "http.request":
            said = [scope["method"], scope["path"], scope["query_string"].decode(), body.decode()]
            await answer(send, orjson.dumps(said))

    async def ignore(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer without a look at the body."""
        await answer(send, b"ignored")

    async def wait(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer nothing until the client leaves; then it may."""
        while (await receive())["type"] != "http.disconnect":
            pass
        await answer(send, b"to nobody")

    async def late(self, scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(2.5)
        await answer(send, b"late")

    async def early(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Begin to answer before the body has come."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"early", "more_body": True})
        await self.wait(scope, receive, send)

    async def flood(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the client's buffers are full, and then give up."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async with asyncio.timeout(0.1):
            while True:
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})

    async def more_than_said(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"123456", length=3)

    async def less_than_said(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"123", length=6)

    async def two_lines(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"a\r\nset-cookie: b")]})
        await send({"type": "http.response.body", "body": b"x"})

    async def nothing(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Return without an answer."""

    async def half(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Begin an answer and return."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    async def too_often(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"once")
        await send({"type": "http.response.body", "body": b"twice"})

    async def no_content(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def chunks(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 299, "headers": []})
        for part in (b"a" * 20, b"", b"b"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def answer(send: Send, body: bytes, length: int | None = None) -> None:
    headers = [(b"content-length", b"%d" % (len(body) if length is None else length))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Plain:
    """A server of the Application."""

    def __init__(self, application: Application, port: int) -> None:
        self.application = application
        self.port = port

    async def all(self, *parts: bytes) -> bytes:
        """Every byte that the server says to these, until it closes."""
        async with raw_client(self.port) as client:
            await client.send(*parts)
            return await client.reader.read(-1)

    async def ended(self, path: str) -> None:
        await until(lambda: path in self.application.ended)


@asynccontextmanager
async def plain_server(**settings: Any) -> AsyncIterator[Plain]:
    application: Any = Application()
    served: Any = SimpleNamespace(app=application)
    async with serving(served, Settings(**settings)) as url:
        yield Plain(application, int(url.rsplit(":", 1)[1]))


@pytest.fixture(scope="module")
async def _one_plain() -> AsyncIterator[Plain]:
    async with plain_server() as plain:
        yield plain


@pytest.fixture
def plain(_one_plain: Plain) -> Plain:
    _one_plain.application.ended.clear()
    return _one_plain


@pytest.fixture(scope="module")
async def _one_hasty() -> AsyncIterator[Plain]:
    async with plain_server(header_timeout=2, body_timeout=2, keepalive_timeout=2) as plain:
        yield plain


@pytest.fixture
def hasty(_one_hasty: Plain) -> Plain:
    """A server with deadlines of two seconds, which is more than a busy machine stands still."""
    _one_hasty.application.ended.clear()
    return _one_hasty


def code(said: bytes) -> str:
    """The status and code of a refusal in the envelope, which also closes the connection."""
    head, _, body = said.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close\r\n" in head + b"\r\n"
    assert b"\r\ncontent-type: application/json\r\n" in head
    document = orjson.loads(body)
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert f"x-request-id: {document['request_id']}".encode() in head
    return f"{head[9:12].decode()} {document['error']['code']}"


# Requests

REQUESTS = [
    (GET, ["GET", "/echo", "", ""]),
    (b"GET /%65cho?a=%20&b HTTP/1.1\r\nhost: x\r\n\r\n", ["GET", "/echo", "a=%20&b", ""]),
    (b"DELETE /echo?a?b HTTP/1.1\r\nhost: x\r\n\r\n", ["DELETE", "/echo", "a?b", ""]),
    (post("/echo", b"hello"), ["POST", "/echo", "", "hello"]),
    (post("/echo", b""), ["POST", "/echo", "", ""]),
    (post("/echo", b"x" * 200_000), ["POST", "/echo", "", "x" * 200_000]),
    (
        b"POST /echo HTTP/1.1\r\nhost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3;ext=1\r\nhel\r\n2\r\nlo\r\n0\r\ntrailer: 1\r\n\r\n",
        ["POST", "/echo", "", "hello"],
    ),
    (b"POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", ["POST", "/echo", "", ""]),
    (b"GET http://engine:8000/echo?a HTTP/1.1\r\nhost: engine:8000\r\n\r\n", ["GET", "/echo", "a", ""]),
    # An offer to upgrade is declined without a word.
    (GET.replace(b"\r\n\r\n", b"\r\n" + H2C + b"\r\n"), ["GET", "/echo", "", ""]),
    (GET.replace(b"\r\n\r\n", b"\r\n" + WEBSOCKET + b"\r\n"), ["GET", "/echo", "", ""]),
    (post("/echo", b"hello", H2C), ["POST", "/echo", "", "hello"]),
    (
        b"POST /echo HTTP/1.1\r\nhost: x\r\n"
        + H2C
        + b"transfer-encoding: chunked\r\n\r\n"
        + chunk(b"hello")
        + LAST_CHUNK,
        ["POST", "/echo", "", "hello"],
    ),
    # An empty line before a request is not one: some clients end a body with one.
    (b"\r\n" + GET, ["GET", "/echo", "", ""]),
]


async def all_answers(plain: Plain, *parts: bytes, count: int) -> list[Any]:
    async with raw_client(plain.port) as client:
        sending = asyncio.create_task(client.send(*parts))
        async with asyncio.timeout(10):
            answers = [await read_answer(client.reader) for _ in range(count)]
            await sending
    assert {reply.status for reply in answers} == {200}
    return [orjson.loads(reply.body) for reply in answers]


@pytest.mark.parametrize(("request_bytes", "said"), REQUESTS)
async def test_a_request_is_read_as_it_was_meant(request_bytes: bytes, said: list[str], plain: Plain) -> None:
    # Twice: what follows on the connection must not be bent by it.
    assert await all_answers(plain, request_bytes, request_bytes, count=2) == [said, said]


async def test_an_offer_to_upgrade_may_come_with_an_empty_body(plain: Plain) -> None:
    async with asyncio.timeout(20):
        assert await all_answers(plain, post("/echo", b"", H2C), GET, count=2) == [
            ["POST", "/echo", "", ""],
            ["GET", "/echo", "", ""],
        ]


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10**6])
async def test_requests_may_come_in_pieces_of_any_size(size: int, plain: Plain) -> None:
    short = [pair for pair in REQUESTS if len(pair[0]) < 1000]
    data = b"".join(request for request, _ in short)
    pieces = [data[i : i + size] for i in range(0, len(data), size)]

    assert await all_answers(plain, *pieces, count=len(short)) == [said for _, said in short]


@pytest.mark.parametrize("size", [10, 5_000, 40_000, 200_000])
async def test_of_what_waits_in_the_pipe_there_is_an_end(size: int, plain: Plain) -> None:
    answers: list[Answer] = []
    async with raw_client(plain.port) as client, asyncio.timeout(10):
        await client.send(b"GET /late HTTP/1.1\r\nhost: x\r\n\r\n")
        for i in range(1000):
            await client.send(post(f"/echo?{i}", b"x" * size))
            if i % 20 == 0:
                await asyncio.sleep(0)
            if client.writer.transport.get_write_buffer_size() > 2**20:
                break
        while not answers or answers[-1].headers.get("connection") != "close":
            answers.append(await read_answer(client.reader))
        with suppress(ConnectionError):
            assert await client.reader.read(-1) == b""

    # In their order, none left out, and the client is told which was the last.
    assert [orjson.loads(answer.body)[2] for answer in answers[1:]] == [str(i) for i in range(len(answers) - 1)]
    assert len(answers) <= 102
    if size > 100_000:
        assert len(answers) <= 3


async def test_a_client_that_leaves_with_requests_in_the_pipe_is_noticed(
    start_engine: Start, start_router: Start
) -> None:
    engine = await start_engine(hang)
    served = await start_router(engine)

    for rest in ([post(URL, {**CHAT, "user": "x" * 500_000})], [post(URL, CHAT)] * 500):
        async with raw_client(served.port) as client:
            await client.send(post(URL, CHAT))
            await until(lambda: engine.busy == 1)
            sending = asyncio.create_task(client.send(*rest))
            await asyncio.sleep(0.2)
            assert engine.busy == 1
            sending.cancel()
            client.reset()
        await until(lambda: engine.busy == 0 and served.router.core.admission.in_flight == 0)


async def test_many_offers_to_upgrade_are_declined(plain: Plain) -> None:
    request = GET[:-2] + H2C + b"\r\n"

    assert len(await all_answers(plain, request * 101, count=101)) == 101


async def test_a_body_that_nobody_reads_is_not_taken_for_a_request(plain: Plain) -> None:
    async with raw_client(plain.port) as client:
        await client.send(post("/ignore", b"GET /echo HTTP/1.1\r\n\r\n" * 50_000), GET)
        first = await read_answer(client.reader)
        assert await client.reader.read(-1) == b""

    assert (first.body, first.headers["connection"]) == (b"ignored", "close")


# Refusals


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        post("/echo", CHAT, b"transfer-encoding: chunked\r\n"),
        post("/echo", CHAT, b"content-length: 3\r\n"),
        post("/echo", CHAT).replace(b"content-length: ", b"content-length: -"),
        post("/echo", CHAT).replace(b"content-length: ", b"content-length: +"),
        post("/echo", CHAT).replace(b"content-length: ", b"content-length: 99999999999999999999"),
        b"POST /echo HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /echo HTTP/1.1\r\ntransfer-encoding: gzip\r\n\r\n",
        b"POST /echo HTTP/1.1\r\ntransfer-encoding: chunked, identity\r\n\r\n" + LAST_CHUNK,
        b"GET /echo HTTP/1.1\r\nx y: 1\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nx : 1\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nx: a\r\n folded\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nx: a\x00b\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nx: a\nhost: b\r\n\r\n",
        b"GET /echo HTTP/1.1\nhost: x\n\n",
        "GET /ëcho HTTP/1.1\r\nhost: x\r\n\r\n".encode(),
        b"CONNECT engine:8000 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
async def test_broken_framing_is_refused_and_the_connection_closed(request_bytes: bytes, plain: Plain) -> None:
    assert code(await plain.all(request_bytes)) == "400 bad_request"
    assert set(plain.application.ended) <= {"/echo"}


async def test_a_body_that_breaks_behind_the_beginning_of_its_answer_cuts_it(plain: Plain) -> None:
    async with raw_client(plain.port) as client:
        await client.send(b"POST /early HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"x"))
        await client.reader.readuntil(chunk(b"early"))
        await client.send(b"zz\r\n")

        assert await client.reader.read(-1) == b""
    await plain.ended("/early")


async def test_the_head_of_a_talkative_client_is_not_too_large(plain: Plain) -> None:
    headers = b"".join(b"x-stainless-%d: %b\r\n" % (i, b"x" * 250) for i in range(80))

    assert await all_answers(plain, GET[:-2] + headers + b"\r\n", count=1) == [["GET", "/echo", "", ""]]


async def test_a_client_that_never_stops_sending_is_told_and_cut_in_the_end(start_router: Start) -> None:
    served = await start_router(max_body_bytes=10, body_timeout=1, linger=0.2)

    async with raw_client(served.port) as client:
        await client.send(b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999999\r\n\r\n")
        flooding = asyncio.create_task(flood(client))
        reply = await read_answer(client.reader)
        async with asyncio.timeout(20):
            await flooding

    assert reply.status == 413


async def test_a_slow_upload_is_let_finish_though_it_was_answered(start_router: Start) -> None:
    served = await start_router(max_body_bytes=10, keepalive_timeout=0.5, linger=1.0)

    # By a client that reads only when it has sent all, as many do.
    async with raw_client(served.port) as client:
        # So that the connection has been idle, and would be closed for that.
        await client.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await read_answer(client.reader)).status == 200
        await client.send(b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 2000\r\n\r\n")
        for _ in range(20):
            await client.send(b"x" * 100)
            await asyncio.sleep(0.1)
        reply = await read_answer(client.reader)

    assert (reply.status, reply.headers["connection"]) == (413, "close")


@pytest.mark.parametrize("behind", [b"garbage\r\n\r\n", post(URL, {**CHAT, "user": "x" * 500_000})[:300_000]])
async def test_what_follows_answers_that_are_read_slowly_does_not_cost_them(
    behind: bytes, start_engine: Start, start_router: Start
) -> None:
    served = await start_router(await start_engine(raw(LARGE)), linger=0.1)
    read = b""

    async with raw_client(served.port, receive_buffer=4096) as client:
        await client.send(post(URL, CHAT) * 6)
        await client.send(behind)
        while piece := await client.reader.read(2**16):
            read += piece
            await asyncio.sleep(0.02)

    assert read.count(b"HTTP/1.1 200 OK\r\n") == read.count(LARGE.partition(b"\r\n\r\n")[2]) == 6


async def test_a_client_that_reads_is_not_cut_while_another_request_of_its_runs(
    start_engine: Start, start_router: Start
) -> None:
    async def script(request: Received, line: Line) -> None:
        if b"last" in request.body:
            await asyncio.sleep(5)
        await line.send(LARGE)

    served = await start_router(await start_engine(script), write_stall_timeout=2)
    read = b""

    async with raw_client(served.port, receive_buffer=4096) as client:
        await client.send(post(URL, CHAT) * 4 + post(URL, {**CHAT, "user": "last"}))
        while read.count(b"HTTP/1.1 200 OK") < 5 or not read.endswith(LARGE[-100:]):
            piece = await client.reader.read(2**16)
            assert piece, len(read)
            read += piece
            await asyncio.sleep(0.06)


async def test_who_half_closes_and_does_not_read_is_let_go(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(raw(json_response(COMPLETION | {"user": "x" * 20_000})))
    served = await start_router(engine, write_stall_timeout=0.5, keepalive_timeout=60)

    async def ask(client: Line) -> None:
        before = len(served.lines)
        await client.send(post(URL, CHAT))
        await until(lambda: len(served.lines) > before)

    async with raw_client(served.port, receive_buffer=4096) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await ask(client)
        connections = connections_of(served)
        [protocol] = connections
        # The kernel takes some megabytes; then a little is left, too little to be told that the buffer is full.
        while not (left := protocol.transport.get_write_buffer_size()):
            await ask(client)
        assert (left < 64 * 1024, protocol.drained) == (True, None)
        client.writer.write_eof()
        await until(lambda: not connections and served.router.core.admission.in_flight == 0)


async def flood(line: Line) -> None:
    """Send until the connection is gone."""
    with suppress(ConnectionError):
        while True:
            await line.send(b"x" * 65536)


@pytest.mark.parametrize("rest", [b"\r\n", GET, b"garbage\r\n\r\n"])
@pytest.mark.parametrize("first", [GET, GET.replace(b"host: x", b"host: x\r\nconnection: close")])
async def test_what_follows_a_request_does_not_cost_it_its_answer(first: bytes, rest: bytes, hasty: Plain) -> None:
    assert (await hasty.all(first + rest)).startswith(b"HTTP/1.1 200 OK\r\n")


# Answers


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_connection_close_is_granted(version: bytes, plain: Plain) -> None:
    request = GET.replace(b"1.1", version).replace(b"host: x", b"host: x\r\nconnection: close")

    head, _, body = (await plain.all(request)).partition(b"\r\n\r\n")

    assert b"\r\nconnection: close" in head
    assert orjson.loads(body) == ["GET", "/echo", "", ""]


async def test_an_answer_without_a_length_is_chunked(plain: Plain) -> None:
    said = await plain.all(b"GET /chunks HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")

    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 299 \r\n")
    assert b"transfer-encoding: chunked" in head
    assert body == chunk(b"a" * 20) + chunk(b"b") + LAST_CHUNK


async def test_to_an_older_client_the_end_of_the_connection_is_the_end_of_the_answer(plain: Plain) -> None:
    head, _, body = (await plain.all(b"GET /chunks HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")).partition(b"\r\n\r\n")

    assert (b"transfer-encoding" in head, b"connection: close" in head) == (False, True)
    assert body == b"a" * 20 + b"b"


@pytest.mark.parametrize("target", [b"HEAD /echo", b"HEAD /chunks", b"GET /no_content"])
async def test_an_answer_without_a_body_leaves_the_connection_in_order(target: bytes, plain: Plain) -> None:
    async with raw_client(plain.port) as client:
        await client.send(target + b" HTTP/1.1\r\nhost: x\r\n\r\n" + GET)
        head = await client.reader.readuntil(b"\r\n\r\n")
        following = await read_answer(client.reader)

    assert b"transfer-encoding" not in head
    assert orjson.loads(following.body) == ["GET", "/echo", "", ""]


@pytest.mark.parametrize("path", ["nothing", "half", "more_than_said", "less_than_said", "two_lines", "missing"])
async def test_an_application_that_fails_never_looks_complete(
    path: str, plain: Plain, caplog: pytest.LogCaptureFixture
) -> None:
    said = await plain.all(f"GET /{path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())

    await plain.ended(f"/{path}")
    assert b"set-cookie" not in said
    assert not said.endswith(LAST_CHUNK)
    length = said.partition(b"content-length: ")[2][:1]
    assert length == b"" or len(said.partition(b"\r\n\r\n")[2]) < int(length)
    assert bool(caplog.records) == (path not in ("nothing", "half"))


async def test_an_answer_that_nobody_reads_can_be_given_up(plain: Plain) -> None:
    async with raw_client(plain.port, receive_buffer=4096) as client:
        await client.send(b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\n")
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await plain.ended("/flood")


async def test_what_an_application_says_after_the_end_is_not_said(plain: Plain) -> None:
    async with raw_client(plain.port) as client:
        await client.send(b"GET /too_often HTTP/1.1\r\nhost: x\r\n\r\n" + GET)
        first, second = await read_answer(client.reader), await read_answer(client.reader)

    assert first.body == b"once"
    assert orjson.loads(second.body) == ["GET", "/echo", "", ""]


async def test_an_answer_carries_the_date(plain: Plain) -> None:
    # The server makes it within the first tenth of a second.
    await asyncio.sleep(0.15)
    async with raw_client(plain.port) as client:
        await client.send(GET)
        reply = await read_answer(client.reader)

    assert reply.headers["date"].endswith(" GMT")


# Deadlines


async def test_a_connection_that_asks_nothing_is_closed(hasty: Plain) -> None:
    async with raw_client(hasty.port) as client, asyncio.timeout(20):
        assert await client.reader.read(-1) == b""


async def test_a_head_that_does_not_end_is_refused_however_it_drips(hasty: Plain) -> None:
    async with raw_client(hasty.port) as client:
        drip = asyncio.create_task(dripping(client, b"GET /echo HTTP/1.1\r\n" + b"x: 1\r\n" * 90))
        async with asyncio.timeout(20):
            said = await client.reader.read(-1)
        drip.cancel()

    assert code(said) == "408 request_timeout"
    assert hasty.application.ended == []


async def dripping(line: Line, data: bytes) -> None:
    with suppress(ConnectionError):
        for i in range(0, len(data), 8):
            await line.send(data[i : i + 8])
            await asyncio.sleep(0.05)


async def test_an_idle_connection_is_closed_without_a_word(hasty: Plain) -> None:
    async with raw_client(hasty.port) as client, asyncio.timeout(20):
        for _ in range(5):
            await asyncio.sleep(0.5)
            await client.send(GET)
            assert (await read_answer(client.reader)).status == 200
        assert await client.reader.read(-1) == b""


async def test_an_answer_may_take_longer_than_any_of_these(hasty: Plain) -> None:
    async with raw_client(hasty.port) as client, asyncio.timeout(20):
        for path, body in ((b"/echo", b'["GET","/echo","",""]'), (b"/late", b"late")):
            await client.send(b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % path)
            assert (await read_answer(client.reader)).body == body


async def test_half_a_request_behind_another_does_not_cost_that_one_its_answer(hasty: Plain) -> None:
    async with raw_client(hasty.port) as client, asyncio.timeout(20):
        await client.send(b"GET /late HTTP/1.1\r\nhost: x\r\n\r\nGET /ec")

        assert (await read_answer(client.reader)).body == b"late"


# Departures


def half_close(line: Line) -> None:
    """As for vLLM, a client that has said its last word has left."""
    line.writer.write_eof()


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_noticed(plain: Plain) -> None:
    async with raw_client(plain.port) as client:
        await client.send(post("/echo", b"x" * 1000)[:-1])

    await plain.ended("/echo")


@pytest.mark.parametrize("following", [GET, GET * 3, GET[:10], post("/echo", b"x" * 100)[:-1]])
async def test_a_client_that_leaves_with_more_requests_in_the_pipe_is_noticed(following: bytes, plain: Plain) -> None:
    async with raw_client(plain.port) as client:
        await client.send(b"GET /wait HTTP/1.1\r\nhost: x\r\n\r\n" + following)
        await asyncio.sleep(0.02)

    async with asyncio.timeout(20):
        await plain.ended("/wait")


# Through the router


async def test_a_connection_serves_one_request_after_another(served: Served, engine: FakeEngine) -> None:
    async with raw_client(served.port) as client:
        for body in (CHAT, STREAM, CHAT):
            await client.send(post(URL, body))
            assert (await read_answer(client.reader)).status == 200

    assert len(engine.requests) == 3


async def test_a_connection_survives_a_refusal(served: Served, engine: FakeEngine) -> None:
    async with raw_client(served.port) as client:
        for path, body, status in (
            ("/nope", b"x" * 5_000, 404),
            (URL, b"x" * 500_000, 400),
            ("/v1/models", b"x" * 5_000, 405),
            (URL, CHAT, 200),
        ):
            await client.send(post(path, body))
            reply = await read_answer(client.reader)
            assert (reply.status, reply.headers.get("connection")) == (status, None)

    assert len(engine.requests) == 1


async def test_pipelined_requests_of_all_kinds_are_answered_in_their_order(served: Served, engine: FakeEngine) -> None:
    ids = [f"x-request-id: {i}\r\n".encode() for i in range(4)]
    requests = [post(URL, CHAT, ids[0]), post(URL, STREAM, ids[1]), post("/nope", CHAT, ids[2])]
    requests.append(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n" + ids[3] + b"\r\n")

    async with raw_client(served.port) as client:
        await client.send(b"".join(requests))
        answers = [await read_answer(client.reader) for _ in requests]

    assert [reply.status for reply in answers] == [200, 200, 404, 200]
    assert [reply.headers["x-request-id"] for reply in answers] == ["0", "1", "2", "3"]
    assert answers[1].body.endswith(DONE)
    assert len(engine.requests) == 2


async def test_an_http_1_0_client_gets_its_stream(served: Served) -> None:
    async with raw_client(served.port) as client:
        await client.send(post(URL, STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"))
        reply: Answer = await read_answer(client.reader)

    assert "transfer-encoding" not in reply.headers
    assert reply.body.startswith(b"data: {")
    assert reply.body.endswith(DONE)


async def test_an_offer_of_http_2_is_no_business_of_the_engine(served: Served, engine: FakeEngine) -> None:
    async with raw_client(served.port) as client:
        await client.send(post(URL, CHAT, H2C))
        reply = await read_answer(client.reader)

    assert orjson.loads(reply.body) == COMPLETION
    assert engine.requests[0].body == orjson.dumps(CHAT)
    assert engine.requests[0].names.isdisjoint({"upgrade", "http2-settings", "connection"})


async def test_a_refusal_of_the_protocol_is_counted_and_logged(served: Served) -> None:
    async with raw_client(served.port) as client:
        await client.send(b"nonsense\r\n\r\n")
        reply = await read_answer(client.reader)

    assert [(line["status"], line["code"], line["outcome"]) for line in served.lines] == [
        (400, "bad_request", "refused")
    ]
    assert served.lines[0]["request_id"] == reply.headers["x-request-id"]


def connections_of(served: Served) -> Collection[Any]:
    """Of the server, which has one now, as long as it runs."""
    protocols = [one for one in gc.get_objects() if isinstance(one, ClientConnection)]
    [state] = {id(one._state): one._state for one in protocols if (one._server or ("", 0))[1] == served.port}.values()
    return state.connections


LARGE = json_response(COMPLETION | {"user": "x" * 900_000})


@pytest.mark.parametrize(
    "requests", [[CHAT], [CHAT] * 8, [CHAT] * 8 + [STREAM]], ids=["one", "many", "a stream behind"]
)
async def test_a_client_that_reads_no_answer_holds_nothing(
    requests: list[Any], start_engine: Start, start_router: Start
) -> None:
    async def script(request: Received, line: Line) -> None:
        answer = sse(event(), then=Line.gone) if orjson.loads(request.body).get("stream") else raw(LARGE)
        await answer(request, line)

    engine = await start_engine(script)
    served = await start_router(engine, write_stall_timeout=0.5, keepalive_timeout=0.5)

    async with raw_client(served.port, receive_buffer=4096) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for request in requests:
            await client.send(post(URL, request))
        await until(lambda: engine.requests)
        connections = connections_of(served)
        assert connections
        await until(lambda: not connections and served.router.core.admission.in_flight == 0)

    await until(lambda: engine.busy == 0)


async def test_who_leaves_before_an_answer_could_be_written_did_not_get_it(
    start_engine: Start, start_router: Start
) -> None:
    served = await start_router(await start_engine(raw(LARGE)))

    async with raw_client(served.port, receive_buffer=4096) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(post(URL, CHAT) * 12)
        # One answer is there, and waits for those before it to be read.
        await until(lambda: served.lines)
        before = 0
        while before != len(served.lines) or served.router.core.admission.in_flight != 1:
            before = len(served.lines)
            await asyncio.sleep(0.3)
        client.reset()
        await until(lambda: served.router.core.admission.in_flight == 0)

    assert len(served.lines) == before + 1 < 12
    assert (served.lines[-1]["outcome"], served.lines[-1]["status"]) == ("client_gone", 499)


@pytest.mark.parametrize("script", ["stream", "json"])
async def test_to_an_old_client_a_broken_answer_does_not_look_complete(
    script: str, start_engine: Start, start_router: Start
) -> None:
    """HTTP/1.0 knows no chunks: the end of the connection is the end of the body, unless it is a reset."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    large = raw(head, *[chunk(b"x" * 2**16)] * 40, close=True)
    served = await start_router(await start_engine(large if script == "json" else sse(b"data: {half", then=Line.reset)))

    async with raw_client(served.port) as client:
        await client.send(post(URL, CHAT if script == "json" else STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"))
        with pytest.raises(ConnectionResetError):
            await client.reader.read(-1)


@pytest.mark.parametrize("value", [b"100-continue", b"100-Continue"])
async def test_an_interim_answer_is_given_to_who_waits_for_one(value: bytes, plain: Plain) -> None:
    request = post("/echo", b"x", b"expect: " + value + b"\r\n")
    async with raw_client(plain.port) as client:
        await client.send(request[:-1])
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(request[-1:])
        assert (await read_answer(client.reader)).status == 200
        await client.send(request.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (await read_answer(client.reader)).status == 200
