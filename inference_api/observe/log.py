"""Logging to stdout: one JSON object per line, or aligned text on a terminal; and the access line of every request.

Access lines are rendered at once but written together, at most 50 ms later: a system call per request would cost more
than the line itself. Anything else that is logged is written immediately, after the lines that came before it.
"""

import asyncio
import json
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

import orjson

_FLUSH_AFTER = 0.05
_FLUSH_AT = 32 * 1024
Fields = dict[str, Any]


class LogWriter:
    """Collects rendered lines and writes them to a text stream. `now` may be called from any thread."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._lines: deque[str] = deque()
        self._size = 0
        self._due: asyncio.TimerHandle | None = None
        self._writing = threading.RLock()

    def later(self, line: str) -> None:
        self._lines.append(line)
        self._size += len(line)
        if self._size > _FLUSH_AT:
            self.flush()
        elif self._due is None:
            self._due = asyncio.get_running_loop().call_later(_FLUSH_AFTER, self._on_time)

    def now(self, line: str) -> None:
        self._lines.append(line)
        self.flush()

    def _on_time(self) -> None:
        self._due = None
        self.flush()

    def flush(self) -> None:
        # The timer stays: it belongs to the loop, and this may be another thread.
        with self._writing:
            lines = []
            while self._lines:
                lines.append(self._lines.popleft())
            self._size = 0
            if lines:
                self._stream.write("\n".join(lines) + "\n")
                self._stream.flush()


class AccessLog:
    """One line per request, at level info."""

    def __init__(self, writer: LogWriter, log_format: str, clock: Callable[[], float] = time.time) -> None:
        self._writer = writer
        self._render = render_json if log_format == "json" else render_console
        self._clock = clock

    def __call__(self, fields: Fields) -> None:
        self._writer.later(self._render(self._clock(), "info", "request", fields))


class _Handler(logging.Handler):
    """Puts records of the logging module into the same lines; `extra={"fields": {...}}` adds to them."""

    def __init__(self, writer: LogWriter, log_format: str) -> None:
        super().__init__()
        self._writer = writer
        self._render = render_json if log_format == "json" else render_console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = {"logger": record.name, **getattr(record, "fields", {})}
            if record.exc_info and record.exc_info[1] is not None:
                fields["exception"] = logging.Formatter().formatException(record.exc_info)
            self._writer.now(self._render(record.created, record.levelname.lower(), record.getMessage(), fields))
        except Exception:
            self.handleError(record)


def render_json(now: float, level: str, event: str, fields: Fields) -> str:
    line = {"time": _timestamp(now), "level": level, "event": event, **fields}
    try:
        return orjson.dumps(line, default=str).decode()
    except TypeError:
        # Text that is not UTF-8 (the name of a file), or an integer of more than 64 bits.
        return json.dumps(line, default=str)


def render_console(now: float, level: str, event: str, fields: Fields) -> str:
    told = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None and name != "exception")
    # Only a traceback has lines of its own; anything else could forge one.
    lines = [
        f"{_timestamp(now)[11:23]} {level:<7} {event} {told}".rstrip(),
        *str(fields.get("exception", "")).split("\n"),
    ]
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines).rstrip("\n")


def configure_logging(level: str, log_format: str | None, stream: TextIO | None = None) -> AccessLog | None:
    """Send the logging module here; the access log, or None at a level above info."""
    writer = LogWriter(stream)
    log_format = log_format or ("console" if (stream or sys.stdout).isatty() else "json")
    root = logging.getLogger()
    root.handlers[:] = [_Handler(writer, log_format)]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel(max(root.level, logging.WARNING))
    # They log request URLs and headers, at info and at debug.
    for name in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return AccessLog(writer, log_format) if root.level <= logging.INFO else None


_second = ("", -1)
_MILLISECONDS = [f".{number:03d}Z" for number in range(1000)]


def _timestamp(now: float) -> str:
    global _second
    whole = int(now)
    if _second[1] != whole:
        _second = (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)), whole)
    return _second[0] + _MILLISECONDS[int((now - whole) * 1000)]
