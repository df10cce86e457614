"""The attempt loop: choose a replica, send, classify what came, and repeat only where that is known to be safe."""

import asyncio
import random
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import httpx

from inference_api.errors import (
    NoBackend,
    Overloaded,
    RouterError,
    UpstreamProtocolError,
    UpstreamReset,
    UpstreamTimeout,
)
from inference_api.models import Call, Outcome, RawHeaders, Reply, Route
from inference_api.outbound.connection import Disconnected, IdleTimeout, TotalTimeout
from inference_api.outbound.rewrite import form_field, rewrite_json
from inference_api.outbound.transport import Request
from inference_api.routing.affinity import affinity_key
from inference_api.routing.backend import Backend, Model
from inference_api.routing.catalogue import CatalogueEntry

# Which foreign exception is which Outcome; the most specific comes first.
_OUTCOMES: tuple[tuple[type[Exception], Outcome], ...] = (
    (httpx.ConnectError, Outcome.CONNECT_FAILED),
    (httpx.ConnectTimeout, Outcome.CONNECT_FAILED),
    (TotalTimeout, Outcome.TOTAL_TIMEOUT),
    (IdleTimeout, Outcome.IDLE_TIMEOUT),
    (httpx.PoolTimeout, Outcome.SHED),
    (httpx.TimeoutException, Outcome.FIRST_BYTE_TIMEOUT),
    (httpx.ProtocolError, Outcome.PROTOCOL_ERROR),
    (httpx.TransportError, Outcome.RESET),
)


class Limits(NamedTuple):
    """Seconds and counts that hold for one call; a model's own timeouts come first."""

    connect: float = 2.0
    first_byte: float = 120.0
    idle: float = 120.0
    total: float = 590.0
    stream_total: float = 3600.0
    attempts: int = 2
    retry_on_status: frozenset[int] = frozenset({503})


class Failure(NamedTuple):
    """Why an attempt gave no answer, and whether another one may be made."""

    backend: Backend
    outcome: Outcome
    repeatable: bool
    # The connection had been idle and went away; its replica may be as well as ever.
    stale: bool = False
    # The replica took the request and said nothing; it may have executed it.
    silent: bool = False


def outcome_of(exc: BaseException) -> Outcome:
    """The Outcome of a request or a body that ended with `exc`."""
    for kind, outcome in _OUTCOMES:
        if isinstance(exc, kind):
            return outcome
    return Outcome.CLIENT_GONE


def classify(exc: httpx.TransportError, backend: Backend, route: Route) -> Failure:
    """Whether a failed attempt may be repeated; nothing has gone to the client yet.

    Not connected: the request was never sent. A reused connection that ends without a byte: the replica had closed it
    before the request came (of 257 such failures in a measurement, none had been executed). A fresh one that ends
    without a byte: the replica may have executed the request, so only where a second execution does no harm. Anything
    else may do harm.
    """
    outcome = outcome_of(exc)
    silent = isinstance(exc, Disconnected) and exc.received == 0
    stale = isinstance(exc, Disconnected) and silent and exc.reused
    repeatable = outcome is Outcome.CONNECT_FAILED or stale or (silent and route.repeatable)
    return Failure(backend, outcome, repeatable, stale, silent and not stale)


class Forward:
    """Takes a Call to a Reply. `on_attempt` hears how each attempt ended, at the end of its body."""

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        limits: Limits,
        on_attempt: Callable[[Backend, Outcome], None] = lambda backend, outcome: None,
        tokens: Mapping[str, str] = MappingProxyType({}),
        rand: random.Random | None = None,
    ) -> None:
        self._transport = transport
        self._limits = limits
        self._on_attempt = on_attempt
        self._tokens = tokens
        self._random_bits = (rand or random.Random()).getrandbits
        # Per model, for as long as its entry stays the same
        self._timeouts: dict[str, tuple[CatalogueEntry, dict[str, float]]] = {}

    async def __call__(self, call: Call, model: Model) -> Reply:
        """Raises RouterError when no attempt gave an answer. Whoever gets the Reply closes it."""
        common = self._common(call, model)
        tried: list[Backend] = []
        failure: Failure | None = None
        while len(tried) < self._limits.attempts:
            backend = _choose(call, model, tried, failure)
            if backend is None:
                break
            tried.append(backend)
            try:
                reply = await self._attempt(call, common, backend, len(tried))
            except httpx.TransportError as exc:
                before, failure = failure, classify(exc, backend, call.route)
                # Silence twice: perhaps it is the request that kills them.
                if not failure.repeatable or (failure.silent and before is not None and before.silent):
                    break
                continue
            if not self._worth_another(reply, model, tried):
                return reply
            failure = Failure(backend, Outcome.UPSTREAM_5XX, repeatable=True)
            await reply.aclose(Outcome.of_status(reply.status))
        raise _refusal(failure, model, tried)

    async def _attempt(self, call: Call, common: "_Common", backend: Backend, number: int) -> Reply:
        """Send to one replica. It has the call in flight from here to the end of the Reply."""
        url, target = backend.address(call.route.path)
        if call.query:
            target += b"?" + call.query
        # Engines key generations by the request id: every attempt has one that no other has.
        request_id = f"{call.request_id}-{self._random_bits(32):08x}".encode()
        own = [(b"host", backend.host), (b"x-request-id", request_id)]
        extensions = {
            "timeout": common.timeout,
            "deadline": common.deadline,
            "origin": backend.url,
            "target": target,
            "fresh": number > 1,
        }
        request = Request(url, own + common.headers, common.body, extensions)
        backend.in_flight += 1
        try:
            response = await self._transport.handle_async_request(request)
        except BaseException as exc:
            self._ended(backend, outcome_of(exc))
            raise
        return Reply(response.status_code, _raw(response), _body_of(response), backend, self._ended, number)

    def _common(self, call: Call, model: Model) -> "_Common":
        body = _body(call, model)
        total = self._limits.total
        if call.stream:
            total = self._limits.stream_total
        elif model.entry.timeouts.total is not None:
            total = model.entry.timeouts.total
        deadline = asyncio.get_running_loop().time() + total
        return _Common(body, self._headers(call, model, body), self._timeout(model), deadline)

    def _ended(self, backend: Backend, outcome: Outcome) -> None:
        backend.in_flight -= 1
        self._on_attempt(backend, outcome)

    def _worth_another(self, reply: Reply, model: Model, tried: list[Backend]) -> bool:
        if reply.status not in self._limits.retry_on_status or len(tried) >= self._limits.attempts:
            return False
        return any(backend not in tried for backend in model.available)

    def _headers(self, call: Call, model: Model, body: bytes) -> RawHeaders:
        headers = [(b"accept-encoding", b"identity"), (b"content-length", b"%d" % len(body)), *call.headers]
        credentials = model.entry.credentials
        if credentials is not None:
            if credentials == "passthrough":
                token = call.authorization
            else:
                value = self._tokens.get(credentials.env)
                # Set but empty is a secret that was not filled in; `Bearer ` alone would be refused by everybody.
                token = b"Bearer " + value.encode("latin-1", "ignore") if value else None
            if token is not None:
                headers.append((b"authorization", token))
        return headers

    def _timeout(self, model: Model) -> dict[str, float]:
        known = self._timeouts.get(model.name)
        if known is not None and known[0] is model.entry:
            return known[1]
        limits, own = self._limits, model.entry.timeouts
        timeout = {
            "connect": own.connect or limits.connect,
            "first_byte": own.first_byte or limits.first_byte,
            "idle": own.idle or limits.idle,
        }
        self._timeouts[model.name] = model.entry, timeout
        return timeout


class _Common(NamedTuple):
    """What is the same in all attempts of a call."""

    body: bytes
    headers: RawHeaders
    timeout: dict[str, float]
    deadline: float


def _choose(call: Call, model: Model, tried: list[Backend], failure: Failure | None) -> Backend | None:
    key = ""
    if model.entry.policy == "prefix_affinity":
        key = affinity_key(model.name, call.fields, call.session_id)
    backend = model.policy.choose(model.available, key, tried)
    if backend is None and failure is not None and failure.stale:
        return failure.backend
    return backend


def _body(call: Call, model: Model) -> bytes:
    # An alias is the router's word; the engine knows the model by its name.
    served = model.entry.served_model_name or model.name
    if served == call.model:
        return call.body
    if not call.route.multipart:
        return rewrite_json(call.body, served)
    content_type = next((value for name, value in call.headers if name == b"content-type"), b"")
    span = form_field(call.body, content_type, "model")
    return call.body if span is None else call.body[: span[0]] + served.encode() + call.body[span[1] :]


def _raw(response: httpx.Response) -> RawHeaders:
    raw = getattr(response, "raw_headers", None)
    return raw if raw is not None else [(name.lower(), value) for name, value in response.headers.raw]


def _body_of(response: httpx.Response) -> httpx.AsyncByteStream:
    stream = response.stream
    assert isinstance(stream, httpx.AsyncByteStream)
    return stream


def _refusal(failure: Failure | None, model: Model, tried: list[Backend]) -> RouterError:
    error = _error(failure, model, tried)
    error.attempts = len(tried)
    error.backend = tried[-1].label if tried else None
    return error


def _error(failure: Failure | None, model: Model, tried: list[Backend]) -> RouterError:
    if failure is None or failure.outcome is Outcome.CONNECT_FAILED:
        return NoBackend(model.name)
    outcome = failure.outcome
    if outcome is Outcome.SHED:
        return Overloaded("The router has no connection left for this request.", retry_after=1)
    if outcome in (Outcome.FIRST_BYTE_TIMEOUT, Outcome.IDLE_TIMEOUT, Outcome.TOTAL_TIMEOUT):
        # A repetition would cost another generation of the same length.
        return UpstreamTimeout("The model did not answer in time.", outcome, final=True)
    final = len(set(tried)) >= len(model.available)
    if outcome is Outcome.PROTOCOL_ERROR:
        return UpstreamProtocolError("The model's backend gave an answer that is not valid HTTP.", outcome, final=final)
    return UpstreamReset("The model's backend closed the connection before it answered.", outcome, final=final)
