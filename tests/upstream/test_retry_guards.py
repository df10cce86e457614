"""What keeps repeats from doing harm: the budget, the poison guard, the backends that asked for a pause."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.routing.backend import Backend
from inference_api.upstream.retry_guards import FREE, Permit, PoisonGuard, RetryAfter, RetryBudget, retry_after


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# RetryBudget


@pytest.mark.parametrize(
    ("share", "in_flight", "allowed"),
    [(0.2, 0, 3), (0.2, 15, 3), (0.2, 19, 3), (0.2, 20, 4), (0.2, 200, 40), (0.0, 200, 3), (1.0, 200, 200)],
)
def test_a_model_may_repeat_a_share_of_what_it_has_in_flight(share: float, in_flight: int, allowed: int) -> None:
    budget = RetryBudget(share)

    permits = [budget.draw("m", in_flight) for _ in range(allowed + 5)]

    assert [permit is not None for permit in permits] == [True] * allowed + [False] * 5
    assert budget.drawn("m") == allowed


def test_models_do_not_share_a_budget() -> None:
    budget = RetryBudget(0.2)
    for _ in range(3):
        assert budget.draw("m", 0)

    assert budget.draw("n", 0)
    assert budget.draw("m", 0) is None


def test_a_permit_is_given_back_once() -> None:
    budget = RetryBudget(0.2)
    first, *_ = [budget.draw("m", 0) for _ in range(3)]
    assert first is not None

    first.release()
    first.release()

    assert budget.drawn("m") == 2
    assert budget.draw("m", 0)
    assert budget.draw("m", 0) is None


def test_what_is_free_has_nothing_to_give_back() -> None:
    FREE.release()
    FREE.release()


@given(st.floats(0, 1), st.lists(st.tuples(st.sampled_from("mn"), st.integers(0, 60), st.booleans())))
def test_never_more_than_allowed_and_all_come_back(share: float, steps: list[tuple[str, int, bool]]) -> None:
    budget, held = RetryBudget(share), {"m": list[Permit](), "n": list[Permit]()}
    for model, in_flight, draws in steps:
        if not draws:
            if held[model]:
                held[model].pop().release()
            continue
        permit = budget.draw(model, in_flight)
        assert (permit is not None) == (len(held[model]) < max(3, int(share * in_flight)))
        if permit is not None:
            held[model].append(permit)
        assert budget.drawn(model) == len(held[model])
    for permit in held["m"] + held["n"]:
        permit.release()

    assert (budget.drawn("m"), budget.drawn("n")) == (0, 0)
    assert budget.draw("m", 0)


# PoisonGuard


def test_a_body_is_guilty_when_two_backends_died_of_it() -> None:
    guard = PoisonGuard(Clock())

    assert not guard.record(b"bad", ["a"])
    assert not guard.is_poison(b"bad")
    assert guard.record(b"bad", ["b"])
    assert guard.is_poison(b"bad")
    assert not guard.is_poison(b"good")
    assert not guard.record(b"good", ["a"])


def test_a_large_body_is_known_again_by_its_ends_and_its_length() -> None:
    guard = PoisonGuard(Clock())
    body = bytes(6_000_000)
    guard.record(body, ["a"])

    for other in (body + b"\0", b"x" + body[1:], body[:-1] + b"x"):
        assert not guard.record(other, ["b"])
    assert guard.record(body, ["b"])


def test_two_deaths_may_be_told_at_once() -> None:
    assert PoisonGuard(Clock()).record(b"bad", ["a", "b"])


def test_what_breaks_on_one_backend_at_once_is_one_death() -> None:
    clock = Clock()
    guard = PoisonGuard(clock)

    verdicts = []
    for _ in range(5):
        verdicts.append(guard.record(b"equal", ["a"]))
        clock.now += 0.1
    clock.now += 1
    verdicts.append(guard.record(b"equal", ["a"]))

    assert verdicts == [False] * 5 + [True]


@pytest.mark.parametrize(("pause", "guilty"), [(59, True), (61, False)])
def test_an_accusation_is_forgotten_after_a_minute(pause: float, guilty: bool) -> None:
    guard = PoisonGuard(clock := Clock())
    guard.record(b"bad", ["a"])
    clock.now += pause

    assert guard.record(b"bad", ["b"]) == guilty
    clock.now += 61
    assert not guard.is_poison(b"bad")


def test_the_oldest_suspects_are_forgotten_first() -> None:
    guard = PoisonGuard(Clock())
    guard.record(b"first", ["a", "b"])

    for number in range(2000):
        guard.record(b"%d" % number, ["a", "b"])

    assert len(guard) == 1024
    assert not guard.is_poison(b"first")
    assert guard.is_poison(b"1999")


def test_nothing_of_a_body_is_kept() -> None:
    ours, theirs = PoisonGuard(Clock()), PoisonGuard(Clock())
    for guard in (ours, theirs):
        guard.record(b"a secret prompt", ["a", "b"])

    (mine,), (other,) = list(ours._known), list(theirs._known)
    assert len(mine) == 16
    assert mine != other


@given(
    st.lists(
        st.tuples(st.sampled_from([b"x", b"y"]), st.sampled_from(["a", "b"]), st.floats(0, 50)), min_size=1, max_size=20
    )
)
def test_a_verdict_follows_from_the_last_minutes(steps: list[tuple[bytes, str, float]]) -> None:
    clock = Clock()
    guard = PoisonGuard(clock)
    deaths: dict[bytes, list[tuple[float, str]]] = {b"x": [], b"y": []}
    for body, backend, pause in steps:
        clock.now += pause
        known = deaths[body]
        if known and clock.now - known[-1][0] >= 60:
            known.clear()
        if not any(who == backend and clock.now - when < 1 for when, who in known):
            known.append((clock.now, backend))

        assert guard.record(body, [backend]) == guard.is_poison(body) == (len(known) > 1)


# Backends that rest

# Wed, 21 Oct 2026 12:00:00 GMT
NOON = 1792584000.0


def test_a_backend_rests_as_long_as_it_asked_and_no_longer_than_30_seconds() -> None:
    a, b, resting = Backend("m", "http://a"), Backend("m", "http://b"), RetryAfter()
    assert not resting

    resting.pause(a, 7, now=100)
    resting.pause(b, 3600, now=100)

    assert resting.paused(106.9) == [a, b]
    assert resting.paused(107) == [b]
    assert resting.paused(130) == []
    assert not resting


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"-1",
        b"1.5",
        b"9" * 10,
        b"\xb2",
        b"soon",
        b"Wed, 99 Oct 2026 07:28:00 GMT",
        b"Wed, 21 Oct 99999999 07:28:00 GMT",
        b"1 " * 40_000,
    ],
)
def test_what_is_no_time_says_nothing(value: bytes) -> None:
    assert retry_after([(b"retry-after", value)], NOON) is None


@pytest.mark.parametrize("seconds", [0, 7, 120])
def test_what_retry_after_says(seconds: int) -> None:
    assert retry_after([(b"x", b"1"), (b"retry-after", b"%d" % seconds)], NOON) == seconds
    assert retry_after([(b"x", b"%d" % seconds)], NOON) is None


@pytest.mark.parametrize(
    "date", [b"Wed, 21 Oct 2026 12:00:08 GMT", b"Wednesday, 21-Oct-26 12:00:08 GMT", b"Wed Oct 21 12:00:08 2026"]
)
def test_a_date_says_how_long_from_now(date: bytes) -> None:
    assert retry_after([(b"retry-after", date)], NOON) == 8
    assert retry_after([(b"retry-after", date)], NOON + 0.5) == 8
    assert retry_after([(b"retry-after", date)], NOON + 3600) == 0


def test_a_date_is_seen_by_the_clock_that_it_was_written_by() -> None:
    headers = [(b"date", b"Wed, 21 Oct 2026 12:00:00 GMT"), (b"retry-after", b"Wed, 21 Oct 2026 12:00:08 GMT")]

    assert [retry_after(headers, NOON + skew) for skew in (-3600, 0, 3600)] == [8, 8, 8]
    assert retry_after([(b"date", b"soon"), headers[1]], NOON) == 8
