"""Time limits of one exchange with a backend. Sans-IO; all times are loop times."""

from typing import NamedTuple

import httpx

from inference_api.upstream.failures import FirstByteTimeout, IdleTimeout, TotalTimeout

# A timer may fire up to a clock tick early.
_TICK = 0.002


class Timeout(NamedTuple):
    """Seconds to connect, from the request to the head of the response, and between two reads of its body."""

    connect: float | None = None
    first_byte: float | None = None
    idle: float | None = None


class Deadlines:
    """The limits of one exchange; `start` resets them for the next.

    `head_done`: the response head has arrived. `silent_since`: the last read, None while silence does not count.
    """

    __slots__ = ("_deadline", "_first_byte", "_idle")

    def __init__(self) -> None:
        self._first_byte: float | None = None
        self._idle: float | None = None
        self._deadline: float | None = None

    def start(self, now: float, timeout: Timeout, deadline: float | None) -> float | None:
        """Begin an exchange that must end before `deadline`. Returns the time of the first check, or None."""
        _, first_byte, self._idle = timeout
        self._first_byte = None if first_byte is None else now + first_byte
        self._deadline = deadline
        return self.soonest(now, False, None)

    def soonest(self, now: float, head_done: bool, silent_since: float | None) -> float | None:
        """The earliest time at which a limit can be exceeded."""
        soonest = None if head_done else self._first_byte
        if self._idle is not None:
            # Silence may start to count at any time from now.
            quiet = (now if silent_since is None else silent_since) + self._idle
            soonest = quiet if soonest is None else min(soonest, quiet)
        if self._deadline is not None and (soonest is None or self._deadline < soonest):
            soonest = self._deadline
        return soonest

    def expired(self, now: float, head_done: bool, silent_since: float | None) -> httpx.TransportError | None:
        """The error of the limit that the exchange exceeded, or None."""
        due = now + _TICK
        if self._deadline is not None and due >= self._deadline:
            return TotalTimeout("the answer did not end in time")
        if not head_done and self._first_byte is not None and due >= self._first_byte:
            return FirstByteTimeout("the backend did not begin to answer in time")
        if silent_since is not None and self._idle is not None and due >= silent_since + self._idle:
            return IdleTimeout("the backend fell silent")
        return None
