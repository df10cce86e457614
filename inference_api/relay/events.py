"""Follows server-sent events without changing them: their ends, their tokens, and the end of the stream.

Sans-IO. Nearly every event carries one token and nothing else: the fast path recognises these, and `dialects` reads
the others.
"""

import re
from collections.abc import Mapping
from typing import Any

from inference_api.models import Outcome
from inference_api.relay.dialects import Event, has_token, is_aborted, read_json
from inference_api.relay.usage import USAGE, find_usage

# Data with one of these endings end with a blank line; \r\n\r\n ends with the second.
ENDS = (b"\n\n", b"\n\r\n", b"\r\r")
BOUNDARY = re.compile(rb"\r\n\r\n|\n\r\n|\n\n|\r\r")
_OBJECT = (b"data: {", b"data:{")
_DONE = b"data: [DONE]"
_NO_CHOICES = re.compile(rb'"choices" ?: ?\[\]')
# Of a larger event only the end is searched, its content is skipped.
MAX_EVENT = 1 << 20


def _is_plain(line: bytes) -> bool:
    """Whether `line`, a whole event whose data are an object, carries a token and nothing else.

    Not by `in` or `find`: on bytes, `in` first tries and fails to make an integer of its operand, and `find` costs
    twice as much as `partition`.
    """
    return line[7:14] != b'"error"' and not line.partition(b'"usage"')[1] and not line.partition(b"\r")[1]


def _is_line(text: bytes) -> bool:
    return text.find(b"\n") < 0 and text.find(b"\r") < 0


def _has_choices(event: bytes) -> bool:
    _, mark, choices = event.partition(b'"choices":[')
    return choices[:1] != b"]" if mark else not _NO_CHOICES.search(event)


class _Beginnings(dict[bytes, bool]):
    """Caches whether events carry a token, by their text from `choices` on: most streams begin alike."""

    def __call__(self, line: bytes) -> bool:
        _, mark, text = line.partition(b'"content":"')
        if mark and text[:1] != b'"':
            return True
        said = line.partition(b'"choices"')[2]
        known = self.get(said) if said else None
        if known is None:
            known = has_token(read_json(line[6:]))
            if 0 < len(said) < 256:
                if len(self) >= 64:
                    self.clear()
                self[said] = known
        return known


_carries_token = _Beginnings()


class EventTracker:
    """Feed it every byte that goes to the client; memory stays below one event of at most 1 MiB.

    `end_marks`: marks of the last event of a complete stream, beside `[DONE]`; () if the stream may end anywhere.
    `finish_ends`: an event with a reason to finish may be the last one.

    `begin` parses the events before the first token; `feed` then counts as a token whatever can be nothing else. Both
    return True if the data held only heartbeats.
    """

    __slots__ = (
        "_aborted", "_begun", "_blind", "_end_marks", "_failed", "_finish_ends", "_last", "_open", "_reported",
        "at_boundary", "ended", "tokens",
    )  # fmt: skip

    def __init__(self, end_marks: tuple[bytes, ...] = (), finish_ends: bool = False) -> None:
        self._end_marks = end_marks
        self._finish_ends = finish_ends
        self._open = bytearray()
        self._blind = False
        self._begun = False
        # The last event that may have carried a token: it may contain the end of the stream.
        self._last = b""
        # The last event with a usage
        self._reported = b""
        self._failed = False
        self._aborted = False
        self.at_boundary = True
        self.ended = False
        # Events that carried a token
        self.tokens = 0

    def begin(self, data: bytes) -> bool:
        """As `feed`, before the first token."""
        line, _, rest = data.partition(b"\n")
        if rest == b"\n" and line[:7] == b"data: {" and not self._open and _is_plain(line):
            self._begun = True
            self._last = data
            if _carries_token(line):
                self.tokens = 1
            return False
        block = self._whole_events(data)
        return bool(block) and self._read(block)

    def feed(self, data: bytes) -> bool:
        line, _, rest = data.partition(b"\n")
        if rest == b"\n" and line[:7] == b"data: {" and not self._open:
            if _is_plain(line):
                self.tokens += 1
                self._last = data
                return False
            if line.find(b"\r") < 0 and line.find(b"error") < 0:
                self._note_usage(data)
                return False
        return self._take(data)

    def finish(self) -> None:
        """The body has ended. A last event also counts without the blank line after it."""
        if not self._open or self._blind:
            return
        rest = bytes(self._open)
        if not self._begun and not self.tokens and rest.lstrip()[:1] == b"{":
            self._finish_document(rest)
            return
        event = Event(rest)
        # Not its name alone: the rest of it may be missing.
        if event.is_done or (event.document and (event.is_error or self._is_end(event))):
            self._note(event, rest)
            self._open.clear()
            self.at_boundary = True

    def verdict(self) -> Outcome:
        """The outcome of a stream whose body is at its end."""
        last = self._last
        if self.ended and not self._failed and last.find(b"error") < 0 and last.find(b'"abort"') < 0:
            return Outcome.ABORTED if self._aborted else Outcome.OK
        if self.failed:
            return Outcome.ERROR_EVENT
        if not self.complete:
            return Outcome.TRUNCATED
        return Outcome.ABORTED if self.aborted else Outcome.OK

    @property
    def failed(self) -> bool:
        """Whether the engine reported an error; one that looks like a token counts only in the last event."""
        return self._failed or (self._last.find(b"error") >= 0 and self._last_event().is_error)

    @property
    def aborted(self) -> bool:
        """Whether the engine reported that it aborted the generation."""
        return self._aborted or (self._last.find(b'"abort"') >= 0 and is_aborted(self._last_event().document))

    @property
    def over(self) -> bool:
        """Whether nothing is missing: there was a last event, or an error."""
        return self.ended or (self.failed and self.at_boundary)

    @property
    def complete(self) -> bool:
        """Whether the stream may end here: its last event came, or it has none that could be missed."""
        return self.ended or not self._end_marks or (self._finish_ends and self._last_event().finish is not None)

    def usage(self) -> Mapping[str, Any] | None:
        """The last usage that was reported, or None."""
        return find_usage(self._reported)

    def _take(self, data: bytes) -> bool:
        if data == _DONE + b"\n\n" and not self._open:
            self.ended = True
            return False
        block = self._whole_events(data)
        if not block:
            return False
        tokens = self._count_tokens(block)
        if not tokens:
            return self._read(block)
        self.tokens += tokens
        self._last = block
        return False

    def _whole_events(self, data: bytes) -> bytes:
        """The events that are complete now; b"" if none is."""
        if not self._open and data.endswith(ENDS):
            return data
        unfinished = self._open
        before = len(unfinished)
        unfinished += data
        # An end may begin up to 3 bytes before this piece.
        seam = max(0, before - 3)
        ends = [i + len(mark) for mark in ENDS if (i := unfinished.rfind(mark, seam)) >= 0]
        block = b""
        if ends:
            start, end = 0, max(ends)
            if self._blind:
                # Skip the rest of an event that was too large.
                start = min(i + len(mark) for mark in ENDS if (i := unfinished.find(mark)) >= 0)
                self._blind = False
                self.tokens += 1
            block = bytes(unfinished[start:end])
            del unfinished[:end]
        elif len(unfinished) > MAX_EVENT:
            del unfinished[:-3]
            self._blind = True
        self.at_boundary = not unfinished
        return block

    def _count_tokens(self, block: bytes) -> int:
        """The number of events in the block if all of them look like tokens, else 0."""
        if not block.startswith(_OBJECT) or block.find(b"error") >= 0 or block.find(b'"usage"') >= 0:
            return 0
        if block.find(b"[DONE]") >= 0 or block.find(b"\n:") >= 0:
            return 0
        return block.count(b"\n\n") or len(BOUNDARY.findall(block))

    def _read(self, block: bytes) -> bool:
        """Read each event. Returns whether all were heartbeats."""
        self._begun = True
        alive = True
        for text in block.split(b"\n\n") if block.find(b"\r") < 0 else BOUNDARY.split(block):
            if text and not self._read_event(text):
                alive = False
        return alive

    def _read_event(self, text: bytes) -> bool:
        """Read one event. Returns whether it is a heartbeat."""
        if text == _DONE:
            self.ended = True
        elif self.tokens and text.startswith(_OBJECT) and text.find(b"error") < 0 and _is_line(text):
            self._note_usage(text)
        else:
            return self._parse_event(text)
        return False

    def _parse_event(self, text: bytes) -> bool:
        event = Event(text)
        if event.is_ping:
            return True
        self._note(event, text)
        return False

    def _note_usage(self, event: bytes) -> None:
        """Note an event after the first token that is no error; one with a usage may carry a token, too."""
        if event.find(b'"usage"') >= 0 and USAGE.search(event):
            self._reported = event
        if _has_choices(event):
            self.tokens += 1
            self._last = event

    def _note(self, event: Event, text: bytes) -> None:
        if USAGE.search(text):
            self._reported = text
        if event.is_done:
            self.ended = True
        elif event.is_error:
            self._failed = True
        elif self._has_token(event):
            self.tokens += 1
            self._last = text

    def _has_token(self, event: Event) -> bool:
        # After the first, an event without choices reports usage. Checking all would require parsing all.
        return _has_choices(event.data) if self.tokens else event.has_token

    def _is_end(self, event: Event) -> bool:
        return event.is_done

    def _last_event(self) -> Event:
        return Event(next((text for text in reversed(BOUNDARY.split(self._last)) if text), b""))

    def _finish_document(self, text: bytes) -> None:
        """Note a body without any event that is a JSON document, whatever its content type."""
        document = read_json(text.strip())
        if isinstance(document, dict):
            self.ended = self.at_boundary = True
            self._failed = bool(document.get("error"))
            self._aborted = is_aborted(document)
            self._reported = text
