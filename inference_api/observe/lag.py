"""Measures the lag of the event loop, which shows an overloaded or hanging router."""

import asyncio
import time
from collections.abc import Callable

_EVERY = 0.25


class LoopLag:
    """Sets a timer, and reports its delay in seconds. `clock`: monotonic seconds.

    Not the loop's own clock: uvloop's stands still while the loop is busy.
    """

    def __init__(
        self, observe: Callable[[float], None], every: float = _EVERY, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._observe = observe
        self._every = every
        self._clock = clock
        # Time of the last run of the timer; None before the start and after the end.
        self._ticked: float | None = None
        self._largest = 0.0

    def take_largest(self) -> float:
        """The largest delay since the last call, in seconds."""
        largest, self._largest = self._largest, 0.0
        return largest

    def silence(self) -> float | None:
        """Seconds since the loop last ran the timer; None before the start and after the end. From any thread."""
        ticked = self._ticked
        return None if ticked is None else self._clock() - ticked

    async def run(self) -> None:
        """Observe until cancelled."""
        try:
            while True:
                self._ticked = self._clock()
                due = self._ticked + self._every
                await asyncio.sleep(self._every)
                # uvloop counts in whole milliseconds, and may be early by a part of one.
                lag = max(0.0, self._clock() - due)
                self._largest = max(self._largest, lag)
                self._observe(lag)
        finally:
            self._ticked = None
