"""A Pump that removes single events of a stream: those that a feature asked the engine for."""

from itertools import pairwise
from typing import Any

from inference_api.models import EventFilter
from inference_api.relay.events import BOUNDARY, ENDS, MAX_EVENT
from inference_api.relay.pump import Pump

# Costs less than `super()`, for every event.
_receive = Pump.data_received


class FilteringPump(Pump):
    """Reads of whole events without the filter's marker pass unchanged, without extra cost.

    The tracker sees every event, also removed ones. The client gets whole events: an incomplete one waits for its rest,
    up to 1 MiB.
    """

    __slots__ = ("_filter", "_held", "_marker")

    def __init__(self, event_filter: EventFilter, *common: Any) -> None:
        super().__init__(*common)
        self._filter = event_filter
        self._marker = event_filter.marker
        self._held = b""

    def data_received(self, data: bytes, complete: bool, frame: bytes | None = None) -> bool:
        # Not by `in`: on bytes, it first tries and fails to make an integer of its operand.
        if frame is not None and (self._held or not data.endswith(ENDS) or data.find(self._marker) >= 0):
            frame = None
        return _receive(self, data, complete, frame)

    def _note(self, data: bytes, complete: bool) -> bytes:
        data, self._held = self._held + data, b""
        if not complete and not data.endswith(ENDS):
            whole = max((end.end() for end in BOUNDARY.finditer(data)), default=0)
            if len(data) - whole <= MAX_EVENT:
                data, self._held = data[:whole], data[whole:]
        kept = self._sift(data) if self._filter.marker in data else data
        self._alive = bool(data) and self._feed is not None and self._feed(data)
        self._show(kept)
        return kept

    def _sift(self, data: bytes) -> bytes:
        """The events without the removed ones; the last one may be incomplete."""
        marker, keeps = self._filter
        if data.find(b"\r") < 0:
            # The regular expression costs a hundred times as much.
            *whole, last = data.split(b"\n\n")
            events = [*(event + b"\n\n" for event in whole), last]
        else:
            ends = [*(end.end() for end in BOUNDARY.finditer(data)), len(data)]
            events = [data[start:end] for start, end in pairwise([0, *ends])]
        return b"".join([event for event in events if event.find(marker) < 0 or keeps(event)])
