"""Who is available, after attempts, health checks and silence; with a clock that is set by hand."""

import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.models import Outcome
from inference_api.routing.backend import Backend
from inference_api.routing.catalogue import parse_catalogue
from tests.fakes import until
from tests.routing.ward import Ward

BAD = [
    Outcome.CONNECT_FAILED,
    Outcome.RESET,
    Outcome.FIRST_BYTE_TIMEOUT,
    Outcome.IDLE_TIMEOUT,
]
NEITHER = [
    Outcome.CLIENT_GONE,
    Outcome.TOTAL_TIMEOUT,
    Outcome.ERROR_EVENT,
    Outcome.UPSTREAM_5XX,
    # A request, or a dialect, may cause them.
    Outcome.PROTOCOL_ERROR,
    Outcome.TRUNCATED,
]


# Attempts


@pytest.mark.parametrize("outcome", BAD)
def test_a_backend_whose_attempts_fail_gets_no_more(outcome: Outcome) -> None:
    ward = Ward("a", "b", "c")
    a, b, c = ward.backends
    for _ in range(4):
        ward.attempt(a, outcome)
    assert (a.origin.failures, ward.available) == (4, "abc")

    ward.attempt(a, outcome)

    assert ward.available == "bc"
    assert ward.chosen() == {b, c}


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_gateways_errors_count_once_each(status: int) -> None:
    ward = Ward("a", "b")
    a, _ = ward.backends

    for number in range(1, 6):
        ward.attempt(a, Outcome.UPSTREAM_5XX, status)
        assert a.origin.failures == number
    assert ward.available == "b"


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500, 501])
def test_other_statuses_do_not_count(status: int) -> None:
    ward = Ward("a", "b")
    a, _ = ward.backends

    for _ in range(1000):
        ward.attempt(a, Outcome.of_status(status), status)

    assert (a.origin.failures, ward.available) == (0, "ab")


@pytest.mark.parametrize("outcome", NEITHER)
def test_what_says_nothing_of_a_backend_neither_counts_nor_clears(outcome: Outcome) -> None:
    ward = Ward("a", "b")
    a, _ = ward.backends
    for _ in range(4):
        ward.attempt(a, Outcome.RESET)
    for _ in range(1000):
        ward.attempt(a, outcome)
    assert (a.origin.failures, ward.available) == (4, "ab")

    ward.attempt(a, Outcome.RESET)

    assert ward.available == "b"


@pytest.mark.parametrize(("outcome", "status"), [(Outcome.OK, 200), (Outcome.UPSTREAM_4XX, 429)])
def test_a_good_answer_clears_and_one_that_breaks_off_does_not(outcome: Outcome, status: int) -> None:
    ward = Ward("a", "b")
    a, _ = ward.backends
    for _ in range(4):
        ward.attempt(a, Outcome.RESET, 200)
    assert a.origin.failures == 4

    ward.attempt(a, outcome, status)

    assert a.origin.failures == 0


def test_operators_are_told_once_of_each_change(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ward = Ward("a", "b", "c")
    a = ward.backends[0]
    ward.open(a)
    ward.open(a)
    ward.now += 60
    assert ward.choose() is a
    ward.report(a, Outcome.RESET)
    ward.now += 60
    assert ward.choose() is a
    ward.report(a, Outcome.OK, 200)
    ward.attempt(a, Outcome.OK, 200)

    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "the circuit of a backend is open"),
        ("INFO", "the circuit of a backend is closed again"),
    ]
    assert vars(caplog.records[0])["fields"] == {"model": "m", "backend": "a", "failures": 5}


# One address of several models


def adapters(*names: str) -> Ward:
    """Each of these models has the backends a and b."""
    ward = Ward()
    entry = {"backends": [{"url": "http://a"}, {"url": "http://b"}]}
    ward.fleet.update(parse_catalogue({"models": [{"name": name, **entry} for name in names]}))
    return ward


def available_of(ward: Ward) -> set[str]:
    return {"".join(backend.label for backend in model.available) for model in ward.fleet.models.values()}


def test_models_at_one_address_share_its_circuit_and_its_probe(caplog: pytest.LogCaptureFixture) -> None:
    ward = adapters("m", "n", "o")
    for model in [*ward.fleet.models.values(), *ward.fleet.models.values()][:5]:
        assert available_of(ward) == {"ab"}
        ward.attempt(model.backends[0], Outcome.RESET)
    assert available_of(ward) == {"b"}
    assert [vars(record)["fields"] for record in caplog.records] == [
        {"model": "m", "backend": "a", "models": 3, "failures": 5}
    ]

    ward.now += 60
    chosen = [model.choose("") for model in ward.fleet.models.values()]
    assert [backend.label for backend in chosen if backend] == ["a", "b", "b"]
    assert chosen[0] is not None
    ward.health.answered(chosen[0], 200)

    assert available_of(ward) == {"ab"}
    assert {backend.share for model in ward.fleet.models.values() for backend in model.backends} == {0.1, 1.0}
    assert all(model.guard is None for model in ward.fleet.models.values())


def test_an_address_that_fails_its_checks_is_out_for_all_of_its_models() -> None:
    ward = adapters("m", "n")
    ward.check(ward.backends[0], False, False, False)
    assert available_of(ward) == {"b"}

    ward.check(ward.backends[0], True, True)

    assert available_of(ward) == {"ab"}


def test_an_address_is_stuck_by_what_its_models_have_there_together() -> None:
    ward = adapters("m", "n")
    ward.backends[0].origin.in_flight = 3
    ward.poll()
    ward.poll(times=60)

    assert available_of(ward) == {"b"}


def test_the_model_whose_answers_may_begin_last_says_how_long_an_address_may_be_silent() -> None:
    ward = Ward()
    backends = [{"url": "http://a"}, {"url": "http://b"}]
    slow = {"name": "n", "backends": backends, "timeouts": {"first_byte": 600}}
    ward.fleet.update(parse_catalogue({"models": [{"name": "m", "backends": backends}, slow]}))
    ward.backends[0].origin.in_flight = 3
    ward.poll()

    ward.poll(times=299)
    assert available_of(ward) == {"ab"}
    ward.poll()

    assert available_of(ward) == {"b"}


# Half-open


def test_the_head_of_the_probes_answer_closes_and_its_end_does_not_matter() -> None:
    ward = Ward("a", "b")
    a, b = ward.backends
    ward.open(a)
    ward.now += 60
    assert ward.choose() is a
    probe = ward.request

    ward.health.answered(a, 200)

    assert (a.origin.opened, a.origin.failures, ward.available) == (None, 0, "ab")
    assert ward.model.guard is None
    ward.poll(30, times=2)
    assert ward.chosen() == {a, b}
    ward.request = probe
    ward.health.ended(a, Outcome.RESET)
    assert (ward.available, a.origin.failures) == ("ab", 1)


def test_the_good_end_of_a_probe_closes_even_if_its_head_was_not_reported() -> None:
    ward = Ward("a", "b")
    a, _ = ward.backends
    ward.open(a)
    ward.now += 60
    assert ward.choose() is a

    ward.report(a, Outcome.OK)

    assert (ward.available, a.origin.failures) == ("ab", 0)


def test_the_head_of_another_requests_answer_closes_nothing() -> None:
    ward = Ward("a", "b")
    a, _ = ward.backends
    ward.open(a)

    ward.attempt(a, Outcome.OK, 200)
    ward.now += 60
    assert ward.choose() is a
    ward.attempt(a, Outcome.OK, 200)

    assert ward.available == "b"


def test_a_probe_that_was_never_sent_is_over_with_its_request() -> None:
    ward = Ward("a", "b")
    a, b = ward.backends
    ward.open(a)
    ward.now += 60
    assert ward.choose() is a
    assert ward.choose() is b

    ward.open(b)  # whatever else happens
    assert a.origin.probe is not None
    a.origin.probe.done = lambda: True  # type: ignore[method-assign]

    assert ward.choose() is a


def test_a_request_that_failed_elsewhere_is_the_probe_only_if_nothing_else_is_left() -> None:
    ward = Ward("a", "b", "c")
    a, b, c = ward.backends
    ward.open(a)
    ward.now += 60

    assert ward.choose(b) is c
    assert ward.choose(a, b, c) is None
    assert ward.choose(b, c) is a
    assert ward.choose(b, c) is None


def test_of_several_that_are_due_each_has_a_probe_and_the_one_that_waits_longest_comes_first() -> None:
    ward = Ward(*"abcdefghij")
    a, b, c, d, e, *others = ward.backends
    for backend in (d, b, a, e, c):
        ward.open(backend)
        ward.now += 1
    ward.now += 60

    assert [ward.choose() for _ in range(5)] == [d, b, a, e, c]
    assert ward.chosen() == set(others)


def test_a_backend_that_fails_its_health_checks_is_not_probed() -> None:
    ward = Ward("a", "b")
    a, b = ward.backends
    ward.open(a)
    ward.check(a, False, False, False)
    ward.now += 60
    assert ward.chosen() == {b}

    ward.check(a, True, True)

    assert ward.choose() is a


# Panic, and the only backend


def test_panic_is_told_once_and_ends_when_enough_are_back(caplog: pytest.LogCaptureFixture) -> None:
    ward = Ward("a", "b", "c", "d")
    a, b, c, _ = ward.backends
    ward.check(a, False, False, False)
    ward.check(b, False, False, False)
    ward.open(c)
    ward.check(c, False, False, False)
    assert (ward.model.panic, ward.available) == (True, "abcd")
    assert [r.getMessage() for r in caplog.records].count(
        "more than half of a model's backends are out; all are used"
    ) == 1

    ward.check(b, True, True)

    assert (ward.model.panic, ward.available) == (False, "bd")


def test_a_backend_that_comes_back_in_a_panic_starts_slowly_too() -> None:
    ward = Ward("a", "b", "c", "d", "e")
    a, b, c, d, _ = ward.backends
    for backend in (a, b, c, d):
        ward.check(backend, False, False, False)
    before = ward.model.available

    ward.check(a, True, True)

    assert ward.model.panic
    # A balancer reads the weights of a tuple once.
    assert ward.model.available is not before
    assert shares(ward) == [0.1, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("outcome", [outcome for outcome in BAD if outcome is not Outcome.CONNECT_FAILED])
def test_an_only_backend_is_never_out(outcome: Outcome) -> None:
    ward = Ward("a")
    [a] = ward.backends
    ward.check(a, False, False, False)
    a.origin.in_flight = 3
    ward.poll(times=100)
    assert not a.origin.up
    ward.open(a, outcome=outcome)

    assert ward.chosen() == {a}
    assert (ward.model.panic, ward.available) == (False, "a")


def test_an_only_backend_that_was_connected_to_is_no_longer_kept_from_requests() -> None:
    """A JSON answer may take its time; nobody should be turned away for as long as the probe waits for one."""
    ward = Ward("a", timeouts={"connect": 3})
    [a] = ward.backends
    ward.open(a, outcome=Outcome.CONNECT_FAILED)
    ward.now += 1
    assert ward.choose() is a
    ward.now += 3
    assert ward.choose() is None

    ward.now += 0.1

    assert ward.chosen() == {a}
    assert ward.choose(a) is None


def test_the_last_backend_of_several_is_an_only_one_from_then_on() -> None:
    ward = Ward("a", "b")
    a, _ = ward.backends
    ward.open(a, outcome=Outcome.CONNECT_FAILED)
    ward.list("a")
    assert ward.choose() is None

    ward.now += 1

    assert ward.choose() is a


# Health checks


@pytest.mark.parametrize(
    ("results", "available"),
    [
        ("FF", "ab"),
        ("FFPFF", "ab"),
        ("FFF", "b"),
        ("FFFP", "b"),
        ("FFFPFP", "b"),
        ("FFFPP", "ab"),
        ("FFFPPFF", "ab"),
        ("FFFPPFFF", "b"),
    ],
)
def test_three_failed_checks_and_it_is_out_two_passes_and_it_is_back(results: str, available: str) -> None:
    ward = Ward("a", "b")

    ward.check(ward.backends[0], *(result == "P" for result in results))

    assert ward.available == available


def test_what_is_known_of_a_backend_survives_a_change_of_the_catalogue() -> None:
    ward = Ward("a", "b", "c", "d", "e")
    a, b, *_ = ward.backends
    ward.open(a)
    ward.check(b, False, False, False)

    ward.list("f", "e", "d", "c", "b", "a", version="2")

    assert ward.available == "fedc"
    ward.now += 60
    assert ward.choose() is a


def test_what_is_still_heard_of_a_backend_that_left_changes_nothing() -> None:
    ward = Ward("a", "b")
    a, _ = ward.backends
    ward.list("b", "c")
    ward.open(a)
    ward.check(a, False, False, False, True, True)
    assert ward.available == "bc"
    b = ward.backends[0]
    ward.fleet.update({})
    ward.open(b)

    assert (b.usable, ward.fleet.models) == (False, {})


# The watchdog


def busy(ward: Ward, count: int = 3) -> Backend:
    a = ward.backends[0]
    a.origin.in_flight = count
    ward.poll()
    return a


def test_a_backend_with_requests_and_without_a_byte_for_a_minute_is_out() -> None:
    ward = Ward("a", "b")
    a = busy(ward)
    ward.poll(times=59)
    assert ward.available == "ab"
    ward.check(a, True, True)  # whatever its /health says

    ward.poll()

    assert (ward.available, a.origin.up) == ("b", False)


def test_two_requests_may_wait_as_long_as_they_like() -> None:
    ward = Ward("a", "b")
    a = busy(ward, 2)
    ward.poll(times=600)
    assert ward.available == "ab"

    a.origin.in_flight = 3
    ward.poll(times=60)
    assert ward.available == "ab"
    a.origin.in_flight = 2
    ward.poll()
    a.origin.in_flight = 3
    ward.poll(times=60)

    assert ward.available == "ab"


def test_a_backend_that_is_heard_now_and_then_is_busy_and_not_stuck() -> None:
    ward = Ward("a", "b")
    a = busy(ward)

    for _ in range(10):
        ward.poll(times=59)
        ward.last_byte_at[a.url] = ward.now

    assert ward.available == "ab"


def test_where_first_bytes_may_take_longer_silence_may_last_longer() -> None:
    ward = Ward("a", "b", timeouts={"first_byte": 600})
    busy(ward)

    ward.poll(times=299)
    assert ward.available == "ab"
    ward.poll()
    assert ward.available == "b"


def test_a_stuck_backend_is_back_when_bytes_flow() -> None:
    ward = Ward("a", "b")
    a = busy(ward)
    ward.poll(times=100)
    assert ward.available == "b"

    ward.last_byte_at[a.url] = ward.now + 0.5
    ward.poll()

    assert (ward.available, a.origin.up) == ("ab", True)
    assert a.share == pytest.approx(0.1, abs=0.05)


def test_a_stuck_backend_whose_requests_gave_up_is_tried_once_a_check_has_passed() -> None:
    ward = Ward("a", "b")
    a = busy(ward)
    b = ward.backends[1]
    ward.check(a, True)
    ward.poll(times=100)
    ward.check(a, True)
    ward.poll()
    assert not a.origin.up

    a.origin.in_flight = 2
    ward.poll()

    assert (a.origin.up, ward.available) == (True, "b")
    assert [ward.choose(), ward.choose()] == [a, b]
    assert a.origin.probe is not None
    ward.request = a.origin.probe  # type: ignore[assignment]
    ward.health.answered(a, 200)
    assert ward.available == "ab"


def test_a_stuck_backend_without_a_passed_check_stays_out() -> None:
    ward = Ward("a", "b")
    a = busy(ward)
    ward.check(a, True)
    ward.poll(times=100)
    a.origin.in_flight = 0

    ward.poll(times=600)

    assert (a.origin.up, ward.available) == (False, "b")


# Sleep


def test_a_sleeping_backend_is_out_and_has_not_failed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ward = Ward("a", "b")
    a, b = ward.backends
    ward.health.slept(a.origin, True)
    ward.health.slept(a.origin, True)

    assert ward.chosen() == {b}
    assert (a.origin.up, ward.model.panic) == (True, False)
    # What it was sent before that was known: it is silent, and that is no fault.
    a.origin.in_flight = 3
    ward.poll(times=200)
    ward.open(a, outcome=Outcome.FIRST_BYTE_TIMEOUT)
    assert (a.origin.up, a.origin.opened, a.origin.failures) == (True, None, 0)
    a.origin.in_flight = 0
    ward.health.slept(a.origin, False)

    assert ward.available == "ab"
    assert a.share == 0.1
    told = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert told == [(logging.INFO, "a backend is asleep"), (logging.INFO, "a backend is awake again")]


def test_a_backend_that_was_stuck_before_it_was_known_to_sleep_is_not_stuck() -> None:
    ward = Ward("a", "b")
    a = busy(ward)
    ward.poll(times=100)
    assert not a.origin.up

    ward.health.slept(a.origin, True)

    assert a.origin.up
    assert ward.available == "b"


def test_what_a_backend_that_left_says_of_its_sleep_changes_nothing() -> None:
    ward = Ward("a", "b")
    a, _ = ward.backends
    ward.list("b")
    ward.health.slept(a.origin, True)
    ward.health.slept(a.origin, False)

    assert ward.available == "b"


@pytest.mark.parametrize("hosts", ["a", "abc"])
def test_when_all_sleep_none_is_tried(hosts: str) -> None:
    """Not in panic, nor because it is the only one: a request would wait until somebody wakes it."""
    ward = Ward(*hosts)
    ward.open(ward.backends[0], outcome=Outcome.CONNECT_FAILED)
    for backend in ward.backends:
        ward.health.slept(backend.origin, True)
    ward.now += 600

    assert ward.chosen() == {None}
    assert not ward.model.panic
    for backend in ward.backends:
        ward.health.slept(backend.origin, None)
    assert ward.choose() is not None


def test_of_those_that_are_awake_one_that_fails_is_as_good_as_an_only_one() -> None:
    ward = Ward("a", "b", "c", "d")
    a, b, c, d = ward.backends
    ward.health.slept(a.origin, True)
    ward.open(b)
    # One of three: the other two do.
    assert (ward.chosen(), ward.model.panic) == ({c, d}, False)
    ward.open(c)
    assert (ward.chosen(), ward.model.panic) == ({b, c, d}, True)
    ward.health.slept(c.origin, True)
    ward.health.slept(d.origin, True)
    assert (ward.chosen(), ward.model.panic) == ({b}, False)


def test_the_only_one_that_is_awake_is_kept_from_requests_while_it_refuses_connections() -> None:
    ward = Ward("a", "b")
    a, b = ward.backends
    ward.health.slept(a.origin, True)
    ward.open(b, outcome=Outcome.CONNECT_FAILED)
    assert ward.chosen() == {None}

    ward.now += 1

    assert [ward.choose(), ward.choose()] == [b, None]


def test_a_circuit_that_is_open_stays_so_while_the_backend_sleeps() -> None:
    ward = Ward("a", "b")
    a, b = ward.backends
    ward.open(a)
    ward.health.slept(a.origin, True)
    ward.now += 600
    assert ward.chosen() == {b}

    ward.health.slept(a.origin, False)

    assert [ward.choose(), ward.choose()] == [a, b]


def test_a_new_model_at_an_address_that_sleeps_is_asleep_there() -> None:
    ward = Ward("a", "b")
    a, _ = ward.backends
    ward.health.slept(a.origin, True)
    entries = [{"name": name, "backends": [{"url": "http://a"}, {"url": "http://b"}]} for name in ("m", "n")]
    ward.fleet.update(parse_catalogue({"models": entries}))

    other = ward.fleet.models["n"]
    assert {backend.label for backend in other.available} == {"b"}
    ward.health.slept(a.origin, False)
    assert {backend.label for backend in other.available} == {"a", "b"}


# Slow start


def shares(ward: Ward) -> list[float]:
    return [round(backend.share, 2) for backend in ward.backends]


def part_of_a(ward: Ward) -> float:
    """Its part of many requests that are in flight together."""
    for _ in range(1000):
        chosen = ward.choose()
        assert chosen is not None
        chosen.origin.in_flight += 1
    part = ward.backends[0].origin.in_flight / 1000
    for backend in ward.backends:
        backend.origin.in_flight = 0
    return part


@pytest.mark.parametrize("balancing", ["round_robin", "two_choices", "least_in_flight"])
def test_a_backend_that_comes_back_gets_its_weight_within_half_a_minute(balancing: str) -> None:
    ward = Ward("a", "b", balancing=balancing)
    a, _ = ward.backends
    ward.poll()
    ward.check(a, False, False, False, True, True)
    assert shares(ward) == [0.1, 1.0]
    assert part_of_a(ward) == pytest.approx(0.1 / 1.1, abs=0.03)

    ward.poll(times=10)
    assert shares(ward)[0] == pytest.approx(0.1 + 10 / 30, abs=0.02)
    assert part_of_a(ward) == pytest.approx(0.43 / 1.43, abs=0.03)
    ward.poll(times=20)

    assert shares(ward) == [1.0, 1.0]
    assert part_of_a(ward) == pytest.approx(0.5, abs=0.03)


def test_a_new_backend_beside_others_starts_slowly_by_its_own_weight() -> None:
    ward = Ward("a", "b")
    assert shares(ward) == [1.0, 1.0]
    backends = [{"url": "http://a"}, {"url": "http://b"}, {"url": "http://c", "weight": 4}]

    ward.list(backends=backends)

    assert [backend.weight for backend in ward.backends] == [1.0, 1.0, pytest.approx(0.4)]
    ward.poll(times=2)
    ward.list(backends=backends, version="3")
    assert 0.4 < ward.backends[2].weight < 1.0
    ward.poll(times=30)
    assert [backend.weight for backend in ward.backends] == [1.0, 1.0, 4.0]


def test_when_all_have_their_weight_the_tuple_is_no_longer_replaced() -> None:
    ward = Ward("a", "b")
    ward.list("a", "b", "c")
    before = ward.model.available
    ward.poll(times=2)
    assert ward.model.available is not before

    ward.poll(times=30)
    assert ward.model.available is ward.backends
    ward.poll(times=30)
    assert ward.model.available is ward.backends


def test_prefix_affinity_keeps_its_ring() -> None:
    ward = Ward("a", "b", "c", balancing="prefix_affinity")
    a = ward.backends[0]
    homes = {key: ward.model.choose(key) for key in map(str, range(100))}
    ward.check(a, False, False, False)
    without = ward.model.available
    ward.poll(times=10)
    assert ward.model.available is without

    ward.check(a, True, True)
    ward.poll(times=3)

    assert shares(ward) == [1.0, 1.0, 1.0]
    assert ward.model.available is ward.backends
    assert {key: ward.model.choose(key) for key in homes} == homes


def test_a_model_that_turns_to_prefix_affinity_has_full_weights_at_once() -> None:
    ward = Ward("a")
    ward.list("a", "b")
    assert shares(ward) == [1.0, 0.1]

    ward.list("a", "b", balancing="prefix_affinity")

    assert shares(ward) == [1.0, 1.0]


# Any order of events


@given(data=st.data(), count=st.integers(1, 5), balancing=st.sampled_from(["two_choices", "prefix_affinity"]))
def test_whatever_happens_there_is_somebody_to_try(data: st.DataObject, count: int, balancing: str) -> None:
    """Only an only backend that refuses may be nobody; and the list is what the backends' states say."""
    ward = Ward(*"abcde"[:count], balancing=balancing)
    for _ in range(data.draw(st.integers(0, 60))):
        backend = data.draw(st.sampled_from(ward.backends))
        event = data.draw(st.sampled_from(["attempt", "open", "check", "look", "choose"]))
        if event == "attempt":
            ward.attempt(backend, data.draw(st.sampled_from(BAD + NEITHER + [Outcome.OK])))
        elif event == "open":
            ward.open(backend)
        elif event == "check":
            ward.check(backend, *[data.draw(st.booleans())] * 3)
        elif event == "look":
            backend.origin.in_flight = data.draw(st.integers(0, 4))
            ward.poll(data.draw(st.sampled_from([1.0, 30.0, 61.0])))
        elif (chosen := ward.choose()) is not None:
            ward.report(chosen, data.draw(st.sampled_from([Outcome.OK, Outcome.RESET, Outcome.CLIENT_GONE])))

        usable = [backend for backend in ward.backends if backend.usable]
        assert ward.model.panic is (count > 1 and 2 * len(usable) < count)
        everyone = ward.model.panic or count == 1
        assert list(ward.model.available) == (list(ward.backends) if everyone else usable)
        assert set(ward.model.open) == {backend for backend in ward.backends if backend.origin.opened is not None}
        assert (ward.choose() is not None) or count == 1


# Its task


@pytest.mark.anyio
async def test_it_looks_again_and_again_even_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ward, looks = Ward("a", poll_every=0.01), 0

    def poll() -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise RuntimeError("a bug")

    monkeypatch.setattr(ward.health, "poll", poll)
    task = asyncio.create_task(ward.health.run())
    await until(lambda: looks > 2)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert [record.getMessage() for record in caplog.records] == ["polling the state of backends failed"]
