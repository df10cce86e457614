"""Writes lines to a stream on a separate thread.

A pipe without a reader, a paused terminal and a disk that hangs block a writer, which must not be the event loop
(docs/adr/0013). The queue has a bound; beyond it lines are dropped and counted.
"""

import asyncio
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple, TextIO

_FLUSH_AFTER = 0.05
_FLUSH_AT = 256 * 1024
# A second of a busy router's access lines is 1 to 3 MB.
_CAPACITY = 8 * 1024 * 1024


class _Batch(NamedTuple):
    """Lines that are written together."""

    data: bytes
    lines: int


class LogWriter:
    """Writes lines in order. Only the event loop's thread may call `later`; any thread may call the rest.

    `capacity`: bytes that may wait. `notice`: a line with the number of dropped lines, written in their place.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        capacity: int = _CAPACITY,
        notice: Callable[[int], str] = "{} log lines were dropped".format,
    ) -> None:
        stream = standard_output() if stream is None else stream
        self._encoding = stream.encoding or "utf-8"
        self._write = _writing(stream, self._encoding)
        self._capacity = capacity
        self._notice = notice
        # Lines for the next batch
        self._lines: deque[str] = deque()
        self._size = 0
        self._due: asyncio.TimerHandle | None = None
        # The lines to be written. The lock is reentrant, for a finalizer can log
        # anywhere; and the queue may be put to by a put that such a finalizer interrupts.
        self._lock = threading.RLock()
        self._batches: SimpleQueue[_Batch | threading.Event | None] = SimpleQueue()
        self._waiting = 0
        self._dropped = self._noticed = 0
        threading.Thread(target=self._run, name="log", daemon=True).start()

    @property
    def dropped(self) -> int:
        """The number of dropped lines."""
        return self._dropped

    def later(self, line: str) -> None:
        """Write a line together with others, at most 50 ms from now."""
        self._lines.append(line)
        self._size += len(line)
        if self._size > _FLUSH_AT:
            self.flush()
        elif self._due is None:
            self._due = asyncio.get_running_loop().call_later(_FLUSH_AFTER, self._on_time)

    def now(self, line: str) -> None:
        """Write a line, after all earlier ones."""
        self._lines.append(line)
        self.flush()

    def _on_time(self) -> None:
        self._due = None
        self.flush()

    def flush(self) -> None:
        """Pass the batch to the thread. Keeps the timer: it belongs to the loop, and this may be another thread."""
        with self._lock:
            lines = []
            while self._lines:
                lines.append(self._lines.popleft())
            self._size = 0
            if lines:
                self._hand_over(lines)

    def _hand_over(self, lines: list[str]) -> None:
        count = len(lines)
        if self._dropped > self._noticed:
            lines.insert(0, self._notice(self._dropped - self._noticed))
        data = ("\n".join(lines) + "\n").encode(self._encoding, "backslashreplace")
        # A single line is accepted at any length.
        if self._waiting and self._waiting + len(data) > self._capacity:
            self._dropped += count
            return
        self._noticed = self._dropped
        self._waiting += len(data)
        self._batches.put(_Batch(data, count))

    def drain(self, seconds: float) -> bool:
        """Wait until everything is written, with a time limit. Returns whether it is."""
        self.flush()
        written = threading.Event()
        self._batches.put(written)
        return written.wait(seconds)

    def close(self) -> None:
        """End the thread once it has written the queue. Later lines are dropped."""
        self.flush()
        self._batches.put(None)

    def _run(self) -> None:
        while (batch := self._batches.get()) is not None:
            if isinstance(batch, threading.Event):
                batch.set()
                continue
            lost = 0
            try:
                self._write(batch.data)
            except (OSError, ValueError):
                # The reader is gone, the disk is full, or the stream is closed.
                lost = batch.lines
            with self._lock:
                self._waiting -= len(batch.data)
                self._dropped += lost


def standard_output() -> TextIO:
    """sys.stdout, or /dev/null if the process was started without it."""
    return sys.stdout or open(os.devnull, "w")


def _writing(stream: TextIO, encoding: str) -> Callable[[bytes], None]:
    try:
        # Not the stream's own buffer: a thread that waits in it holds a lock that `print` needs.
        stream.fileno()
    except (OSError, AttributeError):
        return lambda data: _write_text(stream, data.decode(encoding))
    return _Descriptor(stream)


def _write_text(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()


class _Descriptor:
    """Writes all of the data to a stream's file descriptor, however long it takes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._torn = False

    def __call__(self, data: bytes) -> None:
        # After a write that failed within a line, the next line must begin on its own.
        rest = memoryview(b"\n" + data if self._torn else data)
        while rest:
            written = self._write(rest)
            rest = rest[written:]
            self._torn = bool(rest) and (self._torn or written > 0)

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._stream.fileno(), data)
        except BlockingIOError:
            # Another process with the same descriptor, such as the shell, has set it to non-blocking.
            poll = select.poll()
            poll.register(self._stream, select.POLLOUT)
            poll.poll()
            return 0
