"""Moves one body from a backend to the client, chunk by chunk: the hot loop of a stream.

The bytes of one read of the backend's connection are written to the client within the same turn of the event loop, and
no task wakes for them. The ASGI `send` is a coroutine that suspends only while the client's write buffer is full, so it
is stepped by hand. When it suspends, the backend's connection is paused, and the pump's task wakes to complete it:
back-pressure with at most one read in memory. (docs/adr/0002 has the measurement.)
"""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Generator, Sequence
from time import perf_counter
from typing import Any

import httpx
from starlette.types import Send

from inference_api.models import Direct, Outcome, Tap, of_status
from inference_api.relay.events import EventTracker
from inference_api.upstream.failures import outcome_of
from inference_api.upstream.response import ResponseStream


class Pump:
    """A Sink that writes to an ASGI `send`. `events` is given for a stream of server-sent events."""

    __slots__ = (
        "_alive", "_backlog", "_before_end", "_clock", "_direct", "_events", "_failure", "_feed", "_outcome", "_send",
        "_stalled", "_status", "_stream", "_taps", "_turn", "_write_stall", "first_at", "size",
    )  # fmt: skip

    def __init__(
        self,
        send: Send,
        taps: Sequence[Tap],
        events: EventTracker | None,
        status: int,
        write_stall: float,
        before_end: Callable[[], None] = lambda: None,
        direct: Direct | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        # Configuration
        self._send = send
        self._taps = taps
        self._events = events
        self._status = status
        self._write_stall = write_stall
        self._before_end = before_end
        self._direct = direct
        self._clock = clock
        # Per body: bytes passed on, and the time of the first, or of a stream's first token (0: none)
        self.size = 0
        self.first_at = 0.0
        # Gets each piece, and returns whether it holds only heartbeats. None: not needed.
        self._feed: Callable[[bytes], bool] | None = self._begin
        self._alive = False
        self._outcome: Outcome | None = None
        self._failure: Exception | None = None
        self._stalled: _Suspended | None = None
        self._backlog: list[tuple[bytes, bool]] = []
        self._turn: asyncio.Future[None] | None = None
        self._stream: ResponseStream | None = None

    async def run(self, stream: httpx.AsyncByteStream | AsyncIterator[bytes], first: bytes | None = None) -> Outcome:
        """Relay `first`, even if it is empty, and then the stream to its end. Returns the outcome."""
        try:
            if first is not None:
                if first:
                    self._note(first, False)
                await self.write(first)
            if isinstance(stream, ResponseStream):
                await self._push(stream)
            else:
                await self.pull(stream)
        except TimeoutError:
            return Outcome.CLIENT_GONE
        finally:
            # It may be a method of this object, and the stream refers to it: rings, left for the garbage collector.
            self._feed = self._stream = None
            if self._stalled is not None:
                self._stalled.close()
        assert self._outcome is not None
        return self._outcome

    @property
    def stalled(self) -> bool:
        """Whether a write waits for a client that does not read, and may be lost."""
        return self._stalled is not None

    async def write(self, data: bytes) -> None:
        """Write without ending the body. Raises TimeoutError if the client does not read."""
        async with asyncio.timeout(self._write_stall):
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> Outcome:
        """End a body that broke off with nothing missing. Returns the outcome. Raises TimeoutError as `write`."""
        self._before_end()
        async with asyncio.timeout(self._write_stall):
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        return self.verdict()

    # Pushed: Sink

    def data_received(self, data: bytes, complete: bool, frame: bytes | None = None) -> bool:
        direct = self._direct
        if self._stalled is not None:
            self._backlog.append((data, complete))
            return False
        try:
            if frame is not None and direct is not None and (write := direct.frames) is not None:
                # `_note` and `push` inlined: the fast path of nearly every event.
                self.size += len(data)
                feed = self._feed
                alive = feed is not None and feed(data)
                for tap in self._taps:
                    tap.chunk(data)
                write(frame)
                return alive
            self._alive = False
            if data or complete:
                data = self._note(data, complete)
            if data or complete:
                self._pass_on(data, not complete or self._end(), complete)
            return self._alive
        except Exception as exc:
            # Of a tap or a filter: raised in the backend's connection it would count as a fault of the backend.
            self._failure = exc
            self._wake()
            return False

    def _pass_on(self, data: bytes, more: bool, complete: bool) -> None:
        direct = self._direct
        try:
            if direct is not None and direct.push(data, more):
                if complete:
                    self._wake()
                return
            sending = self._send({"type": "http.response.body", "body": data, "more_body": more})
            waits_for = sending.send(None)  # type: ignore[attr-defined]
        except StopIteration:
            if complete:
                self._wake()
        except Exception as exc:
            self._failure = exc
            self._wake()
        else:
            self._stalled = _Suspended(sending, waits_for)  # type: ignore[arg-type]
            if self._stream is not None:
                self._stream.pause()
            self._wake()

    def broken(self, error: httpx.TransportError) -> None:
        self._outcome = _outcome_in_body(error)
        self._wake()

    async def _push(self, stream: ResponseStream) -> None:
        loop = asyncio.get_running_loop()
        self._stream = stream
        stream.push_to(self)
        while True:
            if self._failure is not None:
                raise self._failure
            if self._stalled is not None:
                await self._catch_up(self._stalled)
                stream.resume()
            elif self._outcome is not None:
                return
            else:
                self._turn = loop.create_future()
                await self._turn

    async def _catch_up(self, stalled: "_Suspended") -> None:
        async with asyncio.timeout(self._write_stall):
            await stalled
        while self._backlog:
            async with asyncio.timeout(self._write_stall):
                data, complete = self._backlog.pop(0)
                data = self._note(data, complete)
                more = not complete or self._end()
                await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._stalled = None

    def _wake(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None and not turn.done():
            turn.set_result(None)

    # Pulled: from any other httpx transport

    async def pull(self, stream: AsyncIterable[bytes]) -> None:
        try:
            async for data in stream:
                if data := self._note(data, False):
                    await self.write(data)
        except httpx.TransportError as exc:
            self._outcome = _outcome_in_body(exc)
            return
        rest = self._note(b"", True)
        async with asyncio.timeout(self._write_stall):
            await self._send({"type": "http.response.body", "body": rest, "more_body": self._end()})

    # Both

    def _note(self, data: bytes, complete: bool) -> bytes:
        """Note a piece, which may be an empty last one, and return the part of it that goes to the client."""
        feed = self._feed
        self._alive = bool(data) and feed is not None and feed(data)
        self._show(data)
        return data

    def _show(self, data: bytes) -> None:
        if data:
            self.size += len(data)
            for tap in self._taps:
                tap.chunk(data)

    def _begin(self, data: bytes) -> bool:
        """Follow the pieces up to the first byte, or the first token of a stream; later ones cost less to follow."""
        events = self._events
        if events is None:
            self.first_at = self._clock()
            self._feed = None
            return False
        alive = events.begin(data)
        if events.tokens:
            self.first_at = self._clock()
            self._feed = events.feed
        return alive

    def _end(self) -> bool:
        """End the body. Returns whether it stays incomplete, so that the server cuts the connection.

        A stream that stopped early must not look complete.
        """
        self._outcome = self.verdict()
        if self._outcome is Outcome.TRUNCATED:
            return True
        self._before_end()
        return False

    def verdict(self) -> Outcome:
        """The outcome of a body that is at its end."""
        events = self._events
        if events is None or self._status >= 300:
            return of_status(self._status)
        events.finish()
        return events.verdict()


def _outcome_in_body(error: httpx.TransportError) -> Outcome:
    outcome = outcome_of(error)
    # Other transports raise one error for both.
    return Outcome.IDLE_TIMEOUT if outcome is Outcome.FIRST_BYTE_TIMEOUT else outcome


class _Suspended:
    """A coroutine that was started by hand and suspended; awaiting this completes it in the awaiting task."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], waits_for: Any) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        try:
            yield self._waits_for
        except BaseException as exc:
            self._coroutine.throw(exc)
            raise
        yield from self._coroutine.__await__()

    def close(self) -> None:
        self._coroutine.close()
