"""Counters in the memory of this process, and of no other."""

from collections.abc import Callable
from itertools import islice
from time import time_ns
from typing import Generic, Protocol, TypeVar

from inference_api.features.limiting.windows import Streams, Window

# Counters at most, and the share of them that goes at once
COUNTERS = 100_000
_BATCH = 100


class Counted(Protocol):
    def empty_at(self) -> float: ...


C = TypeVar("C", bound=Counted)


def unix_ms() -> int:
    return time_ns() // 1_000_000


class Counters(Generic[C]):
    """At most `size` counters by name. The first to go are empty ones, then those that are empty soonest.

    `on_evict` is called after some have gone: whoever holds counters must look them up again.
    """

    def __init__(self, size: int, on_evict: Callable[[], None] = lambda: None) -> None:
        self._size = size
        self._found: dict[str, C] = {}
        self.on_evict = on_evict

    def get(self, name: str, make: Callable[[], C]) -> C:
        found = self._found.get(name)
        if found is None:
            if len(self._found) >= self._size:
                self._evict()
            found = self._found[name] = make()
        return found

    def all(self) -> list[C]:
        return list(self._found.values())

    def _evict(self) -> None:
        """Look at some, the oldest first; one half goes, and the other half is not looked at again for long."""
        batch = max(self._size // _BATCH, 1)
        looked_at = list(islice(self._found.items(), 2 * batch))
        looked_at.sort(key=lambda item: item[1].empty_at())
        for place, (name, counter) in enumerate(looked_at):
            del self._found[name]
            if place >= batch:
                self._found[name] = counter
        self.on_evict()

    def __len__(self) -> int:
        return len(self._found)


class MemoryStore:
    """A Store of this process alone. `clock`: Unix time in milliseconds."""

    def __init__(self, size: int = COUNTERS, clock: Callable[[], int] = unix_ms) -> None:
        self.now = clock
        self._windows: Counters[Window] = Counters(size)
        self._streams: Counters[Streams] = Counters(size)

    def on_evict(self, forget: Callable[[], None]) -> None:
        """Call `forget` after counters have gone."""
        self._windows.on_evict = self._streams.on_evict = forget

    def window(self, name: str, per: int) -> Window:
        return self._windows.get(name, lambda: Window(name, per))

    def streams(self, name: str) -> Streams:
        return self._streams.get(name, lambda: Streams(name))
