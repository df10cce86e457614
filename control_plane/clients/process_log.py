"""The last lines that a process has written, in memory, and those who read along."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable

from control_plane.pure.lifecycle import MOST_LINES

# Lines that wait for one reader at most
_WAITING = 1_000


class ProcessLog:
    """Of this run, and of the one before it."""

    def __init__(self, waiting: int = _WAITING) -> None:
        self._lines: deque[str] = deque(maxlen=MOST_LINES)
        self._previous: deque[str] | None = None
        self._waiting = waiting
        self._readers: set[_Reader] = set()
        self._has_begun = self._has_ended = False

    @property
    def has_previous(self) -> bool:
        return self._previous is not None

    def begin(self) -> None:
        """A run begins."""
        if self._has_begun:
            self._previous, self._lines = self._lines, deque(maxlen=MOST_LINES)
        self._has_begun = True

    def add(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._lines.append(line)
            for reader in self._readers:
                reader.add(line)

    def last(self, count: int, previous: bool = False) -> tuple[str, ...]:
        lines = (self._previous or ()) if previous else self._lines
        return tuple(lines)[-count:] if count else ()

    async def follow(self, count: int) -> AsyncIterator[str]:
        """The last lines, and those that come, also of runs that follow, until the log ends."""
        reader = _Reader(self._waiting, self._has_ended)
        before = self.last(count)
        self._readers.add(reader)
        try:
            for line in before:
                yield line
            async for line in reader.lines():
                yield line
        finally:
            self._readers.discard(reader)

    def end(self) -> None:
        """Nobody reads along any more."""
        self._has_ended = True
        for reader in self._readers:
            reader.end()


class _Reader:
    """What one reader has not got yet: a slow one loses the oldest lines."""

    def __init__(self, most: int, has_ended: bool) -> None:
        self._lines: deque[str] = deque(maxlen=most)
        self._lost = 0
        self._has_ended = has_ended
        self._news = asyncio.Event()

    def add(self, line: str) -> None:
        self._lost += len(self._lines) == self._lines.maxlen
        self._lines.append(line)
        self._news.set()

    def end(self) -> None:
        self._has_ended = True
        self._news.set()

    async def lines(self) -> AsyncIterator[str]:
        while True:
            while self._lines:
                if self._lost:
                    lost, self._lost = self._lost, 0
                    yield f"[{lost} lines are missing: they came faster than they were read]"
                yield self._lines.popleft()
            if self._has_ended:
                return
            await self._news.wait()
            self._news.clear()
