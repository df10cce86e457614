"""One request and its response on a client connection: the `receive` and `send` of ASGI.

Both suspend only on a plain future, so that they can be stepped by hand (`http.disconnect`, `relay.pump`).
"""

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from types import TracebackType
from typing import NamedTuple, NoReturn, Protocol

from starlette.types import Message, Scope

from inference_api.errors import ClientGone, RouterError
from inference_api.models import RawHeaders
from inference_api.server.repeated_head import HeadCache
from inference_api.server.upgrade import Upgraded

logger = logging.getLogger(__name__)

# Bytes of a body from which a second write costs less than a copy.
_JOIN = 16 * 1024


def _status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


STATUS_LINES = {status: _status_line(status) for status in range(100, 600)}


_NO_SCOPE: Scope = {}


class Rejection(NamedTuple):
    """The server's own answer to a request whose rest it could not read."""

    error: RouterError
    request_id: str
    size: int


class Connection(Protocol):
    """The connection, as a Cycle uses it."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    # Set while the write buffer is full: done when it has drained
    drained: asyncio.Future[None] | None
    # The client has half-closed the connection.
    left: bool

    def write(self, data: bytes) -> None: ...
    def resume_reading(self) -> None: ...
    def cut(self, to_the_end: bool = False) -> None: ...
    def default_headers(self) -> RawHeaders: ...
    def default_lines(self) -> bytes: ...
    def cycle_ended(self, cycle: "Cycle") -> None: ...
    def forget(self, task: "asyncio.Task[None]") -> None: ...
    def pause_reading(self) -> None: ...
    def upgrade(self, head: bytes, upgraded: Upgraded) -> bool: ...
    def leave(self, cycle: "Cycle", cleanly: bool) -> None: ...


def client_gone(exc: BaseException | None) -> NoReturn:
    """Turn the cancellation of the running task by a disconnect into ClientGone."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
    raise ClientGone from exc


def cycle_of(function: Callable[..., object]) -> "Cycle | None":
    """The Cycle of this bound `receive` or `send`; None for that of a layer, or of another server."""
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, Cycle) else None


class Cycle:
    """Fed by its ClientConnection, run by its own task."""

    __slots__ = (
        "_body",
        "_chunked",
        "_expects_continue",
        "_head",
        "_left",
        "_news",
        "_protocol",
        "_waiter",
        "_watched",
        "disconnected",
        "frames",
        "gone",
        "head_cache",
        "keep_alive",
        "more_body",
        "rejection",
        "response_complete",
        "response_started",
        "scope",
        "task",
        "unread",
    )  # fmt: skip

    def __init__(
        self,
        protocol: Connection,
        scope: Scope,
        keep_alive: bool,
        expects_continue: bool,
        head_cache: HeadCache | None = None,
    ) -> None:
        self._protocol = protocol
        self.scope = scope
        self.keep_alive = keep_alive
        self.head_cache = head_cache
        self.task: asyncio.Task[None] | None = None
        # Request
        self.disconnected = False
        self.rejection: Rejection | None = None
        self.more_body = True
        self._expects_continue = expects_continue
        self._body: list[bytes] = []
        self.unread = 0
        self._news = False
        self._waiter: asyncio.Future[None] | None = None
        # Whether a disconnect cancels the task; `gone`: it did.
        self._watched = False
        self.gone = False
        # Response
        self.response_started = False
        self.response_complete = False
        # See Direct
        self.frames: Callable[[bytes], None] | None = None
        self._head = b""
        self._chunked = False
        self._left: int | None = None

    # Fed by the protocol

    def feed(self, data: bytes) -> None:
        if self.response_complete:
            return
        self._body.append(data)
        self.unread += len(data)
        self._wake()

    def end_of_body(self) -> None:
        self.more_body = False
        self._wake()

    def disconnect(self) -> None:
        if self.disconnected:
            return
        self.disconnected = True
        self.frames = None
        self._wake()
        if self._watched:
            self._cancel()

    def half_closed(self) -> None:
        """The client half-closed, which counts as a disconnect if the request is being processed."""
        if self.more_body or self._watched or self._waiter is not None:
            self.disconnect()

    def _wake(self) -> None:
        self._news = True
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # For the router's own application, beside ASGI (`Direct`, `DisconnectWatcher`)

    @property
    def repeatable(self) -> bool:
        """Whether a request with the same head would be handled alike, body length aside."""
        if self.more_body or self._expects_continue or not self.keep_alive or self.scope.get("method") != "POST":
            return False
        return not {b"upgrade", b"transfer-encoding"}.intersection(dict(self.scope["headers"]))

    def whole_body(self, limit: int) -> bytes | None:
        """The body if it has arrived and has at most `limit` bytes; None: use `receive`."""
        if self.more_body or self.disconnected or self.unread > limit:
            return None
        self._news = False
        pieces = self._body
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return body

    def respond(self, status: int, lines: bytes, body: bytes) -> bool:
        """Send a whole response to a POST at once. False: the write buffer is full, use `send`.

        `lines`: the response's headers as lines of a head, with the Content-Length of the body.
        """
        protocol = self._protocol
        if protocol.drained is not None:
            return False
        if not self.disconnected:
            end = b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n"
            head = b"%b%b%b%b" % (STATUS_LINES[status], protocol.default_lines(), lines, end)
            if len(body) < _JOIN:
                protocol.write(head + body)
            else:
                protocol.transport.writelines([head, body])
            self.response_started = True
            self._complete()
        return True

    def push(self, body: bytes, more_body: bool) -> bool:
        """Send one piece of a started response. False: the write buffer is full, use `send`."""
        if self._protocol.drained is not None:
            return False
        if not self.disconnected:
            self._send_body(body, more_body)
        return True

    def upgrade(self, lines: bytes, upgraded: Upgraded) -> "Connection | None":
        """Answer 101, after which all that the client sends is `upgraded`'s, and the connection ends by `leave`.

        None: the client has not waited for the answer, or has gone. `lines`: the headers as lines of a head.
        """
        protocol = self._protocol
        head = STATUS_LINES[101] + protocol.default_lines() + lines + b"\r\n"
        if self.more_body or self.disconnected or not protocol.upgrade(head, upgraded):
            return None
        self.response_started = self.response_complete = True
        self.keep_alive = False
        return protocol

    def __enter__(self) -> "Cycle":
        """As DisconnectWatcher: while entered, a disconnect cancels the task. Raises if the client has disconnected."""
        if self.disconnected or self._protocol.left:
            raise ClientGone
        self._watched = True
        # Paused reading would hide a disconnect, and nothing reads the body any more.
        self._protocol.resume_reading()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watched = False
        if self.gone and kind is asyncio.CancelledError:
            client_gone(exc)

    def close(self) -> None:
        """Stop watching: a later disconnect does not affect this request."""
        self._watched = False

    def _cancel(self) -> None:
        if self.task is not None:
            self.gone = True
            self.task.cancel()

    def ended(self, task: asyncio.Task[None]) -> None:
        """The application has returned. Cancelled: the server stops, and DRAIN_TIMEOUT has passed."""
        self._protocol.forget(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.error("the application failed", exc_info=error)
        # Break the reference cycle with the scope, to avoid garbage collection.
        self.scope = _NO_SCOPE
        if not self.response_complete and not self.disconnected:
            # Never a clean end: the client must see that the answer is incomplete.
            to_the_end = self.response_started and not self._chunked and self._left is None
            self._protocol.cut(to_the_end)

    # ASGI

    async def receive(self) -> Message:
        # After the server's own rejection nothing may be written, not even an interim response.
        if self._expects_continue and not (self.response_started or self.disconnected):
            self._expects_continue = False
            self._protocol.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not (self._news or self.disconnected or self.response_complete):
            if self._protocol.left:
                return {"type": "http.disconnect"}
            self._protocol.resume_reading()
            self._waiter = self._protocol.loop.create_future()
            await self._waiter
        self._news = False
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        pieces = self._body
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self.unread = 0
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Message) -> None:
        protocol = self._protocol
        if protocol.drained is not None and not self.disconnected:
            await asyncio.shield(protocol.drained)
        if self.disconnected:
            return
        if self.response_started:
            self._send_body(message.get("body", b""), message.get("more_body", False))
        else:
            self._send_head(message["status"], message["headers"])

    def _send_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Write or buffer the head. Raises RuntimeError if a header holds a line break."""
        protocol = self._protocol
        self.response_started = True
        self._expects_continue = False
        headers = protocol.default_headers() + headers
        lines = [STATUS_LINES[status], *[b"%b: %b\r\n" % pair for pair in headers]]
        values = dict(headers)
        length = values.get(b"content-length")
        has_close = values.get(b"connection") == b"close"
        if has_close or self.more_body:
            # After an unread body the next request cannot be found.
            self.keep_alive = False
        if length is not None:
            # RFC 9110 8.6: a 304 has the length of the 200.
            self._left = None if status == 304 else int(length)
        elif status not in (204, 304) and self.scope["method"] != "HEAD":
            if self.scope["http_version"] == "1.1":
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False  # HTTP/1.0: the end of the connection ends the body
        if not self.keep_alive:
            if not has_close:
                lines.append(b"connection: close\r\n")
        elif self.scope["http_version"] == "1.0":
            lines.append(b"connection: keep-alive\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
            raise RuntimeError("a response header holds a line break")
        # Written together with the first piece of the body, to save a system call.
        self._head = head + b"\r\n"

    def _send_body(self, body: bytes, more_body: bool) -> None:
        """Write a piece of the body. Raises RuntimeError if the body differs from its Content-Length."""
        if self.response_complete:
            raise RuntimeError("the response is complete already")
        if self.scope["method"] == "HEAD":
            self._left = None
            body = b""
        elif self._chunked:
            end = b"" if more_body else b"0\r\n\r\n"
            body = b"%x\r\n%b\r\n%b" % (len(body), body, end) if body else end
        elif self._left is not None:
            self._left -= len(body)
            if self._left < 0:
                raise RuntimeError("the response body is longer than its Content-Length")
        if self._head:
            body, self._head = self._head + body, b""
        if body:
            self._protocol.write(body)
        if more_body:
            if self._chunked and self._protocol.drained is None:
                self.frames = self._protocol.transport.write
        else:
            if self._left:
                raise RuntimeError("the response body is shorter than its Content-Length")
            self._complete()

    def _complete(self) -> None:
        self.frames = None
        self.response_complete = True
        self._wake()
        self._protocol.cycle_ended(self)


class OlderCycle(Cycle):
    """For HTTP/1.0 clients, which need `connection: keep-alive`: without the short cuts, which omit it."""

    __slots__ = ()

    @property
    def repeatable(self) -> bool:
        return False

    def respond(self, status: int, lines: bytes, body: bytes) -> bool:
        return False
