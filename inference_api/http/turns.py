"""Runs long work on the event loop in slices, so that other requests wait a few milliseconds at most."""

import asyncio
from collections.abc import Callable, Generator
from time import monotonic
from typing import TypeVar

T = TypeVar("T")


class Turns:
    """Does at most `seconds` of work, plus the rest of a slice, per turn of the loop, for all requests together.

    A thread would not help: it would hold the interpreter just as long.
    """

    def __init__(self, seconds: float = 0.004, clock: Callable[[], float] = monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        # Fair: bodies take turns slice by slice, and a small one does not wait for the end of a large one.
        self._lock = asyncio.Lock()

    async def run(self, work: Generator[None, None, T]) -> T:
        """Run `work` to its end, and return its result. It is suspended where it yields."""
        while True:
            async with self._lock:
                end = self._clock() + self._seconds
                try:
                    next(work)
                    while self._clock() < end:
                        next(work)
                except StopIteration as stop:
                    result: T = stop.value
                    return result
                await asyncio.sleep(0)
