"""What errors do to a backend: much if the others do not give them, and nothing at all if they do."""

import logging
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_api.models import Outcome
from inference_api.routing.backend import Backend
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.fleet import Model
from tests.routing.ward import Request, Ward

BALANCING = ["two_choices", "least_in_flight", "round_robin", "prefix_affinity"]
# Of a backend that fails in one way or in several: status and outcome of its answers.
REFUSING = [[(401, Outcome.UPSTREAM_4XX)], [(404, Outcome.UPSTREAM_4XX)]]
BROKEN = [
    [(500, Outcome.UPSTREAM_5XX)],
    [(500, Outcome.UPSTREAM_5XX), (404, Outcome.UPSTREAM_4XX), (401, Outcome.UPSTREAM_4XX)],
    [(501, Outcome.UPSTREAM_5XX)],
    [(200, Outcome.TRUNCATED)],
    [(200, Outcome.ERROR_EVENT)],
    [(None, Outcome.PROTOCOL_ERROR)],
]
WELL = (200, Outcome.OK)
Answer = tuple[int | None, Outcome]


def ask(ward: Ward, answer: Callable[[Backend], Answer], key: str = "", model: Model | None = None) -> Backend:
    """One request, from choice to end."""
    ward.request = Request()
    backend = (model or ward.model).choose(key)
    assert backend is not None
    status, outcome = answer(backend)
    ward.report(backend, outcome, status)
    return backend


def asked(ward: Ward, answer: Callable[[Backend], Answer], times: int, keys: int = 20) -> Counter[str]:
    """How often each backend was asked."""
    return Counter(ask(ward, answer, str(number % keys)).label for number in range(times))


def failing(host: str, answers: list[Answer]) -> Callable[[Backend], Answer]:
    """This one answers so in turn, the others answer well."""
    left: list[Answer] = []

    def answer(backend: Backend) -> Answer:
        if backend.label != host:
            return WELL
        left[:] = left or answers
        return left.pop(0)

    return answer


def set_aside(ward: Ward, answers: list[Answer] | None = None) -> Backend:
    """The first backend, once it is out."""
    a = ward.backends[0]
    asked(ward, failing(a.label, answers or [(500, Outcome.UPSTREAM_5XX)]), 200)
    assert a not in ward.model.available
    return a


# Errors that the others do not give


def test_it_is_out_for_the_model_that_it_fails_and_serves_the_others() -> None:
    ward = Ward()
    backends = [{"url": f"http://{host}"} for host in "abc"]
    ward.fleet.update(parse_catalogue({"models": [{"name": name, "backends": backends} for name in ("m", "n")]}))
    n = ward.fleet.models["n"]

    for _ in range(200):
        ask(ward, failing("a", [(404, Outcome.UPSTREAM_4XX)]))
        ask(ward, lambda backend: WELL, model=n)

    assert ward.available == "bc"
    assert n.available is n.backends
    assert n.guard is None


def test_a_stream_of_errors_beside_good_answers_of_old_streams_is_found() -> None:
    ward = Ward("a", "b", "c")
    a = ward.backends[0]
    old = [Request() for _ in range(400)]

    def answer(backend: Backend) -> Answer:
        if backend is a and a.compared:
            # A stream that began when it was well ends.
            now, ward.request = ward.request, old.pop()
            ward.health.ended(a, Outcome.OK)
            ward.request = now
        return failing("a", [(500, Outcome.UPSTREAM_5XX)])(backend)

    asked(ward, answer, 400)

    assert ward.available == "bc"


@pytest.mark.parametrize("balancing", ["two_choices", "least_in_flight"])
def test_one_that_often_fails_and_quickly_is_not_asked_more_often_for_it(balancing: str) -> None:
    """Its in-flight count is always the lowest; the others have four each."""
    ward = Ward("a", "b", balancing=balancing)
    a, b = ward.backends
    b.origin.in_flight = 4
    number = 0

    def answer(backend: Backend) -> Answer:
        nonlocal number
        number += backend is a
        return WELL if backend is b or number % 2 else (500, Outcome.UPSTREAM_5XX)

    counts = asked(ward, answer, 400)

    assert 15 <= counts["a"] <= 40
    assert ward.available == "ab"


def test_operators_are_told_when_it_is_out_and_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ward = Ward("a", "b", "c")
    a = set_aside(ward)
    ward.now += 72
    assert ask(ward, lambda backend: WELL) is a

    assert [(record.levelname, vars(record)["fields"]) for record in caplog.records] == [
        ("WARNING", {"model": "m", "backend": "a"}),
        ("INFO", {"model": "m", "backend": "a"}),
    ]


# It comes back


def test_after_the_cooldown_one_good_answer_brings_it_back_slowly() -> None:
    ward = Ward("a", "b", "c")
    a = set_aside(ward)
    a.recent, a.extra = 50.0, 42
    ward.now += 47
    assert ward.chosen() == set(ward.backends[1:])
    ward.now += 25

    assert ward.choose() is a
    assert ward.chosen() == set(ward.backends[1:])
    assert a.circuit.probe is not None
    ward.request = a.circuit.probe  # type: ignore[assignment]
    ward.health.answered(a, 200)

    assert ward.available == "abc"
    assert (a.share, a.errors, a.recent, a.extra, ward.model.guard) == (0.1, 0, 0.0, 0, None)
    ward.poll(times=30)
    assert (a.share, ward.model.available) == (1.0, ward.backends)


@pytest.mark.parametrize("answer", [(500, Outcome.UPSTREAM_5XX), (404, Outcome.UPSTREAM_4XX), (None, Outcome.RESET)])
def test_a_probe_that_gets_an_error_is_the_last_for_another_cooldown(answer: Answer) -> None:
    ward = Ward("a", "b", "c")
    a = set_aside(ward)
    ward.now += 72

    assert ask(ward, lambda backend: answer) is a

    assert ward.chosen() == set(ward.backends[1:])
    ward.now += 72
    assert ward.choose() is a


def test_a_probe_whose_client_leaves_is_followed_by_the_next_request() -> None:
    ward = Ward("a", "b", "c")
    a = set_aside(ward)
    ward.now += 72

    assert ask(ward, lambda backend: (None, Outcome.CLIENT_GONE)) is a
    assert ward.choose() is a


def test_where_answers_broke_off_the_head_of_one_shows_nothing() -> None:
    ward = Ward("a", "b", "c")
    a = set_aside(ward, [(200, Outcome.TRUNCATED)])
    ward.now += 72
    assert ward.choose() is a

    ward.health.answered(a, 200)
    assert ward.available == "bc"
    ward.health.ended(a, Outcome.OK)

    assert ward.available == "abc"


def test_an_address_that_is_down_as_well_is_tried_when_both_circuits_are_due() -> None:
    ward = Ward("a", "b", "c")
    a = set_aside(ward)
    ward.now += 50
    ward.open(a)
    assert a.origin.opened is not None
    ward.now += 30
    assert a not in ward.chosen()
    ward.now += 50

    assert ask(ward, lambda backend: WELL) is a

    assert ward.available == "abc"


# Errors that all give


@given(
    balancing=st.sampled_from(BALANCING),
    answer=st.sampled_from([(400, Outcome.UPSTREAM_4XX), (500, Outcome.UPSTREAM_5XX), (None, Outcome.PROTOCOL_ERROR)]),
    count=st.integers(2, 5),
    # Of each request: whether all refuse it, and the session it is of.
    requests=st.lists(st.tuples(st.booleans(), st.sampled_from(["", "x", "y", "z"])), max_size=300),
    every=st.integers(1, 6),
)
@settings(max_examples=150, deadline=None)
def test_whoever_asks_whatever_others_refuse_too_changes_nothing(
    balancing: str, answer: Answer, count: int, requests: list[tuple[bool, str]], every: int
) -> None:
    """In bursts, in every n-th place, by one session or by many."""
    ward = Ward(*"abcde"[:count], balancing=balancing)
    before = [backend.weight for backend in ward.backends]
    for number, (bad, key) in enumerate(requests):
        refused = bad or number % every == 0
        ask(ward, lambda backend, refused=refused: answer if refused else WELL, key)  # type: ignore[misc]
        assert ward.model.open == ()
        assert ward.model.available is ward.backends
    # What is being compared is so for a few more requests.
    asked(ward, lambda backend: WELL, 400)

    assert ward.model.guard is None
    assert [backend.weight for backend in ward.backends] == before
    assert [backend.errors for backend in ward.backends] == [0] * count


def test_a_session_that_is_refused_moves_few_of_the_others() -> None:
    ward = Ward("a", "b", "c", balancing="prefix_affinity")
    homes = {str(key): ward.model.choose(str(key)) for key in range(60)}
    home = ward.model.choose("bad")
    moved = 0

    for number in range(3000):
        ward.now += 0.01
        if number % 2:
            assert ask(ward, lambda backend: (400, Outcome.UPSTREAM_4XX), "bad") is not None
        else:
            key = str(number // 2 % 60)
            moved += ask(ward, lambda backend: WELL, key) is not homes[key]
    assert ward.model.open == ()
    # 30 s are three comparisons at most.
    assert moved < 60
    ward.now += 10
    asked(ward, lambda backend: WELL, 100)
    assert ward.model.choose("bad") is home


def test_in_every_third_place_of_three_backends_in_turn() -> None:
    """All bad requests come to the same one, and all good ones to the others."""
    ward = Ward("a", "b", "c", balancing="round_robin")

    for number in range(3000):
        ask(ward, lambda backend, bad=number % 3 == 0: (400, Outcome.UPSTREAM_4XX) if bad else WELL)  # type: ignore[misc]
        assert ward.model.available is ward.backends


def test_an_only_backend_is_never_out() -> None:
    ward = Ward("a")

    asked(ward, lambda backend: (500, Outcome.UPSTREAM_5XX), 1000)

    assert (ward.available, ward.model.guard) == ("a", None)


def test_a_backend_without_others_to_compare_it_with_is_used() -> None:
    ward = Ward("a", "b")
    ward.open(ward.backends[1])

    asked(ward, lambda backend: (500, Outcome.UPSTREAM_5XX), 1000)

    assert ward.available == "a"


def test_what_shows_nothing_ends() -> None:
    ward = Ward("a", "b")
    a = ward.backends[0]
    for _ in range(3):
        ward.attempt(a, Outcome.UPSTREAM_5XX, 500)
    assert a.compared
    assert ward.model.guard is not None

    ward.poll(601)

    assert not a.compared
    assert ward.model.guard is None


def test_a_backend_that_leaves_while_it_is_compared_leaves_nothing() -> None:
    ward = Ward("a", "b")
    a = ward.backends[0]
    for _ in range(3):
        ward.attempt(a, Outcome.UPSTREAM_5XX, 500)
    ward.choose()
    ward.list("b", "c")
    ward.report(a, Outcome.UPSTREAM_5XX, 500)

    asked(ward, lambda backend: WELL, 100)
    ward.poll(601)

    assert ward.available == "bc"
    assert ward.model.guard is None


def test_a_request_whose_client_leaves_while_it_is_compared_is_forgotten() -> None:
    ward = Ward("a", "b")
    for _ in range(3):
        ward.attempt(ward.backends[0], Outcome.UPSTREAM_5XX, 500)
    gone = []
    for _ in range(20):
        ask(ward, lambda backend: (None, Outcome.CLIENT_GONE))
        gone.append(weakref.ref(ward.request))

    ward.request = Request()
    assert ward.backends[0].compared
    assert [reference() for reference in gone] == [None] * 20


# Recent errors as load


def errors(ward: Ward, **given: int) -> list[int]:
    """What so many errors of each backend add to its load."""
    for backend in ward.backends:
        for _ in range(given[backend.label]):
            ward.attempt(backend, Outcome.UPSTREAM_4XX, 400)
            # Few in a row, so that none is compared.
            ward.attempt(backend, Outcome.OK, 200)
    return [backend.extra for backend in ward.backends]


def test_errors_that_one_has_given_more_of_count_as_requests_in_flight() -> None:
    assert errors(Ward("a", "b", "c"), a=20, b=0, c=0) == [12, 0, 0]


def test_errors_that_all_have_given_count_nothing_nor_does_what_chance_may_do() -> None:
    assert errors(Ward("a", "b", "c"), a=100, b=100, c=100) == [0, 0, 0]
    assert errors(Ward("a", "b", "c"), a=8, b=0, c=0) == [0, 0, 0]
    assert errors(Ward("a", "b", "c"), a=130, b=100, c=110) == [0, 0, 0]


def test_a_heavier_backend_meets_more_of_them() -> None:
    backends: list[dict[str, Any]] = [{"url": "http://a", "weight": 4}, {"url": "http://b"}]
    ward = Ward()
    ward.list(backends=backends)

    assert errors(ward, a=400, b=100) == [0, 0]
    assert errors(ward, a=0, b=100)[1] > 50


def test_they_fade() -> None:
    ward = Ward("a", "b")
    a, _ = ward.backends
    errors(ward, a=50, b=0)
    assert a.extra == 42

    ward.poll(times=20)
    assert 15 <= a.extra <= 20
    ward.poll(times=150)

    assert (a.extra, a.recent) == (0, 0.0)


def test_a_backend_that_starts_slowly_has_met_few_and_sets_no_measure() -> None:
    ward = Ward("a", "b")
    errors(ward, a=50, b=50)
    ward.list("a", "b", "c")

    assert errors(ward, a=1, b=1, c=0) == [0, 0, 0]
