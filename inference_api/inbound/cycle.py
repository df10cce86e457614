"""One request and its response on a client's connection: the `receive` and `send` that ASGI applications are given.

Both suspend only on a plain future, so that they can be stepped by hand (`departure`, `outbound.pump`).
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Scope

if TYPE_CHECKING:
    from inference_api.inbound.protocol import Protocol

logger = logging.getLogger(__name__)

# The name of the ASGI extension below: a function that is given what to call when the client leaves.
DEPARTURE = "inference_api.departure"

# As in uvicorn: beyond this the body waits in the kernel until the application asks for more.
_HIGH_WATER = 64 * 1024


def _status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


STATUS_LINES = {status: _status_line(status) for status in range(100, 600)}


class Cycle:
    """Fed by its Protocol, run by a task of its own."""

    __slots__ = (
        "_body", "_chunked", "_expects_continue", "_head", "_left", "_news", "_on_departure", "_protocol", "_size",
        "_waiter",
        "disconnected", "keep_alive", "more_body", "response_complete", "response_started", "scope",
    )  # fmt: skip

    def __init__(self, protocol: "Protocol", scope: Scope, keep_alive: bool, expects_continue: bool) -> None:
        self._protocol = protocol
        self.scope = scope
        self.keep_alive = keep_alive
        # Request
        self.disconnected = False
        self.more_body = True
        self._expects_continue = expects_continue
        self._body: deque[bytes] = deque()
        self._size = 0
        self._news = False
        self._waiter: asyncio.Future[None] | None = None
        self._on_departure: Callable[[], None] | None = None
        scope["extensions"] = {DEPARTURE: self.watch}
        # Response
        self.response_started = False
        self.response_complete = False
        self._head = b""
        self._chunked = False
        self._left: int | None = None

    # Fed by the protocol

    def feed(self, data: bytes) -> None:
        if self.response_complete:
            return
        self._body.append(data)
        self._size += len(data)
        if self._size > _HIGH_WATER:
            self._protocol.pause_reading()
        self._wake()

    def end_of_body(self) -> None:
        self.more_body = False
        self._wake()

    def disconnect(self) -> None:
        self.disconnected = True
        self._wake()
        if self._on_departure is not None:
            self._on_departure()

    def _wake(self) -> None:
        self._news = True
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # An extension of ASGI

    def watch(self, on_departure: Callable[[], None] | None) -> None:
        """Call this when the client leaves, at once if it has; None: no longer."""
        self._on_departure = on_departure
        if on_departure is None:
            return
        if self.disconnected:
            on_departure()
        # Nobody may be reading the body any more, and a pause would hide the end of the connection.
        self._protocol.resume_reading()

    # Run by the task

    async def run(self, app: ASGIApp) -> None:
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            pass  # the server stops, and has waited as long as it may
        except Exception:
            logger.exception("the application failed")
        if not self.response_complete and not self.disconnected:
            # Never a clean end: the client must see that the answer is not whole.
            self._protocol.cut()

    # ASGI

    async def receive(self) -> Message:
        if self._expects_continue and not self.response_started:
            self._expects_continue = False
            self._protocol.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not (self._news or self.disconnected or self.response_complete):
            self._protocol.resume_reading()
            self._waiter = self._protocol.loop.create_future()
            await self._waiter
        self._news = False
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        pieces = self._body
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._size = 0
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
        lines = [STATUS_LINES[status]]
        has_close = False
        for name, value in [*protocol.default_headers(), *headers]:
            if name == b"content-length":
                # RFC 9110 8.6: of a 304 it is the length that a 200 would have had.
                self._left = None if status == 304 else int(value)
            elif name == b"connection" and value == b"close":
                has_close = True
                self.keep_alive = False
            lines.append(b"%b: %b\r\n" % (name, value))
        if self._left is None and status not in (204, 304) and self.scope["method"] != "HEAD":
            if self.scope["http_version"] == "1.1":
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False  # to an older client the end of the connection is the end of the body
        if not self.keep_alive and not has_close:
            lines.append(b"connection: close\r\n")
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
        if not more_body:
            if self._left:
                raise RuntimeError("the response body is shorter than its Content-Length")
            self.response_complete = True
            self._wake()
            self._protocol.cycle_ended(self)
