"""Logging to stdout: one JSON object per line, or aligned text on a terminal; and the access line of every request.

Access lines are rendered at once, and passed to the writer in batches, at most 50 ms later: waking its thread for each
would cost more than the line itself. All other lines are passed at once, after earlier ones.
"""

import json
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import lru_cache
from types import TracebackType
from typing import Any, TextIO

import orjson

from inference_api.observe.console import render_colours, render_console
from inference_api.observe.writer import LogWriter, standard_output

logger = logging.getLogger(__name__)

# Seconds that the process waits for the writer at its end.
_TIMEOUT = 1.0
# Statuses of requests that were not served: their lines are warnings.
UNSERVED = 503
Fields = dict[str, Any]
Render = Callable[[float, str, str, Fields], str]


class AccessLog:
    """One line per request, at level info; a warning where the router could not serve it."""

    def __init__(self, writer: LogWriter, render: Render, clock: Callable[[], float] = time.time) -> None:
        self._writer = writer
        self._render = render
        self._clock = clock

    def __call__(self, fields: Fields) -> None:
        level = "warning" if fields.get("status") == UNSERVED else "info"
        self._writer.later(self._render(self._clock(), level, "request", fields))


class UsageLog:
    """One line per usage record, as JSON and at any level of the log: it is data for other programs."""

    def __init__(self, writer: LogWriter, clock: Callable[[], float] = time.time) -> None:
        self._writer = writer
        self._clock = clock

    def __call__(self, record: str) -> None:
        self._writer.later(f'{{"time":"{_timestamp(self._clock())}","level":"info","event":"usage",{record[1:]}')


class LogHandler(logging.Handler):
    """Passes records of the logging module to a writer; `flush` waits for it, with a time limit."""

    def __init__(self, writer: LogWriter, formatter: logging.Formatter) -> None:
        super().__init__()
        self.writer = writer
        self.formatter = formatter

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.writer.now(self.format(record))
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Log which line could not be rendered; logging would print that to stderr, which may block."""
        fields = {"exception": traceback.format_exc()}
        text = f"a line of {record.name} cannot be rendered: {record.msg!r}"
        self.writer.now(render_json(record.created, "error", text, fields))

    def flush(self) -> None:
        self.writer.drain(_TIMEOUT)

    def close(self) -> None:
        self.writer.close()
        super().close()


class _Lines(logging.Formatter):
    """Records as lines of the log; `extra={"fields": {...}}` adds to them."""

    def __init__(self, render: Render) -> None:
        super().__init__()
        self._render = render

    def format(self, record: logging.LogRecord) -> str:
        fields = {"logger": record.name, **getattr(record, "fields", {})}
        if record.exc_info and record.exc_info[1] is not None:
            fields["exception"] = self.formatException(record.exc_info)
        return self._render(record.created, record.levelname.lower(), record.getMessage(), fields)


def _renderer(log_format: str, colours: bool) -> Render:
    if log_format == "json":
        return render_json
    return render_colours if colours else render_console


def render_json(now: float, level: str, event: str, fields: Fields) -> str:
    try:
        rest = orjson.dumps(fields, default=str).decode()
    except TypeError:
        # Text that is not UTF-8 (the name of a file), or an integer of more than 64 bits.
        rest = json.dumps(fields, default=str)
    # Joined as text: cheaper than one dictionary of all fields.
    return f'{{"time":"{_timestamp(now)}{_start(level, event, bool(fields))}{rest[1:]}'


@lru_cache(maxsize=256)
def _start(level: str, event: str, more: bool) -> str:
    """The text between the time and the other fields."""
    return f'","level":"{level}","event":{json.dumps(event)}{"," if more else ""}'


def configure_logging(
    level: str, log_format: str | None, stream: TextIO | None = None, colours: bool = True
) -> AccessLog | None:
    """Configure the logging module. Returns the access log, or None at a level above warning.

    `colours`: on a terminal.
    """
    stream = standard_output() if stream is None else stream
    terminal = stream.isatty()
    render = _renderer(log_format or ("console" if terminal else "json"), colours and terminal)
    writer = LogWriter(stream, notice=lambda lines: _notice(render, lines))
    root = logging.getLogger()
    for handler in root.handlers:
        if isinstance(handler, LogHandler):
            handler.close()
    root.handlers[:] = [LogHandler(writer, _Lines(render))]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel(max(root.level, logging.WARNING))
    # They log request URLs and headers, at info and at debug.
    for name in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return AccessLog(writer, render) if root.level <= logging.WARNING else None


def _notice(render: Render, lines: int) -> str:
    text = "log lines were dropped here, because they could not be written in time"
    return render(time.time(), "warning", text, {"logger": __name__, "lines": lines})


def usage_log() -> UsageLog:
    """The log of usage records, by the writer that `configure_logging` made."""
    [writer] = [handler.writer for handler in logging.getLogger().handlers if isinstance(handler, LogHandler)]
    return UsageLog(writer)


def dropped_lines() -> int:
    """The number of lines dropped since logging was configured."""
    handlers = logging.getLogger().handlers
    return sum(handler.writer.dropped for handler in handlers if isinstance(handler, LogHandler))


def log_unhandled() -> None:
    """Log warnings and uncaught exceptions, which Python would print to stderr.

    The traceback that ends the process is still printed, with the time limit of the log.
    """
    logging.captureWarnings(True)
    threading.excepthook = _thread_failed
    sys.unraisablehook = _finalizer_failed
    sys.excepthook = _process_failed


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    name = "" if args.thread is None else args.thread.name
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        logger.error("a thread failed: %s", name, exc_info=args.exc_value)


def _finalizer_failed(args: "sys.UnraisableHookArgs") -> None:
    what = args.err_msg or "an exception was ignored"
    # By name: its content may be secret.
    name = getattr(args.object, "__qualname__", type(args.object).__qualname__)
    logger.error("%s: %s", what, name, exc_info=args.exc_value)


def _process_failed(kind: type[BaseException], exc: BaseException, trace: TracebackType | None) -> None:
    if sys.stderr is None:
        return
    writer = LogWriter(sys.stderr)
    writer.now("".join(traceback.format_exception(kind, exc, trace)).rstrip("\n"))
    writer.drain(_TIMEOUT)


_second = ("", -1)
_MILLISECONDS = [f".{number:03d}Z" for number in range(1000)]


def _timestamp(now: float) -> str:
    global _second
    whole = int(now)
    if _second[1] != whole:
        _second = (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)), whole)
    return _second[0] + _MILLISECONDS[int((now - whole) * 1000)]
