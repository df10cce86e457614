"""Lines of engines' logs as entries: when, how bad, what they say.

It knows the beginnings of lines of vLLM, TGI, SGLang, uvicorn and PyTorch, JSON of any program, and tracebacks of
Python, of several processes at the same time. What it does not know is an entry by itself.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, get_args

import orjson

from control_plane.pure.redaction import lines_without_secrets, without_secrets

Level = Literal["error", "warning", "unknown", "info", "debug"]
# From the worst; a line that says nothing of it may be the last words of a process.
LEVELS: tuple[Level, ...] = get_args(Level)
# Characters of a line, and lines of a traceback, that are read
LONGEST, _MOST_FRAMES = 1_000, 200
# Lines of a traceback that an example has
_SHOWN = 12
_DAY = 86_400_000

# Escape sequences of terminals; then all that is not seen: controls, and marks that change the direction of text
_ESCAPES = re.compile(
    r"\x1b\[[0-?]*+[ -/]*+[@-~]|\x1b\][^\x07\x1b]*+(?:\x07|\x1b\\)?|\x1b[@-_]?|\x9b[0-?]*+[ -/]*+[@-~]"
)
_UNSEEN = re.compile(
    r"[\x00-\x08\x0a-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb]"
)
_BREAK = re.compile(r"[\s,;&\"'{}()\[\]]")
# What lines begin with, piece by piece
_PIECES = re.compile(
    r"(?P<who>\([A-Za-z_][^()]{0,60}\bpid=\d+\)|\[rank\d+\]:?)"
    r"|\[?(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)[T ](?P<time>\d\d:\d\d:\d\d)(?:[.,](?P<part>\d{1,9}))?"
    r"(?P<zone>Z|[+-]\d\d:?\d\d)?(?: [A-Z]{2}\d+)?\]?"
    r"|(?P<month2>\d\d)-(?P<day2>\d\d) (?P<time2>\d\d:\d\d:\d\d)"
    r"|\[?(?P<glog>[IWEF])(?P<month3>\d\d)(?P<day3>\d\d) (?P<time3>\d\d:\d\d:\d\d)(?:\.\d{1,9})?(?: +\d+)?"
    r"|\[?(?P<level>TRACE|DEBUG|INFO|NOTICE|WARN(?:ING)?|ERROR|CRITICAL|FATAL)\]?(?=[:\s]|$):?"
    r"|\[?[\w./-]{1,100}\.(?:py|rs|cpp|cc|cu|hpp|h):\d+\]"
    r"|[-|](?=\s)"
)
_LEVELS: Mapping[str, Level] = {
    **dict.fromkeys(("ERROR", "ERR", "CRITICAL", "FATAL", "SEVERE", "PANIC", "E", "F"), "error"),
    **dict.fromkeys(("WARN", "WARNING", "W"), "warning"),
    **dict.fromkeys(("INFO", "NOTICE", "I"), "info"),
    **dict.fromkeys(("DEBUG", "TRACE"), "debug"),
}
_SAID = re.compile(r"\b(CRITICAL|FATAL|ERROR|WARN|WARNING|panicked|[Ss]egmentation fault|core dumped|Killed)\b")
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]{0,120}(?:Error|Exception|Exit|Interrupt|Fault)(?::|$)")
_TRACEBACK = "Traceback (most recent call last):"
_FRAME = re.compile(r'\s+File "([^"]{1,400})", line \d+(?:, in (\S{1,100}))?')
# uvicorn: 10.0.0.1:55 - "POST /v1/chat/completions HTTP/1.1" 200 OK
_ACCESS = re.compile(r'\S{3,60} - "([A-Z]{3,7}) (\S{1,300}) HTTP/[\d.]{1,3}" (\d{3})\b')
# Of JSON: names of what a line says, when, and how bad; and what else of a line of the router is evidence
_MESSAGES = ("message", "msg", "event", "error")
_TIMES = ("timestamp", "time", "ts", "@timestamp")
_SEVERITIES = ("level", "severity", "levelname")
_OURS = ("outcome", "status", "code", "backend", "why", "reason", "error", "exception")


class Entry(NamedTuple):
    """`message`: without what it begins with, and without secrets. `at`: Unix milliseconds; None: not known.

    `line`: its number, from 1. `text`: the lines, as people see them. `is_template`: nothing in it is to be masked.
    """

    message: str
    level: Level
    at: int | None
    line: int
    text: str
    is_template: bool = False


class _Head(NamedTuple):
    """`who`: what tells lines of one process from those of others. `rest`: with its indentation."""

    at: int | None
    level: Level | None
    who: str
    rest: str


class _Trace:
    """A traceback that is being read."""

    def __init__(self, line: int, head: _Head, text: str) -> None:
        self.line, self.at, self.lines = line, head.at, [text]
        self.frame = ""
        self.message = ""

    def take(self, rest: str, text: str) -> bool:
        """Whether the line belongs to it."""
        indented = rest[:1] in (" ", "\t") or not rest
        if self.message and (not indented or not rest or len(self.lines) >= _MOST_FRAMES):
            return False
        if self.message and _SPACES.match(rest):
            # Of an exception that says more than one line
            if len(self.message) < LONGEST and not self.message.endswith("\0"):
                self.message += f" {rest.strip()}\0"
        elif indented:
            if (found := _FRAME.match(rest)) is not None:
                self.frame = f"{found[1].rpartition('/')[2]} in {found[2] or 'module'}"
        else:
            self.message = rest
        if len(self.lines) < _MOST_FRAMES:
            self.lines.append(text)
        return True

    def entry(self) -> Entry:
        shown = self.lines if len(self.lines) <= _SHOWN else [self.lines[0], "  ...", *self.lines[2 - _SHOWN :]]
        message = self.message.rstrip("\0") or "Traceback without an end"
        where = f" (at {self.frame})" if self.frame else ""
        return Entry(f"{message[:LONGEST]}{where}", "error", self.at, self.line, "\n".join(shown))


_SPACES = re.compile(r"\s+\S")


def cleaned(line: str) -> str:
    """What a terminal would show of it at last, in one line; of a very long one its beginning."""
    line = line.rstrip("\r\n").rpartition("\r")[2][: 4 * LONGEST]
    line = _UNSEEN.sub("", _ESCAPES.sub("", line)).replace("\t", "    ")
    if len(line) <= LONGEST:
        return line.rstrip()
    # A secret that was cut in two would no longer be known as one.
    cut = next((place for place in range(LONGEST, LONGEST // 2, -1) if _BREAK.match(line[place])), LONGEST)
    return f"{line[:cut].rstrip()} …"


def unseen(text: str) -> str:
    """`text` without what is not seen; line ends are spaces."""
    return _UNSEEN.sub("", _ESCAPES.sub("", text.replace("\n", " ")))


def entries(lines: Sequence[str], now: int) -> Iterator[Entry]:
    """In the order of their ends. `now`: Unix milliseconds, for times without a year; those without a zone are UTC.

    An entry without a time has that of the line before.
    """
    open_: dict[str, _Trace] = {}
    last: int | None = None
    shown = lines_without_secrets(map(cleaned, lines))
    for number, (line, text) in enumerate(zip(lines, shown, strict=True), 1):
        head = _head(text, now)
        last = head.at if head.at is not None else last
        head = head._replace(at=last)
        if head.rest.lstrip(" +|").startswith(_TRACEBACK):
            if (before := open_.pop(head.who, None)) is not None:
                yield before.entry()
            open_[head.who] = _Trace(number, head, text)
            continue
        if (trace := open_.get(head.who)) is not None:
            if trace.take(head.rest, text):
                continue
            yield open_.pop(head.who).entry()
        if not head.rest.strip():
            continue
        yield _json(number, line, text, head) or _plain(number, text, head)
    for trace in open_.values():
        yield trace.entry()


def _plain(number: int, text: str, head: _Head) -> Entry:
    message = head.rest.strip()
    if (access := _ACCESS.match(message)) is not None:
        method, target, status = access.groups()
        path = target.partition("?")[0]
        level: Level = "error" if status[0] == "5" else head.level or "info"
        return Entry(f"{method} {_segments(path)} {status}", level, head.at, number, text, is_template=True)
    return Entry(message, _level(head.level, message), head.at, number, text)


def _segments(path: str) -> str:
    """A path without ids."""
    parts = [part if re.fullmatch(r"[a-z_]{1,30}|v\d", part) else "<id>" for part in path.split("/")[1:6]]
    return "/" + "/".join(parts)


def _level(said: Level | None, message: str) -> Level:
    if _EXCEPTION.match(message):
        return "error"
    if said is not None:
        return said
    found = _SAID.search(message, 0, 200)
    if found is None:
        return "unknown"
    return "warning" if found[1].startswith("WARN") else "error"


def _json(number: int, line: str, text: str, head: _Head) -> Entry | None:
    """`line`: as it came: cut off, or without its secrets, it may be no JSON any more."""
    if not text.startswith("{"):
        return None
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(found, dict):
        return None
    inner = found.get("fields")
    fields = {**found, **inner} if isinstance(inner, dict) else found
    message = _text(fields, _MESSAGES)
    if not message:
        return None
    if isinstance(found.get("event"), str):
        message = " ".join([message, *(f"{name}={found[name]}" for name in _OURS if found.get(name) not in (None, ""))])
    said = _LEVELS.get(_text(fields, _SEVERITIES).upper())
    at = _moment(_text(fields, _TIMES), head.at)
    message = without_secrets(_UNSEEN.sub(" ", message))[:LONGEST]
    return Entry(message, _level(said, message), at, number, text)


def _text(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((value for name in names if isinstance(value := fields.get(name), str) and value), "")


def _moment(text: str, otherwise: int | None) -> int | None:
    found = _PIECES.match(text)
    return (found and found["year"] and _time(found, 0)) or otherwise


def _head(text: str, now: int) -> _Head:
    """Piece by piece, as long as the line begins with one; an indented line has none."""
    at: int | None = None
    level: Level | None = None
    who, place = "", 0
    for _ in range(8):
        found = _PIECES.match(text, place)
        if found is None:
            break
        who = found["who"] or who
        at = at or _time(found, now)
        name = found["level"] or found["glog"]
        level = level or (_LEVELS[name] if name else None)
        # One space belongs to the piece: what is behind more of them is another piece, or indented text.
        place = found.end() + (text[found.end() : found.end() + 1] == " ")
        if at is None or level is None:
            ahead = len(text) - len(text[place:].lstrip(" "))
            place = ahead if _PIECES.match(text, ahead) else place
    # A traceback has a piece before each of its lines, or before none.
    return _Head(at, level, f"{who} {place > 0}", text[place:])


def _time(found: re.Match[str], now: int) -> int | None:
    """Unix milliseconds of a piece that is a time; None: it is none."""
    month, day, time = (found[name] or found[f"{name}2"] or found[f"{name}3"] for name in ("month", "day", "time"))
    if time is None:
        return None
    this_year = datetime.fromtimestamp(now / 1000, UTC).year
    zone = (found["zone"] or "Z").replace("Z", "+00:00")
    part = (found["part"] or "0").ljust(3, "0")[:3]
    for year in (found["year"] or f"{this_year:04}", f"{this_year - 1:04}"):
        try:
            at = datetime.fromisoformat(f"{year}-{month}-{day}T{time}.{part}{zone}").timestamp()
        except (ValueError, OverflowError):
            return None
        # In January lines of December have no year, either.
        if found["year"] or at * 1000 <= now + _DAY:
            return round(at * 1000)
    return None
