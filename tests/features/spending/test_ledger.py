"""Periods, and what is known of a budget: told by the registry, not yet in its sum, and reserved."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.features.spending.ledger import Entry, Ledger, Spent, period
from inference_api.policy.document import shown_time, unix_time
from inference_api.policy.rules import Spending


def at(text: str) -> float:
    seconds: float = unix_time(text)
    return seconds


NOW = at("2026-11-28T12:00:00Z")


def budget(amount: int = 100, unit: str = "tokens", per: str = "day", **more: Any) -> Spending:
    return Spending(f"user:ana:{unit}:{per}", "user 'ana'", unit, amount, per, more.get("soft", 0.8))


@pytest.mark.parametrize(
    ("per", "now", "start", "end"),
    [
        ("day", "2026-11-28T00:00:00Z", "2026-11-28T00:00:00Z", "2026-11-29T00:00:00Z"),
        ("day", "2026-11-28T23:59:59.999Z", "2026-11-28T00:00:00Z", "2026-11-29T00:00:00Z"),
        # The 28th is a Saturday; weeks begin on Monday.
        ("week", "2026-11-28T12:00:00Z", "2026-11-23T00:00:00Z", "2026-11-30T00:00:00Z"),
        ("week", "2026-11-30T00:00:00Z", "2026-11-30T00:00:00Z", "2026-12-07T00:00:00Z"),
        ("week", "2027-01-01T00:00:00Z", "2026-12-28T00:00:00Z", "2027-01-04T00:00:00Z"),
        ("month", "2026-12-31T23:00:00Z", "2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z"),
        ("month", "2028-02-29T23:00:00Z", "2028-02-01T00:00:00Z", "2028-03-01T00:00:00Z"),
    ],
)
def test_periods_are_of_utc(per: str, now: str, start: str, end: str) -> None:
    assert tuple(map(shown_time, period(per, at(now)))) == (start, end)


@given(st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)), st.sampled_from(["day", "week", "month"]))
def test_every_moment_is_in_its_period(moment: datetime, per: str) -> None:
    now = moment.replace(tzinfo=UTC).timestamp()
    start, end = period(per, now)

    assert start <= now < end
    assert period(per, end)[0] == end
    assert period(per, start) == (start, end)


def test_a_record_counts_once_on_its_way_to_the_registry() -> None:
    entry = Entry(budget(), NOW)
    entry.learn(told(spent=40), at=NOW - 1, now=NOW)
    entry.take(10, NOW)
    assert entry.used(NOW) == 50
    # Delivered after the sum was made: it may not be in it.
    entry.deliver(10, NOW, now=NOW + 1)
    assert entry.used(NOW + 1) == 50
    # A sum of before the delivery, and one of after it.
    entry.learn(told(spent=40), at=NOW + 0.5, now=NOW + 2)
    assert entry.used(NOW + 2) == 50
    entry.learn(told(spent=50), at=NOW + 5, now=NOW + 6)
    assert entry.used(NOW + 6) == 50


def test_what_is_delivered_before_the_latest_sum_is_in_it() -> None:
    entry = Entry(budget(), NOW)
    entry.take(10, NOW)
    entry.learn(told(spent=10), at=NOW + 5, now=NOW + 5)
    entry.deliver(10, NOW, now=NOW + 4)

    assert entry.used(NOW + 5) == 10


def test_a_period_that_is_over_begins_anew() -> None:
    entry = Entry(budget(), NOW)
    entry.learn(told(spent=99), at=NOW, now=NOW)
    entry.take(5, NOW)
    entry.reserved = 3
    midnight = at("2026-11-29T00:00:00Z")

    assert entry.used(midnight - 0.001) == 107
    # Requests in flight go on, and are of the day in which they began.
    assert entry.used(midnight) == 3
    entry.take(5, NOW)
    assert entry.used(midnight) == 3
    entry.take(5, midnight)
    assert entry.used(midnight) == 8


def test_a_sum_whose_period_is_over_is_nothing() -> None:
    entry = Entry(budget(), NOW)
    entry.learn(told(spent=99, resets_at=NOW - 1), at=NOW - 2, now=NOW)

    assert entry.used(NOW) == 0


def test_sums_of_budgets_that_nobody_used_are_kept_for_their_first_request() -> None:
    ledger = Ledger()
    ledger.learn([told(spent=90)], NOW, NOW)

    assert ledger.of(budget(), NOW).used(NOW) == 90
    # A budget that the registry does not name has spent nothing.
    ledger.learn([], NOW + 5, NOW + 5)
    assert ledger.of(budget(), NOW).used(NOW) == 0


def test_a_changed_amount_keeps_what_is_spent() -> None:
    ledger = Ledger()
    ledger.of(budget(100), NOW).take(50, NOW)

    entry = ledger.of(budget(200), NOW)

    assert (entry.amount, entry.used(NOW)) == (200, 50)


def test_a_delivered_record_reaches_each_budget_of_its_holders() -> None:
    ledger = Ledger()
    entries = [ledger.of(budget(unit=unit, per=per), NOW) for unit in ("cost", "tokens") for per in ("day", "month")]
    for entry, amount in zip(entries, (7, 7, 3, 3), strict=True):
        entry.take(amount, NOW)
    ledger.learn([], NOW + 9, NOW + 9)

    ledger.deliver(["all:", "user:ana"], (7, 3, 1), NOW, NOW + 1)

    assert [entry.used(NOW + 9) for entry in entries] == [0, 0, 0, 0]


def test_states_are_by_the_share_that_is_used() -> None:
    ledger = Ledger()
    for name, taken in enumerate((0, 79, 80, 99, 100, 200)):
        ledger.of(budget()._replace(id=f"user:{name}:tokens:day"), NOW).take(taken, NOW)

    assert ledger.states(NOW) == {"ok": 2, "soft": 2, "hard": 2}
    assert ledger.states(at("2026-11-29T00:00:00Z")) == {"ok": 6, "soft": 0, "hard": 0}


def told(spent: int, resets_at: float | None = None) -> Spent:
    start, end = period("day", NOW)
    return Spent(budget().id, start, resets_at or end, spent)
