"""The real command and a real collector: spans by OTLP over HTTP, sent before it ends, and nothing of it when off."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from inference_api.cli import main
from inference_api.settings import SettingsError, wants_traces
from tests.command import command, log_of, ready
from tests.fakes import (
    CHAT,
    STREAM,
    Line,
    ScriptedServer,
    event,
    hang,
    post,
    raw,
    raw_client,
    sse,
    until,
)
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

BASE = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n"
# Longer than any test: what arrives was sent because the process ends.
LATE = {"OTEL_BSP_SCHEDULE_DELAY": "60000"}


class Collector(ScriptedServer):
    """A receiver of OTLP over HTTP."""

    @property
    def exports(self) -> list[ExportTraceServiceRequest]:
        return [ExportTraceServiceRequest.FromString(request.body) for request in self.requests]

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for export in self.exports
            for resource in export.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    @property
    def resource(self) -> dict[str, Any]:
        return values(self.exports[0].resource_spans[0].resource.attributes)


def values(attributes: Any) -> dict[str, Any]:
    pairs: list[KeyValue] = list(attributes)
    return {pair.key: value(pair.value) for pair in pairs}


def value(of: AnyValue) -> Any:
    kind = of.WhichOneof("value")
    return None if kind is None else getattr(of, kind)


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    collector = Collector(raw(OK))
    async with collector:
        yield collector


async def test_spans_arrive_while_the_router_serves(tmp_path: Path, start_engine: Start, collector: Collector) -> None:
    engine = await start_engine()
    environ = {
        BASE: collector.url,
        "OTEL_EXPORTER_OTLP_HEADERS": "x-token=abc",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_RESOURCE_ATTRIBUTES": "k8s.pod.name=router-1",
    }
    async with command(tmp_path, engine, environ=environ) as router:
        await ready(router.client)
        response = await router.client.post("/v1/chat/completions", json=STREAM)
        await until(lambda: len(collector.spans) == 2)
        code, out, err = await router.stop()

    assert (code, err) == (0, "")
    [attempt], [request] = (
        [span for span in collector.spans if span.kind == kind]
        for kind in (Span.SPAN_KIND_CLIENT, Span.SPAN_KIND_SERVER)
    )
    assert (request.name, attempt.name) == ("POST /v1/chat/completions", "chat m")
    assert (attempt.trace_id, attempt.parent_span_id) == (request.trace_id, request.span_id)
    assert request.start_time_unix_nano <= attempt.start_time_unix_nano < attempt.end_time_unix_nano
    assert attempt.end_time_unix_nano <= request.end_time_unix_nano
    assert values(attempt.attributes)["gen_ai.usage.output_tokens"] == 5
    [line] = [line for line in log_of(out) if line["event"] == "request" and line["route"] == "chat_completions"]
    assert (line["trace_id"], line["span_id"]) == (request.trace_id.hex(), request.span_id.hex())
    assert values(request.attributes)["inference_api.request_id"] == response.headers["x-request-id"]
    assert collector.resource.items() >= {"service.name": "inference-api", "k8s.pod.name": "router-1"}.items()
    export = collector.requests[0]
    assert (export.target, export.header("x-token")) == ("/v1/traces", "abc")
    assert export.header("content-type") == "application/x-protobuf"


async def test_what_was_not_sent_is_sent_before_the_process_ends(
    tmp_path: Path, start_engine: Start, collector: Collector
) -> None:
    """A stream too, that the deadline of the drain has cut; by the endpoint, the name and the sampler that were set."""
    engine = await start_engine(sse(event(), then=Line.gone))
    environ = LATE | {
        TRACES: collector.url + "/here",
        "OTEL_SERVICE_NAME": "router-eu",
        "OTEL_TRACES_SAMPLER": "always_on",
    }
    async with command(tmp_path, engine, environ=environ, drain_timeout=1) as router:
        await ready(router.client)
        async with raw_client(router.port) as client:
            context = f"traceparent: 00-{'a' * 32}-{'b' * 16}-00\r\n".encode()
            await client.send(post("/v1/chat/completions", STREAM, context))
            await client.reader.readuntil(b"data: ")
            code, out, err = await router.stop()

    assert (code, err) == (0, "")
    assert log_of(out)[-1]["event"] == "stopped"
    assert {span.trace_id.hex() for span in collector.spans} == {"a" * 32}
    assert [span.kind for span in collector.spans] == [Span.SPAN_KIND_CLIENT, Span.SPAN_KIND_SERVER]
    assert collector.resource["service.name"] == "router-eu"
    assert {request.target for request in collector.requests} == {"/here"}


async def test_a_collector_that_takes_no_spans_keeps_nobody(tmp_path: Path, start_engine: Start) -> None:
    """They are lost, and the process ends five seconds later than it would have."""
    async with Collector(hang) as collector:
        environ = LATE | {BASE: collector.url, "OTEL_EXPORTER_OTLP_HEADERS": "authorization s3cret"}
        async with command(tmp_path, await start_engine(), environ=environ) as router:
            await ready(router.client)
            assert (await router.client.post("/v1/chat/completions", json=CHAT)).status_code == 200
            code, out, err = await router.stop(patience=20)

    lines = log_of(out)
    assert code == 0
    assert [line["event"] for line in lines if line["level"] == "warning"] == [
        "the collector did not accept the last spans in time"
    ]
    assert lines[-1]["event"] == "stopped"
    # A header that cannot be read is not shown.
    assert "s3cret" not in out + err


async def test_off_means_that_nothing_of_it_is_loaded(
    tmp_path: Path, start_engine: Start, collector: Collector
) -> None:
    modules = {}
    for name, more in {"off": {}, "on": {BASE: collector.url}}.items():
        async with command(tmp_path, await start_engine(), environ={"PYTHONPROFILEIMPORTTIME": "1"} | more) as router:
            await ready(router.client)
            assert (await router.client.post("/v1/chat/completions", json=CHAT)).status_code == 200
            _, _, err = await router.stop()
        modules[name] = {
            line.rpartition("|")[2].strip() for line in err.splitlines() if line.startswith("import time:")
        }

    assert "inference_api.app" in modules["off"] & modules["on"]
    assert "inference_api.features.spans" in modules["on"] - modules["off"]
    assert not [name for name in modules["off"] if name.startswith(("opentelemetry", "google.protobuf", "requests"))]


# What cannot be


async def test_without_the_extra_the_router_says_what_is_missing(tmp_path: Path) -> None:
    """A package of the same name that is found first, and says that it is not there."""
    (tmp_path / "opentelemetry.py").write_text("raise ModuleNotFoundError(\"No module named 'opentelemetry'\")")
    environ = {BASE: "http://127.0.0.1:4318", "PYTHONPATH": str(tmp_path)}

    async with command(tmp_path, environ=environ) as router:
        await asyncio.wait_for(router.process.wait(), 20)
        code, out, err = await router.stop()

    assert (code, out) == (2, "")
    assert err == (
        "inference-api: OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, but OpenTelemetry is not installed "
        "(No module named 'opentelemetry'); pip install 'inference-api[otel]', or unset it\n"
    )


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, False),
        ({BASE: ""}, False),
        ({BASE: "http://collector:4318"}, True),
        ({TRACES: "https://collector/v1/traces"}, True),
        ({BASE: "nonsense", TRACES: "http://collector:4318/v1/traces"}, True),
        ({BASE: "http://collector:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
        ({BASE: "http://collector:4318", "OTEL_SDK_DISABLED": "True"}, False),
        ({BASE: "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({BASE: "http://collector:4318", "OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_SERVICE_NAME": "x", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://collector:4318"}, False),
    ],
)
async def test_traces_are_asked_for_by_an_endpoint(environ: dict[str, str], wanted: bool) -> None:
    assert wants_traces(environ) == wanted


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({BASE: "collector:4318"}, f"{BASE}: must be the http:// or https:// URL"),
        ({BASE: "http://collector:4318", TRACES: "user:s3cret@collector"}, f"{TRACES}: must be the http:// or"),
        ({BASE: "http://c", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL='grpc': spans go by"),
        ({BASE: "http://c", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "x"}, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL='x': "),
    ],
)
async def test_what_cannot_be_sent_to_is_refused_at_the_start(environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        wants_traces(environ)

    assert message in str(caught.value)
    assert "s3cret" not in str(caught.value)


async def test_check_holds_the_variables_of_opentelemetry_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(BASE, f"http://127.0.0.1:{free_port()}")
    assert main(["check"]) == 0
    capsys.readouterr()
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    assert main(["check"]) == 2

    err = capsys.readouterr().err
    assert err.startswith("inference-api: OpenTelemetry rejects one of its variables (OTEL_...): max_queue_size ")
    assert err.count("\n") == 1
