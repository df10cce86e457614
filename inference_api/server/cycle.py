"""One request and its response on a client's connection: the `receive` and `send` that ASGI applications are given.

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

logger = logging.getLogger(__name__)

# From here on joining head and body would copy more than a second buffer costs.
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
    """What the server answered in the middle of a request, because the rest of it could not be taken."""

    error: RouterError
    request_id: str
    size: int


class Connection(Protocol):
    """What a Cycle needs of the connection that it answers on."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    # Set while the client's buffer is full: done when it has drained
    drained: asyncio.Future[None] | None
    # The client has closed its half.
    left: bool

    def write(self, data: bytes) -> None: ...
    def resume_reading(self) -> None: ...
    def cut(self, to_the_end: bool = False) -> None: ...
    def default_headers(self) -> RawHeaders: ...
    def default_lines(self) -> bytes: ...
    def cycle_ended(self, cycle: "Cycle") -> None: ...
    def forget(self, task: "asyncio.Task[None]") -> None: ...


def client_gone(exc: BaseException | None) -> NoReturn:
    """The running task was cancelled because its client left, and goes on. Raises ClientGone."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
    raise ClientGone from exc


def cycle_of(function: Callable[..., object]) -> "Cycle | None":
    """The Cycle whose own `receive` or `send` this is; None for that of a layer, or of another server."""
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, Cycle) else None


class Cycle:
    """Fed by its ClientConnection, run by a task of its own."""

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
        # Somebody works on it who is to be cancelled when the client leaves; `gone`: and has been.
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
        """The client will say no more, which is how a client that leaves looks: disconnect if somebody waits for it."""
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
        """Whether a request with the same head would be taken in the same way, body length aside."""
        if self.more_body or self._expects_continue or not self.keep_alive or self.scope.get("method") != "POST":
            return False
        return not {b"upgrade", b"transfer-encoding"}.intersection(dict(self.scope["headers"]))

    def whole_body(self, limit: int) -> bytes | None:
        """The body if it is here already and has at most `limit` bytes, or None: then it is to be received."""
        if self.more_body or self.disconnected or self.unread > limit:
            return None
        self._news = False
        pieces = self._body
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return body

    def respond(self, status: int, lines: bytes, body: bytes) -> bool:
        """A whole response to a POST, at once. False: the client's buffer is full, it is to be sent.

        `lines`: the response's headers as lines of a head, as long as the body is by its Content-Length.
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
        """One piece of a response that has been started. False: the client's buffer is full, it is to be sent."""
        if self._protocol.drained is not None:
            return False
        if not self.disconnected:
            self._send_body(body, more_body)
        return True

    def __enter__(self) -> "Cycle":
        """As a DisconnectWatcher: while entered, a client that leaves cancels the task; raises if it has left."""
        if self.disconnected or self._protocol.left:
            raise ClientGone
        self._watched = True
        # Nobody may be reading the body any more, and a pause would hide the end of the connection.
        self._protocol.resume_reading()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watched = False
        if self.gone and kind is asyncio.CancelledError:
            client_gone(exc)

    def close(self) -> None:
        """A client that leaves from now on is none of this request's business."""
        self._watched = False

    def _cancel(self) -> None:
        if self.task is not None:
            self.gone = True
            self.task.cancel()

    def ended(self, task: asyncio.Task[None]) -> None:
        """The application has returned. If it was cancelled, the server stops, and has waited as long as it may."""
        self._protocol.forget(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.error("the application failed", exc_info=error)
        # The scope refers to this object in turn; a ring would be left for the garbage collector.
        self.scope = _NO_SCOPE
        if not self.response_complete and not self.disconnected:
            # Never a clean end: the client must see that the answer is not whole.
            to_the_end = self.response_started and not self._chunked and self._left is None
            self._protocol.cut(to_the_end)

    # ASGI

    async def receive(self) -> Message:
        # Behind the server's own refusal nothing may be written, an interim answer neither.
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
        """Raises RuntimeError if a header would start another line."""
        protocol = self._protocol
        self.response_started = True
        self._expects_continue = False
        headers = protocol.default_headers() + headers
        lines = [STATUS_LINES[status], *[b"%b: %b\r\n" % pair for pair in headers]]
        values = dict(headers)
        length = values.get(b"content-length")
        has_close = values.get(b"connection") == b"close"
        if has_close or self.more_body:
            # Nothing that comes after a body that nobody read can be told from it.
            self.keep_alive = False
        if length is not None:
            # RFC 9110 8.6: of a 304 it is the length that a 200 would have had.
            self._left = None if status == 304 else int(length)
        elif status not in (204, 304) and self.scope["method"] != "HEAD":
            if self.scope["http_version"] == "1.1":
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False  # to an older client the end of the connection is the end of the body
        if not self.keep_alive:
            if not has_close:
                lines.append(b"connection: close\r\n")
        elif self.scope["http_version"] == "1.0":
            lines.append(b"connection: keep-alive\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
            raise RuntimeError("a response header holds a line break")
        # Written together with the first piece of the body: one system call less.
        self._head = head + b"\r\n"

    def _send_body(self, body: bytes, more_body: bool) -> None:
        """Raises RuntimeError if the body is not as long as its Content-Length says."""
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
    """Of an HTTP/1.0 client, which is to be told that its connection stays: without the short cuts, which do not."""

    __slots__ = ()

    @property
    def repeatable(self) -> bool:
        return False

    def respond(self, status: int, lines: bytes, body: bytes) -> bool:
        return False
