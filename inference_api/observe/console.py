"""Lines of the log for people at a terminal: columns, and colours if it has them."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_RESET, _DIM = "\x1b[0m", "\x1b[2m"
_RED, _GREEN, _YELLOW, _CYAN = "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[36m"
_LEVELS = {"debug": _DIM, "info": "", "warning": _YELLOW, "error": _RED, "critical": _RED}
# Fields with their own columns, fields at the end, and fields shown only with unusual values
_COLUMNS = frozenset({"status", "latency_ms", "model", "backend", "route", "request_id"})
_USUAL = {"outcome": "ok", "attempts": 1, "stream": False}

Paint = Callable[[str, str], str]


def render_console(now: float, level: str, event: str, fields: Mapping[str, Any]) -> str:
    """One line of text without colours, or more with a traceback."""
    return _render(now, level, event, fields, lambda text, colour: text)


def render_colours(now: float, level: str, event: str, fields: Mapping[str, Any]) -> str:
    return _render(now, level, event, fields, lambda text, colour: f"{colour}{text}{_RESET}" if colour else text)


def _render(now: float, level: str, event: str, fields: Mapping[str, Any], paint: Paint) -> str:
    parts = _access(fields, paint) if event == "request" and "latency_ms" in fields else _event(event, fields, paint)
    head = f"{paint(_time(now), _DIM)} {paint(f'{level:<7}', _LEVELS.get(level, ''))}"
    line = " ".join([head, *parts]).rstrip()
    exception = fields.get("exception")
    return line if exception is None else "\n".join([line, *(_clean(one) for one in str(exception).split("\n"))])


def _access(fields: Mapping[str, Any], paint: Paint) -> Iterator[str]:
    status, latency = fields["status"], fields["latency_ms"]
    colour = _GREEN if status < 400 else _YELLOW if status < 500 else _RED
    yield paint(f"{status:>3}", colour)
    yield f"{_duration(latency):>8}"
    yield paint(f"{_clean(fields['model']):<16}", _CYAN)
    yield f"{_clean(fields['backend'] or '-'):<21}"
    yield _clean(fields["route"])
    yield from _pairs({name: value for name, value in fields.items() if name not in _COLUMNS}, _USUAL)
    yield paint(_clean(fields["request_id"]), _DIM)


def _event(event: str, fields: Mapping[str, Any], paint: Paint) -> Iterator[str]:
    yield _clean(event)
    yield from _pairs({name: value for name, value in fields.items() if name not in ("exception", "logger")}, {})
    if "logger" in fields:
        yield paint(_clean(f"({fields['logger']})"), _DIM)


def _pairs(fields: Mapping[str, Any], usual: Mapping[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        if value not in (None, []) and (name not in usual or value != usual[name]):
            yield f"{_clean(name)}={_value(value)}"


def _value(value: object) -> str:
    text = _clean(",".join(map(str, value)) if isinstance(value, list | tuple) else value)
    return f'"{text}"' if " " in text else text


def _duration(milliseconds: float) -> str:
    return f"{milliseconds:.1f}ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f}s"


def _clean(value: object) -> str:
    """Escape text that is not printable: it could forge lines, or control the terminal."""
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def _time(now: float) -> str:
    return f"{time.strftime('%H:%M:%S', time.gmtime(now))}.{int((now - int(now)) * 1000):03d}"
