"""What is known of each budget: spent, not yet in that sum, and reserved by requests in flight. Pure."""

from collections import deque
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from inference_api.policy.rules import Spending

# (cost in nanos, tokens, requests) of a request
Amounts = tuple[int, int, int]
_PLACE = {"cost": 0, "tokens": 1, "requests": 2}
# Budgets kept; beyond that, those whose period is over go first.
_MOST = 200_000


class Spent(NamedTuple):
    """One budget of GET /spend. Times in Unix seconds."""

    id: str
    period_start: float
    resets_at: float
    spent: int


def period(per: str, now: float) -> tuple[float, float]:
    """Begin and end of the UTC day, ISO week or calendar month, in Unix seconds."""
    day = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if per == "day":
        start, end = day, day + timedelta(days=1)
    elif per == "week":
        start = day - timedelta(days=day.weekday())
        end = start + timedelta(days=7)
    else:
        start = day.replace(day=1)
        end = (start + timedelta(days=32)).replace(day=1)
    return start.timestamp(), end.timestamp()


class Entry:
    """One budget in its present period.

    `spent`: the sum of the registry as of `at`. `pending`: of records that it may not have. `delivered`: (time, amount)
    of records that it got, but maybe after `at`.
    """

    __slots__ = (
        "amount",
        "at",
        "delivered",
        "end",
        "late",
        "pending",
        "per",
        "place",
        "reserved",
        "soft_at",
        "spending",
        "spent",
        "start",
    )

    def __init__(self, spending: Spending, now: float) -> None:
        self.place = _PLACE[spending.unit]
        self.reserved = 0
        self.adopt(spending)
        self.start, self.end = period(spending.per, now)
        self._empty()

    def adopt(self, spending: Spending) -> None:
        """Apply a changed budget; what is spent stays."""
        self.spending = spending
        self.amount, self.per = spending.amount, spending.per
        # From which it is announced
        self.soft_at = spending.amount * spending.soft

    def _empty(self) -> None:
        self.spent = self.pending = self.late = 0
        self.at = 0.0
        self.delivered: deque[tuple[float, int]] = deque()

    def used(self, now: float) -> int:
        """Spent, unsettled and reserved. Begins the next period, if this one is over."""
        if now >= self.end:
            self.start, self.end = period(self.per, now)
            self._empty()
        return self.spent + self.pending + self.late + self.reserved

    def take(self, amount: int, at: float) -> None:
        """A finished request of this router that began at `at`."""
        if at >= self.start:
            self.pending += amount

    def deliver(self, amount: int, at: float, now: float) -> None:
        """The registry has the record of this request, since `now`."""
        if at < self.start or not amount:
            return
        self.pending = max(0, self.pending - amount)
        if now > self.at:
            self.late += amount
            if self.delivered and self.delivered[-1][0] == now:
                amount += self.delivered.pop()[1]
            self.delivered.append((now, amount))

    def learn(self, told: Spent, at: float, now: float) -> None:
        """The sum of the registry as of `at`; 0 if its period is over."""
        if now < told.resets_at:
            self.used(now)
            self.spent, self.end = told.spent, told.resets_at
            self.start = max(self.start, told.period_start)
        self.at = max(self.at, at)
        while self.delivered and self.delivered[0][0] <= self.at:
            self.late -= self.delivered.popleft()[1]


class Ledger:
    """The entries of all budgets that a request or the registry has named, by id."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        # What the registry has told of budgets without an entry, and when
        self._told: dict[str, Spent] = {}
        self._at = 0.0

    def of(self, spending: Spending, now: float) -> Entry:
        entry = self._entries.get(spending.id)
        if entry is None:
            entry = self._make(spending, now)
        elif entry.spending != spending:
            entry.adopt(spending)
        return entry

    def _make(self, spending: Spending, now: float) -> Entry:
        if len(self._entries) >= _MOST:
            self._entries = {id: entry for id, entry in self._entries.items() if entry.end > now and entry.used(now)}
        entry = self._entries[spending.id] = Entry(spending, now)
        if told := self._told.pop(spending.id, None):
            entry.learn(told, self._at, now)
        return entry

    def learn(self, spends: Iterable[Spent], at: float, now: float) -> None:
        """Take a whole document of GET /spend; budgets that it does not name have spent nothing."""
        told = {one.id: one for one in spends}
        for id, entry in self._entries.items():
            start, end = period(entry.per, now)
            entry.learn(told.pop(id, Spent(id, start, end, 0)), at, now)
        self._told, self._at = told, at

    def deliver(self, holders: Iterable[str], amounts: Amounts, at: float, now: float) -> None:
        """The registry has a record. `holders`: `<scope>:<name>` of its budgets."""
        for holder in holders:
            for suffix, place in _SUFFIXES:
                entry = self._entries.get(holder + suffix)
                if entry is not None:
                    entry.deliver(amounts[place], at, now)

    def states(self, now: float) -> Mapping[str, int]:
        """How many are ok, past their soft limit, or used up."""
        counts = {"ok": 0, "soft": 0, "hard": 0}
        for entry in list(self._entries.values()):
            used = entry.spent + entry.pending + entry.late + entry.reserved if now < entry.end else 0
            state = "hard" if used >= entry.amount else "soft" if used >= entry.soft_at else "ok"
            counts[state] += 1
        return counts


_SUFFIXES = tuple((f":{unit}:{per}", place) for unit, place in _PLACE.items() for per in ("day", "week", "month"))
