"""Reads the dialects of engines: single server-sent events, JSON answers, and how to distinguish them. Pure.

For the rare cases: the beginning and the end of a stream, and unusual spellings. `events` has the fast paths.
"""

import re
from enum import Enum, auto
from typing import Any

from inference_api.upstream.json_text import NotJSON, judge

_BOM = b"\xef\xbb\xbf"
_FIELDS = (b"data:", b"event:", b"id:", b"retry:")
# Bytes
_LONGEST_PING = 100
_ERRORS = (b"error", b"response.failed")
# Event names without a meaning of their own
_UNNAMED = (b"", b"message")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_ABORT = re.compile(rb'"finish_reason"\s*:\s*"abort"')
# White space of JSON, and the separator of a sequence (RFC 7464).
_PADDING = b" \t\r\n\x1e"
# Bytes of padding after which an answer counts as JSON: only JSON is padded.
_LONGEST_PADDING = 4096


class Event:
    """One server-sent event, by the lines of its block (HTML, 9.2.6)."""

    __slots__ = ("_block", "_document", "data", "name")

    def __init__(self, block: bytes) -> None:
        self._block = block
        self.name = b""
        data = []
        for line in block.removeprefix(_BOM).splitlines():
            field, _, value = line.partition(b":")
            if field == b"data":
                data.append(value.strip())
            elif field == b"event":
                self.name = value.strip()
        self.data = b"\n".join(data)
        self._document: dict[str, Any] | None = None

    @property
    def document(self) -> dict[str, Any]:
        """The object that its data is; empty if it is none."""
        if self._document is None:
            found = read_json(self.data) if self.data[:1] == b"{" else {}
            if found is None:
                # Printed over several lines, with `data:` only on the first.
                found = read_json(self._block[self._block.find(b"{") : self._block.rfind(b"}") + 1])
            self._document = found if isinstance(found, dict) else {}
        return self._document

    @property
    def kind(self) -> str:
        """Its name, or the type in its data: some engines leave out `event:`."""
        kind = self.name.decode("latin-1") if self.name not in _UNNAMED else self.document.get("type")
        return kind if isinstance(kind, str) else ""

    @property
    def is_ping(self) -> bool:
        """Whether it is a heartbeat: comments, blank lines, or a ping of the Messages API."""
        return (
            (not self.data and not self.name) or self.name == b"ping" or (len(self.data) < 99 and self.kind == "ping")
        )

    @property
    def is_done(self) -> bool:
        return self.data.strip(b'"') == b"[DONE]"

    @property
    def is_error(self) -> bool:
        if self.name not in _ERRORS and self._block.find(b"error") < 0 and self._block.find(b"response.failed") < 0:
            return False
        document = self.document
        return (
            bool(document.get("error"))
            or self.kind.encode() in _ERRORS
            or document.get("object") == "error"
            or self.finish == "error"
        )

    @property
    def has_token(self) -> bool:
        return is_delta(self.kind) or (self.name in _UNNAMED and has_token(self.document))

    @property
    def finish(self) -> Any:
        """The reason to finish of a choice, or None."""
        choices = self.document.get("choices")
        if isinstance(choices, list):
            found = [choice.get("finish_reason") for choice in choices if isinstance(choice, dict)]
            return next((reason for reason in reversed(found) if reason is not None), None)
        return None

    @property
    def usage(self) -> dict[str, Any] | None:
        """The usage of the event itself, or of the message or response in it."""
        document = self.document
        for place in (document, document.get("message"), document.get("response")):
            usage = place.get("usage") if isinstance(place, dict) else None
            if isinstance(usage, dict):
                return usage
        return None


def has_token(document: Any) -> bool:
    """Whether the data of an event without a name carry output of the model; True if that is not clear."""
    if not isinstance(document, dict):
        return True
    choices = document.get("choices")
    if isinstance(choices, list):
        return any(isinstance(choice, dict) and _is_said(choice) for choice in choices)
    kind = document.get("type")
    return is_delta(kind) if isinstance(kind, str) else document.keys() != {"usage"}


def _is_said(choice: dict[str, Any]) -> bool:
    # A reason to finish comes with the token that ends it.
    if choice.get("finish_reason") is not None or choice.get("text"):
        return True
    delta = choice.get("delta")
    if isinstance(delta, dict):
        for name, value in delta.items():
            if value and name != "role":
                return True
    return False


def is_delta(kind: str) -> bool:
    return kind.endswith("delta") and kind != "message_delta"


def is_aborted(document: Any) -> bool:
    """Whether an answer, or a part of a stream, reports that the engine aborted the generation.

    vLLM reports `abort` in a choice, `cancelled` in a response, and in a message no reason to stop.
    """
    if not isinstance(document, dict):
        return False
    choices = document.get("choices")
    if isinstance(choices, list):
        return any(isinstance(choice, dict) and choice.get("finish_reason") == "abort" for choice in choices)
    kind = document.get("type")
    if kind in ("message", "message_delta"):
        delta = document.get("delta") if kind == "message_delta" else document
        return isinstance(delta, dict) and delta.get("stop_reason", "") is None
    return document.get("object") == "response" and document.get("status") == "cancelled"


def ends_in_abort(body: bytes) -> bool:
    """The same for a JSON text that is too long to parse, by its end."""
    return _ABORT.search(body, max(0, len(body) - 2048)) is not None


class Body(Enum):
    """The kind of a body."""

    EVENTS = auto()
    JSON = auto()
    OTHER = auto()


def body_kind(first: bytes) -> Body | None:
    """The kind of a body, by its beginning; None: more bytes are needed."""
    if len(first) < len(_BOM) and _BOM.startswith(first):
        return None
    text = first.removeprefix(_BOM).lstrip(_PADDING)
    if text[:1] in (b"{", b"["):
        return Body.JSON
    if text[:1] == b":" or text.startswith(_FIELDS):
        return Body.EVENTS
    if not text:
        return None if len(first) < _LONGEST_PADDING else Body.JSON
    if any(field.startswith(text) for field in _FIELDS):
        return None
    return Body.OTHER


def read_json(text: bytes) -> Any:
    """The value of a JSON text; None if it is none, or none that Python can hold."""
    try:
        return judge(text)
    except (NotJSON, RecursionError):
        return None


def is_json(body: bytes, whole: bool) -> bool:
    """Whether a text that does not parse here is probably JSON, or a JSON sequence.

    Engines nest deeper than parsers allow, and write NaN, lone surrogates, and padding. `whole`: check all of
    it, and not only its ends.
    """
    text = body.removeprefix(_BOM).strip(_PADDING)
    if text[:1] not in (b"{", b"[") or text[-1:] not in (b"}", b"]"):
        return False
    if not whole:
        return True
    rest = _STRING.sub(b"", text)
    return rest.count(b"{") == rest.count(b"}") and rest.count(b"[") == rest.count(b"]") and b'"' not in rest
