"""A Pump that keeps single events of a stream from the client: those that a feature asked the engine for."""

import re
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

from inference_api.models import EventFilter
from inference_api.relay.pump import Pump

_END_OF_EVENT = re.compile(rb"\r\n\r\n|\n\n|\r\r")


class FilteringPump(Pump):
    """Reads without the filter's marker go on as they came, and as fast; only one with it is taken apart.

    The trackers see every event, whatever the client gets. The end of a read that may be the beginning of an event
    with the marker waits for the rest of it.
    """

    __slots__ = ("_filter", "_held")

    def __init__(self, event_filter: EventFilter, *common: Any) -> None:
        super().__init__(*common)
        self._filter = event_filter
        self._held = b""

    def data_received(self, data: bytes, complete: bool, frame: bytes | None = None) -> bool:
        whole = data.endswith((b"\n\n", b"\r\n\r\n", b"\r\r")) or complete
        if whole and not self._held and self._filter.marker not in data:
            return super().data_received(data, complete, frame)
        kept = self._sift(data, complete)
        return super().data_received(kept, complete) if kept or complete else False

    async def pull(self, stream: AsyncIterable[bytes]) -> None:
        await super().pull(self._sifted(stream))

    async def _sifted(self, stream: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        async for data in stream:
            if kept := self._sift(data, False):
                yield kept
        if self._held:
            yield self._sift(b"", True)

    def _sift(self, data: bytes, complete: bool) -> bytes:
        """What the client gets of all that has come; what is no whole event yet waits."""
        data, self._held = self._held + data, b""
        kept, at = [], 0
        for end in _END_OF_EVENT.finditer(data):
            event, at = data[at : end.end()], end.end()
            if self._filter.marker not in event or self._filter.keeps(event):
                kept.append(event)
            else:
                self.skip(event)
        if complete:
            kept.append(data[at:])
        else:
            self._held = data[at:]
        return b"".join(kept)
