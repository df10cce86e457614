"""The attempt loop: what is tried again, what is not, and what each attempt says to a backend."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.errors import NoBackend, RouterError, UpstreamProtocolError, UpstreamReset, UpstreamTimeout
from inference_api.http.routes import INFERENCE_ROUTES
from inference_api.models import Call, Outcome, Reply
from inference_api.routing.backend import Backend
from inference_api.routing.balance import make_balancer
from inference_api.routing.entries import BackendEntry, CatalogueEntry
from inference_api.routing.fleet import Fleet, Model
from inference_api.upstream.attempt import Attempt, SendAttempt, SendToBackend
from inference_api.upstream.failures import (
    Disconnected,
    FirstByteTimeout,
    IdleTimeout,
    Malformed,
    TotalTimeout,
    outcome_of,
)
from inference_api.upstream.forward import Forward
from inference_api.upstream.limits import Limits
from inference_api.upstream.prepare import Prepare
from inference_api.upstream.retry import RetryPolicy
from inference_api.upstream.transport import Transport
from tests.fakes import (
    CHAT,
    FakeEngine,
    body_of,
    form,
    hang,
    until,
)

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

ROUTES = {route.label: route for route in INFERENCE_ROUTES}
JSON = (b"content-type", b"application/json")
BODY = orjson.dumps(CHAT)
BACKENDS = ("http://a:1", "http://b:1", "http://c:1")


def call_to(label: str = "chat_completions", **more: Any) -> Call:
    return Call(ROUTES[label], "m", False, BODY, [JSON], "rid", [])._replace(**more)


def model_of(*urls: str, **more: Any) -> Model:
    entry = CatalogueEntry(
        name="m", backends=tuple(BackendEntry(url=url) for url in urls), **{"balancing": "round_robin", **more}
    )
    fleet = Fleet(lambda name: make_balancer(name, random.Random(1).random))
    fleet.update({"m": entry})
    return fleet.by_name["m"]


class Body(httpx.AsyncByteStream):
    """A response body that knows whether it was closed."""

    def __init__(self, data: bytes = b"{}") -> None:
        self.data = data
        self.closed = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.data

    async def aclose(self) -> None:
        self.closed += 1


class Jitter(random.Random):
    """Always the same share of the longest back-off; 1000 of them is 25 seconds or more."""

    def __init__(self, share: float) -> None:
        super().__init__(1)
        self._share = share

    def random(self) -> float:
        return self._share


class FirstChoice:
    """A balancer: the first that has not been tried."""

    def choose(self, backends: Sequence[Backend], key: str, tried: Collection[Backend] = ()) -> Backend | None:
        return next((backend for backend in backends if backend not in tried), None)


class Desk:
    """A Forward over a transport that plays `results` in turn, and what it did with them; its clock stands still."""

    def __init__(self, *results: Exception | httpx.Response | int, jitter: float | None = None, **limits: Any) -> None:
        self.results = list(results)
        self.requests: list[httpx.Request] = []
        self.answers: list[tuple[str, int]] = []
        self.ended: list[tuple[str, Outcome]] = []
        self.retries: list[str] = []
        self.now = 1000.0
        self.rand = random.Random(1) if jitter is None else Jitter(jitter)
        self.forward = self.over(httpx.MockTransport(self.handle), **limits)

    def over(
        self,
        transport: httpx.AsyncBaseTransport,
        tokens: dict[str, str] | None = None,
        wrap: Callable[[SendAttempt], SendAttempt] = lambda send: send,
        **limits: Any,
    ) -> Forward:
        common = Limits(**limits)
        self.policy = RetryPolicy(common, self.rand.random, lambda: self.now)
        send = SendToBackend(
            transport, self.note, lambda backend, status: self.answers.append((backend.label, status)), self.rand
        )
        return Forward(
            wrap(send), Prepare(common, tokens or {}), self.policy, lambda model, reason: self.retries.append(reason)
        )

    @property
    def permits(self) -> int:
        """That are drawn."""
        return self.policy.budget.drawn("m")

    def note(self, backend: Backend, outcome: Outcome) -> None:
        self.ended.append((backend.label, outcome))

    async def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        result = self.results.pop(0) if self.results else 200
        if isinstance(result, Exception):
            raise result
        return httpx.Response(result, stream=Body()) if isinstance(result, int) else result

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for _, outcome in self.ended]

    @property
    def hosts(self) -> list[str]:
        return [request.url.host for request in self.requests]


async def finish(reply: Reply) -> bytes:
    body = await body_of(reply.stream)
    await reply.aclose(Outcome.of_status(reply.status))
    return body


def in_flight(model: Model) -> list[int]:
    counts = [backend.in_flight for backend in model.backends]
    # Balancing goes by the count of the address, which is the same where no other model is served.
    assert [backend.origin.in_flight for backend in model.backends] == counts
    return counts


STALE = Disconnected("gone", received=0, reused=True)
SILENT = Disconnected("gone", received=0, reused=False)
# A used connection, but the backend had the request for two seconds.
DIED = Disconnected("gone", received=0, reused=True, waited=2.0)
PARTIAL = Disconnected("gone", received=17, reused=False)
PARTIAL_REUSED = Disconnected("gone", received=17, reused=True)
REFUSED = httpx.ConnectError("refused")
UNREACHED = httpx.ConnectTimeout("late")


# What is tried again


@pytest.mark.parametrize("label", ["chat_completions", "responses", "transcriptions", "embeddings"])
@pytest.mark.parametrize(
    ("error", "outcome"),
    [(REFUSED, Outcome.CONNECT_FAILED), (UNREACHED, Outcome.CONNECT_FAILED), (STALE, Outcome.STALE)],
)
async def test_a_request_that_was_not_taken_goes_to_another_backend(
    label: str, error: Exception, outcome: Outcome
) -> None:
    desk, model = Desk(error), model_of(*BACKENDS)

    reply = await desk.forward(call_to(label), model)

    assert (reply.status, reply.attempts) == (200, 2)
    assert len(set(desk.hosts)) == 2
    assert sorted(in_flight(model)) == [0, 0, 1]
    await finish(reply)
    assert desk.outcomes == [outcome, Outcome.OK]
    assert in_flight(model) == [0, 0, 0]


async def test_a_stale_connection_is_replaced_at_the_same_backend_if_there_is_no_other() -> None:
    desk, model = Desk(STALE), model_of("http://a:1")

    await finish(await desk.forward(call_to("responses"), model))

    assert desk.hosts == ["a", "a"]
    assert [request.extensions["fresh"] for request in desk.requests] == [False, True]
    assert desk.outcomes == [Outcome.STALE, Outcome.OK]


@pytest.mark.parametrize("label", [label for label in ROUTES if label != "responses"])
@pytest.mark.parametrize("error", [SILENT, DIED])
async def test_silence_is_tried_once_more(error: Exception, label: str) -> None:
    desk, model = Desk(error), model_of(*BACKENDS)

    reply = await desk.forward(call_to(label), model)

    assert len(set(desk.hosts)) == 2
    assert desk.requests[1].extensions["fresh"]
    await reply.aclose(Outcome.OK)
    assert desk.outcomes == [Outcome.RESET, Outcome.OK]


async def test_a_503_goes_to_another_backend_and_its_body_is_closed() -> None:
    busy = Body(b"busy")
    desk, model = Desk(httpx.Response(503, stream=busy)), model_of(*BACKENDS)

    reply = await desk.forward(call_to(), model)

    assert (reply.status, busy.closed) == (200, 1)
    assert len(set(desk.hosts)) == 2
    await finish(reply)
    assert desk.outcomes == [Outcome.UPSTREAM_5XX, Outcome.OK]
    assert in_flight(model) == [0, 0, 0]


@pytest.mark.parametrize("urls", [BACKENDS[:1], BACKENDS])
async def test_the_last_503_is_the_answer(urls: tuple[str, ...]) -> None:
    bodies = [Body(b"first"), Body(b"second")]
    desk, model = Desk(*(httpx.Response(503, stream=body) for body in bodies)), model_of(*urls)

    reply = await desk.forward(call_to(), model)

    assert reply.status == 503
    assert await finish(reply) == (b"first" if len(urls) == 1 else b"second")
    assert in_flight(model) == [0] * len(urls)


@pytest.mark.parametrize("status", [429, 502, 504])
async def test_which_statuses_are_tried_again_is_a_setting(status: int) -> None:
    by_default, chosen = Desk(status), Desk(status, retry_on_status=frozenset({status}))

    first = await by_default.forward(call_to(), model_of(*BACKENDS))
    second = await chosen.forward(call_to(), model_of(*BACKENDS))

    assert (first.status, second.status) == (status, 200)
    await first.aclose(Outcome.UPSTREAM_5XX)
    await second.aclose(Outcome.OK)


@pytest.mark.parametrize("status", [200, 204, 302, 400, 401, 404, 408, 409, 422, 429, 500, 501, 502, 504])
async def test_an_answer_is_an_answer(status: int) -> None:
    desk = Desk(status)

    reply = await desk.forward(call_to(), model_of(*BACKENDS))

    assert (reply.status, reply.attempts) == (status, 1)
    await reply.aclose(Outcome.of_status(status))
    assert len(desk.requests) == 1


@pytest.mark.parametrize(
    ("error", "outcome", "kind"),
    [
        (PARTIAL, Outcome.RESET, UpstreamReset),
        (PARTIAL_REUSED, Outcome.RESET, UpstreamReset),
        (httpx.ReadError("reset"), Outcome.RESET, UpstreamReset),
        (httpx.WriteError("reset"), Outcome.RESET, UpstreamReset),
        (Malformed("junk"), Outcome.PROTOCOL_ERROR, UpstreamProtocolError),
        (httpx.RemoteProtocolError("junk"), Outcome.PROTOCOL_ERROR, UpstreamProtocolError),
        (FirstByteTimeout("late"), Outcome.FIRST_BYTE_TIMEOUT, UpstreamTimeout),
        (httpx.ReadTimeout("late"), Outcome.FIRST_BYTE_TIMEOUT, UpstreamTimeout),
        (IdleTimeout("late"), Outcome.IDLE_TIMEOUT, UpstreamTimeout),
        (TotalTimeout("late"), Outcome.TOTAL_TIMEOUT, UpstreamTimeout),
    ],
)
async def test_what_may_have_been_executed_is_not_tried_again(
    error: Exception, outcome: Outcome, kind: type[RouterError]
) -> None:
    desk, model = Desk(error), model_of(*BACKENDS)

    with pytest.raises(kind) as caught:
        await desk.forward(call_to(), model)

    assert len(desk.requests) == 1
    assert desk.outcomes == [outcome]
    assert caught.value.outcome is outcome
    assert in_flight(model) == [0, 0, 0]


async def test_three_attempts_reach_three_backends() -> None:
    desk = Desk(REFUSED, 503, attempts=3)

    reply = await desk.forward(call_to(), model_of(*BACKENDS))

    assert (reply.status, reply.attempts) == (200, 3)
    assert sorted(desk.hosts) == ["a", "b", "c"]
    await reply.aclose(Outcome.OK)
    assert desk.outcomes == [Outcome.CONNECT_FAILED, Outcome.UPSTREAM_5XX, Outcome.OK]


async def test_the_last_failure_is_the_one_that_is_told() -> None:
    with pytest.raises(UpstreamProtocolError):
        await Desk(REFUSED, Malformed("junk")).forward(call_to(), model_of(*BACKENDS))
    with pytest.raises(NoBackend):
        await Desk(503, REFUSED).forward(call_to(), model_of(*BACKENDS[:2]))


@pytest.mark.parametrize(
    ("errors", "urls", "final"),
    [
        ((PARTIAL,), BACKENDS[:1], True),
        ((PARTIAL,), BACKENDS[:2], False),
        ((SILENT, SILENT), BACKENDS[:2], True),
        ((SILENT, REFUSED), BACKENDS, False),
        ((SILENT, SILENT), BACKENDS, True),
        ((Malformed("junk"),), BACKENDS[:1], True),
        ((Malformed("junk"),), BACKENDS, False),
        ((FirstByteTimeout("late"),), BACKENDS, True),
        ((TotalTimeout("late"),), BACKENDS, True),
    ],
)
async def test_an_sdk_is_told_not_to_repeat_what_cannot_succeed(
    errors: tuple[Exception, ...], urls: tuple[str, ...], final: bool
) -> None:
    with pytest.raises(RouterError) as caught:
        await Desk(*errors).forward(call_to(), model_of(*urls))

    assert ((b"x-should-retry", b"false") in caught.value.headers) == final


@pytest.mark.parametrize("error", [PARTIAL, Malformed("http://a:1 said x"), FirstByteTimeout("a"), REFUSED])
async def test_no_error_names_a_backend(error: Exception) -> None:
    with pytest.raises(RouterError) as caught:
        await Desk(error).forward(call_to(), model_of("http://secret-host:1234"))

    assert "secret-host" not in caught.value.message
    assert "1234" not in caught.value.message


# When it is tried again


@pytest.mark.parametrize("error", [REFUSED, UNREACHED, STALE, SILENT])
async def test_another_backend_is_tried_at_once(error: Exception) -> None:
    desk = Desk(error, jitter=1000)

    async with asyncio.timeout(10):
        await finish(await desk.forward(call_to(), model_of(*BACKENDS)))

    assert len(desk.requests) == 2


@pytest.mark.parametrize(("first", "urls"), [(503, BACKENDS), (STALE, BACKENDS[:1])])
async def test_a_client_that_leaves_during_a_pause_is_not_served_again(
    first: Exception | int, urls: tuple[str, ...]
) -> None:
    busy = Body()
    desk = Desk(httpx.Response(503, stream=busy) if first == 503 else STALE, jitter=1000)
    model = model_of(*urls)
    calling = asyncio.ensure_future(desk.forward(call_to(), model))
    await until(lambda: desk.answers or desk.ended)

    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling

    assert len(desk.requests) == len(desk.ended) == 1
    assert in_flight(model) == [0] * len(urls)
    assert busy.closed == (first == 503)


async def test_a_client_that_leaves_while_it_is_tried_again_gives_its_permit_back() -> None:
    async def handle(request: httpx.Request) -> httpx.Response:
        desk.requests.append(request)
        if len(desk.requests) == 1:
            raise SILENT
        await asyncio.sleep(30)
        raise AssertionError("never")

    desk, model = Desk(), model_of(*BACKENDS)
    weaken(model)
    forward = desk.over(httpx.MockTransport(handle))
    calling = asyncio.ensure_future(forward(call_to(), model))
    await until(lambda: len(desk.requests) == 2)
    assert desk.permits == 1

    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling

    assert desk.permits == 0
    assert desk.outcomes == [Outcome.RESET, Outcome.CLIENT_GONE]
    assert in_flight(model) == [0, 0, 0]


@pytest.mark.parametrize("error", [REFUSED, STALE, SILENT])
async def test_no_attempt_starts_after_the_deadline(error: Exception) -> None:
    desk, model = Desk(error, total=0.0), model_of(*BACKENDS)

    with pytest.raises(UpstreamTimeout) as caught:
        await desk.forward(call_to(), model)

    assert caught.value.outcome is Outcome.TOTAL_TIMEOUT
    assert (b"x-should-retry", b"false") in caught.value.headers
    assert len(desk.requests) == 1
    assert desk.retries == []


async def test_no_pause_goes_beyond_the_deadline() -> None:
    desk = Desk(503, jitter=1000, total=20.0)

    async with asyncio.timeout(10):
        reply = await desk.forward(call_to(), model_of(*BACKENDS))

    assert (reply.status, len(desk.requests)) == (503, 1)
    assert not_again(reply) is False
    await reply.aclose(Outcome.UPSTREAM_5XX)


# How often


def alternately(*results: Exception | int, times: int) -> list[Exception | int]:
    return list(results) * times


def weaken(model: Model) -> None:
    """Its backends have been failing already."""
    for backend in model.backends:
        backend.origin.failures = 1


def not_again(reply: Reply) -> bool:
    return (b"x-should-retry", b"false") in reply.headers


@pytest.mark.parametrize("error", [REFUSED, STALE, SILENT])
async def test_a_backend_that_dies_may_take_any_number_with_it(error: Exception) -> None:
    desk, model = Desk(*alternately(error, 200, times=10)), model_of(*BACKENDS)

    replies = [await desk.forward(call_to(body=b"%d" % number), model) for number in range(10)]

    assert [reply.status for reply in replies] == [200] * 10
    assert desk.retries == [desk.retries[0]] * 10
    for reply in replies:
        await reply.aclose(Outcome.OK)


@pytest.mark.parametrize(("error", "kind"), [(STALE, UpstreamReset), (SILENT, UpstreamReset)])
async def test_a_model_whose_backends_fail_has_a_budget_of_repeats(error: Exception, kind: type[RouterError]) -> None:
    desk, model = Desk(*alternately(error, 200, times=3), error, error, 200), model_of(*BACKENDS)
    weaken(model)
    replies = [await desk.forward(call_to(body=b"%d" % number), model) for number in range(3)]

    call = call_to(body=b"refused")
    with pytest.raises(kind) as caught:
        await desk.forward(call, model)

    assert (b"x-should-retry", b"false") in caught.value.headers
    assert (len(call.tried), len(desk.requests)) == (1, 7)
    assert desk.retries[-1] == "budget_exhausted"
    # A permit comes back with the end of the body.
    await replies.pop().aclose(Outcome.OK)
    replies.append(await desk.forward(call_to(body=b"allowed"), model))
    assert desk.retries.count("budget_exhausted") == 1
    for reply in replies:
        await reply.aclose(Outcome.OK)
    assert in_flight(model) == [0, 0, 0]


async def test_a_busy_model_has_a_budget_of_repeats_however_well_it_stands() -> None:
    desk, model = Desk(*[503, 200] * 3, 503, 503, 200, retry_budget=0.1), model_of(*BACKENDS)
    replies = [await desk.forward(call_to(), model) for _ in range(3)]

    replies.append(await desk.forward(call_to(), model))
    model.in_flight = 40
    replies.append(await desk.forward(call_to(), model))

    assert [reply.status for reply in replies] == [200, 200, 200, 503, 200]
    assert [not_again(reply) for reply in replies] == [False, False, False, True, False]
    assert desk.retries == ["status"] * 3 + ["budget_exhausted", "status"]
    for reply in replies:
        await reply.aclose(Outcome.OK)
    assert desk.permits == 0


@pytest.mark.parametrize("balancing", ["round_robin", "two_choices", "least_in_flight", "prefix_affinity"])
async def test_a_repeat_goes_to_a_backend_in_good_standing_if_there_is_one(balancing: str) -> None:
    urls = [f"http://r{number}:1" for number in range(6)]
    for good in range(6):
        desk, model = Desk(REFUSED, REFUSED, 200), model_of(*urls, balancing=balancing)
        for number, backend in enumerate(model.backends):
            backend.origin.failures = int(number != good)

        with suppress(NoBackend):
            await finish(await desk.forward(call_to(), model))

        assert f"r{good}" in desk.hosts


async def test_only_what_a_backend_in_good_standing_failed_is_repeated_freely() -> None:
    desk, model = Desk(STALE, STALE, 200, attempts=3), model_of(*BACKENDS)
    model.balancer = FirstChoice()
    model.backends[1].origin.failures = model.backends[2].origin.failures = 1

    reply = await desk.forward(call_to(), model)

    assert desk.hosts == ["a", "b", "c"]
    assert desk.permits == 1
    await reply.aclose(Outcome.OK)
    assert desk.permits == 0


async def test_a_client_that_leaves_while_a_busy_answer_is_closed_gives_its_permit_back() -> None:
    class Stuck(Body):
        async def aclose(self) -> None:
            await super().aclose()
            await asyncio.sleep(30)

    desk, model = Desk(httpx.Response(503, stream=(busy := Stuck())), jitter=0.0), model_of(*BACKENDS)
    calling = asyncio.ensure_future(desk.forward(call_to(), model))
    await until(lambda: busy.closed)
    assert desk.permits == 1

    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling

    assert desk.permits == 0
    assert len(desk.requests) == 1
    assert in_flight(model) == [0, 0, 0]


async def test_repeats_that_wait_for_their_pause_count_in_the_budget() -> None:
    """Otherwise those that wait would pass one after another, and nearly every request would be sent twice."""
    busy = Desk(*[503] * 30, jitter=1000.0)
    model = model_of(*BACKENDS)
    calling = [asyncio.ensure_future(busy.forward(call_to(body=b"%d" % number), model)) for number in range(30)]
    await until(lambda: sum(call.done() for call in calling) == 27)

    assert busy.permits == 3
    assert busy.retries == ["budget_exhausted"] * 27
    for call in calling:
        call.cancel()
    for result in await asyncio.gather(*calling, return_exceptions=True):
        if isinstance(result, Reply):
            await result.aclose(Outcome.UPSTREAM_5XX)
    assert busy.permits == 0
    assert in_flight(model) == [0, 0, 0]


async def test_a_choice_that_fails_gives_its_permit_back() -> None:
    class Closing(FirstChoice):
        """All circuits open while the client waits."""

        def choose(self, backends: Sequence[Backend], key: str, tried: Collection[Backend] = ()) -> Backend | None:
            return None if tried else backends[0]

    desk, model = Desk(503), model_of(*BACKENDS)
    model.balancer = Closing()

    reply = await desk.forward(call_to(), model)

    assert (reply.status, not_again(reply), desk.retries) == (503, False, [])
    assert desk.permits == 0
    await reply.aclose(Outcome.UPSTREAM_5XX)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(REFUSED, "connect"), (UNREACHED, "connect"), (STALE, "stale"), (SILENT, "reset"), (503, "status")],
)
async def test_a_repeat_is_counted_by_its_reason(error: Exception | int, reason: str) -> None:
    desk = Desk(error)

    await finish(await desk.forward(call_to(), model_of(*BACKENDS)))

    assert desk.retries == [reason]


async def test_an_answer_is_told_of_at_its_head() -> None:
    desk = Desk(REFUSED, 503, 200, attempts=3)

    reply = await desk.forward(call_to(), model_of(*BACKENDS))

    assert [status for _, status in desk.answers] == [503, 200]
    assert reply.backend is not None
    assert desk.answers[-1] == (reply.backend.label, 200)
    await reply.aclose(Outcome.OK)


# Requests that kill


async def test_a_request_that_two_backends_died_of_meets_no_third() -> None:
    desk, model = Desk(*[SILENT] * 4, 200, attempts=3), model_of(*BACKENDS)

    refusals = []
    for _ in range(3):
        call = call_to()
        with pytest.raises(UpstreamReset) as caught:
            await desk.forward(call, model)
        refusals.append((len(call.tried), (b"x-should-retry", b"false") in caught.value.headers))
        desk.now += 2

    assert refusals == [(2, True), (1, True), (1, True)]
    assert desk.retries == ["reset", "poison", "poison", "poison"]
    reply = await desk.forward(call_to(body=b"another"), model)
    assert reply.status == 200
    await reply.aclose(Outcome.OK)


async def test_a_request_that_kills_may_be_repeated_where_it_reached_nobody() -> None:
    desk, model = Desk(SILENT, SILENT, REFUSED, 200, attempts=3), model_of(*BACKENDS)
    with pytest.raises(UpstreamReset):
        await desk.forward(call_to(), model)

    reply = await desk.forward(call_to(), model)

    assert reply.status == 200
    assert desk.retries == ["reset", "poison", "connect"]
    await reply.aclose(Outcome.OK)


async def test_a_first_death_may_look_like_a_stale_connection() -> None:
    desk, model = Desk(STALE, SILENT, STALE), model_of(*BACKENDS)

    calls = call_to(), call_to()
    with pytest.raises(UpstreamReset) as first:
        await desk.forward(calls[0], model)
    with pytest.raises(UpstreamReset) as second:
        await desk.forward(calls[1], model)

    assert [len(call.tried) for call in calls] == [2, 1]
    assert (b"x-should-retry", b"false") in first.value.headers
    assert (b"x-should-retry", b"false") in second.value.headers


async def test_stale_connections_alone_make_nobody_a_suspect() -> None:
    desk, model = Desk(*alternately(STALE, 200, times=5)), model_of(*BACKENDS)

    for _ in range(5):
        await finish(await desk.forward(call_to(), model))
        desk.now += 2

    assert desk.retries == ["stale"] * 5


async def test_equal_requests_that_die_with_their_backend_did_not_kill_it() -> None:
    async def handle(request: httpx.Request) -> httpx.Response:
        if request.url.host == "a":
            raise SILENT
        return await desk.handle(request)

    desk, model = Desk(), model_of(*BACKENDS[:2])
    dying, alive = model.backends
    model.balancer = FirstChoice()
    forward = desk.over(httpx.MockTransport(handle))
    calls = [asyncio.ensure_future(forward(call_to(), model)) for _ in range(5)]

    replies = await asyncio.gather(*calls)

    assert {reply.backend for reply in replies} == {alive}
    assert desk.ended == [(dying.label, Outcome.RESET)] * 5
    for reply in replies:
        await reply.aclose(Outcome.OK)


async def test_a_request_that_may_be_sent_once_is_watched_too() -> None:
    desk, model = Desk(SILENT, SILENT), model_of(*BACKENDS)

    final = []
    for _ in range(2):
        with pytest.raises(UpstreamReset) as caught:
            await desk.forward(call_to("responses"), model)
        final.append((b"x-should-retry", b"false") in caught.value.headers)
        desk.now += 2

    assert final == [False, True]


# Backends that ask for a rest


def busy_for(seconds: int, status: int = 503) -> httpx.Response:
    return httpx.Response(status, headers={"retry-after": str(seconds)}, stream=Body())


@pytest.mark.parametrize("balancing", ["round_robin", "two_choices", "least_in_flight", "prefix_affinity"])
@pytest.mark.parametrize("status", [429, 503])
async def test_a_backend_that_asks_for_a_rest_has_it(status: int, balancing: str) -> None:
    desk, model = (
        Desk(busy_for(7, status), retry_on_status=frozenset({status})),
        model_of(*BACKENDS, balancing=balancing),
    )

    await finish(await desk.forward(call_to(), model))
    tired = desk.hosts[0]
    desk.now += 6.9
    for _ in range(20):
        await finish(await desk.forward(call_to(body=b"x"), model))
    assert tired not in desk.hosts[1:]

    desk.now += 0.2
    assert not desk.policy.resting.paused(desk.now)
    for number in range(60):
        await finish(await desk.forward(call_to(prefix=f"s{number}"), model))
    assert tired in desk.hosts[21:]


async def test_a_status_that_is_not_tried_again_gives_no_rest() -> None:
    desk, model = Desk(busy_for(7, 502)), model_of(*BACKENDS[:2])

    first = await desk.forward(call_to(), model)
    for _ in range(3):
        await finish(await desk.forward(call_to(), model))

    assert first.status == 502
    assert desk.hosts[2] == desk.hosts[0] != desk.hosts[1]
    await first.aclose(Outcome.UPSTREAM_5XX)


async def test_too_many_requests_give_a_rest_also_if_they_are_not_tried_again() -> None:
    desk, model = Desk(busy_for(7, 429)), model_of(*BACKENDS[:2])

    first = await desk.forward(call_to(), model)
    for _ in range(9):
        await finish(await desk.forward(call_to(), model))

    assert first.status == 429
    assert desk.hosts[0] not in desk.hosts[1:]
    await first.aclose(Outcome.UPSTREAM_4XX)


async def test_if_all_rest_the_request_is_still_sent_once() -> None:
    desk, model = Desk(busy_for(5), busy_for(20), busy_for(9)), model_of(*BACKENDS[:2])

    first = await desk.forward(call_to(), model)
    second = await desk.forward(call_to(), model)

    assert [first.attempts, second.attempts] == [2, 1]
    assert (b"retry-after", b"20") in first.headers
    assert not_again(first)
    for reply in (first, second):
        await reply.aclose(Outcome.UPSTREAM_5XX)


async def test_a_backend_that_rests_is_better_than_none() -> None:
    desk, model = Desk(busy_for(9), 200, REFUSED), model_of(*BACKENDS[:2])
    await finish(await desk.forward(call_to(), model))

    await finish(await desk.forward(call_to(), model))

    tired, other, *rest = desk.hosts
    assert rest == [other, tired]


async def test_a_busy_backend_is_not_a_reason_to_wake_another() -> None:
    desk, model = Desk(busy_for(9), 200, 503), model_of(*BACKENDS[:2])
    await finish(await desk.forward(call_to(), model))

    reply = await desk.forward(call_to(), model)

    assert (reply.status, reply.attempts, not_again(reply)) == (503, 1, False)
    await reply.aclose(Outcome.UPSTREAM_5XX)


@pytest.mark.parametrize(("status", "told"), [(503, True), (429, True)])
async def test_an_sdk_is_told_when_every_backend_was_tried(status: int, told: bool) -> None:
    statuses = frozenset({status})
    own = httpx.Response(status, headers={"x-should-retry": "true"}, stream=Body())
    desk = Desk(status, own, retry_on_status=statuses)

    reply = await desk.forward(call_to(), model_of(*BACKENDS[:2]))

    assert [value for name, value in reply.headers if name == b"x-should-retry"] == [b"false"]
    await reply.aclose(Outcome.UPSTREAM_5XX)


# Whatever happens

_RESULTS: dict[str, Any] = {
    "refused": REFUSED, "unreached": UNREACHED, "stale": STALE, "silent": SILENT, "died": DIED, "partial": PARTIAL,
    "junk": Malformed("junk"), "late": FirstByteTimeout("late"), "total": TotalTimeout("late"),
    "ok": 200, "bad": 400, "error": 500, "busy": 503, "tired": busy_for, "slow down": 429,
}  # fmt: skip
_REPEATABLE = {"refused", "unreached", "stale", "silent", "died", "busy", "tired"}


@given(
    st.lists(st.sampled_from(sorted(_RESULTS)), max_size=12),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["chat_completions", "responses"]),
    st.booleans(),
)
async def test_whatever_happens_the_rules_hold(
    names: list[str], attempts: int, backends: int, label: str, weak: bool
) -> None:
    results = [busy_for(3) if name == "tired" else _RESULTS[name] for name in names]
    desk, model = Desk(*results, attempts=attempts, jitter=0.0), model_of(*BACKENDS[:backends])
    if weak:
        weaken(model)
    seen = 0
    while desk.results or not seen:
        call = call_to(label)
        try:
            reply = await desk.forward(call, model)
        except RouterError as error:
            hints = error.headers
        else:
            hints = reply.headers
            assert reply.attempts == len(call.tried)
            await finish(reply)
        count = len(call.tried)
        mine, what = desk.requests[seen:], [*names, *["ok"] * attempts][seen : seen + count]
        seen += count

        assert len(mine) == count <= attempts
        assert set(what[:-1]) <= _REPEATABLE
        assert sum(name in ("silent", "died") for name in what[:-1]) <= 1
        assert label != "responses" or not {"silent", "died"} & set(what[:-1])
        hosts = [request.url.host for request in mine]
        for number in range(1, count):
            again = what[number - 1] == "stale" and hosts[number] == hosts[number - 1]
            assert hosts[number] not in hosts[:number] or (again and len(set(hosts[:number])) == backends)
        lost = [name in ("stale", "silent", "died") for name in what]
        assert [request.extensions["fresh"] for request in mine] == [False, *lost[: count - 1]]
        if what[-1] in ("ok", "bad", "error", "slow down"):
            assert (b"x-should-retry", b"false") not in hints
        assert in_flight(model) == [0] * backends
        assert desk.permits == 0
    assert len(desk.ended) == len(desk.requests)


# Accounts


async def test_an_attempt_ends_with_its_body_and_only_once() -> None:
    desk, model, body = Desk(httpx.Response(200, stream=(stream := Body()))), model_of("http://a:1"), b"{}"
    reply = await desk.forward(call_to(), model)
    assert (in_flight(model), desk.ended) == ([1], [])
    assert await body_of(reply.stream) == body
    assert repr(reply) == "<Reply 200 from a:1>"

    await reply.aclose(Outcome.ERROR_EVENT)
    await reply.aclose(Outcome.OK)

    assert (in_flight(model), desk.ended) == ([0], [("a:1", Outcome.ERROR_EVENT)])
    assert stream.closed == 1
    assert repr(reply) == "<Reply 200 from a:1 closed>"


@pytest.mark.parametrize("failure", [RuntimeError("bug"), ValueError("bug")])
async def test_a_bug_below_leaves_the_counts_right(failure: Exception) -> None:
    desk, model = Desk(failure), model_of("http://a:1")

    with pytest.raises(type(failure)):
        await desk.forward(call_to(), model)

    assert in_flight(model) == [0]
    assert desk.outcomes == [Outcome.INTERNAL_ERROR]


async def test_a_cancelled_attempt_is_a_client_that_left(start_engine: Start, transport: Transport) -> None:
    engine: FakeEngine = await start_engine(hang)
    desk, model = Desk(), model_of(engine.url)
    sending = asyncio.ensure_future(desk.over(transport)(call_to(), model))
    await until(lambda: engine.busy)
    assert in_flight(model) == [1]

    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending

    assert (in_flight(model), desk.outcomes) == ([0], [Outcome.CLIENT_GONE])
    await until(lambda: engine.open == 0)
    assert "0 active" in repr(transport)


def test_every_transport_error_has_an_outcome() -> None:
    kinds = {kind for kind in vars(httpx).values() if isinstance(kind, type) and issubclass(kind, httpx.TransportError)}

    assert all(outcome_of(kind("x")) is not Outcome.CLIENT_GONE for kind in kinds)
    assert outcome_of(asyncio.CancelledError()) is Outcome.CLIENT_GONE


# The attempt seam


async def test_a_wrapper_sees_each_attempt_and_may_change_its_lines() -> None:
    desk, model, seen = Desk(REFUSED), model_of(*BACKENDS), list[Attempt]()

    def wrap(send: SendAttempt) -> SendAttempt:
        async def wrapped(attempt: Attempt) -> Reply:
            seen.append(attempt)
            lines = attempt.prepared.lines + b"x-attempt: %d\r\n" % attempt.number
            return await send(attempt._replace(prepared=attempt.prepared._replace(lines=lines)))

        return wrapped

    call = call_to()

    await finish(await desk.over(httpx.MockTransport(desk.handle), wrap=wrap)(call, model))

    assert [request.headers["x-attempt"] for request in desk.requests] == ["1", "2"]
    assert [attempt.tried for attempt in seen] == [(), (seen[0].backend,)]
    assert call.tried == [attempt.backend for attempt in seen]


async def test_an_answer_that_no_backend_gave_needs_no_attempt() -> None:
    desk, model, call = Desk(), model_of(*BACKENDS), call_to()

    async def cached(attempt: Attempt) -> Reply:
        return Reply(200, [], Body())

    await finish(await desk.over(httpx.MockTransport(desk.handle), wrap=lambda send: cached)(call, model))

    assert (desk.requests, desk.ended, call.tried) == ([], [], [])


# What an attempt says


async def only_request(model: Model, call: Call | None = None, **more: Any) -> httpx.Request:
    """Forward one call; the request that was made of it."""
    desk = Desk()
    forward = desk.over(httpx.MockTransport(desk.handle), **more)
    await finish(await forward(call or call_to(), model))
    (request,) = desk.requests
    return request


async def test_a_request_has_these_headers_and_no_others() -> None:
    call = call_to(headers=[JSON, (b"openai-beta", b"x")], authorization=b"Bearer client")
    request = await only_request(model_of("http://a:1/base"), call)
    headers = dict(request.headers.raw)

    assert headers.pop(b"x-request-id").startswith(b"rid-")
    assert headers == {
        b"host": b"a:1",
        b"accept-encoding": b"identity",
        b"content-length": b"%d" % len(BODY),
        b"content-type": b"application/json",
        b"openai-beta": b"x",
    }
    assert (request.method, request.content) == ("POST", BODY)


@pytest.mark.parametrize("suffix", [b"", b"?api-version=1&x=%20", b"/id?x=1"])
@pytest.mark.parametrize("base", ["", "/base", "/a/b"])
async def test_the_target_is_base_route_and_query(base: str, suffix: bytes) -> None:
    request = await only_request(model_of(f"https://a:1{base}/"), call_to("rerank", suffix=suffix))

    assert request.extensions["target"] == base.encode() + ROUTES["rerank"].path.encode() + suffix
    assert (request.url.scheme, request.url.host, request.url.port) == ("https", "a", 1)
    assert request.url.path == base + ROUTES["rerank"].path


async def test_a_real_backend_gets_base_route_and_query(start_engine: Start, transport: Transport) -> None:
    engine: FakeEngine = await start_engine()
    model = model_of(engine.url + "/base")

    await finish(await Desk().over(transport)(call_to(suffix=b"?x=%2F"), model))

    assert engine.requests[0].target == "/base/v1/chat/completions?x=%2F"
    assert engine.requests[0].header("host") == f"127.0.0.1:{engine.port}"
    assert engine.requests[0].body == BODY


async def test_every_attempt_has_a_request_id_of_its_own() -> None:
    desk, model = Desk(REFUSED), model_of(*BACKENDS)

    for _ in range(3):
        await finish(await desk.forward(call_to(request_id="same"), model))

    ids = [request.headers["x-request-id"] for request in desk.requests]
    assert len(set(ids)) == len(ids) == 4
    assert all(request_id.startswith("same-") for request_id in ids)


@pytest.mark.parametrize(
    ("credentials", "authorization"),
    [
        (None, None),
        ("passthrough", "Bearer client"),
        ({"env": "BACKEND_TOKEN"}, "Bearer secret"),
        ({"env": "BACKEND_UNSET"}, None),
    ],
)
async def test_whose_credentials_a_backend_sees(credentials: Any, authorization: str | None) -> None:
    model, call = model_of("http://a:1", credentials=credentials), call_to(authorization=b"Bearer client")

    request = await only_request(model, call, tokens={"BACKEND_TOKEN": "secret"})

    assert request.headers.get("authorization") == authorization


async def test_credentials_go_with_every_attempt() -> None:
    desk, model = Desk(REFUSED), model_of(*BACKENDS, credentials={"env": "BACKEND_TOKEN"})
    forward = desk.over(httpx.MockTransport(desk.handle), tokens={"BACKEND_TOKEN": "secret"})

    await finish(await forward(call_to(), model))

    assert [request.headers["authorization"] for request in desk.requests] == ["Bearer secret"] * 2


@pytest.mark.parametrize(
    ("priority", "sent"),
    [("client", b"-9"), ("ignore", b"0"), ("caller", b"0"), (0, b"0"), (-(2**63), b"%d" % -(2**63))],
)
async def test_how_urgent_a_request_is_the_entry_decides(priority: Any, sent: bytes) -> None:
    desk, model = Desk(REFUSED), model_of(*BACKENDS, priority=priority)
    body = b'{"model":"m","messages":[],"priority":-9}'
    call = call_to(headers=[JSON, (b"x-vllm-priority", b"-9")], body=body)

    await finish(await desk.forward(call, model))

    for request in desk.requests:
        assert [value for name, value in request.headers.raw if name == b"x-vllm-priority"] == [sent]
        assert request.content == body


async def test_the_served_models_name_replaces_the_clients() -> None:
    request = await only_request(model_of("http://a:1", served_model_name="tgi-ü"))

    assert orjson.loads(request.content) == {**CHAT, "model": "tgi-ü"}
    assert request.headers["content-length"] == str(len(request.content)) != str(len(BODY))


async def test_the_body_stays_as_it_is_if_the_names_are_equal() -> None:
    body = b' { "model" : "m" } '

    request = await only_request(model_of("http://a:1", served_model_name="m"), call_to(body=body))

    assert request.content == body


@pytest.mark.parametrize("has_model", [True, False])
async def test_the_served_models_name_replaces_the_forms(has_model: bool) -> None:
    file = b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + bytes(range(256))
    field = b'Content-Disposition: form-data; name="%s"\r\n\r\n%s'
    names = (b"model", b"m") if has_model else (b"language", b"m")
    body = form(file, field % names)
    at = body.rindex(b"\r\nm\r\n") + 2
    call = call_to("transcriptions", body=body, model_at=(at, at + 1) if has_model else None)

    request = await only_request(model_of("http://a:1", served_model_name="large-v3"), call)

    assert request.content == form(file, field % (names[0], b"large-v3" if has_model else b"m"))
    assert request.headers["content-length"] == str(len(request.content))


async def test_a_models_own_timeouts_come_first() -> None:
    limits: dict[str, Any] = {"connect": 1.0, "first_byte": 2.0, "idle": 3.0, "total": 4.0, "stream_total": 50.0}
    own = {"connect": 10, "first_byte": 20, "idle": 30, "total": 40}
    now = asyncio.get_running_loop().time()

    plain = await only_request(model_of("http://a:1"), **limits)
    owned = await only_request(model_of("http://a:1", timeouts=own), **limits)
    stream = await only_request(model_of("http://a:1", timeouts=own), call_to(stream=True), **limits)

    assert plain.extensions["timeout"] == {"connect": 1, "first_byte": 2, "idle": 3}
    assert owned.extensions["timeout"] == {"connect": 10, "first_byte": 20, "idle": 30}
    deadlines = [request.extensions["deadline"] - now for request in (plain, owned, stream)]
    assert deadlines == [pytest.approx(seconds, abs=1) for seconds in (4, 40, 50)]


async def test_a_changed_entry_changes_the_timeouts() -> None:
    desk, model = Desk(), model_of("http://a:1", timeouts={"idle": 10})
    for idle in (10, 20):
        model.entry = model.entry.model_copy(
            update={"timeouts": model.entry.timeouts.model_copy(update={"idle": idle})}
        )
        await finish(await desk.forward(call_to(), model))

    assert [request.extensions["timeout"]["idle"] for request in desk.requests] == [10, 20]


async def test_the_headers_of_any_transport_come_in_lower_case() -> None:
    desk = Desk(httpx.Response(200, headers=[("X-Up", "A"), ("Content-Type", "text/plain")], stream=Body()))

    reply = await desk.forward(call_to(), model_of("http://a:1"))

    assert reply.headers == [(b"x-up", b"A"), (b"content-type", b"text/plain")]
    await reply.aclose(Outcome.OK)
