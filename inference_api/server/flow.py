"""Byte-level control of a client connection: back-pressure in both directions, and closing."""

import asyncio
import fcntl
import socket
import struct
import sys
import termios
from typing import NamedTuple, cast

# Minimum progress per `write_stall`, in bytes; less only if less is pending.
_LEAST_READ = 64 * 1024


class Deadlines(NamedTuple):
    """Seconds for a client to send a request head, to send a body, to be idle between requests, and not to read.

    `age`: after which the connection closes with an answer, 0: never. `linger`: after the last byte of either side, so
    that a client that is still sending a rejected body can read the answer.
    """

    header: float = 10.0
    body: float = 60.0
    keepalive: float = 75.0
    write_stall: float = 60.0
    age: float = 0.0
    linger: float = 2.0


class Flow(asyncio.Protocol):
    """Base of a connection's protocol class, which reads unless `_ignoring` is set, and sets `_timer`."""

    __slots__ = (
        "_deadlines", "_idle_timer", "_ignoring", "_linger_until", "_read_paused", "_received", "_stall_timer",
        "_timer", "_unwritten", "drained", "left", "loop", "transport",
    )  # fmt: skip

    def __init__(self, deadlines: Deadlines, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._deadlines = deadlines
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        # The client's half: reading is paused; input is ignored; it has ended.
        self._read_paused = self._ignoring = self.left = False
        # Set while the write buffer is full: done when it has drained
        self.drained: asyncio.Future[None] | None = None
        # Timers: for a head or body or idle time, and for the client to read
        self._timer: asyncio.TimerHandle | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        # Bytes pending when the last write timer was set
        self._unwritten = 0
        # After the last answer: whether bytes arrived since the last check, and the end of lingering
        self._received, self._linger_until = False, 0.0

    # asyncio.Protocol

    def pause_writing(self) -> None:
        if self.drained is None:
            self.drained = self.loop.create_future()
            self._watch_stall()

    def resume_writing(self) -> None:
        if self._stall_timer is not None and not self.transport.is_closing():
            self._stall_timer.cancel()
            self._stall_timer = None
        drained, self.drained = self.drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._idle_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()

    # Back-pressure

    def pause_reading(self) -> None:
        if not self._read_paused:
            self._read_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self._read_paused:
            self._read_paused = False
            self.transport.resume_reading()

    def _unread(self) -> int:
        """Pending bytes: in the write buffer, and in the kernel's, which moves large pieces."""
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

    # Ends

    def cut(self, to_the_end: bool = False) -> None:
        """Close without completing the response; `to_the_end` sends RST, since EOF would look like a normal end."""
        if self.drained is not None or to_the_end:
            self._reset()
        else:
            self._hang_up()

    def _reset(self) -> None:
        # The client will not read the buffer; RST makes the kernel drop it, too.
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _hang_up(self) -> None:
        """Close once the client has read the buffer, or does not read in time."""
        self._cancel_timer()
        self.transport.close()
        if self._stall_timer is None and self.transport.get_write_buffer_size():
            self._watch_stall()

    def _close(self, unread: bool) -> None:
        """Close after the last answer; `unread`: the client may still send."""
        if not unread or self.left or not self.transport.can_write_eof():
            self._hang_up()
            return
        # Closing with unread bytes resets the connection, and the client may lose the answer.
        self._ignoring = True
        self.transport.write_eof()
        self.resume_reading()
        self._cancel_timer()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._received = False
        self._linger_until = self.loop.time() + self._deadlines.body
        self._timer = self.loop.call_later(self._deadlines.linger, self._lingered)

    def _lingered(self) -> None:
        self._timer = None
        unwritten = self.transport.get_write_buffer_size()
        if unwritten and self._stall_timer is None:
            self._watch_stall()
        if unwritten or (self._received and self.loop.time() < self._linger_until):
            self._received = False
            self._timer = self.loop.call_later(self._deadlines.linger, self._lingered)
        else:
            self.transport.abort()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
