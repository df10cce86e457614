"""Follows the typed events of the Responses and Messages APIs, and chooses the tracker of an answer."""

from collections.abc import Mapping
from typing import Any

from inference_api.models import Route
from inference_api.relay.dialects import Event, is_aborted
from inference_api.relay.events import EventTracker
from inference_api.relay.usage import later


class TypedEvents(EventTracker):
    """An EventTracker for the Responses and Messages APIs, whose events have types.

    `token_type`: text that occurs once in each event with a token, and in no other.
    """

    __slots__ = ("_token_type", "_usage")

    def __init__(self, end_marks: tuple[bytes, ...], token_type: bytes) -> None:
        super().__init__(end_marks)
        self._token_type = token_type
        self._usage: dict[str, Any] | None = None

    def begin(self, data: bytes) -> bool:
        return self._take(data)

    def feed(self, data: bytes) -> bool:
        return self._take(data)

    def usage(self) -> Mapping[str, Any] | None:
        return self._usage

    def _read_event(self, text: bytes) -> bool:
        return self._parse_event(text)

    def _count_tokens(self, block: bytes) -> int:
        tokens = block.count(self._token_type)
        return tokens if tokens == block.count(b"\n\n") else 0

    def _note(self, event: Event, text: bytes) -> None:
        if event.is_error:
            self._failed = True
        if event.is_done or self._is_end(event):
            self.ended = True
        elif event.has_token:
            self.tokens += 1
        document = event.document
        self._aborted = (
            is_aborted(document)
            or is_aborted(document.get("response"))
            or (self._aborted and event.kind != "message_delta")
        )
        if (usage := event.usage) is not None:
            # A message begins with its input tokens, and ends with its output tokens.
            self._usage = usage if self._usage is None else later(self._usage, usage)

    def _is_end(self, event: Event) -> bool:
        return event.kind.encode() in self._end_marks


def follow(route: Route, finish_ends: bool) -> EventTracker:
    """The tracker for an answer on this route."""
    if route.token_type:
        return TypedEvents(route.end_marks, route.token_type)
    return EventTracker(route.end_marks, finish_ends)
