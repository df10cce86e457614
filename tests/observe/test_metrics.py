"""What /metrics says after real requests: every family, its labels, and the right numbers in them."""

import asyncio
import gc
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from inference_api import __version__
from inference_api.models import Outcome
from inference_api.observe.exposition import write
from inference_api.observe.families import Families
from inference_api.observe.metrics import (
    DURATION_BUCKETS,
    OVERHEAD_BUCKETS,
    TOKEN_BUCKETS,
    TPOT_BUCKETS,
    TTFT_BUCKETS,
    Metrics,
)
from inference_api.observe.series import Histogram
from inference_api.routing.backend import Backend
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.fleet import Fleet
from inference_api.routing.registry import RegistryStatus
from tests.fakes import (
    CHAT,
    DONE,
    LAST_CHUNK,
    STREAM,
    USAGE,
    Line,
    Received,
    Script,
    ScriptedServer,
    event,
    hang,
    json_response,
    post,
    raw,
    raw_client,
    sse,
    until,
)
from tests.records import record_of

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
P = "inference_api_"


class Scrape:
    """/metrics, parsed."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = {family.name: family for family in families}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels."""
        found = [s for s in self.samples if s.name == P + name and labels.items() <= s.labels.items()]
        return sum(sample.value for sample in found)

    def values(self, name: str, label: str) -> dict[str, float]:
        return {s.labels[label]: s.value for s in self.samples if s.name == P + name}

    def counted(self, name: str, label: str) -> dict[str, float]:
        """Those that are not 0, by a label."""
        found = [s for s in self.samples if s.name == P + name and s.value]
        return {s.labels[label]: s.value for s in found}

    @property
    def series(self) -> int:
        return sum(sample.name.startswith(P) for sample in self.samples)


async def scrape(served: Any) -> Scrape:
    response = await served.client.get("/metrics")
    assert response.status_code == 200
    return Scrape(parse_text(response.text))


async def settle(served: Any, lines: int) -> None:
    """An account is closed a moment after its client has the answer."""
    await until(lambda: len(served.lines) >= lines)


# name -> type, labels, buckets
FAMILIES: dict[str, tuple[str, set[str], tuple[float, ...]]] = {
    "requests": ("counter", {"model_name", "route", "code", "stream"}, ()),
    "request_duration_seconds": ("histogram", {"model_name", "route", "stream", "code_class"}, DURATION_BUCKETS),
    "overhead_seconds": ("histogram", {"route"}, OVERHEAD_BUCKETS),
    "requests_in_flight": ("gauge", {"model_name"}, ()),
    "model_backends": ("gauge", {"model_name"}, ()),
    "time_to_first_token_seconds": ("histogram", {"model_name", "route"}, TTFT_BUCKETS),
    "time_per_output_token_seconds": ("histogram", {"model_name", "route"}, TPOT_BUCKETS),
    "tokens": ("counter", {"model_name", "type"}, ()),
    "request_tokens": ("histogram", {"model_name", "type"}, TOKEN_BUCKETS),
    "rejected_requests": ("counter", {"model_name", "reason"}, ()),
    "stream_aborts": ("counter", {"model_name", "reason"}, ()),
    "upstream_attempts": ("counter", {"model_name", "backend", "outcome"}, ()),
    "upstream_auth_failures": ("counter", {"model_name", "backend"}, ()),
    "retries": ("counter", {"model_name", "reason"}, ()),
    "backend_in_flight": ("gauge", {"model_name", "backend"}, ()),
    "backend_up": ("gauge", {"model_name", "backend"}, ()),
    "backend_circuit_open": ("gauge", {"model_name", "backend"}, ()),
    "backend_set_aside": ("gauge", {"model_name", "backend"}, ()),
    "backend_asleep": ("gauge", {"model_name", "backend"}, ()),
    "backend_probe_failures": ("counter", {"model_name", "backend", "kind"}, ()),
    "panic_mode": ("gauge", {"model_name"}, ()),
    "backend_running_requests": ("gauge", {"model_name", "backend"}, ()),
    "backend_queue_depth": ("gauge", {"model_name", "backend"}, ()),
    "backend_kv_cache_usage_ratio": ("gauge", {"model_name", "backend"}, ()),
    "backend_last_scrape_timestamp_seconds": ("gauge", {"model_name", "backend"}, ()),
    "discovery_failures": ("counter", {"reason"}, ()),
    "registry_models": ("gauge", {"source"}, ()),
    "registry_last_success_timestamp_seconds": ("gauge", set(), ()),
    "registry_sync_failures": ("counter", {"reason"}, ()),
    "draining": ("gauge", set(), ()),
    "event_loop_lag_seconds": ("histogram", set(), OVERHEAD_BUCKETS),
    "event_loop_last_tick_timestamp_seconds": ("gauge", set(), ()),
    "log_lines_dropped": ("counter", set(), ()),
    "build_info": ("gauge", {"version", "revision", "python_version"}, ()),
}


@pytest.fixture
async def everything(start_engine: Start, start_router: Start) -> AsyncIterator[Any]:
    """A router that has at least one sample in every family."""
    silent, dead, unknown = await start_engine(lively), await start_engine(), {"url": "http://unknown.test"}
    await dead.stop()
    backends = [{"url": engine.url} for engine in (silent, dead)] + [unknown | {"discovery": "dns"}]
    async with ScriptedServer(telling) as engine:
        served = await start_router(
            models=[
                {
                    "name": "m",
                    "backends": [{"url": engine.url}, *backends],
                    "balancing": "round_robin",
                    "adapters": ["lora"],
                    "credentials": {"env": "BACKEND_KEY"},
                }
            ],
            tokens={"BACKEND_KEY": "x"},
            resolve=nobody,
            registry_url="http://127.0.0.1:9",
            load_signal_interval=1,
        )
        await requests_once(served)
        telling_one, other, *_ = served.router.core.fleet.models["m"].backends
        await until(lambda: telling_one.origin.reading)
        # Long enough to be a matter of other tests.
        other.circuit.opened = time.monotonic()
        yield served


async def requests_once(served: Any) -> None:
    await served.chat()
    await served.chat(stream=True)
    await served.chat(model="nope")
    async with raw_client(served.port) as client:
        await client.send(post("/v1/chat/completions", STREAM | {"user": "stay"}))
        await client.reader.readuntil(b"data: ")
    await settle(served, 4)


async def nobody(host: str) -> list[str]:
    raise OSError("no such host")


LOAD = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="awake"} 1.0
"""


async def telling(request: Received, line: Line) -> None:
    if request.target == "/metrics":
        await line.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(LOAD) + LOAD)
    else:
        await lively(request, line)


async def lively(request: Received, line: Line) -> None:
    """Answers like an engine; and holds the line of a client that will leave."""
    if b"stay" in request.body:
        await sse(event(), then=Line.gone)(request, line)
    elif b'"stream":true' in request.body.replace(b" ", b""):
        await sse(event(), event(), event(choices=[], usage=USAGE), DONE, then=lambda line: line.send(LAST_CHUNK))(
            request, line
        )
    else:
        await line.send(json_response({"usage": USAGE}))


# The shape of it


async def test_every_family_is_there_with_its_type_labels_and_buckets(everything: Any) -> None:
    families = (await scrape(everything)).families

    assert {name.removeprefix(P) for name in families if name.startswith(P)} == set(FAMILIES)
    for name, (kind, labels, buckets) in FAMILIES.items():
        family = families[P + name]
        assert family.samples, name
        assert family.type == kind, name
        assert len(family.documentation) > 10, name
        assert {label for sample in family.samples for label in sample.labels} - {"le"} == labels, name
        bounds = [sample.labels["le"] for sample in family.samples if "le" in sample.labels]
        assert [float(bound) for bound in bounds[: len(buckets)]] == list(buckets), name
    assert {"process_cpu_seconds", "process_resident_memory_bytes", "python_gc_objects_collected"} <= set(families)


def test_the_buckets_reach_from_the_fastest_to_the_slowest() -> None:
    for buckets, first, last in [
        (TTFT_BUCKETS, 0.001, 160),
        (TPOT_BUCKETS, 0.01, 10),
        (DURATION_BUCKETS, 0.01, 655.36),
        (OVERHEAD_BUCKETS, 0.0001, 0.5),
        (TOKEN_BUCKETS, 1, 262144),
    ]:
        assert (buckets[0], buckets[-1]) == (first, last)
        assert list(buckets) == sorted(set(buckets))


async def test_promtool_finds_nothing_to_complain_about(everything: Any) -> None:
    promtool = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on PATH and PROMTOOL is not set")
    page = (await everything.client.get("/metrics")).content

    checked = await asyncio.to_thread(subprocess.run, [promtool, "check", "metrics"], input=page, capture_output=True)

    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


async def test_a_scraper_that_asks_for_openmetrics_gets_it(everything: Any) -> None:
    accept = "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    response = await everything.client.get("/metrics", headers={"accept": accept})

    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")
    # Unlike the other, this parser refuses what the specification refuses.
    scraped = Scrape(parse_openmetrics(response.text))  # type: ignore[no-untyped-call]
    assert scraped("requests_total", model_name="m", code="200") == 3 - 1
    assert set(FAMILIES) <= {name.removeprefix(P) for name in scraped.families}


# What is counted


async def test_json_requests_are_counted_and_timed(start_engine: Start, start_router: Start) -> None:
    served = await start_router(await start_engine(), entry={"aliases": ["alias"]})
    began = time.perf_counter()
    for number in range(6):
        await served.chat(model=["m", "alias"][number % 2])
    await settle(served, 6)
    took = time.perf_counter() - began
    seen = await scrape(served)

    labels = {"model_name": "m", "route": "chat_completions", "stream": "false"}
    assert seen("requests_total") == seen("requests_total", code="200", **labels) == 6
    assert seen("request_duration_seconds_count", code_class="2xx", **labels) == 6
    assert 0 < seen("request_duration_seconds_sum") < took
    assert seen("overhead_seconds_count", route="chat_completions") == 6
    assert 0 < seen("overhead_seconds_sum") < seen("request_duration_seconds_sum")
    assert seen.values("tokens_total", "type") == {"input": 18, "output": 30}
    assert seen("upstream_attempts_total", model_name="m", outcome="ok") == seen("upstream_attempts_total") == 6
    assert seen("time_to_first_token_seconds_count") == seen("time_per_output_token_seconds_count") == 0


async def test_streams_are_timed_by_their_tokens(start_engine: Start, start_router: Start) -> None:
    events = [event(), event(choices=[], usage=USAGE), DONE]
    served = await start_router(await start_engine(sse(*events, then=lambda line: line.send(LAST_CHUNK))))
    await served.chat(stream=True)
    await settle(served, 1)
    seen = await scrape(served)

    labels = {"model_name": "m", "route": "chat_completions"}
    assert seen("requests_total", stream="true", code="200", **labels) == 1
    assert seen("time_to_first_token_seconds_count", **labels) == 1
    first = seen("time_to_first_token_seconds_sum")
    assert 0 < first < seen("request_duration_seconds_sum")
    assert seen("time_per_output_token_seconds_count", **labels) == 1
    # The rest of the time, shared by the tokens after the first: USAGE has five.
    assert seen("time_per_output_token_seconds_sum") == pytest.approx(
        (seen("request_duration_seconds_sum") - first) / 4
    )
    assert seen.values("tokens_total", "type") == {"input": 3, "output": 5}
    assert seen("stream_aborts_total") == 0


async def test_without_usage_streamed_events_are_an_estimate(start_engine: Start, start_router: Start) -> None:
    events = [event(), event(), event(usage=None), DONE]
    served = await start_router(await start_engine(sse(*events, then=lambda line: line.send(LAST_CHUNK))))
    await served.chat(stream=True)
    await settle(served, 1)
    seen = await scrape(served)

    assert seen.values("tokens_total", "type") == {"output_estimate": 3}
    assert seen("time_to_first_token_seconds_count") == 1
    assert seen("time_per_output_token_seconds_count") == 0


async def test_the_tokens_of_each_request_are_known(start_engine: Start, start_router: Start) -> None:
    sizes = iter([4, 5])

    async def script(request: Received, line: Line) -> None:
        await line.send(json_response({"usage": {"prompt_tokens": 1, "completion_tokens": next(sizes)}}))

    served = await start_router(await start_engine(script))
    for _ in range(2):
        await served.chat()
    await settle(served, 2)
    seen = await scrape(served)

    assert seen("request_tokens_count", type="output") == seen("request_tokens_bucket", type="input", le="1.0") == 2
    assert seen("request_tokens_sum", type="output") == seen("tokens_total", type="output") == 9
    assert [seen("request_tokens_bucket", type="output", le=le) for le in ("1.0", "4.0", "16.0")] == [0, 1, 2]


RESPONSES_USAGE = {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 1}, "output_tokens": 11}
ANSWERS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, int]]] = {
    "/v1/responses": ({"input": "x"}, {"object": "response", "usage": RESPONSES_USAGE}, (7, 11)),
    "/v1/messages": ({"messages": []}, {"type": "message", "usage": {"input_tokens": 2, "output_tokens": 3}}, (2, 3)),
    "/v1/embeddings": ({"input": "x"}, {"data": [], "usage": {"prompt_tokens": 5, "total_tokens": 5}}, (5, 0)),
    "/v1/rerank": ({"query": "x", "documents": []}, {"results": [], "usage": {"total_tokens": 9}}, (0, 0)),
    "/tokenize": ({"prompt": "x"}, {"tokens": [1, 2, 3]}, (0, 0)),
}


async def test_tokens_are_read_from_the_usage_of_every_api(start_engine: Start, start_router: Start) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.send(json_response(ANSWERS[request.target][1]))

    served = await start_router(await start_engine(script))
    inputs = outputs = 0.0
    for number, (path, (body, _, (prompt, completion))) in enumerate(ANSWERS.items(), 1):
        await served.client.post(path, json={"model": "m"} | body)
        await settle(served, number)
        inputs, outputs = inputs + prompt, outputs + completion
        seen = await scrape(served)
        assert (seen("tokens_total", type="input"), seen("tokens_total", type="output")) == (inputs, outputs), path
    assert {line["route"] for line in served.lines} == {"responses", "messages", "embeddings", "rerank", "tokenize"}


STREAMED_USAGE = [
    (
        "/v1/responses",
        {"input": "x"},
        b"event: response.completed\ndata: " + orjson.dumps({"response": {"usage": RESPONSES_USAGE}}) + b"\n\n",
        {"input": 7, "cached_input": 1, "output": 11},
    ),
    (
        "/v1/messages",
        {"messages": []},
        b'event: message_start\ndata: {"message":{"usage":{"input_tokens":2,"output_tokens":1}}}\n\n'
        b'event: message_delta\ndata: {"usage":{"input_tokens":2,"output_tokens":30}}\n\n'
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
        {"input": 2, "output": 30},
    ),
]


@pytest.mark.parametrize(("path", "body", "events", "tokens"), STREAMED_USAGE)
async def test_tokens_are_read_from_the_last_usage_of_a_stream(
    start_engine: Start, start_router: Start, path: str, body: dict[str, Any], events: bytes, tokens: dict[str, int]
) -> None:
    served = await start_router(await start_engine(sse(events, then=lambda line: line.send(LAST_CHUNK))))
    await served.client.post(path, json={"model": "m", "stream": True} | body)
    await settle(served, 1)

    assert served.lines[0]["outcome"] == "ok"
    assert (await scrape(served)).values("tokens_total", "type") == tokens


async def test_errors_are_counted_by_their_status(start_engine: Start, start_router: Start) -> None:
    statuses = {b"one": "400 Bad Request", b"two": "429 Too Many Requests", b"three": "500 Internal Server Error"}

    async def script(request: Received, line: Line) -> None:
        status = next(status for word, status in statuses.items() if word in request.body)
        await line.send(json_response({"error": {}}, status))

    served = await start_router(await start_engine(script))
    for word in ("one", "two", "three"):
        await served.chat(user=word)
    await served.client.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    await served.client.post("/v1/chat/completions", json={"model": "m"})
    await served.chat(model="nope")
    await served.client.get("/v1/chat/completions")
    await served.client.get("/v1/models/nope")
    await served.client.get("/nowhere")
    await settle(served, 9)
    seen = await scrape(served)

    by = {
        (s.labels["model_name"], s.labels["route"], s.labels["code"]): s.value
        for s in seen.samples
        if s.name == P + "requests_total" and s.value
    }
    assert by == {
        ("m", "chat_completions", "400"): 1,
        ("m", "chat_completions", "429"): 1,
        ("m", "chat_completions", "500"): 1,
        ("unknown", "chat_completions", "400"): 1,
        ("unknown", "chat_completions", "422"): 1,
        ("unknown", "chat_completions", "404"): 1,
        ("unknown", "other", "405"): 1,
        ("unknown", "models", "404"): 1,
        ("unknown", "other", "404"): 1,
    }
    assert seen("request_duration_seconds_count", code_class="4xx") == 8
    assert seen("request_duration_seconds_count", code_class="5xx") == 1
    assert seen.values("upstream_attempts_total", "outcome") == {"upstream_4xx": 2, "upstream_5xx": 1}
    assert seen("overhead_seconds_count") == 3


async def test_what_the_router_turns_away_is_counted_by_why(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(hang)
    models = [{"name": "full", "backends": [{"url": engine.url}], "max_in_flight": 1}, {"name": "bare"}]
    served = await start_router(models=models, max_body_bytes=1000)
    before = await scrape(served)
    async with raw_client(served.port) as client:
        await client.send(post("/v1/chat/completions", CHAT | {"model": "full"}))
        await until(lambda: engine.busy)
        for model in ("full", "full", "bare", "nope"):
            await served.chat(model=model)
    await served.chat(user="x" * 1000)
    await served.client.post("/v1/chat/completions", json={"model": "full"})
    await settle(served, 7)
    seen = await scrape(served)

    counted = {
        (s.labels["model_name"], s.labels["reason"]): s.value
        for s in seen.samples
        if s.name == P + "rejected_requests_total"
    }
    assert before("rejected_requests_total") == 0
    assert set(before.values("rejected_requests_total", "model_name")) == {"full", "bare", "unknown"}
    assert counted == {
        ("full", "overload"): 2,
        ("full", "no_backend"): 0,
        ("bare", "overload"): 0,
        ("bare", "no_backend"): 1,
        ("unknown", "overload"): 0,
        ("unknown", "unknown_model"): 1,
        ("unknown", "too_large"): 1,
    }
    assert seen("requests_total", model_name="full", code="503") == 2


async def test_faults_are_shown_as_none_before_the_first(start_engine: Start, start_router: Start) -> None:
    models = [{"name": "m", "backends": [{"url": (await start_engine()).url}]}, {"name": "other"}]
    served = await start_router(models=models)
    before = await scrape(served)
    await served.client.post("/v1/completions", json={"model": "m", "prompt": "x"})
    await settle(served, 1)
    seen = await scrape(served)

    def zeros(seen: Scrape, name: str, label: str) -> set[tuple[str, str, str]]:
        found = [s.labels for s in seen.samples if s.name == P + name and s.value == 0]
        return {(labels["model_name"], labels.get("route", ""), labels[label]) for labels in found}

    chat = {(model, "chat_completions", code) for model in ("m", "other") for code in ("502", "503", "504")}
    assert zeros(before, "requests_total", "code") == chat
    assert zeros(seen, "requests_total", "code") == chat | {
        ("m", "completions", code) for code in ("502", "503", "504")
    }
    assert {name for name, _, reason in zeros(before, "stream_aborts_total", "reason") if reason == "truncated"} == {
        "m",
        "other",
    }
    # One that happened is the one that is shown.
    await served.chat(model="other")
    await settle(served, 2)
    found = [s.value for s in (await scrape(served)).samples if s.labels.get("code") == "503" and s.value]
    assert found == [1]


def test_of_many_models_only_those_that_were_asked_for_show_that_nothing_went_wrong() -> None:
    fleet = Fleet(make_balancer)
    fleet.update(parse_catalogue({"models": [{"name": f"model-{number}"} for number in range(1000)]}))
    metrics = Metrics(lambda: fleet.models)
    none = shown(metrics)
    metrics.record(record_of("model-7", stream=True))
    seen = shown(metrics)

    assert none.values("requests_total", "code") == none.values("stream_aborts_total", "reason") == {}
    assert seen.values("requests_total", "code") == {"200": 1, "502": 0, "503": 0, "504": 0}
    assert set(seen.values("stream_aborts_total", "model_name")) == {"model-7"}


async def test_a_router_that_was_asked_to_stop_says_so(start_router: Start) -> None:
    served = await start_router()
    before = await scrape(served)
    served.router.drain()

    assert (before("draining"), (await scrape(served))("draining")) == (0, 1)


async def test_a_busy_event_loop_is_seen(start_router: Start) -> None:
    served = await start_router()
    await until(lambda: sum(served.router.core.metrics.loop_lag.counts))
    before = served.router.core.metrics.loop_lag.sum
    time.sleep(0.6)  # noqa: ASYNC251
    await until(lambda: served.router.core.metrics.loop_lag.sum > before + 0.3)
    seen = await scrape(served)

    assert seen("event_loop_lag_seconds_count") > seen("event_loop_lag_seconds_bucket", le="0.1")


async def test_the_last_tick_is_told_while_the_loop_is_there_to_tick(start_router: Start) -> None:
    served = await start_router()
    seen = await scrape(served)

    assert time.time() - 5 < seen("event_loop_last_tick_timestamp_seconds") <= time.time()
    assert shown(metrics_of()).values("event_loop_last_tick_timestamp_seconds", "") == {}


def test_a_tick_is_as_old_as_the_silence_whatever_the_time_of_day() -> None:
    seen = shown(metrics_of(), silence=lambda: 40.0, clock=lambda: 1000.0)

    assert seen("event_loop_last_tick_timestamp_seconds") == 960


async def test_what_is_in_flight_is_shown_and_falls_to_nothing(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(hang)
    served = await start_router(engine)
    async with raw_client(served.port) as one, raw_client(served.port) as two:
        await one.send(post("/v1/chat/completions", CHAT))
        await two.send(post("/v1/chat/completions", STREAM))
        await until(lambda: engine.busy == 2)
        seen = await scrape(served)
        label = engine.url.removeprefix("http://")
        assert seen("requests_in_flight", model_name="m") == 2
        assert seen("backend_in_flight", model_name="m", backend=label) == 2
    await settle(served, 2)
    seen = await scrape(served)

    assert seen("requests_in_flight") == seen("backend_in_flight") == 0
    # A client that did not wait: 499, and nothing the backend is to blame for.
    assert seen.counted("requests_total", "code") == {"499": 1}
    assert seen("requests_total", code="499") == 2
    assert seen("request_duration_seconds_count", code_class="4xx") == 2
    assert seen.values("upstream_attempts_total", "outcome") == {"client_gone": 2}


async def test_a_client_that_leaves_mid_stream_is_an_abort(start_engine: Start, start_router: Start) -> None:
    served = await start_router(await start_engine(lively))
    await requests_once(served)
    seen = await scrape(served)

    assert seen("requests_total", code="499", stream="true") == 1
    assert seen.counted("stream_aborts_total", "reason") == {"client_disconnect": 1}
    assert seen("upstream_attempts_total", outcome="client_gone") == 1
    assert seen("requests_in_flight") == seen("backend_in_flight") == 0


async def served_by(start_engine: Start, start_router: Start, scripts: Mapping[str, Script], **settings: Any) -> Any:
    """A router with one model per script, of the script's name, each behind an engine of its own."""
    engines = {name: await start_engine(script) for name, script in scripts.items()}
    models = [{"name": name, "backends": [{"url": engine.url}]} for name, engine in engines.items()]
    return await start_router(models=models, **settings)


async def test_a_stream_that_breaks_is_an_abort(start_engine: Start, start_router: Start) -> None:
    broken = {
        "upstream_reset": sse(event(), then=Line.reset),
        "truncated": sse(event(), then=lambda line: line.send(LAST_CHUNK)),
        "idle_timeout": sse(event(), then=Line.gone),
    }
    served = await served_by(start_engine, start_router, broken, idle_timeout=2, first_byte_timeout=30)
    for model in broken:
        async with raw_client(served.port) as client:
            await client.send(post("/v1/chat/completions", STREAM | {"model": model}))
            await client.reader.read(-1)
    await settle(served, len(broken))
    seen = await scrape(served)

    for model, outcome in {"upstream_reset": "reset", "truncated": "truncated", "idle_timeout": "idle_timeout"}.items():
        assert seen("stream_aborts_total", model_name=model, reason=model) == 1, model
        assert seen("upstream_attempts_total", model_name=model, outcome=outcome) == 1, model
        assert seen("requests_total", model_name=model, code="200", stream="true") == 1, model
    assert seen("stream_aborts_total") == seen("upstream_attempts_total") == len(broken)
    assert seen("requests_in_flight") == seen("backend_in_flight") == 0


async def test_attempts_are_counted_by_how_they_ended(start_engine: Start, start_router: Start) -> None:
    scripts = {
        "first_byte_timeout": hang,
        "protocol_error": raw(b"SSH-2.0\r\n\r\n", close=True),
        "reset": raw(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{", close=True),
        "upstream_4xx": raw(json_response({}, "404 Not Found")),
        "upstream_5xx": raw(json_response({}, "500 Internal Server Error")),
    }
    served = await served_by(start_engine, start_router, scripts, first_byte_timeout=0.8)
    statuses = {outcome: (await served.chat(model=outcome)).status_code for outcome in scripts}
    await settle(served, len(scripts))
    seen = await scrape(served)

    assert list(statuses.values()) == [504, 502, 502, 404, 500]
    for outcome, status in statuses.items():
        assert seen("upstream_attempts_total", model_name=outcome, outcome=outcome) == 1, outcome
        assert seen("requests_total", model_name=outcome, code=str(status)) == 1, outcome
    assert seen("upstream_attempts_total") == len(scripts)
    assert seen("requests_in_flight") == seen("backend_in_flight") == 0


async def test_each_attempt_is_its_own_backends(start_engine: Start, start_router: Start) -> None:
    dead, alive = await start_engine(), await start_engine()
    served = await start_router(dead, alive, entry={"balancing": "round_robin"})
    await dead.stop()
    for _ in range(10):
        assert (await served.chat()).status_code == 200
    await settle(served, 10)
    seen = await scrape(served)

    attempts = {
        (s.labels["backend"], s.labels["outcome"]): s.value
        for s in seen.samples
        if s.name == P + "upstream_attempts_total"
    }
    assert attempts[alive.url.removeprefix("http://"), "ok"] == 10
    failed = attempts[dead.url.removeprefix("http://"), "connect_failed"]
    assert failed >= 4
    assert len(attempts) == 2
    assert seen.values("retries_total", "reason") == {"connect": failed}


async def test_a_backend_that_left_takes_its_series_along(start_engine: Start, start_router: Start) -> None:
    old, new = await start_engine(), await start_engine()

    async def registry(request: Received, line: Line) -> None:
        await line.send(json_response({"models": [{"name": "m", "backends": [{"url": listed.url}]}]}))

    listed = old
    async with ScriptedServer(registry) as server:
        served = await start_router(registry_url=server.url)
        await served.chat()
        listed = new
        await served.router.core.registry.refresh()
        await served.chat()
        await settle(served, 2)
        page = (await served.client.get("/metrics")).text

    assert new.url.removeprefix("http://") in page
    assert old.url.removeprefix("http://") not in page


async def test_a_model_that_left_takes_its_series_along(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(lively)

    async def registry(request: Received, line: Line) -> None:
        models = [{"name": name, "backends": [{"url": engine.url}]} for name in listed]
        await line.send(json_response({"models": models}))

    listed = ["kept", "gone"]
    async with ScriptedServer(registry) as server:
        served = await start_router(registry_url=server.url)
        for name in (*listed, "nobody's"):
            await served.chat(model=name)
            await served.chat(model=name, stream=True)
        await settle(served, 6)
        before = await scrape(served)
        listed.remove("gone")
        await served.router.core.registry.refresh()
        seen = await scrape(served)

    assert before("requests_total", model_name="gone") == 2
    assert {
        labels["model_name"] for labels in (sample.labels for sample in seen.samples) if "model_name" in labels
    } == {
        "kept",
        "unknown",
    }
    for name in ("requests_total", "request_duration_seconds_count", "tokens_total", "upstream_attempts_total"):
        assert seen(name, model_name="kept") == before(name, model_name="kept") > 0
    assert seen("requests_total", model_name="unknown") == 2


async def test_what_ends_after_its_model_or_backend_has_left_brings_no_series_back(
    start_engine: Start, start_router: Start
) -> None:
    engines = [await start_engine(lively) for _ in range(3)]

    async def registry(request: Received, line: Line) -> None:
        entries = [{"name": name, "backends": [{"url": engine.url}]} for name, engine in listed.items()]
        await line.send(json_response({"models": entries}))

    listed = {"gone": engines[0], "moved": engines[1], "back": engines[0]}
    async with ScriptedServer(registry) as server, AsyncExitStack() as stack:
        served = await start_router(registry_url=server.url)
        for model in listed:
            client = await stack.enter_async_context(raw_client(served.port))
            await client.send(post("/v1/chat/completions", STREAM | {"model": model, "user": "stay"}))
            await client.reader.readuntil(b"data: ")
        for listed in ({"moved": engines[2]}, {"moved": engines[2], "back": engines[0]}):  # noqa: B007
            await served.router.core.registry.refresh()
        before = await scrape(served)
    await settle(served, 3)
    seen = await scrape(served)

    assert {line["model"] for line in served.lines} == {"gone", "moved", "back"}
    assert {sample.labels.get("model_name") for sample in seen.samples} == {None, "unknown", "moved", "back"}
    old = engines[1].url.removeprefix("http://")
    assert old not in {sample.labels.get("backend") for sample in (*before.samples, *seen.samples)}
    # What is there is counted, also of what had left in between.
    for model in ("moved", "back"):
        assert seen("requests_total", model_name=model, code="499") == 1
        assert seen("stream_aborts_total", model_name=model, reason="client_disconnect") == 1


async def test_the_registry_and_the_build_are_shown(start_router: Start) -> None:
    served = await start_router(models=[{"name": "a"}, {"name": "b"}], registry_url="http://127.0.0.1:9")
    await served.router.core.registry.refresh()
    seen = await scrape(served)

    assert seen.values("registry_models", "source") == {"registry": 0, "stale": 0, "static": 2}
    assert seen("registry_last_success_timestamp_seconds") == 0
    assert seen.values("registry_sync_failures_total", "reason") == {"connect": 2}
    assert seen("build_info", version=__version__, python_version=sys.version.split()[0]) == 1
    assert seen("requests_in_flight", model_name="a") == 0


# By itself


def metrics_of(*names: str) -> Metrics:
    """Of a fleet of these models, each with a backend of its name."""
    fleet = Fleet(make_balancer)
    fleet.update(parse_catalogue({"models": [{"name": n, "backends": [{"url": f"http://{n}"}]} for n in names]}))
    return Metrics(lambda: fleet.models)


def shown(metrics: Metrics, **sources: Any) -> Scrape:
    families = Families(metrics, lambda: RegistryStatus("static", 0, 0.0, {}), **sources)
    return Scrape(parse_text("".join(write(families()))))


@given(st.lists(st.floats(0, 1000, allow_nan=False), max_size=50))
def test_a_histogram_counts_what_is_at_most_its_bound(values: list[float]) -> None:
    histogram = Histogram(TPOT_BUCKETS)
    for value in values:
        histogram.observe(value)

    for bound, count in zip(TPOT_BUCKETS, histogram.cumulative(), strict=False):
        assert count == sum(value <= bound for value in values)
    assert histogram.cumulative()[-1] == len(values)
    assert histogram.sum == pytest.approx(sum(values))


def test_a_scrape_on_another_thread_survives_new_series() -> None:
    """As on OPS_PORT, where /metrics has a thread of its own."""
    names = [f"m{number}" for number in range(200)]
    metrics = metrics_of(*names)
    failures: list[Exception] = []
    done = threading.Event()

    def scrape_on() -> None:
        try:
            while not done.is_set():
                shown(metrics)
        except Exception as exc:
            failures.append(exc)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    scraper = threading.Thread(target=scrape_on)
    scraper.start()
    for name in names:
        tokens = (1, None, 2, None)
        metrics.record(record_of(name, stream=True, first=0.1, tokens=tokens, outcome=Outcome.CLIENT_GONE))
        metrics.attempt(Backend(name, f"http://{name}"), Outcome.OK)
        time.sleep(0.001)
    done.set()
    scraper.join()
    sys.setswitchinterval(interval)

    assert failures == []


def test_a_scrape_survives_what_a_garbage_collection_lets_happen() -> None:
    """A thread switch in the middle of reading a series, made certain."""
    metrics = metrics_of("m", "n")
    numbers = itertools.count()

    def another(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            metrics.record(record_of("n", status=next(numbers)))

    # More than Python has tuples of two to hand without allocating any.
    for code in range(3000):
        metrics.record(record_of("m", status=code))
    thresholds = gc.get_threshold()
    gc.callbacks.append(another)
    gc.set_threshold(20)
    try:
        seen = shown(metrics)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(another)

    assert seen("requests_total", model_name="m") == 3000
    assert next(numbers) > 100


def test_a_label_cannot_break_a_line() -> None:
    evil = 'a"}\n\\b{le="1 %s%%'
    metrics = metrics_of()
    metrics.retry("unknown", evil)
    metrics.record(record_of("unknown", route=evil))
    seen = shown(metrics)

    assert seen.values("retries_total", "reason") == {evil: 1}
    assert evil in seen.values("request_duration_seconds_count", "route")


def test_a_stream_that_ended_well_is_no_abort() -> None:
    metrics = metrics_of("m")
    for outcome in Outcome:
        metrics.record(record_of(outcome=outcome, stream=True))
    seen = shown(metrics)

    assert seen.values("stream_aborts_total", "reason") == {
        "client_disconnect": 1,
        "upstream_reset": 2,
        "truncated": 1,
        "error_event": 1,
        "aborted": 1,
        "idle_timeout": 1,
        "deadline": 1,
        "shutdown": 1,
        "internal_error": 1,
    }


def test_a_failed_check_of_an_address_counts_for_each_of_its_models() -> None:
    fleet = Fleet(make_balancer)
    metrics = Metrics(lambda: fleet.models)
    models = [{"name": name, "backends": [{"url": "http://a"}]} for name in ("m", "n")]
    fleet.update(parse_catalogue({"models": models}))

    metrics.probe_failed(fleet.origins["http://a"], "health")

    scrape = shown(metrics)
    assert [scrape("backend_probe_failures_total", model_name=name, kind="health") for name in ("m", "n")] == [1, 1]


def test_failed_checks_are_forgotten_with_the_backend() -> None:
    fleet = Fleet(make_balancer)
    metrics = Metrics(lambda: fleet.models)
    listed = {"name": "m", "backends": [{"url": "http://a"}, {"url": "http://b"}]}

    def take(entry: dict[str, Any]) -> Backend:
        fleet.update(parse_catalogue({"models": [entry]}))
        metrics.forget_backends()
        return fleet.models["m"].backends[-1]

    metrics.probe_failed(take(listed).origin, "health")
    assert shown(metrics)("backend_probe_failures_total", backend="b", kind="health") == 1
    take(listed)
    assert shown(metrics)("backend_probe_failures_total") == 1

    take({"name": "m", "backends": [{"url": "http://a"}]})
    take(listed)

    assert shown(metrics).values("backend_probe_failures_total", "backend") == {"a": 0, "b": 0}
