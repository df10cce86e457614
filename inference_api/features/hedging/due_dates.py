"""Notices what is late, with one timer for many requests: nearly all are answered in time, and a timer costs 3 us."""

import asyncio
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Generic, Protocol, TypeVar

# Seconds by which a timer of the loop may be early
_EARLY = 0.001


class Awaited(Protocol):
    """`due`: loop time; `over`: it has come."""

    due: float
    over: bool


A = TypeVar("A", bound=Awaited)


class DueDates(Generic[A]):
    """`late` gets what is not over when it is due, in the order in which it was added: later ones are due later."""

    __slots__ = ("_awaited", "_late", "_timer")

    def __init__(self, late: Callable[[A], None]) -> None:
        self._late = late
        self._awaited: deque[A] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, one: A) -> None:
        self._awaited.append(one)
        if self._timer is None:
            self._set(one.due)

    def done(self) -> None:
        """Something is over: forget what can be forgotten. The timer stays, for what comes next."""
        awaited = self._awaited
        while awaited and awaited[0].over:
            awaited.popleft()

    def _set(self, due: float) -> None:
        self._timer = asyncio.get_running_loop().call_at(due, self._expire)

    def _expire(self) -> None:
        self._timer = None
        awaited, now = self._awaited, monotonic() + _EARLY
        while awaited:
            one = awaited[0]
            if not one.over and one.due > now:
                self._set(one.due)
                return
            awaited.popleft()
            if not one.over:
                self._late(one)
