"""Whose turn it is: order within a caller, bands of priority, and shares by weight within a band."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.features.queueing.fair import FairQueue, Turn


def taken(queue: FairQueue[str]) -> Iterator[str]:
    while (turn := queue.next()) is not None:
        yield turn.item


def test_a_caller_is_served_first_come_first_served() -> None:
    queue: FairQueue[str] = FairQueue()
    for number, cost in enumerate((500, 1, 90_000, 3)):
        queue.add("a", 0, 1.0, cost, f"a{number}")

    assert list(taken(queue)) == ["a0", "a1", "a2", "a3"]


def test_a_lower_priority_is_served_first() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("late", 10, 100.0, 1, "late")
    queue.add("usual", 0, 1.0, 99_999, "usual")
    queue.add("first", -5, 0.01, 99_999, "first")

    assert list(taken(queue)) == ["first", "usual", "late"]


def test_one_with_many_requests_waits_for_one_with_few() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(50):
        queue.add("greedy", 0, 1.0, 100, f"greedy{number}")
    assert queue.next() is not None
    queue.add("b", 0, 1.0, 100, "b0")
    queue.add("c", 0, 1.0, 100, "c0")

    assert [turn.item for turn in (queue.next(), queue.next(), queue.next()) if turn] == ["greedy1", "b0", "c0"]


def test_large_requests_count_by_their_tokens() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(20):
        queue.add("large", 0, 1.0, 1000, "large")
        queue.add("small", 0, 1.0, 100, "small")

    # A thousand tokens of each
    assert Counter(turn.item for turn in (queue.next() for _ in range(11)) if turn) == {"small": 10, "large": 1}


@pytest.mark.parametrize("weight", [0.01, 0.5, 2.0, 100.0])
def test_shares_follow_the_weights(weight: float) -> None:
    queue: FairQueue[str] = FairQueue()
    random = Random(4)
    served: Counter[str] = Counter()
    for name, of in (("heavy", weight), ("light", 1.0)):
        for _ in range(4000):
            queue.add(name, 0, of, random.randint(1, 400), name)
    for _ in range(3000):
        turn = queue.next()
        assert turn is not None
        served[turn.item] += turn.cost

    # To within one request of either side
    assert abs(served["heavy"] / weight - served["light"]) <= 400 / weight + 400


def test_who_was_away_has_no_claim_on_it() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.add("there", 0, 1.0, 10, "there")
    for _ in range(50):
        queue.next()
    for _ in range(100):
        queue.add("new", 0, 1.0, 10, "new")

    assert Counter(turn.item for turn in (queue.next() for _ in range(20)) if turn) == {"there": 10, "new": 10}


def test_one_that_leaves_is_gone_at_once() -> None:
    queue: FairQueue[str] = FairQueue()
    first, second = (queue.add("a", 0, 1.0, 10, f"a{number}") for number in range(2))
    queue.add("b", 0, 1.0, 20, "b0")

    assert queue.remove(first)
    assert not queue.remove(first)
    assert len(queue) == 2
    # The second has become the first, and is due as its own cost says.
    assert queue.next() is second
    assert not queue.remove(second)
    assert list(taken(queue)) == ["b0"]


def test_bounds_are_for_all_and_for_each_caller() -> None:
    queue: FairQueue[str] = FairQueue()
    assert queue.full("a", 3, 2) is None
    turn = queue.add("a", 0, 1.0, 1, "")
    # In another band, too: a key whose priority has changed.
    queue.add("a", 5, 1.0, 1, "")
    assert (queue.full("a", 3, 2), queue.full("b", 3, 2)) == ("caller", None)
    queue.add("b", 0, 1.0, 1, "")
    assert (queue.full("a", 3, 2), queue.full("b", 3, 2)) == ("all", "all")

    queue.remove(turn)

    assert (queue.full("a", 3, 2), queue.full("b", 3, 2)) == (None, None)


ACTIONS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(-1, 1), st.sampled_from([0.01, 1.0, 3.0]), st.integers(0, 10**6))
    | st.just("next")
    | st.integers(0, 20),
    max_size=80,
)


@given(ACTIONS)
def test_nothing_is_lost_or_served_twice_or_out_of_order(actions: list[object]) -> None:
    queue: FairQueue[int] = FairQueue()
    waiting: dict[int, tuple[object, Turn[int]]] = {}
    served: list[tuple[object, int]] = []
    for number, action in enumerate(actions):
        if isinstance(action, tuple):
            caller, priority, weight, cost = action
            waiting[number] = (caller, priority), queue.add(caller, priority, weight, cost, number)
        elif action == "next":
            turn = queue.next()
            assert (turn is None) == (not waiting)
            if turn is not None:
                whose, _ = waiting.pop(turn.item)
                assert all(whose[1] <= other[1] for other, _ in waiting.values())  # type: ignore[index]
                served.append((whose, turn.item))
        elif waiting and isinstance(action, int):
            left = list(waiting)[action % len(waiting)]
            assert queue.remove(waiting.pop(left)[1])
        assert len(queue) == len(waiting)
    for turn in iter(queue.next, None):
        served.append((waiting.pop(turn.item)[0], turn.item))

    assert waiting == {}
    for whose in {one for one, _ in served}:
        numbers = [number for one, number in served if one == whose]
        assert all(first < second for first, second in pairwise(numbers))


def test_clients_that_leave_leave_nothing_behind() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.add("stays", 0, 1.0, 1, 0)
    for number in range(10_000):
        queue.remove(queue.add(f"caller{number}", number, 1.0, 1, number))

    assert len(queue) == 1
    assert len(vars(queue)["_due"]) < 1000
    assert len(vars(queue)["_waiting"]) == len(vars(queue)["_shares"]) == 1
