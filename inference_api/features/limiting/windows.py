"""The sliding window: two counts in windows that are aligned to Unix time. Times are milliseconds.

`used = current + ceil(previous x (per - elapsed) / per)`: the window before counts by the part of it that a window of
the same length, which ends now, still covers. At most `limit` are admitted in each aligned window, as `current` alone
never exceeds it.
"""

from typing import Protocol


class Window:
    """Counts of the current and of the previous window of `per` milliseconds; `start`, `end`: of the current one.

    Whoever admits requests (`limiting.plans.take`) reads and writes the counts itself, and calls `roll` from `end` on.
    """

    __slots__ = ("current", "end", "name", "per", "previous", "start")

    def __init__(self, name: str, per: int) -> None:
        self.name = name
        self.per = per
        self.start = self.end = self.current = self.previous = 0

    def roll(self, now: int) -> int:
        """Move to the window of `now`. Returns the milliseconds since its start.

        A clock that goes back by less than a window does not move it, so that nobody is let through twice.
        """
        per, start = self.per, now - now % self.per
        passed = start - self.start
        if 0 > passed >= -per:
            return 0
        if passed:
            self.shift(passed == per)
            self.start, self.end = start, start + per
        return now - start

    def shift(self, adjacent: bool) -> None:
        """Begin a window; `adjacent`: directly after the current one."""
        self.previous = self.current if adjacent else 0
        self.current = 0

    def used(self, now: int) -> int:
        """What counts at `now`."""
        elapsed = self.roll(now)
        return self.current + faded(self.previous, elapsed, self.per)

    def give_back(self, amount: int, taken_at: int) -> None:
        """Return a part of what was taken, to the window it was taken from, if that still counts."""
        if taken_at >= self.start:
            self.current = max(self.current - amount, 0)
        elif taken_at >= self.start - self.per:
            self.previous = max(self.previous - amount, 0)

    def wait(self, room: int, now: int) -> int:
        """The shortest time after which at most `room` is used, if nothing more is taken; `room`: 0 or more."""
        per, elapsed = self.per, self.roll(now)
        if self.current <= room:
            return max(_fades_to(self.previous, room - self.current, per) - elapsed, 0)
        # The current count is then the previous one.
        return per - elapsed + _fades_to(self.current, room, per)

    def reset(self, now: int) -> int:
        """The time until nothing is used, if nothing more is taken."""
        elapsed = self.roll(now)
        if self.current:
            return 2 * self.per - elapsed
        return self.per - elapsed if self.previous else 0

    def empty_at(self) -> float:
        """When it counts nothing any more."""
        return self.start + 2 * self.per


class Streams:
    """How many streams of one holder are open: those of this router, and those of the others."""

    __slots__ = ("name", "others", "own")

    def __init__(self, name: str) -> None:
        self.name = name
        self.own = self.others = 0

    def used(self, now: int) -> int:
        return self.own + self.others

    def empty_at(self) -> float:
        return float("inf") if self.own else 0.0


class Store(Protocol):
    """Keeps the counters; one of each name. `now`: Unix time in milliseconds, by which its windows go."""

    def now(self) -> int: ...

    def window(self, name: str, per: int) -> Window: ...

    def streams(self, name: str) -> Streams: ...


def faded(count: int, elapsed: int, per: int) -> int:
    """What still counts of the previous window, rounded up."""
    return -(count * (elapsed - per) // per)


def _fades_to(count: int, room: int, per: int) -> int:
    """The first millisecond of a window at which at most `room` of the `count` of the window before still counts."""
    return max(per - room * per // count, 0) if count else 0
