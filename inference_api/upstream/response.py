"""One response of a backend as it arrives: a head, then a body that is pushed to a sink, or pulled."""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

import httpx

from inference_api.models import RawHeaders
from inference_api.upstream.repeated_head import RepeatedHead

# What may wait in memory for a reader that pulls.
HIGH_WATER = 64 * 1024


class Source(Protocol):
    """The connection that a response arrives on."""

    loop: asyncio.AbstractEventLoop

    def pause(self, stream: "ResponseStream") -> None: ...
    def resume(self, stream: "ResponseStream") -> None: ...
    def abandon(self, stream: "ResponseStream") -> None: ...


class Sink(Protocol):
    """Takes a response body as it arrives. Called from the event loop, must not raise."""

    def data_received(self, data: bytes, complete: bool, frame: bytes | None = None) -> bool | None:
        """Body bytes of one read; `complete`: the message ended with them (they may be empty).

        `frame`: what was read, if that is one whole chunk with `data` in it. True: all of it was a sign of life, and
        nothing of the answer; for the clocks it has not come.
        """
        ...

    def broken(self, error: httpx.TransportError) -> None:
        """The body ended too early; nothing follows."""
        ...


class ResponseStream(httpx.AsyncByteStream):
    """One response as it arrives: first `head`, then a body that is pushed to a sink, or pulled."""

    __slots__ = (
        "_waiter", "_wanted", "complete", "connection", "error", "framed", "head", "headers", "known", "pieces", "sink",
        "size", "status",
    )  # fmt: skip

    def __init__(self, connection: Source) -> None:
        self.connection = connection
        # Head
        self.status = 0
        self.headers: RawHeaders = []
        self.known: RepeatedHead | None = None
        # Its end does not depend on the end of the connection.
        self.framed = True
        self.head: asyncio.Future[None] = connection.loop.create_future()
        # Body
        self.pieces: list[bytes] = []
        self.size = 0
        self.complete = False
        self.error: httpx.TransportError | None = None
        self.sink: Sink | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._wanted = 0

    # Called by the connection

    def deliver(self) -> bool | None:
        """Pass one read on: to the sink, which says whether it was a sign of life, or to the waiting reader."""
        if self.sink is not None:
            data = self.take()
            return self.sink.data_received(data, self.complete) if data or self.complete else None
        if self.complete or self.size > self._wanted:
            if self.size > HIGH_WATER and not self.complete:
                self.connection.pause(self)
            self._wake()
        return None

    def fail(self, error: httpx.TransportError) -> None:
        self.error = error
        if not self.head.done():
            self.head.set_exception(error)
            # Whoever waited may have been cancelled; the error is then nobody's to retrieve.
            self.head.exception()
        elif self.sink is not None:
            self.sink.broken(error)
        self._wake()

    # Called by the reader

    def push_to(self, sink: Sink) -> None:
        """From now on give the body to `sink` as it arrives, beginning with what is here already."""
        self.sink = sink
        self.resume()
        if self.pieces or self.complete:
            self.deliver()
        if self.error is not None:
            sink.broken(self.error)

    def pause(self) -> None:
        self.connection.pause(self)

    def resume(self) -> None:
        self.connection.resume(self)

    def take(self) -> bytes:
        """What has come of the body and was not taken yet."""
        pieces = self.pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self.size = 0
        return data

    async def collect(self, limit: int) -> tuple[bytes, bool]:
        """The body, and True, if it ends within `limit` bytes; else what came so far, and False.

        Raises httpx.TransportError when it breaks off.
        """
        while not self.complete and self.size <= limit:
            # No wake-up, and no pause, for each of the reads that it takes.
            await self._arrival(limit)
        return self.take(), self.complete

    async def peek(self, wanted: int = 0) -> bytes:
        """What has come of the body, once that is more than `wanted` bytes, or all; it stays to be read.

        Raises httpx.TransportError when the body breaks off.
        """
        while not self.complete and self.size <= wanted:
            await self._arrival(wanted)
        return b"".join(self.pieces)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            if self.pieces:
                data = self.take()
                self.resume()
                yield data
            elif self.complete:
                return
            else:
                await self._arrival()

    async def aclose(self) -> None:
        """Done with it. If the response had not ended, its connection is closed: the engine stops generating."""
        self.connection.abandon(self)

    async def _arrival(self, wanted: int = 0) -> None:
        """Until more than so many bytes are here, or the body is complete."""
        if self.error is not None:
            raise self.error
        self._wanted = wanted
        self.resume()
        self._waiter = self.connection.loop.create_future()
        await self._waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
