"""The account of one request: its access line, field by field, and that there is exactly one, however it ends."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text
from starlette.types import Scope

from inference_api.errors import ModelNotFound
from inference_api.http.head import RequestHeaders
from inference_api.http.routes import INFERENCE_ROUTES
from inference_api.models import Call, Outcome, Reply
from inference_api.observe.account import Account
from inference_api.observe.exposition import write
from inference_api.observe.families import Families
from inference_api.observe.lines import access_log
from inference_api.observe.log import Fields
from inference_api.observe.metrics import Metrics
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.fleet import Fleet, Model
from inference_api.routing.registry import RegistryStatus
from tests.fakes import (
    CHAT,
    LAST_CHUNK,
    STREAM,
    USAGE,
    Line,
    Received,
    Script,
    answer,
    event,
    hang,
    json_response,
    post,
    raw_client,
    sse,
    until,
)

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
CHAT_ROUTE = INFERENCE_ROUTES[0]

# What design and README promise; `time`, `level` and `event` are added by the log.
FIELDS = [
    "request_id",
    "route",
    "model",
    "backend",
    "client",
    "status",
    "outcome",
    "attempts",
    "stream",
    "latency_ms",
    "ttft_ms",
    "prompt_tokens",
    "completion_tokens",
    "bytes",
]


class Bench:
    """Accounts with a clock that is set by hand, and what the sinks made of their Records."""

    def __init__(self) -> None:
        self.now = 100.0
        self.lines: list[Fields] = []
        fleet = Fleet(make_balancer)
        fleet.update(parse_catalogue({"models": [{"name": "m", "backends": [{"url": "http://a:8000"}]}]}))
        self.model: Model = fleet.models["m"]
        self.metrics = Metrics(lambda: fleet.models)

    def begin(self, *, stream: bool = False) -> Account:
        scope: Scope = {"path": CHAT_ROUTE.path, "client": None, "state": {}}
        account = Account("id-1", lambda: self.now, scope, RequestHeaders()([]))
        account.route, account.stream = CHAT_ROUTE.label, stream
        return account

    def accept(self, account: Account, attempts: int = 1) -> None:
        tried = [self.model.backends[0]] * attempts
        account.asked = account.model_name = "m"
        account.accepted(Call(CHAT_ROUTE, "m", account.stream, b"", [], "id-1", tried), self.model)

    def answer(self, account: Account, relay: Any) -> None:
        account.reply = Reply(relay.status, [], httpx.ByteStream(b""), self.model.backends[0])
        account.relay = relay

    def end(self, account: Account, outcome: Outcome = Outcome.OK) -> Fields:
        account.outcome = outcome
        record = account.end()
        self.metrics.record(record)
        access_log(self.lines.append)(record)
        return self.lines[-1]

    def value(self, name: str) -> float:
        page = "".join(write(Families(self.metrics, lambda: RegistryStatus("static", 1, 0.0, {}))()))
        families = parse_text(page)
        return sum(s.value for family in families for s in family.samples if s.name == f"inference_api_{name}")


@pytest.fixture
def bench() -> Bench:
    return Bench()


def relay(usage: Any = None, events: int = 0, size: int = 0, first_at: float = 0.0, status: int = 200) -> Any:
    """What a Relay knows at the end of an answer."""
    facts = {"started": True, "status": status, "size": size, "first_at": first_at}
    return SimpleNamespace(usage=lambda: usage, streamed_events=events, **facts)


# With a clock


def test_the_times_of_a_stream_are_measured_from_the_request_head(bench: Bench) -> None:
    account = bench.begin(stream=True)
    bench.now += 0.001
    bench.accept(account, attempts=2)
    bench.now += 0.499
    first_at = bench.now
    bench.now += 2.0
    bench.answer(account, relay(USAGE, events=7, size=8, first_at=first_at))

    line = bench.end(account)

    assert line == {
        "request_id": "id-1",
        "route": "chat_completions",
        "model": "m",
        "backend": "a:8000",
        "client": None,
        "status": 200,
        "outcome": "ok",
        "attempts": 2,
        "stream": True,
        "latency_ms": 2500.0,
        "ttft_ms": 500.0,
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "bytes": 8,
    }
    assert list(line) == FIELDS
    assert bench.value("overhead_seconds_sum") == pytest.approx(0.001)
    assert bench.value("time_to_first_token_seconds_sum") == pytest.approx(0.5)
    # Four tokens came after the first, in two seconds.
    assert bench.value("time_per_output_token_seconds_sum") == pytest.approx(0.5)
    assert bench.value("request_duration_seconds_sum") == pytest.approx(2.5)


def test_the_time_of_an_upload_is_not_the_routers(bench: Bench) -> None:
    account = bench.begin()
    bench.now += 7
    account.received()
    bench.now += 0.002
    bench.accept(account)

    line = bench.end(account)

    assert bench.value("overhead_seconds_sum") == pytest.approx(0.002)
    # The client waited for all of it.
    assert line["latency_ms"] == pytest.approx(7002, abs=0.1)


@pytest.mark.parametrize(
    ("stream", "facts", "first", "between"),
    [
        (True, {"usage": USAGE}, 1, 1),
        (False, {"usage": USAGE}, 0, 0),
        # One token has no time between tokens.
        (True, {"usage": {"prompt_tokens": 3, "completion_tokens": 1}}, 1, 0),
        (True, {"status": 500}, 0, 0),
        (True, {"events": 9}, 1, 0),
    ],
    ids=["stream", "json", "one token", "failed", "no usage"],
)
def test_only_streams_that_succeed_tell_how_fast_tokens_come(
    stream: bool, facts: dict[str, Any], first: int, between: int, bench: Bench
) -> None:
    account = bench.begin(stream=stream)
    bench.accept(account)
    bench.now += 1.0
    first_at = bench.now
    bench.now += 0.23456
    bench.answer(account, relay(size=2, first_at=first_at, **facts))

    line = bench.end(account)

    assert (line["latency_ms"], line["ttft_ms"]) == (1234.56, 1000.0 if stream else None)
    assert bench.value("time_to_first_token_seconds_count") == first
    assert bench.value("time_per_output_token_seconds_count") == between


def test_a_request_without_a_model_is_nobodys(bench: Bench) -> None:
    account = bench.begin()
    account.asked = "nope"
    account.rejected(ModelNotFound("nope", ["m"]), 404, 7)

    line = bench.end(account, account.outcome)

    assert (line["model"], line["asked_model"], line["backend"], line["attempts"]) == ("unknown", "nope", None, 0)
    assert (line["status"], line["outcome"], line["code"]) == (404, "refused", "model_not_found")
    assert bench.value("rejected_requests_total") == 1
    assert bench.value("overhead_seconds_count") == 0


def test_a_client_that_left_has_499_whatever_was_sent(bench: Bench) -> None:
    before_head, after_head = bench.begin(), bench.begin(stream=True)
    bench.accept(after_head)
    bench.answer(after_head, relay())

    lines = [bench.end(account, Outcome.CLIENT_GONE) for account in (before_head, after_head)]

    assert [(line["status"], line["outcome"]) for line in lines] == [(499, "client_gone")] * 2


def test_events_stand_in_for_usage_and_say_so(bench: Bench) -> None:
    account = bench.begin(stream=True)
    bench.accept(account)
    bench.answer(account, relay(events=9, size=1, first_at=bench.now))

    line = bench.end(account)

    assert (line["prompt_tokens"], line["completion_tokens"], line["events"]) == (None, None, 9)
    assert bench.value("tokens_total") == 9


@pytest.mark.parametrize(
    ("usage", "prompt", "completion"),
    [
        ({"prompt_tokens": 1, "completion_tokens": 2}, 1, 2),
        ({"input_tokens": 1, "output_tokens": 2}, 1, 2),
        ({"prompt_tokens": 1, "total_tokens": 1}, 1, None),
        ({"prompt_tokens": 0, "completion_tokens": 0}, 0, 0),
        ({"prompt_tokens": "1", "completion_tokens": -2}, None, None),
        ({"prompt_tokens": None, "completion_tokens": 2.5}, None, None),
        ({}, None, None),
    ],
)
def test_tokens_are_those_of_usage(
    bench: Bench, usage: dict[str, Any], prompt: int | None, completion: int | None
) -> None:
    account = bench.begin()
    bench.accept(account)
    bench.answer(account, relay(usage))

    line = bench.end(account)

    assert (line["prompt_tokens"], line["completion_tokens"]) == (prompt, completion)


# With requests


async def test_a_body_that_comes_slowly_is_no_overhead(start_engine: Start, start_router: Start) -> None:
    served = await start_router(await start_engine())
    request = post("/v1/chat/completions", CHAT)

    async with raw_client(served.port) as client:
        await client.send(request[:-5])
        await asyncio.sleep(2.1)
        await client.send(request[-5:])
        await client.reader.readuntil(b"\r\n\r\n")
    await until(lambda: served.lines)

    assert served.lines[0]["latency_ms"] >= 2000
    assert 0 < await served.metric("inference_api_overhead_seconds_sum") < 2


async def test_the_access_line_of_a_request_has_every_field(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine()
    served = await start_router(engine)
    response = await served.chat()
    streamed = await served.chat(stream=True)
    await until(lambda: len(served.lines) == 2)

    whole, stream = served.lines
    assert list(whole) == list(stream) == FIELDS
    assert whole["request_id"] == response.headers["x-request-id"]
    assert whole["backend"] == engine.url.removeprefix("http://")
    assert (whole["route"], whole["model"], whole["status"], whole["outcome"]) == ("chat_completions", "m", 200, "ok")
    assert (whole["attempts"], whole["stream"], whole["ttft_ms"]) == (1, False, None)
    assert (whole["prompt_tokens"], whole["completion_tokens"]) == (3, 5)
    assert (whole["bytes"], stream["bytes"]) == (len(response.content), len(streamed.content))
    assert 0 < stream["ttft_ms"] <= stream["latency_ms"]


async def script(request: Received, line: Line) -> None:
    """An engine that does what the request's `user` says."""
    for word, act in ACTS.items():
        if word in request.body:
            await act(request, line)
            return
    await answer(request, line)


ACTS: dict[bytes, Script] = {
    b"reset": sse(event(), then=Line.reset),
    b"cut": sse(event(), then=lambda line: line.send(LAST_CHUNK)),
    b"hang": hang,
    b"fail": lambda request, line: line.send(json_response({"error": {}}, "500 Internal Server Error")),
}


async def test_however_a_request_ends_it_is_accounted_for_once(start_engine: Start, start_router: Start) -> None:
    served = await start_router(await start_engine(script), first_byte_timeout=0.8, max_body_bytes=1000)
    sent = 0
    for document in [
        CHAT,
        STREAM,
        STREAM | {"user": "reset"},
        STREAM | {"user": "cut"},
        CHAT | {"user": "hang"},
        CHAT | {"user": "fail"},
        CHAT | {"model": "nope"},
        CHAT | {"messages": None},
        CHAT | {"user": "x" * 2000},
        b"{",
    ]:
        async with raw_client(served.port) as client:
            await client.send(post("/v1/chat/completions", document, b"connection: close\r\n"))
            await client.reader.read(-1)
        sent += 1
    for unread in (CHAT | {"user": "hang"}, STREAM | {"user": "hang"}):
        async with raw_client(served.port) as client:
            await client.send(post("/v1/chat/completions", unread))
        sent += 1
    for path in ("/v1/models", "/v1/models/m", "/v1/models/nope", "/nowhere", "/v1/chat/completions"):
        await served.client.get(path)
        sent += 1
    await until(lambda: len(served.lines) >= sent)
    model = served.router.core.fleet.models["m"]
    await until(lambda: model.backends[0].in_flight == 0)

    page = (await served.client.get("/metrics")).text.splitlines()
    counted = sum(float(line.split()[-1]) for line in page if line.startswith("inference_api_requests_total{"))
    assert len(served.lines) == counted == sent
    assert model.in_flight == served.router.core.admission.in_flight == 0
    assert len({line["request_id"] for line in served.lines}) == sent
    assert all(set(FIELDS) <= set(line) for line in served.lines)
    assert all(line["status"] >= 200 and line["latency_ms"] >= 0 for line in served.lines)
    assert {line["outcome"] for line in served.lines} == {
        "ok",
        "refused",
        "reset",
        "truncated",
        "first_byte_timeout",
        "upstream_5xx",
        "client_gone",
    }


async def test_the_line_of_a_refusal_has_its_code_and_its_bytes(start_engine: Start, start_router: Start) -> None:
    served = await start_router(await start_engine())
    response = await served.chat(model="nope")
    await until(lambda: served.lines)

    assert served.lines[0]["code"] == "model_not_found"
    assert served.lines[0]["bytes"] == len(response.content)


async def test_the_line_of_a_failure_has_its_attempts(start_engine: Start, start_router: Start) -> None:
    engines = [await start_engine(), await start_engine()]
    served = await start_router(*engines)
    # An engine that is being asked for its models at this moment would not be gone altogether.
    await until(lambda: served.router.core.fleet.models["m"].max_model_len)
    for engine in engines:
        await engine.stop()
    assert (await served.chat()).status_code == 503
    await until(lambda: served.lines)

    assert served.lines[0]["attempts"] == 2
    assert served.lines[0]["backend"] in {engine.url.removeprefix("http://") for engine in engines}


async def test_no_line_has_a_prompt_a_completion_or_a_key(
    start_engine: Start, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    async def echo(request: Received, line: Line) -> None:
        if b"refuse" in request.body:
            await line.send(json_response({"error": {"message": "s3cret completion"}}, "400 Bad Request"))
        else:
            await sse(event("s3cret completion"), then=Line.reset)(request, line)

    served = await start_router(await start_engine(echo))
    message = {"role": "user", "content": "s3cret prompt"}
    headers = {"authorization": "Bearer s3cret-key", "x-api-key": "s3cret-key", "cookie": "s3cret=1"}
    bodies: list[dict[str, Any]] = [
        CHAT | {"messages": [message], "user": "refuse"},
        STREAM | {"messages": [message]},
        CHAT | {"messages": message},
        CHAT | {"messages": [message], "model": "nope"},
        {"messages": [message]},
    ]
    for body in bodies:
        async with raw_client(served.port) as client:
            more = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
            await client.send(post("/v1/chat/completions?api_key=s3cret-key", body, more + b"connection: close\r\n"))
            await client.reader.read(-1)
    await until(lambda: len(served.lines) == len(bodies))

    assert "s3cret" not in str(served.lines)
    assert "s3cret" not in caplog.text
