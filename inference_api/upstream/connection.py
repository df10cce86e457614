"""One connection to a backend, on httptools: writes a request, parses the head, and pushes or buffers the body."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, cast

import httptools
import httpx

from inference_api.models import RawHeaders
from inference_api.routing.backend import Backend
from inference_api.upstream.deadlines import Deadlines, Timeout
from inference_api.upstream.failures import Disconnected, Malformed
from inference_api.upstream.repeated_head import RepeatedHead, RepeatedHeads
from inference_api.upstream.response import ResponseStream
from inference_api.upstream.rewrite import Content

# The body of a request that offers to leave HTTP
OFFER: Content = ()

# An engine's head is below 1 KiB, but vLLM adds 0.1 KiB for each of up to 2,048 embeddings in the format `bytes`. curl
# has the same limit.
MAX_HEAD = 256 * 1024
# Bytes of a body from which a second write costs less than a copy.
_JOIN = 16 * 1024

# Length of a whole chunk without extensions -> offset of its data, and its size line, as uvicorn and hyper write it.
_SIZE_LINES = {len(b"%x" % n) + n + 4: (len(b"%x" % n) + 2, (b"%x\r\n" % n, b"%X\r\n" % n)) for n in range(1, 4096)}
_NO_SIZE = (0, (b"", b""))


class ConnectionPool(Protocol):
    """Holds the connections of one origin.

    `last_read`: loop time of the last read of any of them, heartbeats excluded.
    """

    last_read: float
    heads: RepeatedHeads

    def release(self, connection: "BackendConnection") -> None: ...
    def discard(self, connection: "BackendConnection") -> None: ...


class BackendConnection(asyncio.Protocol):
    """One connection to a backend, and at most one response on it at a time.

    Invariant: its pool holds it as idle if and only if `stream` is None, its last response ended cleanly, and no byte
    has come since.
    """

    __slots__ = (
        "_between_chunks", "_deadlines", "_direct", "_due", "_head_done", "_headers", "_keep_alive", "_last_read",
        "_offered", "_paused", "_poisoned", "_received", "_reused", "_timer", "closed", "idle_since", "loop",
        "on_writable", "parser", "pool", "stream", "transport", "used",
    )  # fmt: skip

    def __init__(self, pool: ConnectionPool, loop: asyncio.AbstractEventLoop) -> None:
        # Connection
        self.pool = pool
        self.loop = loop
        self.transport: asyncio.Transport | None = None
        self.parser: Any = httptools.HttpResponseParser(self)
        # Of a connection that has left HTTP: told whether its write buffer has room
        self.on_writable: Callable[[bool], None] | None = None
        self.used = False
        self.closed = False
        self.idle_since = 0.0
        # Exchange
        self.stream: ResponseStream | None = None
        self._reused = False
        self._received = 0
        # Headers of the head that is being parsed.
        self._headers: RawHeaders | None = None
        self._head_done = False
        # Between two chunks: no byte parsed since the last whole one, or since the head.
        self._between_chunks = False
        # The same, certainly, and there is a sink: a read that is one whole chunk may skip the parser.
        self._direct = False
        self._keep_alive = False
        # The request offers to leave HTTP.
        self._offered = False
        self._poisoned = False
        self._paused = False
        # One timer, kept across exchanges and evaluated only when it fires
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._last_read = 0.0
        self._deadlines = Deadlines()

    # Exchange

    def exchange(
        self, head: bytes, body: Content, timeout: Timeout, deadline: float | None, backend: Backend | None = None
    ) -> ResponseStream:
        """Write a request; the response begins at the returned stream. `deadline`: loop time of its end.

        Only with OFFER for a body may the backend leave HTTP: after a 101 the body is all that it sends.
        """
        transport = self.transport
        assert transport is not None
        self._reused, self.used = self.used, True
        self._received = 0
        self._head_done = self._keep_alive = self._between_chunks = self._direct = self._offered = False
        stream = self.stream = ResponseStream(self, backend)
        self._headers = stream.headers
        now = self._last_read = self.loop.time()
        soonest = self._deadlines.start(now, timeout, deadline)
        # Keep an earlier exchange's timer if it fires in time; setting one costs 3 us.
        if soonest is not None and (self._timer is None or soonest < self._due):
            self._set_timer(soonest)
        if isinstance(body, tuple):
            self._offered = body == OFFER
            transport.writelines([head, *body])
        elif len(body) < _JOIN:
            transport.write(head + body)
        else:
            transport.writelines([head, body])
        return stream

    def abandon(self, stream: ResponseStream) -> None:
        """Close unless `stream` has ended: the rest of its body must never reach the next request."""
        if self.stream is stream:
            self.stream = None
            self.close()

    def pause(self, stream: ResponseStream) -> None:
        if self.stream is stream and not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()

    def resume(self, stream: ResponseStream) -> None:
        if self.stream is stream and self._paused and self.transport is not None:
            self._paused = False
            # Silence during the reader's pause does not count against the backend.
            self._last_read = self.loop.time()
            self.transport.resume_reading()

    @property
    def is_out(self) -> bool:
        """Whether an operator has taken the backend out whose answer it carries."""
        stream = self.stream
        return stream is not None and stream.backend is not None and stream.backend.is_out

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._disarm()
        self.pool.discard(self)
        if self.transport is not None:
            # Not close(): that waits for a stuck backend to read the rest of a request.
            self.transport.abort()

    def fail(self, error: httpx.TransportError) -> None:
        """Close, and fail the response with `error`."""
        stream, self.stream = self.stream, None
        self.close()
        if stream is not None:
            stream.fail(error)

    def write(self, data: bytes) -> None:
        """Write to a backend that has left HTTP."""
        if self.transport is not None and not self.closed:
            self.transport.write(data)

    # asyncio.Protocol

    def pause_writing(self) -> None:
        if self.on_writable is not None:
            self.on_writable(False)

    def resume_writing(self) -> None:
        if self.on_writable is not None:
            self.on_writable(True)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        stream = self.stream
        if stream is None:
            self.close()  # bytes without a request
            return
        if self._direct:
            # Engines write an event as one chunk: passed to the client unchanged, without the parser.
            at, sizes = _SIZE_LINES.get(len(data), _NO_SIZE)
            if at and data[:at] in sizes and data[-2:] == b"\r\n":
                if not stream.sink.data_received(data[at:-2], False, data):  # type: ignore[union-attr]
                    self._last_read = self.pool.last_read = self.loop.time()
                return
        before = self._last_read, self.pool.last_read
        self._last_read = self.pool.last_read = self.loop.time()
        fresh = not self._received
        self._received += len(data)
        if fresh and (known := self.pool.heads.newest) is not None and (read := known.read(data)) is not None:
            self._whole(stream, known, *read)
        elif self._parse(stream, data, fresh):
            self._last_read, self.pool.last_read = before

    def _parse(self, stream: ResponseStream, data: bytes, fresh: bool) -> bool | None:
        """Parse a read; True: it held heartbeats only."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self._leave_http(stream, data[exc.args[0] :])
        except httptools.HttpParserError as exc:
            if not stream.complete:
                self.fail(Malformed(f"the backend sent {_reason(exc)}"))
                return None
            # The bytes after a complete response are invalid; the response itself is good.
            self._poisoned = True
        if not self._head_done:
            if self._received > MAX_HEAD:
                self.fail(Malformed(f"the backend sent a response head of more than {MAX_HEAD} bytes"))
            return None
        if stream.complete:
            if fresh and stream.status == 200 and self._keep_alive and not self._poisoned:
                self.pool.heads.parsed(data, stream.headers)
            self._end_exchange()
        # The parser may have taken part of a chunk's size line, but never its line break.
        self._direct = self._between_chunks and stream.sink is not None and data.endswith(b"\r\n")
        return stream.deliver()

    def _whole(self, stream: ResponseStream, known: RepeatedHead, headers: RawHeaders, body: bytes) -> None:
        """Deliver a whole answer with a known head, without parsing."""
        stream.status = 200
        stream.headers = headers
        stream.known = known
        stream.pieces.append(body)
        stream.size = len(body)
        stream.complete = self._head_done = self._keep_alive = True
        self._headers = None
        if not stream.head.done():
            stream.head.set_result(None)
        self._end_exchange()

    def connection_lost(self, exc: Exception | None) -> None:
        stream, self.stream = self.stream, None
        self.close()
        if stream is None:
            return
        if self._head_done and not stream.framed and exc is None:
            # RFC 9112 6.3: without a length, the end of the connection ends the body.
            stream.complete = True
            stream.deliver()
        else:
            message = "the backend closed the connection"
            waited = self.loop.time() - self._last_read
            stream.fail(Disconnected(message, received=self._received, reused=self._reused, waited=waited))

    # httptools callbacks; feed_data turns their exceptions into HttpParserError

    def on_message_begin(self) -> None:
        if self.stream is None or self.stream.complete:
            self._poisoned = True

    def on_header(self, name: bytes, value: bytes) -> None:
        # Otherwise a trailer, or part of an unsolicited message.
        if self._headers is not None:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        stream = self.stream
        if self._poisoned or stream is None:
            return
        status = self.parser.get_status_code()
        if status == 101 and self._offered:
            self._take_head(stream, status)
            # No message of HTTP follows, whatever the parser makes of it.
            self._poisoned = True
            return
        if status == 101 or status < 100 or status > 599:
            raise ValueError(f"an answer with the status {status}")
        headers = stream.headers
        # Counted as in RFC 9113 6.5.2: a header costs more than its bytes.
        size = 32 * len(headers) + self._received
        if size > MAX_HEAD and sum([len(name) + len(value) + 32 for name, value in headers]) > MAX_HEAD:
            raise ValueError(f"a response head of more than {MAX_HEAD} bytes")
        if status < 200:
            headers.clear()
            return
        names = dict(headers)
        coding = names.get(b"transfer-encoding")
        # `identity` (RFC 2616) means no transfer coding.
        coded = coding is not None and coding.lower() != b"identity"
        stream.framed = coded or b"content-length" in names or status in (204, 304)
        self._between_chunks = coding == b"chunked"
        self._take_head(stream, status)

    def _take_head(self, stream: ResponseStream, status: int) -> None:
        stream.status = status
        self._headers = None
        self._head_done = True
        if not stream.head.done():
            stream.head.set_result(None)

    def _leave_http(self, stream: ResponseStream, data: bytes) -> None:
        """From now on all bytes are the body, without an end or a time limit; `data`: those after the head."""
        self._deadlines = Deadlines()
        self._disarm()
        self.parser = _Opaque(stream)
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if not self._poisoned and self.stream is not None:
            self.stream.pieces.append(body)
            self.stream.size += len(body)

    def on_chunk_header(self) -> None:
        self._between_chunks = False

    def on_chunk_complete(self) -> None:
        self._between_chunks = True

    def on_message_complete(self) -> None:
        if self._head_done and not self._poisoned and self.stream is not None:
            self.stream.complete = True
            self._keep_alive = self.parser.should_keep_alive()

    def _end_exchange(self) -> None:
        """The response is complete: return the connection if the request is written and no surplus byte was read."""
        self.stream = None
        transport = self.transport
        assert transport is not None
        if self._paused:
            self._paused = False
            transport.resume_reading()
        if self._keep_alive and not self._poisoned and transport.get_write_buffer_size() == 0:
            self.pool.release(self)
        else:
            self.close()

    # Timers

    def _set_timer(self, due: float) -> None:
        self._disarm()
        self._due = due
        self._timer = self.loop.call_at(due, self._expire)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        if self.stream is None:
            return
        now = self.loop.time()
        error = self._deadlines.expired(now, self._head_done, self._silent_since())
        if error is not None:
            self.fail(error)
        elif (soonest := self._deadlines.soonest(now, self._head_done, self._silent_since())) is not None:
            self._set_timer(soonest)

    def _silent_since(self) -> float | None:
        """None before the head, and while the reader pauses: silence does not count then."""
        return self._last_read if self._head_done and not self._paused else None

    def __repr__(self) -> str:
        return f"<BackendConnection {'closed' if self.closed else 'idle' if self.stream is None else 'active'}>"


class _Opaque:
    """In place of the parser: what is no HTTP is passed on as it is."""

    def __init__(self, stream: ResponseStream) -> None:
        self._stream = stream

    def feed_data(self, data: bytes) -> None:
        if data:
            self._stream.pieces.append(data)
            self._stream.size += len(data)


def _reason(exc: httptools.HttpParserError) -> str:
    if isinstance(exc.__context__, ValueError):
        return str(exc.__context__)
    return f"no valid HTTP/1.1 response ({exc})"
