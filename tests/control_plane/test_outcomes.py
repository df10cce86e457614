"""Every way in which a request or an attempt can end has its words, and they lead to a place that exists."""

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.pure import outcomes
from control_plane.pure.outcomes import ATTEMPTS, CODES, OUTCOMES, STATUSES, attempt_words, bars, explain
from control_plane.pure.records import FINE, KINDS
from inference_api import errors
from inference_api.models import Outcome

ROOT = Path(__file__).parent.parent.parent


def tried(outcome: str, backend: str = "10.0.0.11:8000", start: float = 1, took: float = 120_000) -> dict[str, Any]:
    return {"backend": backend, "outcome": outcome, "status": 0, "start_ms": start, "duration_ms": took}


def record(**changes: Any) -> dict[str, Any]:
    found = {
        "kind": "request",
        "asked_model": "llama-3-8b",
        "model": "llama-3-8b",
        "backend": "10.0.0.12:8000",
        "stream": True,
        "status": 200,
        "outcome": "ok",
        "code": None,
        "attempts": 1,
        "fallback": False,
        "variant": None,
        "cache": None,
        "votes": None,
        "latency_ms": 2312.0,
        "ttft_ms": 181.5,
        "queued_ms": 0,
        "bytes": 31_044,
    }
    return found | changes


def failed(outcome: str, *attempts: dict[str, Any], status: int = 504, code: str | None = None) -> dict[str, Any]:
    details = {"attempt_details": list(attempts)} if attempts else {}
    return record(outcome=outcome, status=status, code=code, attempts=len(attempts), ttft_ms=None, bytes=180, **details)


def codes() -> Iterator[str]:
    pending: list[type[errors.RouterError]] = [errors.RouterError]
    while pending:
        one = pending.pop()
        pending += one.__subclasses__()
        # Not those of other tests
        if one.__module__.startswith("inference_api"):
            yield one.code


def slugs(page: str) -> set[str]:
    """The anchors of a page, as GitHub and the documentation's site make them."""
    titles = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("outcome", [one.value for one in Outcome])
def test_every_outcome_of_the_router_has_words(outcome: str) -> None:
    assert outcome in OUTCOMES
    assert outcome in ATTEMPTS
    assert attempt_words(outcome, 500, 1200.0)
    assert "_" not in attempt_words(outcome, 500, 1200.0)


def test_every_error_of_the_router_has_words() -> None:
    by_outcome = {"internal_error", "upstream_reset", "upstream_protocol_error", "upstream_auth_failed"}

    assert {*codes()} - by_outcome - {"upstream_timeout"} <= CODES.keys()
    assert {"api_key_expired", "api_key_disabled"} <= CODES.keys()


def test_what_to_do_is_written_down() -> None:
    for kind in {*OUTCOMES.values(), *CODES.values(), *STATUSES.values()}:
        if kind.runbook is not None:
            page, _, anchor = kind.runbook.partition("#")
            assert not anchor or anchor in slugs(page), kind.runbook
        if kind not in (OUTCOMES["ok"], OUTCOMES["race_lost"]):
            assert kind.advice
            assert kind.runbook
            assert kind.look


@pytest.mark.parametrize("outcome", [*(one.value for one in Outcome), "of_a_later_router"])
def test_any_record_is_explained(outcome: str) -> None:
    for kind, attempts in product(KINDS, range(4)):
        details = [tried(outcome, f"10.0.0.{place}:8000") for place in range(attempts)]
        given = failed(outcome, *details, status=200 if outcome == "ok" else 400) | {"kind": kind}

        found = explain(given)

        assert found.headline
        assert found.sentence.endswith(".")
        assert "{" not in found.sentence
        lost = kind != "request" and outcome.endswith("_lost")
        assert (found.verdict == "failed") == (outcome not in FINE and not lost)


@pytest.mark.parametrize("code", CODES)
def test_a_refusal_says_why(code: str) -> None:
    found = explain(record(outcome="refused", status=400, code=code, attempts=0, backend=None))

    assert found.verdict == "refused"
    assert found.headline == CODES[code].headline
    assert found.sentence


def test_two_backends_that_did_the_same() -> None:
    given = failed(
        "first_byte_timeout", tried("first_byte_timeout"), tried("first_byte_timeout", "10.0.0.12:8000", 120_001)
    )

    assert explain(given).sentence == "Two backends were tried; neither sent a first byte in 2 min."
    assert explain(given).runbook == "docs/troubleshooting.md#504"


def test_backends_that_failed_in_different_ways() -> None:
    given = failed(
        "reset", tried("first_byte_timeout"), tried("reset", "10.0.0.12:8000", 120_001, 3_012.0), code="upstream_reset"
    )

    assert explain(given).sentence == (
        "Two backends were tried: 10.0.0.11:8000 sent no first byte in 2 min, "
        "then 10.0.0.12:8000 closed the connection after 3.01 s."
    )


def test_one_backend_twice() -> None:
    given = failed("stale", tried("stale"), tried("stale", start=3))

    assert explain(given).sentence == ("Two attempts were made on 10.0.0.11:8000; both had closed the idle connection.")


def test_an_answer_at_the_second_try() -> None:
    details = [tried("connect_failed", took=1.1), tried("ok", "10.0.0.12:8000", 1.6, 2310.2)]
    found = explain(record(attempts=2, attempt_details=details))

    assert found.verdict == "ok"
    assert found.sentence == (
        "10.0.0.12:8000 answered at the second try, in 2.31 s altogether, with the first token after 182 ms; "
        "before, 10.0.0.11:8000 did not accept a connection."
    )


def test_an_answer_of_the_cache() -> None:
    found = explain(record(cache="hit", attempts=0, backend=None, latency_ms=0.8))

    assert found.sentence == "The router answered from its cache in 0.8 ms; no backend was asked."


def test_backends_that_were_down() -> None:
    down = [tried("connect_failed"), tried("connect_failed", "10.0.0.12:8000")]
    found = explain(failed("no_backend", *down, status=503, code="no_backend_available"))

    assert found.headline == "No backend could be connected to"
    assert found.sentence == "Two backends were tried; neither accepted a connection."
    assert found.runbook == "k8s/runbook.md#inferencerouterbackenddown"


def test_a_deadline_that_left_no_time_for_another_try() -> None:
    given = failed("total_timeout", tried("reset", took=599_000.0), code="upstream_timeout")

    assert explain(given | {"latency_ms": 600_000.0}).sentence == (
        "10.0.0.11:8000 closed the connection after 9 min 59 s. After 10 min there was no time left for another try."
    )


def test_an_engine_that_does_not_know_the_model() -> None:
    found = explain(record(outcome="upstream_4xx", status=404, ttft_ms=None))

    assert found.verdict == "refused"
    assert found.sentence == "10.0.0.12:8000 answered 404."
    assert "served_model_name" in found.advice


def test_a_client_that_left_in_the_middle() -> None:
    found = explain(record(outcome="client_gone"))

    assert found.verdict == "left"
    assert "in the middle of the answer of 10.0.0.12:8000: 30.3 KiB had gone out." in found.sentence


def test_a_stream_that_broke_after_its_head() -> None:
    found = explain(record(outcome="truncated"))

    assert found.verdict == "failed"
    assert "The client had got the status 200 before, and a part of the answer." in found.sentence


def test_an_answer_of_another_model() -> None:
    found = explain(record(fallback=True, model="gpt2"))

    assert "The fallback gpt2 answered in place of llama-3-8b." in found.sentence


def test_the_rows_of_a_waterfall() -> None:
    details = [tried("first_byte_timeout", start=1800), tried("ok", "10.0.0.12:8000", 121_801, 9500.0)]
    rows = bars(record(attempts=2, attempt_details=details, queued_ms=1799, ttft_ms=122_000, latency_ms=131_301))

    assert [(row.label, row.state, row.start_ms, row.first_byte_ms) for row in rows] == [
        ("waited", "waited", 1, None),
        ("10.0.0.11:8000", "failed", 1800, None),
        ("10.0.0.12:8000", "ok", 121_801, 122_000),
    ]
    assert rows[1].words == "no first byte in 2 min"


def test_a_request_without_details_is_one_attempt() -> None:
    (row,) = bars(record())

    assert (row.label, row.start_ms, row.duration_ms) == ("10.0.0.12:8000", 0, 2312.0)
    assert bars(record(attempts=0, backend=None)) == ()


WORDS = st.sampled_from([*OUTCOMES, "of_a_later_router"])
NAMES = st.sampled_from(["llama-3-8b", "{model}", "{}", "%s", "<b>"])
TRIED = st.builds(tried, WORDS, NAMES, st.floats(0, 1e9), st.floats(0, 1e9))


@given(
    outcome=WORDS,
    code=st.one_of(st.none(), st.sampled_from([*CODES]), WORDS),
    kind=st.sampled_from(KINDS),
    status=st.integers(0, 599),
    attempts=st.integers(0, 20),
    backend=st.one_of(st.none(), NAMES),
    model=NAMES,
    asked_model=NAMES,
    fallback=st.booleans(),
    cache=st.sampled_from(["hit", "miss", "bypass", None]),
    votes=st.sampled_from(["2/3", None]),
    queued_ms=st.floats(0, 1e6),
    ttft_ms=st.one_of(st.none(), st.floats(0, 1e6)),
    bytes=st.integers(0, 2**40),
    attempt_details=st.one_of(st.none(), st.lists(TRIED, max_size=16)),
)
def test_no_record_is_too_odd(**fields: Any) -> None:
    given_record = record(**fields)

    found = explain(given_record)

    assert found.headline
    assert found.sentence.endswith(".")
    assert len(bars(given_record)) <= 17


def test_states_of_attempts_are_those_of_charts() -> None:
    assert {outcomes.state_of(one.value) for one in Outcome} == {"ok", "left", "refused", "lost", "failed"}
