"""The fault laboratory: a router between engines that fail byte by byte and clients that behave as badly."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import orjson

from tests.conftest import Served
from tests.fakes import (
    LAST_CHUNK,
    STREAM,
    FakeEngine,
    Line,
    Received,
    Script,
    chunk,
    event,
    post,
    raw_client,
    until,
)
from tests.faults.quiescence import Quiescence

Pods = Callable[..., Awaitable[list[FakeEngine]]]

URL = "/v1/chat/completions"
# An event stream whose end is the end of the connection.
UNFRAMED_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
OLD_HEAD = b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
ERROR_EVENT = b"event: error\ndata: "


class Lab:
    """Starts engines and routers, and knows what has to be quiet in the end."""

    def __init__(
        self, start_engine: Callable[..., Any], start_router: Callable[..., Any], quiescence: Quiescence
    ) -> None:
        self._start_engine = start_engine
        self._start_router = start_router
        self.quiescence = quiescence

    async def engine(self, script: Script | None = None) -> FakeEngine:
        engine: FakeEngine = await self._start_engine(script)
        return engine

    async def router(self, *engines: FakeEngine | Script, **settings: Any) -> Served:
        """A router of these engines; a script stands for an engine that follows it."""
        started = [e if isinstance(e, FakeEngine) else await self.engine(e) for e in engines]
        served: Served = await self._start_router(*started, **settings)
        if started:
            # It asks its engines once for what only they know.
            await until(lambda: served.router.core.fleet.models["m"].max_model_len is not None)
        self.quiescence.begin()
        return served

    @property
    def engines(self) -> list[FakeEngine]:
        return self.quiescence.engines


async def talk(served: Served, *parts: bytes) -> bytes:
    """Every byte that the router says to these, until it closes the connection."""
    async with raw_client(served.port) as client, asyncio.timeout(10):
        with suppress(ConnectionError):
            await client.send(*parts)
        return await client.reader.read(-1)


async def broken_stream(served: Served, **more: Any) -> bytes:
    """The body of a stream that the router cuts, with its chunks' framing taken off; it must not be complete."""
    said = await talk(served, post(URL, STREAM | more))
    head, _, framed = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"\r\ntransfer-encoding: chunked" in head
    assert not framed.endswith(LAST_CHUNK)
    return unchunked(framed)


def unchunked(framed: bytes) -> bytes:
    body = b""
    while framed:
        size, _, rest = framed.partition(b"\r\n")
        length = int(size, 16)
        body += rest[:length]
        framed = rest[length + 2 :]
    return body


def told(body: bytes) -> tuple[bytes, str | None]:
    """What came before the router's own error event, and that event's code; None if there is none."""
    passed, mark, data = body.partition(ERROR_EVENT)
    if not mark:
        return passed, None
    assert data.endswith(b"\n\n")
    document = orjson.loads(data)
    assert document["code"] == document["error"]["code"]
    return passed, document["code"]


def refusal_of(said: bytes) -> tuple[int, str]:
    """The (status, code) of a refusal that is whole, in the envelope, and the last word on its connection."""
    head, _, body = said.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head
    document = orjson.loads(body)
    assert set(document["error"]) == {"message", "type", "param", "code"}
    return int(head[9:12]), document["error"]["code"]


def outcomes(served: Served) -> list[str]:
    return [line["outcome"] for line in served.lines]


# Scripts


def answers(*scripts: Script) -> Script:
    """The first request gets the first script, and so on; the last one is for all that follow."""
    left = list(scripts)

    async def script(request: Received, line: Line) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(request, line)

    return script


def flooding(piece: bytes, head: bytes) -> Script:
    """The head, and then that piece as a chunk for as long as anybody takes it."""

    async def script(request: Received, line: Line) -> None:
        await line.send(head)
        while True:
            await line.send(chunk(piece))

    return script


def holding(release: Awaitable[Any], then: Script) -> Script:
    """Nothing until the release; then that script."""

    async def script(request: Received, line: Line) -> None:
        await release
        await then(request, line)

    return script


def events(count: int) -> list[bytes]:
    return [event(f"word{i} ") for i in range(count)]
