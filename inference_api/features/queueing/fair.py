"""Whose turn it is among requests that wait: a FIFO for each caller, bands of priority, and fair shares in a band.

Pure: no clock, no input or output. In a band, each caller that waits gains credit in proportion to its weight, and its
first request is next when the credit has reached its cost: deficit round robin in rounds that are infinitely short.
So callers that always wait get tokens in proportion to their weights, however many requests they have and however
large those are; a caller that comes later has no claim on what it did not ask for.

The credit is not counted up. A band has a clock of its own, in tokens per weight; a caller whose turn began at `start`
is due at `start + cost / weight`, and when a request is next, the clock shows the time at which it was due. That costs
O(log callers) for each request.
"""

from collections import OrderedDict
from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Generic, Literal, TypeVar

T = TypeVar("T")
# What is at its bound: the queue, or the caller's part of it
Full = Literal["all", "caller"]
# Entries of the heap that are out of date, beyond one for each caller, until it is made anew
_STALE = 64


class Turn(Generic[T]):
    """One request that waits; `cost` in tokens."""

    __slots__ = ("cost", "item", "share")

    def __init__(self, share: "_Share[T]", cost: int, item: T) -> None:
        self.share = share
        self.cost = cost
        self.item = item


class _Share(Generic[T]):
    """The requests of one caller in one band, first come, first served."""

    __slots__ = ("caller", "number", "priority", "start", "turns", "weight")

    def __init__(self, caller: Hashable, priority: int, start: float) -> None:
        self.caller, self.priority, self.start = caller, priority, start
        self.weight = 1.0
        self.turns: OrderedDict[Turn[T], None] = OrderedDict()
        # Of its one entry in the heap that is up to date
        self.number = -1


class FairQueue(Generic[T]):
    """Requests that wait, by caller, priority (lower is earlier) and weight."""

    def __init__(self) -> None:
        self._shares: dict[tuple[int, Hashable], _Share[T]] = {}
        # (priority, due, number, share): equal ones in the order in which they came
        self._due: list[tuple[int, float, int, _Share[T]]] = []
        # By priority
        self._clocks: dict[int, float] = {}
        self._waiting: dict[Hashable, int] = {}
        self._length = 0
        self._numbers = 0

    def __len__(self) -> int:
        return self._length

    def full(self, caller: Hashable, size: int, per_caller: int) -> Full | None:
        """What is at its bound for one more request of this caller."""
        if self._length >= size:
            return "all"
        return "caller" if self._waiting.get(caller, 0) >= per_caller else None

    def add(self, caller: Hashable, priority: int, weight: float, cost: int, item: T) -> Turn[T]:
        share = self._shares.get((priority, caller))
        if share is None:
            share = self._shares[priority, caller] = _Share(caller, priority, self._clocks.get(priority, 0.0))
        # As the policy has it now, from its next request on
        share.weight = weight
        turn = Turn(share, max(cost, 1), item)
        share.turns[turn] = None
        self._length += 1
        self._waiting[caller] = self._waiting.get(caller, 0) + 1
        if len(share.turns) == 1:
            self._enter(share)
        return turn

    def next(self) -> Turn[T] | None:
        """Take out the request whose turn it is."""
        while self._due:
            priority, due, number, share = heappop(self._due)
            if number != share.number:
                continue
            turn, _ = share.turns.popitem(last=False)
            share.start = due
            # One whose first request has left may be overdue.
            self._clocks[priority] = max(self._clocks.get(priority, 0.0), due)
            self._taken(share, is_first=True)
            return turn
        return None

    def remove(self, turn: Turn[T]) -> bool:
        """Take out a request that does not wait any more. False: it was out already."""
        share = turn.share
        if turn not in share.turns:
            return False
        is_first = next(iter(share.turns)) is turn
        del share.turns[turn]
        self._taken(share, is_first)
        return True

    def _taken(self, share: _Share[T], is_first: bool) -> None:
        self._length -= 1
        left = self._waiting[share.caller] - 1
        if left:
            self._waiting[share.caller] = left
        else:
            del self._waiting[share.caller]
        if not share.turns:
            share.number = -1
            del self._shares[share.priority, share.caller]
        elif is_first:
            self._enter(share)
        if not self._shares:
            self._due.clear()
            self._clocks.clear()
        elif len(self._due) > 2 * len(self._shares) + _STALE:
            self._due = [entry for entry in self._due if entry[2] == entry[3].number]
            heapify(self._due)

    def _enter(self, share: _Share[T]) -> None:
        """Note when its first request is due."""
        self._numbers = share.number = self._numbers + 1
        cost = next(iter(share.turns)).cost
        heappush(self._due, (share.priority, share.start + cost / share.weight, share.number, share))
