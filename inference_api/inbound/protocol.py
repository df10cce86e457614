"""The protocol class that uvicorn is given: HTTP/1.1 from clients, on httptools, with the limits a router needs.

uvicorn's own has no deadline for a request head or body, loses the body of a request that offers `Upgrade: h2c`, does
not tell a pipelined request that its client left, and answers bad framing with text (docs/adr/0005). What is relied on
in uvicorn: that it makes one of these per connection with `config`, `server_state` and `app_state`, keeps the
connections and tasks that are put into `server_state`, and calls `shutdown` on each connection when it stops.
"""

import asyncio
import fcntl
import math
import re
import socket
import struct
import sys
import termios
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

import httptools
import uvicorn
from starlette.types import Scope
from uvicorn.server import ServerState

from inference_api.errors import BadRequest, HeadersTooLarge, Overloaded, RequestTimeout, RouterError, render
from inference_api.inbound.cycle import STATUS_LINES, Cycle, Memo, Refused
from inference_api.inbound.gate import refusal

# gunicorn's and Envoy's order of magnitude; an SDK sends 20 headers of 1 KiB together.
_MAX_HEADERS = 100
_MAX_HEAD = 32 * 1024
# Pipelined requests that may wait, and how much of bodies may come before their requests have their turn. Reading goes
# on while they wait, so that the end of the connection is noticed; what is beyond is not answered.
_MAX_WAITING = 100
_MAX_UNREAD = 64 * 1024
# Of a chunked body: bytes that are neither content nor the 16 that a chunk may take; Go's server allows as many.
_MAX_OVERHEAD = 16 * 1024
_CHUNK_OVERHEAD = 16
# A client that is still sending a body nobody wants gets this long to read why, after the last byte of either side.
_LINGER = 2.0
# Bytes that a client must take within `write_stall` to count as one that reads, unless that is all there is.
_LEAST_READ = 64 * 1024
_LENGTH_LINE = re.compile(rb"\r\ncontent-length:[ \t]*+([0-9]{1,12})\r\n", re.IGNORECASE)


class Deadlines(NamedTuple):
    """Seconds for a client to send a request head, to send a body, to be idle between requests, and not to read."""

    header: float = 10.0
    body: float = 60.0
    keepalive: float = 75.0
    write_stall: float = 60.0


# error, request id, size of the answer's body
OnRefusal = Callable[[RouterError, str, int], None]


class _Enough(Exception):
    """Raised in a parser callback: nothing that follows is answered."""


class _Refusal(Exception):
    """Raised in a parser callback: the request is not to be parsed on."""

    def __init__(self, error: RouterError) -> None:
        super().__init__(error.message)
        self.error = error


class State(ServerState):
    """What uvicorn shares among its connections, and whether each is to end with its next answer."""

    draining = False

    def __init__(self) -> None:
        super().__init__()
        self._rendered: tuple[Any, bytes] = (None, b"")

    def default_lines(self) -> bytes:
        """What the server adds to every response; it makes a new list when the date changes."""
        headers = self.default_headers
        if self._rendered[0] is not headers:
            self._rendered = headers, b"".join([b"%b: %b\r\n" % pair for pair in headers])
        return self._rendered[1]


class _KnownHead(Memo):
    """A request head that was parsed, and accepted, on this connection: the next one often differs in its length only.

    Where every other byte is the same, so is all that parsing would say. Comparing costs a tenth of parsing.
    """

    __slots__ = ("_after", "_before", "_headers", "_length_at", "_scope")

    def __init__(self, before: bytes, after: bytes, scope: Scope) -> None:
        super().__init__()
        self._before = before
        self._after = after
        self._scope = {name: value for name, value in scope.items() if name not in ("extensions", "state")}
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        self._length_at = [name for name, _ in self._headers].index(b"content-length")

    @classmethod
    def learn(cls, data: bytes, scope: Scope) -> "_KnownHead | None":
        """From the bytes of one read and what they were parsed to; None unless they are one whole request."""
        end = data.find(b"\r\n\r\n") + 4
        lengths = list(_LENGTH_LINE.finditer(data, 0, end))
        if len(lengths) != 1 or len(data) - end != int(lengths[0][1]):
            return None
        first, last = lengths[0].span(1)
        return cls(data[:first], data[last:end], scope)

    def body_at(self, data: bytes) -> int:
        """Where the body begins if `data` is one whole request with this head, else 0."""
        first = len(self._before)
        last = data.find(b"\r", first, first + 13)
        length = data[first:last]
        if not (data.startswith(self._before) and length.isdigit() and data.startswith(self._after, last)):
            return 0
        at = last + len(self._after)
        return at if len(data) - at == int(length) else 0

    def scope(self, length: int) -> Scope:
        headers = self._headers.copy()
        headers[self._length_at] = (b"content-length", b"%d" % length)
        return {**self._scope, "headers": headers, "state": {}}


class Protocol(asyncio.Protocol):
    """One client connection. Requests on it are answered in their order, one at a time."""

    __slots__ = (
        "_app", "_client", "_deadlines", "_deaf", "_head_open", "_head_size", "_headers", "_heard", "_idle_since",
        "_idle_timer", "_known", "_learn_at", "_linger_until", "_max_connections", "_on_refusal", "_overhead",
        "_parsed", "_parser", "_read_paused", "_reading", "_replayed_whole", "_replaying", "_running", "_server",
        "_stall_timer", "_state", "_timer", "_unwritten", "_upgrading", "_url", "_waiting", "drained", "loop",
        "transport",
    )  # fmt: skip

    def __init__(
        self,
        deadlines: Deadlines,
        on_refusal: OnRefusal,
        config: uvicorn.Config,
        server_state: State,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        max_connections: float = math.inf,
    ) -> None:
        # Configuration
        self.loop = _loop or asyncio.get_running_loop()
        self._app = cast(Any, config.loaded_app)
        self._deadlines = deadlines
        self._on_refusal = on_refusal
        self._max_connections = max_connections
        # Shared with the server
        self._state = server_state
        # Connection
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._client: tuple[str, int] | None = None
        self._server: tuple[str, int] | None = None
        self._read_paused = False
        self._deaf = False
        # Set while the client's buffer is full: done when it has drained
        self.drained: asyncio.Future[None] | None = None
        self._running: Cycle | None = None
        self._waiting: list[Cycle] = []
        # Request being read
        self._parser = httptools.HttpRequestParser(self)
        self._reading: Cycle | None = None
        self._head_open, self._head_size = False, 0
        # Of a body that takes more than one read: what came beyond its content
        self._overhead = 0
        self._upgrading = self._replaying = self._replayed_whole = False
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._known: _KnownHead | None = None
        # Heads parsed, and at which of them one is to be learnt: a client that varies them costs nothing soon.
        self._parsed = 0
        self._learn_at = 2
        # Timers
        self._timer: asyncio.TimerHandle | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._idle_since = 0.0
        self._stall_timer: asyncio.TimerHandle | None = None
        # Bytes that the client had not taken when that was set
        self._unwritten = 0
        # After the last answer: whether anything came lately, and until when it matters
        self._heard, self._linger_until = False, 0.0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._state.connections.add(cast(Any, self))
        self._client = _address(transport.get_extra_info("peername"))
        self._server = _address(transport.get_extra_info("sockname"))
        if len(self._state.connections) > self._max_connections:
            # Not even an answer: to wait until it is read would hold what there is too little of.
            self._deaf = True
            self._on_refusal(Overloaded("The router has as many connections as it takes."), uuid.uuid4().hex, 0)
            self.transport.abort()
            return
        self._timer = self.loop.call_later(self._deadlines.header, self._late)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            self._heard = True
            return
        # The parser holds nothing of another request: neither of a head, nor of one that a read ended within.
        between = self._reading is None and not self._head_open and not self._head_size
        if between and self._known is not None and (body_at := self._known.body_at(data)) and self._has_place():
            self._begin(self._known, data[body_at:])
            return
        if self._head_open or self._reading is None:
            self._head_size += len(data)
        else:
            self._overhead += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError as exc:
            cause = exc.__context__
            if isinstance(cause, _Enough):
                self._take_no_more()
            else:
                self._refuse(cause.error if isinstance(cause, _Refusal) else BadRequest(f"Not valid HTTP/1.1: {exc}."))
            return
        if self._parsed >= self._learn_at:
            self._learn(data if between else b"")
        if self._head_open:
            if self._head_size > 2 * _MAX_HEAD:
                self._refuse(HeadersTooLarge(f"The request head is larger than {_MAX_HEAD} bytes."))
            elif self._timer is None:
                self._timer = self.loop.call_later(self._deadlines.header, self._late)
        elif self._reading is not None:
            self._wait_for_more(self._reading)

    def _has_place(self) -> bool:
        """Whether one more request may wait, if it has to."""
        if self._running is None or not self._waiting:
            return True
        return len(self._waiting) < _MAX_WAITING and sum([one.unread for one in self._waiting]) <= _MAX_UNREAD

    def _wait_for_more(self, cycle: Cycle) -> None:
        """The body of a request takes more than one read."""
        if self._overhead > _MAX_OVERHEAD:
            self._refuse(BadRequest("The body has chunk extensions or trailers that are too large."))
            return
        if self._timer is None:
            self._timer = self.loop.call_later(self._deadlines.body, self._late)
        if cycle.unread > _MAX_UNREAD:
            if cycle is self._running:
                # It waits in the kernel until the application asks for more.
                self.pause_reading()
            else:
                self._waiting.pop()
                self._take_no_more()

    def _learn(self, data: bytes) -> None:
        self._learn_at *= 2
        newest = self._waiting[-1] if self._waiting else self._running
        if newest is not None and newest.repeatable:
            self._known = _KnownHead.learn(data, newest.scope)

    def eof_received(self) -> None:
        # A client that closes its half has left, as for every engine behind us.
        self._hang_up()
        return None

    def pause_writing(self) -> None:
        if self.drained is None:
            self.drained = self.loop.create_future()
            self._watch_stall()
        if self._running is not None:
            self._running.frames = None

    def resume_writing(self) -> None:
        if self._stall_timer is not None and not self.transport.is_closing():
            self._stall_timer.cancel()
            self._stall_timer = None
        drained, self.drained = self.drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._state.connections.discard(cast(Any, self))
        for timer in (self._timer, self._idle_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        for cycle in (self._running, self._reading, *self._waiting):
            if cycle is not None:
                cycle.disconnect()
        self.resume_writing()

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as exc:
                data = data[exc.args[0] :]
                self._decline_upgrade()
            else:
                return

    def _decline_upgrade(self) -> None:
        """RFC 9110 7.8: an offer to upgrade may be ignored. httptools stops at it, so another parser goes on."""
        self._parser = httptools.HttpRequestParser(self)
        framing = [pair for pair in self._headers if pair[0] in (b"content-length", b"transfer-encoding")]
        lines = [b"%b: %b\r\n" % pair for pair in framing]
        self._replaying = True
        self._replayed_whole = False
        self._parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(lines) + b"\r\n")
        self._replaying = self._upgrading = False
        if self._replayed_whole or not framing:
            self.on_message_complete()

    # httptools callbacks

    def on_message_begin(self) -> None:
        if not self._replaying:
            self._head_open = True
            self._url = b""
            self._headers = []

    def on_url(self, url: bytes) -> None:
        if not self._replaying:
            self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        # What comes after the head is a trailer, and no header.
        if self._head_open:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._replaying:
            return
        size, self._head_size = self._head_size, 0
        self._head_open = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        parser, headers = self._parser, self._headers
        if len(headers) > _MAX_HEADERS:
            raise _Refusal(HeadersTooLarge(f"The request has more than {_MAX_HEADERS} headers."))
        if (size > _MAX_HEAD or not size) and len(self._url) + sum(
            len(name) + len(value) for name, value in headers
        ) > _MAX_HEAD:
            raise _Refusal(HeadersTooLarge(f"The request head is larger than {_MAX_HEAD} bytes."))
        version = parser.get_http_version()
        error = refusal(parser.get_method(), self._url, headers, version)
        if error is not None:
            raise _Refusal(error)
        target, _, query = self._url.partition(b"?")
        if target[:1] != b"/":
            target = _origin_form(target)
        path = target.decode("ascii")
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "method": parser.get_method().decode("ascii"),
            "scheme": "http",
            "path": unquote(path) if "%" in path else path,
            "raw_path": target,
            "query_string": query,
            "root_path": "",
            "headers": headers,
            "client": self._client,
            "server": self._server,
            "state": {},
        }
        if not self._has_place():
            raise _Enough
        self._upgrading = parser.should_upgrade()
        expects_continue = version == "1.1" and dict(headers).get(b"expect", b"").lower() == b"100-continue"
        keep_alive = version == "1.1" and (parser.should_keep_alive() or self._upgrading) and not self._state.draining
        self._parsed += 1
        cycle = self._reading = Cycle(self, scope, keep_alive, expects_continue)
        self._queue(cycle)

    def _begin(self, known: _KnownHead, body: bytes) -> None:
        """A request that is here as a whole, and whose head needs no parsing."""
        cycle = Cycle(self, known.scope(len(body)), not self._state.draining, False, known)
        cycle.feed(body)
        cycle.end_of_body()
        self._queue(cycle)

    def _queue(self, cycle: Cycle) -> None:
        if self._running is None:
            self._start(cycle)
        else:
            self._waiting.append(cycle)

    def _take_no_more(self) -> None:
        """No further request is read. What was sent behind the last answer is to be sent again, as ever when a server
        closes (RFC 9112, 9.3.2)."""
        self._deaf = True
        self._reading = None
        self._cancel_timer()
        last = self._waiting[-1] if self._waiting else self._running
        assert last is not None
        last.keep_alive = False

    def on_chunk_header(self) -> None:
        self._overhead -= _CHUNK_OVERHEAD

    def on_body(self, body: bytes) -> None:
        if self._overhead:
            self._overhead -= len(body)
        if self._reading is not None:
            self._reading.feed(body)

    def on_message_complete(self) -> None:
        if self._replaying:
            self._replayed_whole = True
        if self._upgrading or self._reading is None or self._replaying:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._overhead = 0
        self._reading.end_of_body()
        self._reading = None

    # Used by the cycle

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def default_headers(self) -> list[tuple[bytes, bytes]]:
        return self._state.default_headers

    def default_lines(self) -> bytes:
        return self._state.default_lines()

    def pause_reading(self) -> None:
        if not self._read_paused:
            self._read_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self._read_paused:
            self._read_paused = False
            self.transport.resume_reading()

    def cycle_ended(self, cycle: Cycle) -> None:
        """The response is complete: on to the next request, or the end of the connection."""
        self._running = None
        self._state.total_requests += 1
        if self.transport.is_closing():
            return
        if not cycle.keep_alive:
            self._close(unread=cycle.more_body or self._deaf)
            return
        if self._waiting:
            self._start(self._waiting.pop(0))
        else:
            self._idle_since = self.loop.time()
            if self._idle_timer is None:
                self._idle_timer = self.loop.call_later(self._deadlines.keepalive, self._idle)
        self.resume_reading()

    def forget(self, task: "asyncio.Task[None]") -> None:
        self._state.tasks.discard(task)

    def cut(self, to_the_end: bool = False) -> None:
        """Close without completing the response; `to_the_end`: that of the connection would be taken for its end."""
        if self.drained is not None or to_the_end:
            self._reset()
        else:
            self._hang_up()

    def _reset(self) -> None:
        # What is buffered will not be read; with RST the kernel does not go on offering it.
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _hang_up(self) -> None:
        """Close, once the client has read what it is to read; if it does."""
        self.transport.close()
        if self._stall_timer is None and self.transport.get_write_buffer_size():
            self._watch_stall()

    def _unread(self) -> int:
        """Bytes that the client has not taken: ours, and the kernel's, which takes and gives in large pieces."""
        try:
            kernel = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        except (OSError, ValueError):
            kernel = bytes(4)
        return self.transport.get_write_buffer_size() + int.from_bytes(kernel, sys.byteorder)

    def _watch_stall(self) -> None:
        self._unwritten = self._unread()
        self._stall_timer = self.loop.call_later(self._deadlines.write_stall, self._stalled)

    def _stalled(self) -> None:
        self._stall_timer = None
        if self._unwritten - self._unread() >= min(_LEAST_READ, self._unwritten):
            self._watch_stall()
        else:
            self._reset()

    # Called by the server

    def shutdown(self) -> None:
        """Close when idle, else after the response under way."""
        if self._running is not None:
            self._running.keep_alive = False
        elif self._deaf:
            self._linger_until = self.loop.time()
        else:
            self._hang_up()

    # Ends

    def _start(self, cycle: Cycle) -> None:
        self._running = cycle
        task = cycle.task = self.loop.create_task(self._app(cycle.scope, cycle.receive, cycle.send))
        self._state.tasks.add(task)
        task.add_done_callback(cycle.ended)

    def _refuse(self, error: RouterError) -> None:
        """Answer what the application will never see, and close: what follows cannot be told from it."""
        self._deaf = True
        self._cancel_timer()
        if self._waiting and self._waiting[-1] is self._reading:
            self._waiting.pop()
        cycle = self._waiting[-1] if self._waiting else self._running
        if cycle is not None and cycle is not self._reading:
            # What is wrong came after sound requests; they keep their answers.
            cycle.keep_alive = False
            return
        request_id = uuid.uuid4().hex
        status, headers, body = render(error, request_id)
        if cycle is None:
            self._on_refusal(error, request_id, len(body))
        else:
            # The application counts it; to it the request ends here.
            cycle.refusal = Refused(error, request_id, len(body))
            cycle.disconnect()
            if cycle.response_started:
                self.cut()
                return
        head = b"".join(b"%b: %b\r\n" % pair for pair in [*self.default_headers(), *headers])
        self.write(STATUS_LINES[status] + head + b"connection: close\r\n\r\n" + body)
        self._close(unread=True)

    def _close(self, unread: bool) -> None:
        if not unread or not self.transport.can_write_eof():
            self._hang_up()
            return
        # To close with bytes unread would reset the connection, and the answer might never be seen.
        self._deaf = True
        self.transport.write_eof()
        self.resume_reading()
        self._cancel_timer()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._heard = False
        self._linger_until = self.loop.time() + self._deadlines.body
        self._timer = self.loop.call_later(_LINGER, self._lingered)

    def _lingered(self) -> None:
        self._timer = None
        unwritten = self.transport.get_write_buffer_size()
        if unwritten and self._stall_timer is None:
            self._watch_stall()
        if unwritten or (self._heard and self.loop.time() < self._linger_until):
            self._heard = False
            self._timer = self.loop.call_later(_LINGER, self._lingered)
        else:
            self.transport.abort()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._head_open or self._reading is not None:
            self._refuse(RequestTimeout("The request did not arrive in time."))
        elif self._running is None:
            self._hang_up()

    def _idle(self) -> None:
        self._idle_timer = None
        left = self._deadlines.keepalive
        if self._running is None and not self._head_open:
            left = self._idle_since + left - self.loop.time()
        if left > 0.001:
            self._idle_timer = self.loop.call_later(left, self._idle)
        else:
            self._hang_up()

    def __repr__(self) -> str:
        return f"<Protocol for {self._client}: {'idle' if self._running is None else 'busy'}>"


def protocol_factory(
    deadlines: Deadlines, on_refusal: OnRefusal, max_connections: float = math.inf
) -> Callable[..., Protocol]:
    """What uvicorn calls for every connection. `on_refusal` hears of requests that never reach the application."""

    def make(**keywords: Any) -> Protocol:
        return Protocol(deadlines, on_refusal, max_connections=max_connections, **keywords)

    return make


def _origin_form(target: bytes) -> bytes:
    """RFC 9112 3.2.2: a client that takes the router for a proxy names scheme and host as well."""
    return b"/" + target.partition(b"://")[2].partition(b"/")[2]


def _address(name: Any) -> tuple[str, int] | None:
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) and len(name) >= 2 else None
