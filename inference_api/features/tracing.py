"""Traces by OpenTelemetry, the extra `otel`: a SERVER span for each inference request, a CLIENT span for each attempt.

Loaded only where traces are asked for, and attached from outside, so that it costs nothing elsewhere: a layer around
each inference route begins the trace, an Accounts ends it with what it saw, and a wrapper of the attempt seam gives
each attempt a span, and a `traceparent`, of its own. The names are those of the HTTP and GenAI conventions
(docs/tracing.md). Nothing of a prompt, a completion or a key gets into a span.
"""

import logging
import re
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from time import perf_counter
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
from typing_extensions import override

from inference_api import __version__
from inference_api.models import Call, Outcome, RawHeaders, Reply, Route
from inference_api.observe.accounts import Account, Accounts, Client
from inference_api.observe.log import Fields
from inference_api.observe.metrics import Metrics
from inference_api.relay.usage import Counts, usage_of
from inference_api.routing.backend import Backend, Model
from inference_api.upstream.attempt import Attempt, SendAttempt
from inference_api.upstream.failures import outcome_of

logger = logging.getLogger(__name__)

# Seconds that the end of the process waits for the collector.
_PATIENCE = 5.0
_W3C = TraceContextTextMapPropagator()
_CLIENTS_CONTEXT = re.compile(rb"^trace(?:parent|state): [^\r]*\r\n", re.MULTILINE)
# gen_ai.operation.name where the conventions have a word for what a route does; its label elsewhere.
_OPERATIONS = {"chat_completions": "chat", "completions": "text_completion", "responses": "chat", "messages": "chat"}

# Set by TracedRoute, in the task of the request.
_current: ContextVar["Trace"] = ContextVar("trace")


class Tracing:
    """Spans of one TracerProvider, and the three places where they attach."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("inference_api", __version__)

    def layer(self, app: ASGIApp, route: Route) -> ASGIApp:
        """Around an inference route."""
        return TracedRoute(self._tracer, app, route)

    def accounts(self, metrics: Metrics, access_log: Callable[[Fields], None] | None) -> Accounts:
        """For what is inside the layer."""
        return TracedObserver(metrics, access_log)

    def attempts(self, send: SendAttempt) -> SendAttempt:
        """Around each attempt."""
        return TracedAttempts(send)

    def close(self, seconds: float = _PATIENCE) -> None:
        """Send what has not been sent; what the collector does not take within `seconds` is lost."""
        # The SDK would wait for 30 s, and take no other time.
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(seconds)
        if closing.is_alive():
            logger.warning("the collector did not take the last spans in time")


def otlp_tracing() -> Tracing:
    """Spans that a thread of the SDK sends by OTLP over HTTP, as OpenTelemetry's variables say.

    Raises ValueError if it refuses one of them.
    """
    # What a client sends is not worth a line each; and a header that cannot be read would be logged with its key.
    for name in ("opentelemetry.trace", "opentelemetry.util"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ours = Resource.create({"service.name": "inference-api", "service.version": __version__})
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


class Trace:
    """The spans of one request."""

    __slots__ = ("_attempt", "_operation", "_span", "_tracer", "model")

    def __init__(self, tracer: Tracer, route: Route, scope: Scope) -> None:
        self._tracer = tracer
        self._operation = _OPERATIONS.get(route.label, route.label)
        self._attempt: AttemptSpan | None = None
        self.model: Model | None = None
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
        """`trace_id` and `span_id` as the access line has them."""
        context = self._span.get_span_context()
        return {"trace_id": format_trace_id(context.trace_id), "span_id": format_span_id(context.span_id)}

    def attempt(self, call: Call, backend: Backend, number: int) -> "AttemptSpan":
        """Begin an attempt; the one before it has ended."""
        model = self.model
        assert model is not None
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
        if number > 1:
            attributes["http.request.resend_count"] = number - 1
        inside = set_span_in_context(self._span, Context())
        span = self._tracer.start_span(f"{self._operation} {served}", inside, SpanKind.CLIENT, attributes)
        self._attempt = AttemptSpan(span)
        return self._attempt

    def relaying(self) -> None:
        """The last attempt gave the answer."""
        if self._attempt is not None:
            self._attempt.relayed = True

    def end(self, seen: "TracedObservation", outcome: Outcome) -> None:
        if self._attempt is not None:
            self._attempt.close(outcome, seen)
        span = self._span
        if span.is_recording():
            attributes: dict[str, Any] = {
                "inference_api.request_id": seen.request_id,
                "inference_api.outcome": outcome.value,
                "inference_api.attempts": seen.attempts,
            }
            if self.model is not None:
                attributes["gen_ai.request.model"] = self.model.name
            if seen.status:
                attributes["http.response.status_code"] = seen.status
            if seen.first is not None:
                attributes["inference_api.time_to_first_token"] = seen.first
            span.set_attributes(attributes)
            # The conventions for HTTP: what a client did wrong is no error of the server.
            fault = not 400 <= seen.status < 500
            _set_error(span, outcome, seen.code or _error_type(outcome, seen.status), fault)
        span.end()


class AttemptSpan:
    """The CLIENT span of one attempt. That of the answer is closed with its request, when all is known."""

    __slots__ = ("_began", "_closed", "_span", "relayed", "status")

    def __init__(self, span: Span) -> None:
        self._span = span
        self._began = perf_counter()
        self._closed = False
        self.status = 0
        self.relayed = False

    @property
    def lines(self) -> bytes:
        """The context that the backend gets, as lines of a request head."""
        context = self._span.get_span_context()
        lines = b"traceparent: 00-%032x-%016x-%02x\r\n" % (context.trace_id, context.span_id, context.trace_flags)
        if context.trace_state:
            lines += b"tracestate: %b\r\n" % context.trace_state.to_header().encode("ascii")
        return lines

    def ended(self, outcome: Outcome) -> None:
        """The backend has nothing to do with the request any more."""
        if not self.relayed:
            self.close(outcome)

    def close(self, outcome: Outcome, seen: "TracedObservation | None" = None) -> None:
        """`seen`: what came of the request, if this was its last attempt."""
        if self._closed:
            return
        self._closed = True
        span = self._span
        if span.is_recording():
            if self.status:
                span.set_attribute("http.response.status_code", self.status)
            if seen is not None:
                span.set_attributes(seen.usage_attributes(self._began))
            _set_error(span, outcome, _error_type(outcome, self.status), True)
        span.end()


class TracedRoute:
    """The ASGI layer that begins a Trace, for whatever the task of the request calls."""

    def __init__(self, tracer: Tracer, app: ASGIApp, route: Route) -> None:
        self._tracer = tracer
        self._app = app
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _current.set(Trace(self._tracer, self._route, scope))
        await self._app(scope, receive, send)


class TracedObserver(Accounts):
    """Its Observations end the trace of the request."""

    @override
    def begin(self, route: str, client: Client | None = None) -> Account:
        return TracedObservation(self, route, client, _current.get())


class TracedObservation(Account):
    """An Account that knows the trace: the access line gets its ids, and the trace gets what was seen.

    `first`: seconds to the first token of a streamed answer, if it was no error.
    """

    __slots__ = ("_trace", "first")

    def __init__(self, accounts: Accounts, route: str, client: Client | None, trace: Trace) -> None:
        super().__init__(accounts, route, client)
        self._trace = trace
        self.first: float | None = None

    @override
    def resolved(self, model: Model, tried: Sequence[Backend] = ()) -> None:
        self._trace.model = model
        super().resolved(model, tried)

    @override
    def answered(self, reply: Reply) -> None:
        self._trace.relaying()
        super().answered(reply)

    @override
    def end(self, outcome: Outcome) -> None:
        try:
            super().end(outcome)
        finally:
            self._trace.end(self, outcome)

    @override
    def _count_tokens(self, took: float, first: float | None) -> Counts:
        self.first = first if self.status < 300 else None
        return super()._count_tokens(took, first)

    @override
    def _line(self, outcome: Outcome, status: int, took: float, first: float | None, tokens: Counts) -> Fields:
        line = super()._line(outcome, status, took, first, tokens)
        line.update(self._trace.ids)
        return line

    def usage_attributes(self, began: float) -> dict[str, Any]:
        """What is known at the end of the answer to an attempt that began then (by the clock); never an estimate."""
        attributes: dict[str, Any] = {}
        if self.first is not None:
            attributes["gen_ai.response.time_to_first_chunk"] = self._first - began
        usage = usage_of(self.usage or {})
        if usage.input_tokens is not None:
            attributes["gen_ai.usage.input_tokens"] = usage.input_tokens
        if usage.output_tokens is not None:
            attributes["gen_ai.usage.output_tokens"] = usage.output_tokens
        if usage.cached_input_tokens is not None:
            attributes["gen_ai.usage.cache_read.input_tokens"] = usage.cached_input_tokens
        return attributes


class TracedAttempts:
    """A SendAttempt whose attempts have spans, and carry their context to the backend in place of the client's."""

    def __init__(self, send: SendAttempt) -> None:
        self._send = send

    async def __call__(self, attempt: Attempt) -> Reply:
        span = _current.get().attempt(attempt.call, attempt.backend, attempt.number)
        prepared = attempt.prepared
        lines = _CLIENTS_CONTEXT.sub(b"", prepared.lines) + span.lines
        try:
            reply = await self._send(attempt._replace(prepared=prepared._replace(lines=lines)))
        except BaseException as exc:
            span.ended(outcome_of(exc))
            raise
        span.status = reply.status
        reply.on_end(lambda reply, outcome: span.ended(outcome))
        return reply


def _sent_context(headers: RawHeaders) -> Context:
    """The client's place in a trace; empty if it sent none, or none that is sound."""
    parents = [value for name, value in headers if name == b"traceparent"]
    if len(parents) != 1:  # of two, neither can be believed
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
    # Nor is it anybody's fault when a client leaves.
    if fault and outcome is not Outcome.CLIENT_GONE:
        span.set_status(StatusCode.ERROR)
