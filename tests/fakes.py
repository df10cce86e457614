"""What stands in for the world: engines scripted byte by byte on real sockets, and clients that misbehave.

These engines say only what a test scripts, even what no engine should; the one that answers the whole API is
inference_api.demo.engine.
"""

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx
import orjson

from tests.ports import free_port


class Received(NamedTuple):
    """A request as an engine got it; header names as sent."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    # Which connection of the engine it came on, from 1.
    connection: int

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    @property
    def names(self) -> set[str]:
        return {key.lower() for key, _ in self.headers}


class Line:
    """One accepted connection, as a script sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        self.reader = reader
        self.writer = writer
        self.number = number

    async def send(self, *parts: bytes) -> None:
        """Write each part by itself and let it go out."""
        for part in parts:
            if self.writer.is_closing():
                # uvloop's own word for it is a RuntimeError.
                raise ConnectionResetError("the peer has left")
            self.writer.write(part)
            await self.writer.drain()
            await asyncio.sleep(0)

    @property
    def left(self) -> bool:
        """Whether the peer has closed the connection and all that it sent was read."""
        return self.writer.is_closing() or self.reader.at_eof()

    async def gone(self) -> None:
        """Wait until the peer has closed the connection."""
        with suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    def reset(self) -> None:
        """Close with RST."""
        raw = self.writer.get_extra_info("socket")
        if raw is not None:  # else it is closed already
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def close(self) -> None:
        self.writer.close()


Script = Callable[[Received, Line], Awaitable[None]]


class FakeEngine:
    """A raw HTTP/1.1 server, by default on a free port of 127.0.0.1; with a `certificate` it speaks TLS.

    `script` answers every POST, `page` every GET; that is a list of models by default.

    `requests` are the POSTs it got, `asked` the targets of the GETs, `connections` how many it accepted, `open` how
    many are open now, `busy` how many POSTs it is answering.
    """

    def __init__(
        self, script: Script | None = None, host: str = "127.0.0.1", port: int = 0, certificate: Path | None = None
    ) -> None:
        self.script: Script = script or answer
        self.page: Script = raw(json_response(MODELS))
        self.host = host
        self.requests: list[Received] = []
        self.asked: list[str] = []
        self.connections = 0
        self.open = 0
        self.busy = 0
        self.port = port or free_port()
        self._tls: ssl.SSLContext | None = None
        if certificate is not None:
            self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._tls.load_cert_chain(certificate)
        self._stopped = False
        self._server: asyncio.Server | None = None
        self._tasks: dict[asyncio.Task[None], int] = {}

    async def __aenter__(self) -> Self:
        self._stopped = False
        self._server = await asyncio.start_server(self._accept, self.host, self.port, ssl=self._tls)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Refuse new connections, and reset the open ones."""
        self._stopped = True
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def clients(self) -> dict[asyncio.Task[None], int]:
        """The tasks of its open connections, with the port at the other end."""
        return dict(self._tasks)

    @property
    def url(self) -> str:
        return f"http{'s' * (self._tls is not None)}://{self.host}:{self.port}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks[task] = (writer.get_extra_info("peername") or ("", 0))[1]
        self.connections += 1
        self.open += 1
        line = Line(reader, writer, self.connections)
        try:
            if self._stopped:  # taken by the loop before the end, and come to us after it
                line.reset()
            while not writer.is_closing():
                await self.serve(await read_request(reader, line.number), line)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except asyncio.CancelledError:
            line.reset()
        finally:
            del self._tasks[task]
            self.open -= 1
            writer.close()

    async def serve(self, request: Received, line: Line) -> None:
        """Answer one request."""
        if request.method == "GET":
            self.asked.append(request.target)
            await self.page(request, line)
            return
        self.requests.append(request)
        self.busy += 1
        try:
            await self.script(request, line)
        finally:
            self.busy -= 1


async def read_request(reader: asyncio.StreamReader, connection: int = 0) -> Received:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
    length = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
    return Received(method, target, headers, await reader.readexactly(length), connection)


# Answers

MODELS = {"object": "list", "data": [{"id": "m", "object": "model", "max_model_len": 1024}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
COMPLETION = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": USAGE,
}
DONE = b"data: [DONE]\n\n"
SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: x\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


def json_response(document: Any, status: str = "200 OK", headers: bytes = b"") -> bytes:
    body = orjson.dumps(document)
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + headers + b"\r\n" + body


def event(text: str = "hi", **more: Any) -> bytes:
    delta = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [delta]}
    return b"data: " + orjson.dumps(chunk | more) + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


async def answer(request: Received, line: Line) -> None:
    """What a well-behaved engine does."""
    if b'"stream":true' in request.body.replace(b" ", b""):
        usage = event(choices=[], usage=USAGE)
        await line.send(SSE_HEAD, *(chunk(event(f"word{i} ")) for i in range(5)), chunk(usage + DONE) + LAST_CHUNK)
    else:
        await line.send(json_response(COMPLETION))


def sse(*events: bytes, then: Callable[[Line], Any] = lambda line: None) -> Script:
    """A script: the head of an event stream, these bytes as one chunk each, and then whatever `then` does."""

    async def script(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD, *map(chunk, events))
        await asyncio.sleep(0.02)
        result = then(line)
        if isinstance(result, Coroutine):
            await result

    return script


def raw(*parts: bytes, close: bool = False) -> Script:
    """A script: exactly these bytes, and the end of the connection if `close`."""

    async def script(request: Received, line: Line) -> None:
        await line.send(*parts)
        if close:
            line.close()

    return script


async def hang(request: Received, line: Line) -> None:
    """Take the request and say nothing until the peer gives up."""
    await line.gone()
    line.close()


class ScriptedServer(FakeEngine):
    """A raw HTTP/1.1 server whose script answers every request, GET too: a registry, or an engine seen by a probe."""

    async def serve(self, request: Received, line: Line) -> None:
        self.requests.append(request)
        await self.script(request, line)


# Clients


@asynccontextmanager
async def raw_client(port: int, *, receive_buffer: int | None = None) -> AsyncIterator[Line]:
    """A client on a raw socket."""
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock)
    line = Line(reader, writer, 0)
    try:
        yield line
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def post(path: str, document: Any, headers: bytes = b"") -> bytes:
    """The bytes of a POST request; `document` is JSON, or bytes as they are."""
    body = document if isinstance(document, bytes) else orjson.dumps(document)
    head = b"POST %s HTTP/1.1\r\nhost: router\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    return head % (path.encode(), len(body)) + headers + b"\r\n" + body


def request_for(engine: FakeEngine, body: bytes = b"{}", **extensions: Any) -> httpx.Request:
    """A POST to an engine, for a transport; `extensions` are httpx's."""
    return httpx.Request("POST", engine.url + "/v1/chat/completions", content=body, extensions=extensions)


async def body_of(stream: AsyncIterable[bytes]) -> bytes:
    return b"".join([data async for data in stream])


async def ask(
    transport: httpx.AsyncBaseTransport, engine: FakeEngine, body: bytes = b"{}", **extensions: Any
) -> tuple[int, bytes]:
    """POST straight to an engine, and read its answer to the end."""
    async with asyncio.timeout(10):
        response = await transport.handle_async_request(request_for(engine, body, **extensions))
        assert isinstance(response.stream, httpx.AsyncByteStream)
        return response.status_code, await body_of(response.stream)


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
STREAM = {**CHAT, "stream": True}


def form(*parts: bytes) -> bytes:
    """A multipart body with the boundary B; each part is its header lines, an empty line, and its content."""
    return b"".join(b"--B\r\n" + part + b"\r\n" for part in parts) + b"--B--\r\n"


class Answer(NamedTuple):
    """A response as a raw client got it; `body` is without the chunks' framing."""

    status: int
    headers: dict[str, str]
    body: bytes


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """The next response on a connection, by its Content-Length, its chunks, or the end of the connection."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip("\r\n").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    status = int(first.split(" ")[1])
    if status < 200:
        return Answer(status, headers, b"")
    if headers.get("transfer-encoding") != "chunked":
        length = headers.get("content-length")
        return Answer(status, headers, await (reader.read(-1) if length is None else reader.readexactly(int(length))))
    body = b""
    while size := int(await reader.readline(), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readline()
    return Answer(status, headers, body)


# Waiting


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait until the condition holds; fail if it does not within a time that is generous on a busy machine."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not come true in time"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def in_background(coroutine: Coroutine[Any, Any, Any]) -> AsyncIterator[asyncio.Task[Any]]:
    """Run beside the body; afterwards wait for its own end."""
    task = asyncio.create_task(coroutine)
    try:
        yield task
    finally:
        async with asyncio.timeout(10):
            await task


# A backend that cannot be reached, or not for long


@contextmanager
def full_listener(host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """A URL where nobody answers a SYN: its listener has no room for another connection."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((host, port))
        listener.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield f"http://{host}:{listener.getsockname()[1]}/"


class ImpatientEngine(FakeEngine):
    """A FakeEngine that closes a connection on which no request has come for `keepalive` seconds, as uvicorn does.

    `executed`: the requests it worked on; one that comes after the end of its connection is not one of them.
    """

    def __init__(self, script: Script | None = None, keepalive: float = 5.0) -> None:
        super().__init__(self._execute)
        self.executed: list[Received] = []
        self._inner = script or answer
        self._keepalive = keepalive
        self._timers: dict[int, asyncio.TimerHandle] = {}

    async def _execute(self, request: Received, line: Line) -> None:
        if request.connection in self._timers:
            self._timers.pop(request.connection).cancel()
        if line.writer.is_closing():
            raise ConnectionResetError("too late")
        self.executed.append(request)
        await self._inner(request, line)
        self._timers[request.connection] = asyncio.get_running_loop().call_later(self._keepalive, line.close)
