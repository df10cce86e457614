"""The protocol class for uvicorn: HTTP/1.1 from clients, on httptools, with the limits of a router.

uvicorn's own has no deadline for a request head or body, loses the body of a request that offers `Upgrade: h2c`, does
not report a disconnect to pipelined requests, and answers bad framing with text (docs/adr/0005). Assumptions about
uvicorn: it creates one instance per connection with `config`, `server_state` and `app_state`, keeps the connections and
tasks that are added to `server_state`, and calls `shutdown` on each connection when it stops.
"""

import asyncio
import math
import random
import uuid
from collections.abc import Callable
from typing import Any, cast

import httptools
import uvicorn
from uvicorn.server import ServerState

from inference_api.errors import Overloaded, RequestTimeout, RouterError, render
from inference_api.server.cycle import STATUS_LINES, Cycle, OlderCycle, Rejection
from inference_api.server.flow import Deadlines, Flow
from inference_api.server.foreign import not_http
from inference_api.server.framing import Framing
from inference_api.server.repeated_head import RepeatedHead, RepeatedHeads
from inference_api.server.request_head import scope_of
from inference_api.server.upgrade import DeclinedUpgrade, Upgraded

# Limits of pipelined requests that wait, and of bytes of their bodies. Reading continues while they wait, to notice a
# disconnect; requests beyond the limits are not answered.
_MAX_WAITING = 100
_MAX_UNREAD = 64 * 1024
# Empty lines per read of a chunked body that are checked as its possible end; forms have a few.
_MAX_LOOKS = 100

# error, request id, size of the answer's body
# (error, request id, bytes of the answer, address of the client)
OnRejection = Callable[[RouterError, str, int, tuple[str, int] | None], None]


class _Stop(Exception):
    """Raised in a parser callback to stop reading; later requests are not answered."""


class State(ServerState):
    """The state that connections share; `draining`: each closes with its next answer."""

    draining = False

    def __init__(self) -> None:
        super().__init__()
        self._rendered: tuple[Any, bytes] = (None, b"")

    def default_lines(self) -> bytes:
        """The header lines of every response; uvicorn makes a new list when the date changes."""
        headers = self.default_headers
        if self._rendered[0] is not headers:
            self._rendered = headers, b"".join([b"%b: %b\r\n" % pair for pair in headers])
        return self._rendered[1]


class ClientConnection(Flow):
    """One client connection. Answers its requests in order, one at a time."""

    __slots__ = (
        "_age_timer", "_app", "_blind", "_client", "_expired", "_framing", "_head_open", "_headers", "_heads",
        "_idle_since", "_max_connections", "_on_rejection", "_parser", "_reading", "_running", "_server", "_state",
        "_upgraded", "_upgrading", "_url", "_waiting",
    )  # fmt: skip

    def __init__(
        self,
        deadlines: Deadlines,
        on_rejection: OnRejection,
        config: uvicorn.Config,
        server_state: State,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        max_connections: float = math.inf,
    ) -> None:
        super().__init__(deadlines, _loop or asyncio.get_running_loop())
        # Configuration
        self._app = cast(Any, config.loaded_app)
        self._on_rejection = on_rejection
        self._max_connections = max_connections
        # Shared with the server
        self._state = server_state
        # Connection
        self._client: tuple[str, int] | None = None
        self._server: tuple[str, int] | None = None
        self._running: Cycle | None = None
        self._waiting: list[Cycle] = []
        # Past MAX_CONNECTION_AGE: the next answer is the last.
        self._expired = False
        self._age_timer: asyncio.TimerHandle | None = None
        # Request being read
        self._parser = httptools.HttpRequestParser(self)
        self._reading: Cycle | None = None
        self._framing = Framing()
        # Within a head.
        self._head_open = False
        # The parsed bytes may hold more than one end of a message: ignore everything after the first.
        self._blind = False
        self._upgrading = False
        # Who gets the bytes of a connection that has left HTTP
        self._upgraded: Upgraded | None = None
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._heads = RepeatedHeads()
        self._idle_since = 0.0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._state.connections.add(cast(Any, self))
        self._client = _address(transport.get_extra_info("peername"))
        self._server = _address(transport.get_extra_info("sockname"))
        if len(self._state.connections) > self._max_connections:
            # Abort without a response: lingering would hold the file descriptors that the router lacks.
            self._ignoring = True
            error = Overloaded("The router has as many connections as it takes.")
            self._on_rejection(error, uuid.uuid4().hex, 0, self._client)
            self.transport.abort()
            return
        self._timer = self.loop.call_later(self._deadlines.header, self._time_out)
        if age := self._deadlines.age:
            # Jitter: connections that were opened together must not close together.
            self._age_timer = self.loop.call_later(age * random.uniform(0.9, 1.1), self._expire)

    def data_received(self, data: bytes) -> None:
        if self._ignoring:
            self._received = True
            if self._upgraded is not None:
                self._upgraded.received(data)
            return
        # The parser has no state of another request.
        between = self._reading is None and not self._framing.head
        known = self._heads.newest
        if between and known is not None and (body_at := known.body_at(data)) and self._has_place():
            self._begin(known, data[body_at:])
            return
        try:
            self._feed(data)
        except (httptools.HttpParserError, RouterError, _Stop) as exc:
            cause = exc.__context__ if isinstance(exc, httptools.HttpParserError) else exc
            if isinstance(cause, _Stop):
                self._stop_reading()
            else:
                self._reject(cause if isinstance(cause, RouterError) else not_http(data, exc))
            return
        if self._heads.due:
            newest = self._waiting[-1] if self._waiting else self._running
            repeatable = newest is not None and newest.repeatable
            self._heads.learn(data if between else b"", newest.scope if newest is not None and repeatable else None)
        if self._head_open:
            if self._timer is None:
                self._timer = self.loop.call_later(self._deadlines.header, self._time_out)
        elif self._reading is not None:
            self._wait_for_more(self._reading)

    def _has_place(self) -> bool:
        """Whether one more request may wait."""
        if self._running is None or not self._waiting:
            return True
        return len(self._waiting) < _MAX_WAITING and sum([one.unread for one in self._waiting]) <= _MAX_UNREAD

    def _wait_for_more(self, cycle: Cycle) -> None:
        """Start the deadline of a body that takes more than one read."""
        if self._timer is None:
            self._timer = self.loop.call_later(self._deadlines.body, self._time_out)
        if cycle.unread > _MAX_UNREAD:
            if cycle is self._running:
                # The rest stays in the kernel until the application reads.
                self.pause_reading()
            else:
                self._waiting.pop()
                self._stop_reading()

    def eof_received(self) -> bool:
        """Treat a half-close as a disconnect, as nginx, Envoy and the engines do: the running request is cancelled.

        Answers without further work are still sent, for clients that half-close after their request.
        """
        self.left = True
        if self._upgraded is not None:
            self._upgraded.lost()
            return False
        self._drop_unfinished()
        self._reading = None
        for cycle in (self._running, *self._waiting):
            if cycle is not None:
                cycle.half_closed()
        if self._running is None or self._running.disconnected:
            self._hang_up()
            return False
        self._cancel_timer()
        last = self._waiting[-1] if self._waiting else self._running
        last.keep_alive = False
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._running is not None:
            self._running.frames = None
        if self._upgraded is not None:
            self._upgraded.client_writable(False)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._upgraded is not None:
            self._upgraded.client_writable(True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._state.connections.discard(cast(Any, self))
        super().connection_lost(exc)
        if self._upgraded is not None:
            self._upgraded.lost()
        if self._age_timer is not None:
            self._age_timer.cancel()
        for cycle in (self._running, self._reading, *self._waiting):
            if cycle is not None:
                cycle.disconnect()
        self.resume_writing()

    # What is read

    def _feed(self, data: bytes) -> None:
        """Parse, but never across the end of a message: the parser does not report where the next one begins.

        Raises RouterError, _Stop, or HttpParserError, also as a wrapper of either.
        """
        framing, at, looks = self._framing, 0, 0
        while at < len(data):
            in_body = self._reading is not None
            self._blind = looks == _MAX_LOOKS
            end = len(data) if self._blind else framing.end_of_piece(data, at, in_body)
            piece: bytes | memoryview = data
            if end - at < len(data):
                # No copy: the parser copies what it returns.
                piece = memoryview(data)[at:end]
            at = end
            looks += framing.take(piece, in_body)
            try:
                self._parser.feed_data(piece)
            except httptools.HttpParserUpgrade:
                self._decline_upgrade()
            framing.check_overhead()
            if self._reading is None:
                if self._blind:
                    raise _Stop
                looks = 0

    def _decline_upgrade(self) -> None:
        """Continue with another parser, since httptools stops at an offer to upgrade."""
        declined = DeclinedUpgrade(self, self._headers, self._parser.should_keep_alive())
        self._parser = declined.parser
        self._upgrading = False
        if declined.whole:
            self.on_message_complete()

    # httptools callbacks

    def on_message_begin(self) -> None:
        if self._blind:
            raise _Stop
        self._head_open = True
        self._url = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        # After the head it is a trailer.
        if self._head_open:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        head = self._framing.end_of_head()
        self._head_open = False
        self._cancel_timer()
        parser, headers = self._parser, self._headers
        version = parser.get_http_version()
        scope = scope_of(head, parser.get_method(), self._url, headers, version)
        scope["client"], scope["server"] = self._client, self._server
        if not self._has_place():
            raise _Stop
        values = dict(headers)
        self._framing.begin_body(int(values.get(b"content-length", 0)))
        self._upgrading = parser.should_upgrade()
        expects_continue = version == "1.1" and values.get(b"expect", b"").lower() == b"100-continue"
        keep_alive = parser.should_keep_alive() and not (self._expired or self._state.draining)
        self._heads.parsed()
        kind = Cycle if version == "1.1" else OlderCycle
        cycle = self._reading = kind(self, scope, keep_alive, expects_continue)
        self._queue(cycle)

    def _begin(self, known: RepeatedHead, body: bytes) -> None:
        """Start a complete request with a known head, without parsing."""
        cycle = Cycle(self, known.scope(len(body)), not self._state.draining, False, known)
        cycle.feed(body)
        cycle.end_of_body()
        self._queue(cycle)

    def _queue(self, cycle: Cycle) -> None:
        if self._running is None:
            self._start(cycle)
        else:
            self._waiting.append(cycle)

    def _stop_reading(self) -> None:
        """Read no further request. The client must repeat requests after the last answer, as after every close by a
        server (RFC 9112, 9.3.2)."""
        self._ignoring = True
        self._reading = None
        self._cancel_timer()
        last = self._waiting[-1] if self._waiting else self._running
        assert last is not None
        last.keep_alive = False

    def on_chunk_header(self) -> None:
        self._framing.chunk()

    def on_body(self, body: bytes) -> None:
        self._framing.content(len(body))
        if self._reading is not None:
            self._reading.feed(body)

    def on_message_complete(self) -> None:
        if self._upgrading or self._reading is None:
            return
        self._cancel_timer()
        self._reading.end_of_body()
        self._reading = None

    # Called by the Cycle

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def default_headers(self) -> list[tuple[bytes, bytes]]:
        return self._state.default_headers

    def default_lines(self) -> bytes:
        return self._state.default_lines()

    def cycle_ended(self, cycle: Cycle) -> None:
        """The response is complete: start the next request, or close the connection."""
        self._running = None
        self._state.total_requests += 1
        if self.transport.is_closing():
            return
        if not cycle.keep_alive:
            self._close(unread=cycle.more_body or self._ignoring or bool(self._waiting))
            return
        if self._waiting:
            self._start(self._waiting.pop(0))
        else:
            self._idle_since = self.loop.time()
            if self._idle_timer is None:
                self._idle_timer = self.loop.call_later(self._deadlines.keepalive, self._idle)
        self.resume_reading()

    def upgrade(self, head: bytes, upgraded: Upgraded) -> bool:
        """Write the head of a 101, and leave HTTP. False: the client has sent more than the offer, or has gone."""
        if self._ignoring or self._waiting or self._reading is not None or self._head_open or self.left:
            return False
        self._ignoring = True
        self._upgraded = upgraded
        self.write(head)
        self.resume_reading()
        return True

    def leave(self, cycle: Cycle, cleanly: bool) -> None:
        """End a connection that has left HTTP; `cleanly`: the last bytes reach the client."""
        self._upgraded = None
        self._running = None
        if self.transport.is_closing():
            return
        if cleanly:
            self._close(unread=True)
        else:
            self.cut()

    def forget(self, task: "asyncio.Task[None]") -> None:
        self._state.tasks.discard(task)

    # Called by the server

    def shutdown(self) -> None:
        """Close when idle, else after the current response."""
        if self._upgraded is not None:
            self._upgraded.stop()
        elif self._running is not None:
            self._running.keep_alive = False
        elif self._ignoring:
            self._linger_until = self.loop.time()
        else:
            self._hang_up()

    # Ends

    def _start(self, cycle: Cycle) -> None:
        self._running = cycle
        task = cycle.task = self.loop.create_task(self._app(cycle.scope, cycle.receive, cycle.send))
        self._state.tasks.add(task)
        task.add_done_callback(cycle.ended)

    def _reject(self, error: RouterError) -> None:
        """Answer input that never reaches the application, and close: its end is unknown."""
        self._ignoring = True
        self._cancel_timer()
        self._drop_unfinished()
        cycle = self._waiting[-1] if self._waiting else self._running
        if cycle is not None and cycle is not self._reading:
            # Valid requests before the error are answered first.
            cycle.keep_alive = False
            return
        request_id = uuid.uuid4().hex
        status, headers, body = render(error, request_id)
        if cycle is None:
            self._on_rejection(error, request_id, len(body), self._client)
        else:
            # The application counts it; for it the request ends here.
            cycle.rejection = Rejection(error, request_id, len(body))
            cycle.disconnect()
            if cycle.response_started:
                self.cut()
                return
        head = b"".join(b"%b: %b\r\n" % pair for pair in [*self.default_headers(), *headers])
        self.write(STATUS_LINES[status] + head + b"connection: close\r\n\r\n" + body)
        self._close(unread=True)

    def _drop_unfinished(self) -> None:
        """Drop the incomplete request, which has not started."""
        if self._waiting and self._waiting[-1] is self._reading:
            self._waiting.pop()

    def _time_out(self) -> None:
        self._timer = None
        if self._head_open or self._reading is not None:
            self._reject(RequestTimeout("The request did not arrive in time."))
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

    def _expire(self) -> None:
        """Close with the next answer; an answer that has begun continues, however long it takes."""
        self._expired = True
        # Known heads skip that check.
        self._heads.close()
        last = self._waiting[-1] if self._waiting else self._running
        if last is not None and not last.response_started:
            last.keep_alive = False

    def __repr__(self) -> str:
        return f"<ClientConnection for {self._client}: {'idle' if self._running is None else 'busy'}>"


def connection_factory(
    deadlines: Deadlines, on_rejection: OnRejection, max_connections: float = math.inf
) -> Callable[..., ClientConnection]:
    """The factory that uvicorn calls per connection. `on_rejection` gets requests that never reach the application."""

    def make(**keywords: Any) -> ClientConnection:
        return ClientConnection(deadlines, on_rejection, max_connections=max_connections, **keywords)

    return make


def _address(name: Any) -> tuple[str, int] | None:
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) and len(name) >= 2 else None
