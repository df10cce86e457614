"""The attempt loop: choose a backend, send, classify what came, and repeat only where that is known to be safe."""

import asyncio
import random
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from math import ceil
from time import monotonic, time
from types import MappingProxyType
from typing import NamedTuple

import httpx

from inference_api.errors import (
    NOT_AGAIN,
    NoBackend,
    Overloaded,
    RouterError,
    UpstreamProtocolError,
    UpstreamReset,
    UpstreamTimeout,
)
from inference_api.headers import header_lines
from inference_api.models import Call, Outcome, RawHeaders, Reply, Route
from inference_api.routing.backend import Backend, Model
from inference_api.routing.entries import CatalogueEntry
from inference_api.upstream.connection import Disconnected, IdleTimeout, Timeout, TotalTimeout
from inference_api.upstream.credentials import with_token
from inference_api.upstream.retry import FREE, Budget, Permit, PoisonGuard, RetryAfter, back_off, retry_after
from inference_api.upstream.rewrite import Content, replaced, rewrite_json, size_of
from inference_api.upstream.transport import Transport, request_head

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
    retry_budget: float = 0.2


class Reason(StrEnum):
    """Why an attempt is repeated."""

    CONNECT = "connect"
    STALE = "stale"
    RESET = "reset"
    STATUS = "status"


class GiveUp(StrEnum):
    """Why an attempt is not repeated."""

    # It may have been executed, or there is no attempt or no backend left.
    NEVER = "never"
    LATE = "late"
    BUDGET_EXHAUSTED = "budget_exhausted"
    POISON = "poison"


# What an SDK must not try again either, although it could.
_LIMITS_REACHED = (GiveUp.BUDGET_EXHAUSTED, GiveUp.POISON)


class Failure(NamedTuple):
    """Why an attempt did not give the answer, and whether another one may be made."""

    backend: Backend
    outcome: Outcome
    # None: it may not be repeated
    reason: Reason | None
    # It was never sent, or its backend was in good standing when it was: a backend that dies takes many requests with
    # it at once, and to send them elsewhere moves load and adds none.
    free: bool
    # The backend had the request in its hands and said nothing; it may have executed it.
    silent: bool = False
    # An answer after all, though not the one that is wanted
    reply: Reply | None = None


def outcome_of(exc: BaseException) -> Outcome:
    """The Outcome of a request or a body that ended with `exc`."""
    if isinstance(exc, Disconnected) and exc.stale:
        return Outcome.STALE
    for kind, outcome in _OUTCOMES:
        if isinstance(exc, kind):
            return outcome
    return Outcome.CLIENT_GONE


def classify(exc: httpx.TransportError, backend: Backend, route: Route, free: bool) -> Failure:
    """Whether a failed attempt may be repeated; nothing has gone to the client yet.

    Not connected: the request was never sent. A reused connection that ends at once and without a byte: the backend had
    closed it before the request came (of 257 such failures in a measurement, none had been executed). Any other that
    ends without a byte: the backend may have executed the request, so only where a second execution does no harm.
    Anything else may do harm.
    """
    outcome = outcome_of(exc)
    silent = isinstance(exc, Disconnected) and exc.silent and not exc.stale
    reason = None
    if outcome is Outcome.CONNECT_FAILED:
        reason, free = Reason.CONNECT, True
    elif outcome is Outcome.STALE:
        reason = Reason.STALE
    elif silent and route.repeatable:
        reason = Reason.RESET
    return Failure(backend, outcome, reason, free, silent)


class Forward:
    """Takes a Call to a Reply.

    `on_answer` hears the status of each answer at its head, `on_attempt` how each attempt ended at the end of its body,
    `on_retry` of each repeat, and of each that the budget or the poison guard forbids: the model's name, and the Reason
    or GiveUp. `clock` gives seconds, `wall` Unix seconds, `rand` is for ids and back-off.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        limits: Limits,
        on_attempt: Callable[[Backend, Outcome], None] = lambda backend, outcome: None,
        tokens: Mapping[str, str] = MappingProxyType({}),
        rand: random.Random | None = None,
        *,
        on_answer: Callable[[Backend, int], None] = lambda backend, status: None,
        on_retry: Callable[[str, str], None] = lambda model, reason: None,
        clock: Callable[[], float] = monotonic,
        wall: Callable[[], float] = time,
    ) -> None:
        self._transport = transport
        self._limits = limits
        self._on_attempt = on_attempt
        self._on_answer = on_answer
        self._on_retry = on_retry
        self._tokens = tokens
        self._rand = rand or random.Random()
        self._random_bits = self._rand.getrandbits
        self._clock = clock
        self._wall = wall
        # Per model, for as long as its entry stays the same
        self._timeouts: dict[str, tuple[CatalogueEntry, Timeout]] = {}
        # Shared by all calls, and touched only after a failure
        self._budget = Budget(limits.retry_budget)
        self._poison_guard = PoisonGuard(clock)
        self._retry_after = RetryAfter()

    async def __call__(self, call: Call, model: Model) -> Reply:
        """Raises RouterError when no attempt gave an answer. Whoever gets the Reply closes it.

        A CancelledError has as `attempt` which backend was tried last, and how many attempts there were.
        """
        common = self._common(call, model)
        backend = self._awake(model, common.key) if self._retry_after else model.choose(common.key)
        if backend is None:
            raise NoBackend(model.name, asleep=bool(model.backends) and not model.awake)
        failures = backend.origin.failures
        try:
            reply = await self._attempt(call, common, backend, 1, FREE, False)
        except httpx.TransportError as exc:
            failure = classify(exc, backend, call.route, not failures)
        else:
            if reply.status not in self._limits.retry_on_status:
                return reply
            failure = self._busy(reply)
        return await self._again(call, model, common, failure)

    async def _again(self, call: Call, model: Model, common: "_Common", failure: Failure) -> Reply:
        """What follows a first attempt that gave no answer, or one that may be repeated."""
        past: list[Failure] = []
        while True:
            past.append(failure)
            delay = self._delay(model, past)
            permit = self._permit(call, model, past, common.deadline - delay)
            if isinstance(permit, GiveUp):
                return self._give_up(model, past, permit)
            if delay:
                await _back_off(delay, past, permit)
            backend = self._next(model, common.key, past)
            if backend is None:
                permit.release()
                return self._give_up(model, past, GiveUp.NEVER)
            self._on_retry(model.name, str(failure.reason))
            failures = backend.origin.failures
            try:
                if failure.reply is not None:
                    await failure.reply.aclose(failure.outcome)
                # Lost to a connection once: not to that of another backend again.
                fresh = failure.reason in (Reason.STALE, Reason.RESET)
                reply = await self._attempt(call, common, backend, len(past) + 1, permit, fresh)
            except BaseException as exc:
                permit.release()
                if not isinstance(exc, httpx.TransportError):
                    raise
                failure = classify(exc, backend, call.route, not failures)
            else:
                if reply.status not in self._limits.retry_on_status:
                    return reply
                failure = self._busy(reply)

    async def _attempt(
        self,
        call: Call,
        common: "_Common",
        backend: Backend,
        number: int,
        permit: Permit,
        fresh: bool,
    ) -> Reply:
        """Send to one backend. It has the call in flight, and `permit` is drawn, until the Reply ends.

        `features.tracing` wraps this.
        """
        url, target = backend.address(call.route.path)
        if call.query:
            target += b"?" + call.query
        # Engines key generations by the request id: every attempt has one that no other has.
        request_id = f"{call.request_id}-{self._random_bits(32):08x}".encode()
        lines = b"host: %b\r\nx-request-id: %b\r\n%b" % (backend.host, request_id, common.lines)
        transport = self._transport
        stream: httpx.AsyncByteStream
        backend.in_flight += 1
        backend.origin.in_flight += 1
        try:
            if isinstance(transport, Transport):
                head = request_head("POST", target, lines)
                stream = await transport.send(
                    backend.url, url, head, common.body, common.timeout, common.deadline, fresh
                )
                status, headers = stream.status, stream.headers
            else:
                response = await transport.handle_async_request(_request(url, target, lines, common, fresh))
                status, stream = response.status_code, _body_of(response)
                headers = [(name.lower(), value) for name, value in response.headers.raw]
        except BaseException as exc:
            exc.attempt = backend.label, number  # type: ignore[attr-defined]
            self._count_end(backend, outcome_of(exc))
            raise
        self._on_answer(backend, status)
        reply = Reply(status, headers, stream, backend, self._ended, number)
        if permit is not FREE:
            reply.on_end(lambda reply, outcome: permit.release())
        return reply

    def _common(self, call: Call, model: Model) -> "_Common":
        body = _body(call, model)
        total = self._limits.total
        if call.stream:
            total = self._limits.stream_total
        elif model.entry.timeouts.total is not None:
            total = model.entry.timeouts.total
        # The clock of both event loops; to ask for the running one is a system call in Python 3.11.
        deadline = monotonic() + total
        size = len(body) if isinstance(body, bytes) else size_of(body)
        return _Common(body, self._lines(call, model, size), self._timeout(model), deadline, call.prefix)

    def _ended(self, reply: Reply, outcome: Outcome) -> None:
        assert reply.backend is not None
        self._count_end(reply.backend, outcome)

    def _count_end(self, backend: Backend, outcome: Outcome) -> None:
        backend.in_flight -= 1
        backend.origin.in_flight -= 1
        self._on_attempt(backend, outcome)

    # Only after a failure

    def _busy(self, reply: Reply) -> Failure:
        """The failure that an answer with one of the statuses is that may be retried."""
        assert reply.backend is not None
        seconds = retry_after(reply.headers, self._wall())
        if seconds and reply.status in (429, 503):
            self._retry_after.rest(reply.backend, seconds, self._clock())
        return Failure(reply.backend, Outcome.of_status(reply.status), Reason.STATUS, free=False, reply=reply)

    def _delay(self, model: Model, past: list[Failure]) -> float:
        """Seconds until the next attempt.

        None to another backend after a failure to reach the first: it has nothing to recover from, and the client
        waits. A busy one may say that all are, and the same one again may just be restarting.
        """
        if past[-1].reason is not Reason.STATUS and _others(model, past):
            return 0.0
        return back_off(len(past), self._rand.random())

    def _why_not(self, call: Call, model: Model, past: list[Failure], latest: float) -> GiveUp | None:
        """Why the last failure may not be repeated; `latest`: loop time until which it could be."""
        failure = past[-1]
        if self._is_poison(call, past):
            return GiveUp.POISON
        if failure.reason is None or len(past) >= self._limits.attempts:
            return GiveUp.NEVER
        if failure.reason is Reason.STATUS and model.panic:
            return GiveUp.NEVER  # what is left of the backends has enough to do
        resting = self._retry_after.at(self._clock()) if failure.reason is Reason.STATUS else ()
        if failure.reason is not Reason.STALE and not _others(model, past, resting):
            return GiveUp.NEVER
        return GiveUp.LATE if monotonic() >= latest else None

    def _permit(self, call: Call, model: Model, past: list[Failure], latest: float) -> Permit | GiveUp:
        """Leave to repeat the last failure. Drawn before the pause: those that wait are repeats, too, and count."""
        give_up = self._why_not(call, model, past, latest)
        if give_up is not None:
            return give_up
        if past[-1].free:
            return FREE
        return self._budget.draw(model.name, model.in_flight) or GiveUp.BUDGET_EXHAUSTED

    def _is_poison(self, call: Call, past: list[Failure]) -> bool:
        """Whether backends die of this very request: it must not meet another one. Silence twice is enough for that."""
        failure = past[-1]
        if failure.silent:
            # What looked like an idle connection's end was perhaps the first death.
            scene = [failure.backend.label for failure in past if failure.silent or failure.reason is Reason.STALE]
            return self._poison_guard.accuse(call.body, scene)
        return failure.reason is Reason.STALE and self._poison_guard.guilty(call.body)

    def _next(self, model: Model, key: str, past: list[Failure]) -> Backend | None:
        """Where the next attempt goes. To be used at once: a choice may be leave for a probe."""
        failure = past[-1]
        tried = [failure.backend for failure in past]
        only = failure.reason is Reason.STATUS
        # Backends often die together; one that has been failing is not what this request needs now.
        failing = [backend for backend in model.backends if backend.origin.failures]
        backend = self._awake(model, key, [*tried, *failing], only=True) or self._awake(model, key, tried, only)
        if backend is None and failure.reason is Reason.STALE:
            backend = failure.backend
        return backend

    def _awake(self, model: Model, key: str, tried: Collection[Backend] = (), only: bool = False) -> Backend | None:
        """A backend that does not rest; if all do, any: none said that it is out. `only`: then None."""
        backend, resting = model.choose(key, tried), self._retry_after.at(self._clock())
        if backend not in resting:
            return backend
        other = model.choose(key, [*tried, *resting])
        return backend if other is None and not only else other

    def _give_up(self, model: Model, past: list[Failure], why: GiveUp) -> Reply:
        """The answer that could not be improved on. Raises RouterError if there is none."""
        if why in _LIMITS_REACHED:
            self._on_retry(model.name, str(why))
        failure, all_tried = past[-1], not _others(model, past)
        if failure.reply is None:
            raise _error(model, past, why, why in _LIMITS_REACHED or all_tried)
        headers = failure.reply.headers
        if why in _LIMITS_REACHED or (all_tried and len(past) > 1):
            headers[:] = [pair for pair in headers if pair[0] != NOT_AGAIN[0]] + [NOT_AGAIN]
        self._hasten(failure.reply, model)
        return failure.reply

    def _hasten(self, reply: Reply, model: Model) -> None:
        """If all backends rest, the client may come back when the first of them is ready."""
        now, own = self._clock(), retry_after(reply.headers, self._wall())
        others = [backend for backend in model.available if backend is not reply.backend]
        resting = self._retry_after.at(now)
        if own is None or not others or any(backend not in resting for backend in others):
            return
        least = ceil(min(self._retry_after[backend] for backend in others) - now)
        if least < own:
            hint = (b"retry-after", b"%d" % max(least, 1))
            reply.headers[:] = [pair for pair in reply.headers if pair[0] != hint[0]] + [hint]

    def _lines(self, call: Call, model: Model, size: int) -> bytes:
        lines = call.lines
        if model.entry.priority != "client":
            lines = _prioritised(call.headers, model.entry.priority)
        elif lines is None:
            lines = header_lines(call.headers)
        lines = b"accept-encoding: identity\r\ncontent-length: %d\r\n%b" % (size, lines)
        credentials = model.entry.credentials
        if credentials is not None:
            if credentials == "passthrough":
                if call.authorization is not None:
                    lines += header_lines([(b"authorization", call.authorization)])
            else:
                lines = with_token(lines, credentials, self._tokens.get(credentials.source))
        return lines

    def _timeout(self, model: Model) -> Timeout:
        known = self._timeouts.get(model.name)
        if known is not None and known[0] is model.entry:
            return known[1]
        limits, own = self._limits, model.entry.timeouts
        timeout = Timeout(own.connect or limits.connect, own.first_byte or limits.first_byte, own.idle or limits.idle)
        self._timeouts[model.name] = model.entry, timeout
        return timeout


class _Common(NamedTuple):
    """What is the same in all attempts of a call."""

    body: Content
    lines: bytes
    timeout: Timeout
    deadline: float
    # For the balancer, see routing.affinity
    key: str


def _body(call: Call, model: Model) -> Content:
    # An alias is the router's word; the engine knows the model by its name.
    served = model.entry.served_model_name or model.name
    if served == call.model:
        return call.body
    if not call.route.multipart:
        return rewrite_json(call.body, served, call.model_at)
    return call.body if call.model_at is None else replaced(call.body, call.model_at, served.encode())


def _prioritised(headers: RawHeaders, priority: str | int) -> bytes:
    """vLLM goes by the header rather than by the body's `priority`, so no byte of that need change."""
    # Without API keys every caller is as urgent as any other.
    own = (b"x-vllm-priority", b"%d" % (priority if isinstance(priority, int) else 0))
    return header_lines([own, *(pair for pair in headers if pair[0] != own[0])])


def _request(url: httpx.URL, target: bytes, lines: bytes, common: _Common, fresh: bool) -> httpx.Request:
    """The same request for a transport that is not ours."""
    headers = [tuple(line.split(b": ", 1)) for line in lines.split(b"\r\n")[:-1]]
    extensions = {
        "timeout": common.timeout._asdict(),
        "deadline": common.deadline,
        "target": target,
        "fresh": fresh,
    }
    body = b"".join(common.body) if isinstance(common.body, tuple) else common.body
    return httpx.Request("POST", url, headers=headers, content=body, extensions=extensions)  # type: ignore[arg-type]


def _body_of(response: httpx.Response) -> httpx.AsyncByteStream:
    stream = response.stream
    assert isinstance(stream, httpx.AsyncByteStream)
    return stream


def _others(model: Model, past: list[Failure], resting: Collection[Backend] = ()) -> bool:
    """Whether the model has a backend that has not been tried."""
    tried = [failure.backend for failure in past]
    return any(backend not in tried and backend not in resting for backend in model.available)


async def _back_off(delay: float, past: list[Failure], permit: Permit) -> None:
    try:
        await asyncio.sleep(delay)
    except BaseException as exc:
        permit.release()
        failure = past[-1]
        exc.attempt = failure.backend.label, len(past)  # type: ignore[attr-defined]
        if failure.reply is not None:
            await failure.reply.aclose(failure.outcome)
        raise


def _error(model: Model, past: list[Failure], why: GiveUp, final: bool) -> RouterError:
    failure = past[-1]
    error = _error_of(failure.outcome, model.name, why, final)
    error.attempts = len(past)
    error.backend = failure.backend.label
    return error


def _error_of(outcome: Outcome, model: str, why: GiveUp, final: bool) -> RouterError:
    if why is GiveUp.LATE:
        return UpstreamTimeout("The model did not answer in time.", Outcome.TOTAL_TIMEOUT, final=True)
    if outcome is Outcome.SHED:
        return Overloaded("The router has no connection left for this request.", retry_after=1)
    if outcome is Outcome.CONNECT_FAILED:
        # Nothing was executed, and Retry-After says when it may work; unless it is repeats that there are too many of.
        return NoBackend(model, final=why in _LIMITS_REACHED)
    if outcome in (Outcome.FIRST_BYTE_TIMEOUT, Outcome.IDLE_TIMEOUT, Outcome.TOTAL_TIMEOUT):
        # A repetition would cost another generation of the same length.
        return UpstreamTimeout("The model did not answer in time.", outcome, final=True)
    if outcome is Outcome.PROTOCOL_ERROR:
        return UpstreamProtocolError("The model's backend gave an answer that is not valid HTTP.", outcome, final=final)
    return UpstreamReset("The model's backend closed the connection before it answered.", Outcome.RESET, final=final)
