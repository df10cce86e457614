"""The spans of a request: SERVER for the request, CLIENT for each attempt (docs/tracing.md has their attributes).

A layer begins the trace, each attempt sends its own `traceparent` to the backend, and the Record of the request ends
the spans. Names follow the HTTP and GenAI conventions. Spans contain no prompt, completion or key.
"""

import logging
import re
import threading
from collections.abc import Awaitable
from time import perf_counter, time_ns
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    Span,
    SpanKind,
    StatusCode,
    Tracer,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Receive, Scope, Send

from inference_api import __version__
from inference_api.feature import Feature
from inference_api.http.accounts import ACCOUNT
from inference_api.http.routes import INFERENCE_ROUTES, normal_path
from inference_api.members import request_state
from inference_api.models import Outcome, RawHeaders, Reply, Route
from inference_api.observe.account import Record
from inference_api.upstream.attempt import Attempt, SendAttempt
from inference_api.upstream.failures import outcome_of

logger = logging.getLogger(__name__)

_W3C = TraceContextTextMapPropagator()
# Key of the Trace in the state of a request.
_TRACE = "tracing"
_CLIENTS_CONTEXT = re.compile(rb"^trace(?:parent|state): [^\r]*\r\n", re.MULTILINE)
# gen_ai.operation.name of routes in the conventions; others use their label.
_OPERATIONS = {"chat_completions": "chat", "completions": "text_completion", "responses": "chat", "messages": "chat"}
_ROUTES = {route.path: route for route in INFERENCE_ROUTES}


def tracing(provider: TracerProvider, timeout: float = 5.0) -> Feature:
    """Makes spans with one provider, which is shut down at the end.

    `timeout`: seconds that shutdown waits for the collector; spans not accepted by then are lost.
    """
    tracer = provider.get_tracer("inference_api", __version__)

    def close() -> None:
        # The SDK waits for a fixed 30 s.
        closing = threading.Thread(target=provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(timeout)
        if closing.is_alive():
            logger.warning("the collector did not accept the last spans in time")

    return Feature(
        "tracing",
        layer=lambda app: _Layer(app, tracer),
        attempt=_attempt,
        record=_end,
        close=close,
    )


def otlp_provider() -> TracerProvider:
    """Export by OTLP over HTTP, on a thread of the SDK. Raises ValueError if the SDK rejects a variable."""
    # No log line per invalid header of a client; and a header that cannot be parsed would be logged with its key.
    for name in ("opentelemetry.trace", "opentelemetry.util"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ours = Resource.create({"service.name": "inference-api", "service.version": __version__})
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class _Layer:
    """Begins the Trace of an inference request, and adds its ids to the access line."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http" and scope["method"] == "POST":
            route = _ROUTES.get(normal_path(scope["path"]))
            if route is not None:
                trace = scope["state"][_TRACE] = Trace(self._tracer, route, scope)
                scope[ACCOUNT].extra = {**scope[ACCOUNT].extra, **trace.ids}
        return self._app(scope, receive, send)


def _attempt(send: SendAttempt) -> SendAttempt:
    """Give each attempt a span, and send its context to the backend in place of the client's."""

    async def traced(attempt: Attempt) -> Reply:
        trace: Trace | None = request_state(attempt.call.state).get(_TRACE)
        if trace is None:
            # Operations on stored responses are not inference, and have no spans.
            return await send(attempt)
        span = trace.begin(attempt)
        prepared = attempt.prepared
        lines = _CLIENTS_CONTEXT.sub(b"", prepared.lines) + span.lines
        try:
            reply = await send(attempt._replace(prepared=prepared._replace(lines=lines)))
        except BaseException as exc:
            trace.attempt_ended(span, outcome_of(exc))
            raise
        span.status = reply.status
        reply.on_end(lambda reply, outcome: trace.attempt_ended(span, outcome))
        return reply

    return traced


def _end(record: Record) -> None:
    """The sink: ends the spans of a request with the attributes of its Record."""
    trace: Trace | None = record.state.get(_TRACE)
    if trace is not None:
        trace.end(record)


class Trace:
    """The spans of one request: its own, and that of the attempt with the answer, which ends with it."""

    def __init__(self, tracer: Tracer, route: Route, scope: Scope) -> None:
        self._tracer = tracer
        self._operation = _OPERATIONS.get(route.label, route.label)
        self._began = scope[ACCOUNT].began
        self._attempts: list[AttemptSpan] = []
        self._has_ended = False
        attributes: dict[str, Any] = {
            "http.request.method": "POST",
            "http.route": route.path,
            "url.path": route.path,
            "url.scheme": "http",
            "network.protocol.version": scope["http_version"],
            "gen_ai.operation.name": self._operation,
        }
        if scope.get("server") is not None:
            attributes["server.address"], attributes["server.port"] = scope["server"]
        parent = _sent_context(scope["headers"])
        self._span = tracer.start_span(f"POST {route.path}", parent, SpanKind.SERVER, attributes)

    @property
    def ids(self) -> dict[str, str]:
        """`trace_id` and `span_id`, as in the access line."""

        context = self._span.get_span_context()
        return {"trace_id": format_trace_id(context.trace_id), "span_id": format_span_id(context.span_id)}

    def begin(self, attempt: Attempt) -> "AttemptSpan":
        """Begin the span of an attempt; those before it have ended, or run beside it."""

        call, model, backend = attempt.call, attempt.model, attempt.backend
        served = model.entry.served_model_name or model.name
        url = backend.address(call.route.path)[0]
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": self._operation,
            "gen_ai.provider.name": model.entry.engine,
            "gen_ai.request.model": served,
            "server.address": url.host,
            "server.port": url.port or (443 if url.scheme == "https" else 80),
            "inference_api.backend": backend.label,
            "inference_api.request_id": call.request_id,
        }
        if call.stream:
            attributes["gen_ai.request.stream"] = True
        if address := backend.url.partition("#")[2]:
            attributes["network.peer.address"] = address
        if attempt.number > 1:
            attributes["http.request.resend_count"] = attempt.number - 1
        inside = set_span_in_context(self._span, Context())
        span = self._tracer.start_span(f"{self._operation} {served}", inside, SpanKind.CLIENT, attributes)
        for before in self._attempts:
            before.close()
        self._attempts.append(AttemptSpan(span, perf_counter() - self._began, backend.label))
        return self._attempts[-1]

    def attempt_ended(self, attempt: "AttemptSpan", outcome: Outcome) -> None:
        """Note that the exchange with the backend has ended; that of a shadow may end after the request."""
        attempt.ended(outcome)
        if self._has_ended:
            attempt.close()

    def end(self, record: Record) -> None:
        """End all spans, with attributes from the Record."""
        self._has_ended = True
        # Of several that ran at once, the one whose answer the client got
        of_answer = [attempt for attempt in self._attempts if attempt.backend == record.backend] or self._attempts
        for attempt in self._attempts:
            attempt.close(record if attempt is of_answer[-1] else None)
        span = self._span
        if span.is_recording():
            attributes: dict[str, Any] = {
                "inference_api.request_id": record.request_id,
                "inference_api.outcome": record.outcome.value,
                "inference_api.attempts": record.attempts,
            }
            if record.model is not None:
                attributes["gen_ai.request.model"] = record.model.name
            if record.status:
                attributes["http.response.status_code"] = record.status
            first = _first(record)
            if first is not None:
                attributes["inference_api.time_to_first_token"] = first
            span.set_attributes(attributes)
            # HTTP conventions: a client's fault is not an error of the server span.
            fault = not 400 <= record.status < 500
            error_type = record.code or _error_type(record.outcome, record.status)
            _set_error(span, record.outcome, error_type, fault)
        span.end()


class AttemptSpan:
    """The CLIENT span of one attempt. That of the answer stays open until the Record."""

    def __init__(self, span: Span, began: float, backend: str) -> None:
        self._span = span
        self._began = began
        self.backend = backend
        self._ended_at: int | None = None
        self._outcome: Outcome | None = None
        self._closed = False
        self.status = 0

    @property
    def lines(self) -> bytes:
        """The context for the backend, as lines of a request head."""
        context = self._span.get_span_context()
        lines = b"traceparent: 00-%032x-%016x-%02x\r\n" % (context.trace_id, context.span_id, context.trace_flags)
        if context.trace_state:
            lines += b"tracestate: %b\r\n" % context.trace_state.to_header().encode("ascii")
        return lines

    def ended(self, outcome: Outcome) -> None:
        """Note that the exchange with the backend has ended."""
        self._outcome, self._ended_at = outcome, time_ns()

    def close(self, record: Record | None = None) -> None:
        """`record`: of the request, if this was its last attempt."""
        if self._closed or self._outcome is None:
            return
        self._closed = True
        span, outcome = self._span, self._outcome
        if span.is_recording():
            if self.status:
                span.set_attribute("http.response.status_code", self.status)
                if record is not None:
                    outcome = record.outcome
                    span.set_attributes(_usage_attributes(record, self._began))
            _set_error(span, outcome, _error_type(outcome, self.status), True)
        span.end(self._ended_at)


def _first(record: Record) -> float | None:
    return record.first if record.status < 300 else None


def _usage_attributes(record: Record, began: float) -> dict[str, Any]:
    """Attributes from the answer; never estimates. `began`: start of the attempt, in seconds of the request."""
    prompt, cached, completion, _ = record.tokens
    first = _first(record)
    found = {
        "gen_ai.response.time_to_first_chunk": None if first is None else first - began,
        "gen_ai.usage.input_tokens": prompt,
        "gen_ai.usage.output_tokens": completion,
        "gen_ai.usage.cache_read.input_tokens": cached,
    }
    return {name: value for name, value in found.items() if value is not None}


def _sent_context(headers: RawHeaders) -> Context:
    """The client's trace context; empty if missing or invalid."""

    parents = [value for name, value in headers if name == b"traceparent"]
    if len(parents) != 1:  # repeated headers are ambiguous
        return Context()
    state = b",".join(value for name, value in headers if name == b"tracestate")
    carrier = {"traceparent": parents[0].decode("latin-1"), "tracestate": state.decode("latin-1")}
    return _W3C.extract(carrier)


def _error_type(outcome: Outcome, status: int) -> str:
    return str(status) if outcome in (Outcome.UPSTREAM_4XX, Outcome.UPSTREAM_5XX) else outcome.value


def _set_error(span: Span, outcome: Outcome, error_type: str, fault: bool) -> None:

    if outcome is Outcome.OK:
        return
    span.set_attribute("error.type", error_type)
    # A client disconnect is not an error, either.
    if fault and outcome is not Outcome.CLIENT_GONE:
        span.set_status(StatusCode.ERROR)
