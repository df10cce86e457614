"""The spans of a request: what is in them, that they end however the request ends, and what the backends are told."""

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from inference_api.features.spans import tracing
from tests.conftest import Served
from tests.fakes import (
    CHAT,
    COMPLETION,
    LAST_CHUNK,
    STREAM,
    Line,
    Received,
    Script,
    answer,
    event,
    form,
    full_listener,
    hang,
    json_response,
    post,
    raw,
    raw_client,
    sse,
    until,
)
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{PARENT}-01"


class Spans:
    """What was exported, in the order of the ends."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = tracing(provider)

    @property
    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    @property
    def attempts(self) -> list[ReadableSpan]:
        return [span for span in self.all if span.kind is SpanKind.CLIENT]

    @property
    def requests(self) -> list[ReadableSpan]:
        return [span for span in self.all if span.kind is SpanKind.SERVER]

    async def ended(self, requests: int = 1) -> tuple[ReadableSpan, list[ReadableSpan]]:
        """The span of the last of so many requests, and all attempts."""
        await until(lambda: len(self.requests) >= requests)
        return self.requests[-1], self.attempts


@pytest.fixture
def spans() -> Spans:
    return Spans()


def ids(span: ReadableSpan) -> tuple[str, str]:
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def parent(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def told(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def send(served: Served, document: Any, headers: bytes = b"", path: str = "/v1/chat/completions") -> bytes:
    async with raw_client(served.port) as client:
        await client.send(post(path, document, headers + b"connection: close\r\n"))
        return await client.reader.read(-1)


# What a trace says


async def test_an_answer_has_a_span_of_the_request_and_one_of_the_attempt(
    start_engine: Start, start_router: Start, spans: Spans
) -> None:
    engine = await start_engine()
    served = await start_router(engine, features=[spans.tracing], entry={"engine": "vllm"})
    await send(served, CHAT, b"x-request-id: id-1\r\n")
    request, [attempt] = await spans.ended()

    assert request.name == "POST /v1/chat/completions"
    assert told(request) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "url.path": "/v1/chat/completions",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "server.address": "127.0.0.1",
        "server.port": served.port,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "m",
        "inference_api.request_id": "id-1",
        "inference_api.outcome": "ok",
        "inference_api.attempts": 1,
    }
    assert attempt.name == "chat m"
    assert told(attempt) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "m",
        "server.address": "127.0.0.1",
        "server.port": engine.port,
        "http.response.status_code": 200,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 5,
        "inference_api.backend": f"127.0.0.1:{engine.port}",
        "inference_api.request_id": "id-1",
    }
    assert (parent(request), parent(attempt)) == (None, ids(request)[1])
    assert ids(attempt)[0] == ids(request)[0]
    assert request.status.status_code is attempt.status.status_code is StatusCode.UNSET


async def test_a_stream_tells_when_its_first_token_came(start_engine: Start, start_router: Start, spans: Spans) -> None:
    served = await start_router(await start_engine(), features=[spans.tracing])
    await send(served, STREAM)
    request, [attempt] = await spans.ended()

    first = told(attempt)["gen_ai.response.time_to_first_chunk"]
    assert 0 < first <= told(request)["inference_api.time_to_first_token"]
    assert first * 1e9 < (attempt.end_time or 0) - (attempt.start_time or 0)
    assert told(attempt)["gen_ai.request.stream"] is True
    assert told(attempt)["gen_ai.usage.output_tokens"] == 5


OPERATIONS: list[tuple[str, Any, str]] = [
    ("/v1/chat/completions", CHAT, "chat"),
    ("/v1/completions", {"model": "m", "prompt": "x"}, "text_completion"),
    ("/v1/embeddings", {"model": "m", "input": "x"}, "embeddings"),
    ("/v1/responses", {"model": "m", "input": "x"}, "chat"),
    ("/v1/messages", CHAT, "chat"),
    ("/rerank", {"model": "m", "query": "x", "documents": []}, "rerank"),
    ("/tokenize", {"model": "m", "prompt": "x"}, "tokenize"),
]


async def test_a_route_is_an_operation(start_engine: Start, start_router: Start, spans: Spans) -> None:
    served = await start_router(await start_engine(), features=[spans.tracing])
    for number, (path, document, operation) in enumerate(OPERATIONS, 1):
        await send(served, document, path=path + "/")
        request, attempts = await spans.ended(number)

        assert (request.name, attempts[-1].name) == (f"POST {path}", f"{operation} m")
        assert told(request)["gen_ai.operation.name"] == told(attempts[-1])["gen_ai.operation.name"] == operation


async def test_an_upload_has_spans(start_engine: Start, start_router: Start, spans: Spans) -> None:
    served = await start_router(await start_engine(), features=[spans.tracing])
    body = form(b'content-disposition: form-data; name="model"\r\n\r\nm')
    head = {"content-type": "multipart/form-data; boundary=B"}
    await served.client.post("/v1/audio/transcriptions", content=body, headers=head)

    assert (await spans.ended())[1][0].name == "transcriptions m"


# usage; the tokens that went in, came out, and were in the cache
USAGES: list[tuple[Any, tuple[int | None, ...]]] = [
    ({"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 8}}, (9, 1, 8)),
    ({"input_tokens": 9, "output_tokens": 1, "input_tokens_details": {"cached_tokens": 0}}, (9, 1, 0)),
    ({"input_tokens": 9, "output_tokens": 1, "cache_read_input_tokens": 7}, (16, 1, 7)),
    ({"prompt_tokens": "9", "prompt_tokens_details": {"cached_tokens": True}}, (None, None, None)),
    ({"prompt_tokens_details": None}, (None, None, None)),
    (None, (None, None, None)),
]


async def test_tokens_are_those_that_the_engine_counted(start_engine: Start, start_router: Start, spans: Spans) -> None:
    async def count(request: Received, line: Line) -> None:
        await line.send(json_response(COMPLETION | {"usage": USAGES[len(engine.requests) - 1][0]}))

    engine = await start_engine(count)
    served = await start_router(engine, features=[spans.tracing])
    for number, (usage, counts) in enumerate(USAGES, 1):
        await send(served, CHAT)
        attempt = (await spans.ended(number))[1][-1]

        names = ("input_tokens", "output_tokens", "cache_read.input_tokens")
        assert tuple(told(attempt).get(f"gen_ai.usage.{name}") for name in names) == counts, usage


async def test_an_alias_is_the_routers_word_and_the_engine_has_its_own(
    start_engine: Start, start_router: Start, spans: Spans
) -> None:
    entry = {"served_model_name": "tgi", "engine": "tgi", "aliases": ["a"]}
    served = await start_router(await start_engine(), features=[spans.tracing], entry=entry)
    await send(served, CHAT | {"model": "a"})
    request, [attempt] = await spans.ended()

    assert (told(request)["gen_ai.request.model"], told(attempt)["gen_ai.request.model"]) == ("m", "tgi")
    assert told(attempt)["gen_ai.provider.name"] == "tgi"


async def test_a_backend_that_was_looked_up_has_its_name_and_its_address(
    start_engine: Start, start_router: Start, spans: Spans
) -> None:
    async def resolve(host: str) -> list[str]:
        return ["127.0.0.1"]

    engine = await start_engine()
    models = [{"name": "m", "backends": [{"url": f"http://engine.test:{engine.port}", "discovery": "dns"}]}]
    served = await start_router(models=models, resolve=resolve, features=[spans.tracing])
    await send(served, CHAT)
    _, [attempt] = await spans.ended()

    assert told(attempt).items() >= {"server.address": "engine.test", "network.peer.address": "127.0.0.1"}.items()


async def test_a_backend_without_a_port_has_that_of_its_scheme(start_router: Start, spans: Spans) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=COMPLETION))
    backends = [{"url": "http://engine.test"}, {"url": "https://engine.test/v2"}]
    models = [{"name": "m", "backends": backends, "balancing": "round_robin"}]
    served = await start_router(models=models, transport=transport, features=[spans.tracing])
    await send(served, CHAT)
    await send(served, CHAT)
    _, attempts = await spans.ended(2)

    assert {(told(span)["server.port"], told(span)["inference_api.backend"]) for span in attempts} == {
        (80, "engine.test"),
        (443, "engine.test/v2"),
    }


async def test_every_repeat_is_an_attempt_of_its_own(start_engine: Start, start_router: Start, spans: Spans) -> None:
    calls = 0

    async def busy_at_first(request: Received, line: Line) -> None:
        nonlocal calls
        calls += 1
        await (line.send(json_response({}, "503 Busy")) if calls == 1 else answer(request, line))

    engines = [await start_engine(busy_at_first) for _ in range(2)]
    served = await start_router(*engines, features=[spans.tracing])
    await send(served, STREAM, f"traceparent: {SAMPLED}\r\n".encode())
    request, [first, second] = await spans.ended()

    assert told(first).items() >= {"error.type": "503", "http.response.status_code": 503}.items()
    assert first.status.status_code is StatusCode.ERROR
    assert "http.request.resend_count" not in told(first)
    assert told(second)["http.request.resend_count"] == 1
    assert told(first)["server.port"] != told(second)["server.port"]
    assert (first.end_time or 0) <= (second.start_time or 0)
    assert parent(first) == parent(second) == ids(request)[1]
    assert told(request)["inference_api.attempts"] == 2
    sent = sorted(request.header("traceparent") or "" for engine in engines for request in engine.requests)
    assert sent == sorted(f"00-{TRACE}-{ids(span)[1]}-01" for span in (first, second))


async def test_a_backend_that_cannot_be_reached_is_an_attempt(
    start_engine: Start, start_router: Start, spans: Spans
) -> None:
    backends = [{"url": f"http://127.0.0.1:{free_port()}"}, {"url": (await start_engine()).url}]
    models = [{"name": "m", "backends": backends, "balancing": "round_robin"}]
    served = await start_router(models=models, features=[spans.tracing])
    await send(served, CHAT)
    await send(served, CHAT)
    _, attempts = await spans.ended(2)

    assert sorted(told(span).get("error.type", "none") for span in attempts) == ["connect_failed", "none", "none"]


# However a request ends

ENGINE: dict[bytes, Script] = {
    b"bad": raw(json_response({"error": {}}, "400 Bad Request")),
    b"fail": raw(json_response({"error": {}}, "500 Internal Server Error")),
    b"busy": raw(json_response({"error": {}}, "503 Service Unavailable")),
    b"garbage": raw(b"garbage\r\n\r\n"),
    b"redirect": raw(b"HTTP/1.1 302 Found\r\nlocation: http://x/\r\ncontent-length: 0\r\n\r\n"),
    b"close": raw(b"", close=True),
    b"hang": hang,
    b"half": raw(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{", close=True),
    b"reset": sse(event(), then=Line.reset),
    b"cut": sse(event(), then=lambda line: line.send(LAST_CHUNK)),
    b"silent": sse(event(), then=Line.gone),
    b"error": sse(
        event(), b'data: {"error": {"message": "x"}}\n\n', b"data: [DONE]\n\n", then=lambda line: line.send(LAST_CHUNK)
    ),
}


async def scripted(request: Received, line: Line) -> None:
    script = next((script for mark, script in ENGINE.items() if b'"user":"%b"' % mark in request.body), answer)
    await script(request, line)


# what is sent; status, error.type, fault of the request; error.type of each attempt
ENDS: list[tuple[Any, int, str | None, bool, list[str | None]]] = [
    (CHAT, 200, None, False, [None]),
    (STREAM, 200, None, False, [None]),
    (b"{", 400, "invalid_json", False, []),
    (CHAT | {"messages": None}, 422, "validation_error", False, []),
    (CHAT | {"model": "nope"}, 404, "model_not_found", False, []),
    (CHAT | {"user": "x" * 2000}, 413, "request_too_large", False, []),
    (CHAT | {"model": "none"}, 503, "no_backend_available", True, []),
    (CHAT | {"model": "gone"}, 503, "no_backend_available", True, ["connect_failed"]),
    (CHAT | {"model": "full"}, 503, "overloaded", True, []),
    (CHAT | {"user": "bad"}, 400, "400", False, ["400"]),
    (CHAT | {"user": "fail"}, 500, "500", True, ["500"]),
    (CHAT | {"user": "busy"}, 503, "503", True, ["503"]),
    (CHAT | {"user": "garbage"}, 502, "upstream_protocol_error", True, ["protocol_error"]),
    # On a new connection: the one before was closed.
    (CHAT | {"user": "close"}, 502, "upstream_reset", True, ["reset"]),
    (CHAT | {"user": "redirect"}, 502, "upstream_protocol_error", True, ["protocol_error"]),
    (CHAT | {"user": "half"}, 502, "upstream_reset", True, ["reset"]),
    (CHAT | {"user": "hang"}, 504, "upstream_timeout", True, ["first_byte_timeout"]),
    (STREAM | {"user": "fail"}, 500, "500", True, ["500"]),
    (STREAM | {"user": "reset"}, 200, "reset", True, ["reset"]),
    (STREAM | {"user": "cut"}, 200, "truncated", True, ["truncated"]),
    (STREAM | {"user": "silent"}, 200, "idle_timeout", True, ["idle_timeout"]),
    (STREAM | {"user": "error"}, 200, "error_event", True, ["error_event"]),
]


async def test_the_spans_end_however_the_request_ends(
    start_engine: Start, start_router: Start, spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await start_engine(scripted)
    models = [
        {"name": "m", "backends": [{"url": engine.url}], "timeouts": {"first_byte": 0.8, "idle": 0.8}},
        {"name": "none", "backends": []},
        {"name": "gone", "backends": [{"url": f"http://127.0.0.1:{free_port()}"}]},
        {"name": "full", "backends": [{"url": engine.url}], "max_in_flight": 1},
    ]
    served = await start_router(models=models, max_body_bytes=1000, features=[spans.tracing])
    served.router.core.fleet.models["full"].in_flight = 1
    for number, (document, status, error, fault, attempts) in enumerate(ENDS, 1):
        before = len(spans.attempts)
        await send(served, document)
        request, made = await spans.ended(number)
        del made[:before]

        assert told(request)["http.response.status_code"] == status, document
        assert told(request).get("error.type") == error, document
        assert (request.status.status_code is StatusCode.ERROR) == fault, document
        assert [told(span).get("error.type") for span in made] == attempts, document
        assert all((span.status.status_code is StatusCode.ERROR) == ("error.type" in told(span)) for span in made)
        assert all(parent(span) == ids(request)[1] for span in made)
        # An error is no first token.
        streamed = isinstance(document, dict) and document.get("stream", False) and status == 200
        assert ("inference_api.time_to_first_token" in told(request)) == streamed, document
        assert ["gen_ai.response.time_to_first_chunk" in told(span) for span in made[-1:]] == [streamed] * len(
            made[-1:]
        )
        line = served.lines[-1]
        assert (line["trace_id"], line["span_id"]) == ids(request)
        assert told(request)["inference_api.request_id"] == line["request_id"]
        assert told(request)["inference_api.outcome"] == line["outcome"]
    # It complains of spans that are ended twice, or changed after that.
    assert [record.message for record in caplog.records if record.name.startswith("opentelemetry")] == []


@pytest.mark.parametrize("document", [CHAT | {"user": "hang"}, STREAM | {"user": "silent"}])
async def test_the_spans_end_when_the_client_leaves(
    start_engine: Start, start_router: Start, spans: Spans, document: Any
) -> None:
    engine = await start_engine(scripted)
    served = await start_router(engine, features=[spans.tracing])
    async with raw_client(served.port) as client:
        await client.send(post("/v1/chat/completions", document))
        await until(lambda: engine.busy)
        if "stream" in document:
            await client.reader.readuntil(b"hi")
    request, [attempt] = await spans.ended()

    # A client that leaves is nobody's fault.
    assert told(request)["error.type"] == told(attempt)["error.type"] == "client_gone"
    assert request.status.status_code is attempt.status.status_code is StatusCode.UNSET


async def test_the_span_of_a_request_whose_body_never_comes_ends(
    start_engine: Start, start_router: Start, spans: Spans
) -> None:
    served = await start_router(await start_engine(), features=[spans.tracing])
    async with raw_client(served.port) as client:
        await client.send(post("/v1/chat/completions", CHAT)[:-5])
        await until(lambda: served.router.core.admission.buffered)
    request, attempts = await spans.ended()

    assert (told(request)["error.type"], attempts) == ("client_gone", [])
    assert "http.response.status_code" not in told(request)


async def test_the_spans_end_when_connecting_takes_too_long(start_router: Start, spans: Spans) -> None:
    with full_listener() as url:
        models = [{"name": "m", "backends": [{"url": url}], "timeouts": {"connect": 0.2}}]
        served = await start_router(models=models, features=[spans.tracing])
        await send(served, CHAT)
        _, [attempt] = await spans.ended()

    assert told(attempt)["error.type"] == "connect_failed"


async def test_an_attempt_that_could_not_be_made_ends_with_its_request(
    start_engine: Start, start_router: Start, spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    served = await start_router(await start_engine(), features=[spans.tracing])
    served.router.core.fleet.models["m"].backends[0].host = "not bytes"
    await send(served, CHAT)
    request, [attempt] = await spans.ended()

    assert told(request)["error.type"] == "internal_error"
    assert (told(attempt)["error.type"], attempt.status.status_code) == ("internal_error", StatusCode.ERROR)


async def test_other_pages_have_no_spans(start_engine: Start, start_router: Start, spans: Spans) -> None:
    served = await start_router(await start_engine(), features=[spans.tracing])
    for path in ("/v1/models", "/healthz", "/readyz", "/metrics", "/nowhere", "/v1/chat/completions"):
        await served.client.get(path)
    await until(lambda: len(served.lines) == 3)

    assert spans.all == []
    assert not any("trace_id" in line for line in served.lines)


async def test_a_pipelined_request_is_in_no_trace_but_its_own(
    start_engine: Start, start_router: Start, spans: Spans
) -> None:
    """The task of the second request is made inside that of the first."""
    served = await start_router(await start_engine(), features=[spans.tracing])
    async with raw_client(served.port) as client:
        first = post("/v1/chat/completions", CHAT, f"traceparent: {SAMPLED}\r\n".encode())
        page = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
        await client.send(first + page + post("/v1/chat/completions", CHAT, b"connection: close\r\n"))
        await client.reader.read(-1)
    await spans.ended(2)

    one, other = spans.requests
    assert (ids(one)[0], parent(one)) == (TRACE, PARENT)
    assert ids(other)[0] != TRACE
    assert parent(other) is None
    assert [line.get("trace_id") for line in served.lines] == [TRACE, None, ids(other)[0]]


# Context


async def test_a_trace_that_the_client_began_goes_on(start_engine: Start, start_router: Start, spans: Spans) -> None:
    engine = await start_engine()
    served = await start_router(engine, features=[spans.tracing])
    state = b"tracestate: a=1,b@c=2\r\ntracestate: d=3\r\n"
    await send(served, CHAT, f"traceparent: {SAMPLED}\r\nbaggage: user=s3cret\r\n".encode() + state)
    request, [attempt] = await spans.ended()

    assert (ids(request)[0], parent(request)) == (TRACE, PARENT)
    [received] = engine.requests
    context = [(name, value) for name, value in received.headers if name in ("traceparent", "tracestate", "baggage")]
    assert context == [("traceparent", f"00-{TRACE}-{ids(attempt)[1]}-01"), ("tracestate", "a=1,b@c=2,d=3")]


async def test_a_trace_that_is_not_sampled_is_not_exported_and_goes_on(
    start_engine: Start, start_router: Start, spans: Spans
) -> None:
    engine = await start_engine()
    served = await start_router(engine, features=[spans.tracing])
    await send(served, STREAM, f"traceparent: 00-{TRACE}-{PARENT}-00\r\n".encode())
    await until(lambda: served.lines)

    sent = engine.requests[0].header("traceparent")
    assert re.fullmatch(rf"00-{TRACE}-[0-9a-f]{{16}}-00", sent)
    assert PARENT not in sent
    assert served.lines[0]["trace_id"] == TRACE
    assert spans.all == []


NO_CONTEXT = [
    b"traceparent: rubbish\r\n",
    b"traceparent: 00-00000000000000000000000000000000-b7ad6b7169203331-01\r\n",
    b"traceparent: ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n",
    b"traceparent: " + b"0" * 600 + b"\r\n",
    f"traceparent: {SAMPLED}\r\ntraceparent: {SAMPLED}\r\n".encode(),
    b"tracestate: a=1\r\n",
    b"",
]


async def test_what_is_no_context_begins_a_trace(start_engine: Start, start_router: Start, spans: Spans) -> None:
    engine = await start_engine()
    served = await start_router(engine, features=[spans.tracing])
    for number, sent in enumerate(NO_CONTEXT, 1):
        await send(served, CHAT, sent)
        request, attempts = await spans.ended(number)

        assert parent(request) is None, sent
        received = [value for name, value in engine.requests[-1].headers if name in ("traceparent", "tracestate")]
        flags = attempts[-1].get_span_context().trace_flags  # type: ignore[union-attr]
        assert received == ["00-{}-{}-{:02x}".format(*ids(attempts[-1]), flags)], sent
    assert len({ids(span)[0] for span in spans.requests}) == len(NO_CONTEXT)


async def test_without_tracing_the_clients_context_passes_as_it_is(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine()
    served = await start_router(engine)
    await send(served, CHAT, f"traceparent: {SAMPLED}\r\ntracestate: a=1\r\n".encode())
    await until(lambda: served.lines)

    received = engine.requests[0]
    assert (received.header("traceparent"), received.header("tracestate")) == (SAMPLED, "a=1")
    assert "trace_id" not in served.lines[0]


async def test_the_request_id_joins_client_engine_log_and_trace(
    start_engine: Start, start_router: Start, spans: Spans
) -> None:
    engine = await start_engine()
    served = await start_router(engine, features=[spans.tracing])
    response = await served.chat()
    request, [attempt] = await spans.ended()

    request_id = response.headers["x-request-id"]
    assert engine.requests[0].header("x-request-id").startswith(request_id + "-")
    assert told(request)["inference_api.request_id"] == told(attempt)["inference_api.request_id"] == request_id
    assert served.lines[0]["request_id"] == request_id


async def test_no_span_has_a_prompt_a_completion_or_a_key(
    start_engine: Start, start_router: Start, spans: Spans
) -> None:
    async def echo(request: Received, line: Line) -> None:
        if b"refuse" in request.body:
            await line.send(json_response({"error": {"message": "s3cret completion"}}, "400 Bad Request"))
        else:
            await sse(event("s3cret completion"), then=Line.reset)(request, line)

    served = await start_router(
        await start_engine(echo),
        features=[spans.tracing],
        tokens={"TOKEN": "s3cret-key"},
        entry={"credentials": {"env": "TOKEN"}},
    )
    head = b"authorization: Bearer s3cret-key\r\ncookie: s3cret=1\r\nbaggage: a=s3cret\r\nuser-agent: s3cret\r\n"
    message = {"role": "user", "content": "s3cret prompt"}
    for body in (
        CHAT | {"messages": [message], "user": "refuse"},
        STREAM | {"messages": [message]},
        CHAT | {"messages": message},
        CHAT | {"messages": [message], "model": "s3cret"},
    ):
        await send(served, body, head, "/v1/chat/completions?api_key=s3cret-key")
    await spans.ended(4)

    assert "s3cret" not in "".join(span.to_json() for span in spans.all)


def test_the_page_tells_every_attribute_and_no_other() -> None:
    root = Path(__file__).parents[2]
    name = r"(?:error|gen_ai|http|inference_api|network|server|url)\.[a-z_.]+"
    code = (root / "inference_api/features/spans.py").read_text()
    rows = re.findall(r"^\| (`.*?) \|", (root / "docs/tracing.md").read_text(), re.MULTILINE)

    assert set(re.findall(f"`({name})`", " ".join(rows))) == set(re.findall(f'"({name})"', code))


# The end of the process


class Stuck(SpanProcessor):
    """A collector that takes nothing."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def shutdown(self) -> None:
        self.released.wait(30)


def test_a_collector_that_takes_nothing_does_not_keep_the_process(caplog: pytest.LogCaptureFixture) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    stuck = Stuck()
    provider.add_span_processor(stuck)
    with caplog.at_level(logging.WARNING):
        close = tracing(provider, timeout=0.05).close
        assert close is not None
        close()
    stuck.released.set()

    assert "the collector did not accept the last spans in time" in caplog.messages


async def test_what_is_done_with_a_stored_response_has_no_spans(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(raw(json_response({"id": "resp_1", "output": []})))
    engine.page = raw(json_response({"id": "resp_1"}))
    spans = Spans()
    served: Served = await start_router(engine, features=[spans.tracing])
    await served.client.post("/v1/responses", json={"model": "m", "input": "hello"})
    await until(lambda: served.lines)
    before = len(spans.all)

    answers = [
        await served.client.get("/v1/responses/resp_1"),
        await served.client.post("/v1/responses/resp_1/cancel"),
        await served.client.delete("/v1/responses/resp_1"),
    ]

    assert [answer.status_code for answer in answers] == [200] * 3
    assert len(spans.all) == before
