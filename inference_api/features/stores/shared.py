"""Counters that routers share: what all have counted, as last known, and what this one has counted since. Pure."""

from collections.abc import Callable, Sequence
from typing import Protocol

from inference_api.features.limiting.plans import Plan, StreamLimit, Wants, WindowLimit
from inference_api.features.limiting.refusals import Refusal, refusal
from inference_api.features.limiting.windows import Streams, Window


class SharedWindow(Window):
    """A Window whose counts are `known` sums of all routers, and what this router has not sent yet.

    `sent`: the part of the known sum that is this router's own.
    """

    __slots__ = ("known", "known_previous", "sent", "sent_previous")

    def __init__(self, name: str, per: int) -> None:
        super().__init__(name, per)
        self.known = self.known_previous = self.sent = self.sent_previous = 0

    def shift(self, adjacent: bool) -> None:
        super().shift(adjacent)
        self.known_previous, self.sent_previous = (self.known, self.sent) if adjacent else (0, 0)
        self.known = self.sent = 0

    def unsent(self) -> tuple[int, int]:
        """What is to be added to the current and to the previous window."""
        return self.current - self.known, self.previous - self.known_previous

    def learn(self, start: int, added: tuple[int, int], sums: tuple[int, int]) -> None:
        """Note the sums of the window that began at `start`, and of the one before it, after adding `added`."""
        if start == self.start:
            self._learn_current(added[0], sums[0])
            self._learn_previous(added[1], sums[1])
        elif start == self.start - self.per:
            # It has rolled since.
            self._learn_previous(added[0], sums[0])

    def part_with(self) -> None:
        """Forget what other routers have counted, as their counts are not known any more."""
        self.current -= self.known - self.sent
        self.previous -= self.known_previous - self.sent_previous
        self.known, self.known_previous = self.sent, self.sent_previous

    def own(self, now: int) -> Window:
        """A window with what this router alone has counted."""
        self.roll(now)
        alone = Window(self.name, self.per)
        alone.start, alone.end = self.start, self.end
        alone.current = self.current - self.known + self.sent
        alone.previous = self.previous - self.known_previous + self.sent_previous
        return alone

    def _learn_current(self, added: int, total: int) -> None:
        rest = self.current - self.known - added
        self.sent += added
        self.known = total
        self.current = max(total + rest, 0)

    def _learn_previous(self, added: int, total: int) -> None:
        rest = self.previous - self.known_previous - added
        self.sent_previous += added
        self.known_previous = total
        self.previous = max(total + rest, 0)


class Asked(Protocol):
    """A store that other routers count in, too. `is_away`: it cannot be reached; `routers`: 0, if never known."""

    is_away: bool
    routers: int
    # Calls that failed, by reason
    failures: dict[str, int]
    # Notes the plan of a request, when it takes and when it is settled.
    touch: Callable[[Plan], None]

    async def ask(self, limits: Sequence[WindowLimit | StreamLimit], wants: Wants) -> bool | None:
        """Take from precise limits, from all or none: whether it was done. None: no answer in time."""
        ...


class SharedStreams(Streams):
    """Streams of this router, and of the others as last known."""

    __slots__ = ()


def take_share(limits: Sequence[WindowLimit | StreamLimit], wants: Wants, routers: int, now: int) -> Refusal | None:
    """Take from precise limits without Redis: from this router's share of each, by what it has counted itself.

    Returns the limit that refuses with the longest wait; then nothing is taken.
    """
    windows, streams = [], []
    for limit in limits:
        amount = max(limit.amount // routers, 1)
        if isinstance(limit, StreamLimit):
            streams.append(StreamLimit(limit.rule, amount, Streams(limit.rule.scope), False))
            streams[-1].streams.own = limit.streams.own
        else:
            assert isinstance(limit.window, SharedWindow)
            windows.append(WindowLimit(limit.rule, amount, limit.window.own(now), False))
    refused = refusal(windows, streams, wants, now)
    if refused is None:
        for limit in limits:
            if isinstance(limit, StreamLimit):
                limit.streams.own += 1
            else:
                limit.window.current += limit.wanted(wants)
    return refused
