"""One response of a backend as it arrives: a head, then a body that is pushed to a sink, or pulled."""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

import httpx

from inference_api.models import RawHeaders
from inference_api.routing.backend import Backend
from inference_api.upstream.repeated_head import RepeatedHead

# Bytes buffered for a reader that pulls.
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
        """Body bytes of one read, possibly none; `complete`: the message ended with them.

        `frame`: the read itself, if it is one whole chunk of `data`. Returns True if it held only heartbeats
        (comments, pings), which do not reset IDLE_TIMEOUT.
        """
        ...

    def broken(self, error: httpx.TransportError) -> None:
        """The body broke off; nothing follows."""
        ...


class ResponseStream(httpx.AsyncByteStream):
    """One response as it arrives: first `head`, then a body that is pushed to a sink, or pulled."""

    __slots__ = (
        "_waiter", "_wanted", "backend", "complete", "connection", "error", "framed", "head", "headers", "known",
        "pieces", "sink", "size", "status",
    )  # fmt: skip

    def __init__(self, connection: Source, backend: Backend | None = None) -> None:
        self.connection = connection
        # Whose answer it is, if an operator may take that out
        self.backend = backend
        # Head
        self.status = 0
        self.headers: RawHeaders = []
        self.known: RepeatedHead | None = None
        # The end of the body does not depend on the end of the connection.
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
        """Deliver one read to the sink, or to the waiting reader. Returns as `Sink.data_received`."""
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
            # The reader may have been cancelled; mark the error as retrieved.
            self.head.exception()
        elif self.sink is not None:
            self.sink.broken(error)
        self._wake()

    # Called by the reader

    def push_to(self, sink: Sink) -> None:
        """Push the body to `sink` as it arrives, the buffered part first."""
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
        """The buffered bytes of the body."""
        pieces = self.pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self.size = 0
        return data

    async def collect(self, limit: int) -> tuple[bytes, bool]:
        """The body and True if it ends within `limit` bytes; otherwise the bytes so far and False.

        Raises httpx.TransportError if the body breaks off.
        """
        while not self.complete and self.size <= limit:
            # One wake-up for all reads, and no pause between them.
            await self._arrival(limit)
        return self.take(), self.complete

    async def peek(self, wanted: int = 0) -> bytes:
        """More than `wanted` bytes of the body, or all of it, without consuming them.

        Raises httpx.TransportError if the body breaks off.
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
        """Release the response. Before its end, this closes the connection, and the engine stops generating."""
        self.connection.abandon(self)

    async def _arrival(self, wanted: int = 0) -> None:
        """Wait for more than so many bytes, or the end of the body."""
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
