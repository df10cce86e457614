"""How late the event loop is: what explains slow answers when it is the router that is busy."""

import asyncio
import time
from collections.abc import Callable

_EVERY = 0.25


class LoopLag:
    """Sets itself a timer, and tells by how many seconds it was late. `clock`: monotonic seconds.

    Not the loop's own clock: uvloop's stands still while the loop is busy.
    """

    def __init__(
        self, observe: Callable[[float], None], every: float = _EVERY, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._observe = observe
        self._every = every
        self._clock = clock

    async def run(self) -> None:
        """Observe until cancelled."""
        while True:
            due = self._clock() + self._every
            await asyncio.sleep(self._every)
            # uvloop counts in whole milliseconds, and may be early by a part of one.
            self._observe(max(0.0, self._clock() - due))
