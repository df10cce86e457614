"""Follows server-sent events without touching them: where one ends, and what the last ones said. Sans-IO."""

import re
from typing import Any

import orjson

_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
_BOUNDARY = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_ERROR = re.compile(rb'(?:^|[\r\n])(?:event: ?error\b|data: ?\{"error" ?: ?[{"])')
# One event may be larger; beyond this its content is no longer looked at, only its end.
_MAX_EVENT = 1 << 20


def _is_plain(line: bytes) -> bool:
    """Whether `line`, all of an event and an object, says nothing but the next token; an end mark is no object.

    Not by `in` or `find`: for bytes, the one first tries and fails to make an integer of what it looks for, and the
    other costs twice as much as `partition`.
    """
    return line[7:14] != b'"error"' and not line.partition(b'"usage"')[1] and not line.partition(b"\r")[1]


class EventTracker:
    """Feed it every byte that goes to the client; memory stays below one event of at most 1 MiB.

    `end_marks`: what the last event of a complete stream holds, say `[DONE]`; () if the route has no such mark.
    """

    __slots__ = (
        "_blind", "_end_mark", "_end_marks", "_open", "_usage_block", "at_boundary", "ended", "events", "failed",
    )  # fmt: skip

    def __init__(self, end_marks: tuple[bytes, ...] = ()) -> None:
        self._end_marks = end_marks
        # What is in every block that has one of the marks; "" is in all.
        self._end_mark = end_marks[0] if len(end_marks) == 1 else b""
        self._open = bytearray()
        self._blind = False
        self._usage_block = b""
        self.at_boundary = True
        self.ended = False
        self.failed = False
        self.events = 0

    def feed(self, data: bytes) -> None:
        line, _, rest = data.partition(b"\n")
        if rest == b"\n" and line[:7] == b"data: {" and not self._open and _is_plain(line):
            self.events += 1
        elif self._open or not data.endswith(_ENDS):
            self._feed_part(data)
        elif data.find(b"error") >= 0 or data.find(b'"usage"') >= 0 or data.find(self._end_mark) >= 0:
            self._read(data)
        else:
            self.events += data.count(b"\n\n") or len(_BOUNDARY.findall(data))

    def _feed_part(self, data: bytes) -> None:
        unfinished = self._open
        before = len(unfinished)
        unfinished += data
        # An end may straddle the seam; its first bytes are at most 3 before it.
        seam = max(0, before - 3)
        ends = [i + len(mark) for mark in _ENDS if (i := unfinished.rfind(mark, seam)) >= 0]
        if ends:
            start, end = 0, max(ends)
            if self._blind:
                # The rest of an event that was too large to look at; what follows it is not.
                start = min(i + len(mark) for mark in _ENDS if (i := unfinished.find(mark)) >= 0)
                self._blind = False
                self.events += 1
            if start < end:
                self._read(bytes(unfinished[start:end]))
            del unfinished[:end]
        elif len(unfinished) > _MAX_EVENT:
            del unfinished[:-3]
            self._blind = True
        self.at_boundary = not unfinished

    def _read(self, block: bytes) -> None:
        self.events += block.count(b"\n\n") or len(_BOUNDARY.findall(block))
        if b'"usage"' in block and _USAGE.search(block):
            self._usage_block = block
        for mark in self._end_marks:
            if mark in block and _has_mark(block, mark):
                self.ended = True
        if b"error" in block and _ERROR.search(block):
            self.failed = True

    @property
    def complete(self) -> bool:
        """Whether the stream may end here: its last event came, or it has none that could be missed."""
        return self.ended or not self._end_marks

    def usage(self) -> dict[str, Any] | None:
        """The last `usage` object seen, or None."""
        return find_usage(self._usage_block)


def find_usage(text: bytes) -> dict[str, Any] | None:
    """The last `"usage": {...}` object in a piece of JSON text, or None.

    A quote inside a JSON string is escaped, so a completion that talks about "usage" cannot match.
    """
    at = text.rfind(b'"usage"')
    while at >= 0:
        if match := _USAGE.match(text, at):
            return _object(text, match.end() - 1)
        at = text.rfind(b'"usage"', 0, at)
    return None


def _object(text: bytes, start: int) -> dict[str, Any] | None:
    # It ends at one of the next closing braces; nested objects (prompt_tokens_details) are few.
    end = start
    for _ in range(8):
        end = text.find(b"}", end) + 1
        if end == 0:
            break
        try:
            found: dict[str, Any] = orjson.loads(text[start:end])
        except orjson.JSONDecodeError:
            continue
        return found
    return None


def _has_mark(block: bytes, mark: bytes) -> bool:
    """Whether `mark` stands where only the engine can put it: a whole data line, or an event's name."""
    return any(
        line.partition(b":")[2].strip() == mark for line in block.splitlines() if line.startswith((b"data:", b"event:"))
    )
