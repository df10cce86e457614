"""The sliding window: what is used, when there is room again, and where refunds go."""

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.features.limiting.plans import WindowLimit, take
from inference_api.features.limiting.windows import Window
from inference_api.features.limiting.wording import prepare
from inference_api.policy.rules import Rule

MINUTE = 60_000
# A Unix time at the start of a minute
START = 1_795_862_400_000


def window(current: int = 0, previous: int = 0, per: int = MINUTE, start: int = START) -> Window:
    made = Window("x", per)
    made.roll(start)
    made.current, made.previous = current, previous
    return made


def limit(amount: int, counter: Window, unit: str = "requests") -> WindowLimit:
    rule = Rule("key", "batch", unit, amount, counter.per // 1000, False, None, "key 'batch'")
    prepare()
    return WindowLimit(rule, amount, counter, False)


def test_the_example_of_the_contract() -> None:
    counter, now = window(current=150, previous=300), START + 15_000

    used = counter.used(now)
    taken = take((limit(600, counter),), (1, 0, 0, 0), now)

    assert used == 375
    assert taken is not None
    assert b"x-ratelimit-remaining-requests: 224\r\nx-ratelimit-reset-requests: 1m45s\r\n" in taken
    assert counter.reset(now) == 105_000


def test_a_window_is_aligned_to_unix_time() -> None:
    counter = window(current=5)

    assert counter.used(START + MINUTE - 1) == 5
    assert counter.used(START + MINUTE) == 5
    assert counter.used(START + MINUTE + MINUTE // 2) == 3
    assert counter.used(START + 2 * MINUTE) == 0


def test_a_window_that_was_left_out_counts_nothing() -> None:
    assert window(current=5, previous=5).used(START + 2 * MINUTE) == 0


def test_a_clock_that_goes_back_a_little_does_not_let_anybody_through_twice() -> None:
    counter = window(current=600)

    assert counter.used(START - 30_000) == 600
    assert counter.start == START


def test_a_clock_that_goes_back_far_does_not_block_for_as_long() -> None:
    counter = window(current=600)

    assert counter.used(START - 3_600_000) == 0


def test_a_refund_goes_to_the_window_it_was_taken_from() -> None:
    counter = window(current=10)
    counter.give_back(3, START + 1)
    assert (counter.current, counter.previous) == (7, 0)

    counter.roll(START + MINUTE)
    counter.current = 4
    counter.give_back(3, START + 1)
    assert (counter.current, counter.previous) == (4, 4)

    counter.roll(START + 2 * MINUTE)
    counter.give_back(3, START + 1)
    assert (counter.current, counter.previous) == (0, 4)


def test_a_refund_before_the_window_has_rolled_goes_where_it_was_taken() -> None:
    counter = window(current=10)

    # Nobody has asked for a long time: the window is still the old one.
    counter.give_back(10, START + 1)

    assert counter.used(START + MINUTE + 1) == 0


def test_no_refund_makes_a_count_negative() -> None:
    counter = window(current=1)

    counter.give_back(5, START)

    assert counter.current == 0


PER = st.sampled_from([1000, 7000, MINUTE, 3_600_000])
COUNT = st.integers(0, 5000)


@given(current=COUNT, previous=COUNT, per=PER, share=st.floats(0, 1, exclude_max=True))
def test_used_is_the_formula(current: int, previous: int, per: int, share: float) -> None:
    start = START - START % per
    elapsed = int(per * share)
    counter = window(current, previous, per, start)

    # Exact, without a float
    assert counter.used(start + elapsed) == current + -((-previous * (per - elapsed)) // per)
    assert counter.used(start + elapsed) >= current + ceil(previous * (1 - elapsed / per)) - 1


@given(current=COUNT, previous=COUNT, room=COUNT, per=PER, share=st.floats(0, 1, exclude_max=True))
def test_the_wait_is_the_shortest(current: int, previous: int, room: int, per: int, share: float) -> None:
    start = START - START % per
    now = start + int(per * share)

    wait = window(current, previous, per, start).wait(room, now)

    assert window(current, previous, per, start).used(now + wait) <= room
    assert wait == 0 or window(current, previous, per, start).used(now + wait - 1) > room


@given(current=COUNT, previous=COUNT, per=PER, share=st.floats(0, 1, exclude_max=True))
def test_after_the_reset_nothing_is_used(current: int, previous: int, per: int, share: float) -> None:
    start = START - START % per
    now = start + int(per * share)

    reset = window(current, previous, per, start).reset(now)

    assert window(current, previous, per, start).used(now + reset) == 0
    assert reset == 0 or window(current, previous, per, start).used(now + reset - 1) > 0


@given(
    amount=st.integers(1, 50),
    per=st.sampled_from([1000, 5000]),
    pauses=st.lists(st.tuples(st.integers(0, 900), st.integers(1, 9)), max_size=200),
)
def test_no_aligned_window_admits_more_than_the_limit(amount: int, per: int, pauses: list[tuple[int, int]]) -> None:
    counter, now = window(per=per), START
    admitted: dict[int, int] = {}

    for pause, want in pauses:
        now += pause
        want = min(want, amount)
        if take((limit(amount, counter, "tokens"),), (1, want, 0, 0), now) is not None:
            admitted[now // per] = admitted.get(now // per, 0) + want

    assert all(count <= amount for count in admitted.values())


def test_an_amount_above_the_limit_passes_an_empty_window() -> None:
    counter = window()

    assert take((limit(1000, counter, "tokens"),), (1, 50_000, 0, 0), START) is not None
    assert counter.current == 1000
    assert take((limit(1000, counter, "tokens"),), (1, 1, 0, 0), START) is None


@pytest.mark.parametrize("refusing", [0, 1, 2])
def test_all_limits_are_taken_or_none(refusing: int) -> None:
    counters = [window(), window(), window()]
    counters[refusing].current = 10
    limits = tuple(limit(10, counter) for counter in counters)

    assert take(limits, (1, 0, 0, 0), START) is None
    assert [counter.current for counter in counters] == [10 if place == refusing else 0 for place in range(3)]


def test_the_tightest_limit_is_the_one_with_the_smallest_share_left() -> None:
    wide, narrow = limit(1000, window(current=500)), limit(10, window(current=8))

    lines = take((wide, narrow), (1, 0, 0, 0), START)

    assert lines is not None
    assert b"limit-requests: 10\r\nx-ratelimit-remaining-requests: 1\r\n" in lines
