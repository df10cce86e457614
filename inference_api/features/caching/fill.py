"""Takes an answer into the cache while a client gets it: exactly these bytes, if the answer is whole and worth it."""

import re
from collections.abc import Callable

import orjson

from inference_api.models import OK, EventFilter, Outcome, RawHeaders
from inference_api.observe.account import NO_COUNTS
from inference_api.relay.replay import Replay
from inference_api.relay.usage import Counts, counts, find_usage

# Bytes of the longest answer that is stored
LONGEST = 256 * 1024
# What another client may get of the head; all else is about the one request, or its client.
_KEPT = frozenset({b"content-type", b"cache-control", b"x-accel-buffering"})
# Not a set: an engine may give anything, and not all of it can be hashed.
_CUT = ("length", "abort")
# In a text of a model the quotes are escaped.
_CUT_IN_STREAM = re.compile(rb'"finish_reason"\s*:\s*"(?:length|abort)"')
_COMPLETED = re.compile(rb'"type"\s*:\s*"response\.completed"')


class Fill:
    """A Tap. `taken` gets the answer and its tokens as soon as it is whole; `dropped` is called if it is not stored.

    One of the two is called, at most once; neither for a stream that breaks off.
    """

    __slots__ = ("_dropped", "_headers", "_label", "_length", "_pieces", "_removed", "_size", "_taken")

    def __init__(self, label: str, taken: Callable[[Replay, Counts], None], dropped: Callable[[], None]) -> None:
        self._label = label
        self._taken = taken
        self._dropped = dropped
        self._headers: RawHeaders = []
        # None: of a stream
        self._length: int | None = None
        # None: nothing more is taken.
        self._pieces: list[bytes] | None = None
        self._size = 0
        # The last event that its client did not get
        self._removed = b""

    def watched(self, event_filter: EventFilter) -> EventFilter:
        """The same filter; the tokens that it keeps from the client are those of the answer."""
        keeps = event_filter.keeps

        def keeping(event: bytes) -> bool:
            is_kept = keeps(event)
            if not is_kept:
                self._removed = event
            return is_kept

        return EventFilter(event_filter.marker, keeping)

    def start(self, status: int, headers: RawHeaders) -> None:
        seen = dict(headers)
        kind, length = seen.get(b"content-type", b"").partition(b";")[0].strip().lower(), seen.get(b"content-length")
        is_json = kind.endswith((b"/json", b"+json")) and length is not None
        if b"content-encoding" in seen or not (is_json or kind == b"text/event-stream"):
            self._dropped()
            return
        if length is not None:
            self._length = int(length)
            if self._length > LONGEST:
                self._dropped()
                return
        self._headers = [pair for pair in headers if pair[0] in _KEPT]
        self._pieces = []

    def chunk(self, data: bytes) -> None:
        if self._pieces is None:
            return
        self._pieces.append(data)
        self._size += len(data)
        if self._size == self._length:
            # Not at the end: a client that reads slowly must not hold up those that wait for this answer.
            self._take()
        elif self._size > LONGEST:
            self._pieces = None
            self._dropped()

    def end(self, outcome: Outcome) -> None:
        if self._pieces is not None and outcome is OK:
            self._take()
        self._pieces = None

    def _take(self) -> None:
        assert self._pieces is not None
        body, self._pieces = b"".join(self._pieces), None
        tokens = (
            of_whole(self._label, body) if self._length is not None else of_stream(self._label, body, self._removed)
        )
        if tokens is None:
            self._dropped()
        else:
            self._taken(Replay(self._headers, body), tokens)


def of_whole(label: str, body: bytes) -> Counts | None:
    """The tokens of a JSON answer; None: it is not to be stored."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(document, dict):
        return NO_COUNTS
    choices = document.get("choices")
    if isinstance(choices, list) and any(one.get("finish_reason") in _CUT for one in choices if isinstance(one, dict)):
        return None
    if document.get("error") or (label == "responses" and document.get("status") != "completed"):
        return None
    usage = document.get("usage")
    return counts(usage) if isinstance(usage, dict) else NO_COUNTS


def of_stream(label: str, body: bytes, removed: bytes = b"") -> Counts | None:
    """The same of a whole stream of events; `removed`: one that only the router got."""
    if _CUT_IN_STREAM.search(body) or (label == "responses" and not _COMPLETED.search(body)):
        return None
    usage = find_usage(removed) or find_usage(body)
    return NO_COUNTS if usage is None else counts(usage)
