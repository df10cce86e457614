"""Failures of an attempt: the transport's exceptions, the Outcome of each, and whether a retry is safe."""

from enum import StrEnum
from typing import NamedTuple

import httpx

from inference_api.errors import RouterError
from inference_api.models import CLIENT_GONE, LOST, Outcome, Reply, Route
from inference_api.routing.backend import Backend
from inference_api.routing.causes import cause_of

# Seconds; a hundred round trips within a cluster, to allow for a busy event loop.
_RACE = 1.0


class Disconnected(httpx.ReadError):
    """The connection ended before the response did, `waited` seconds after the request or the response's last byte."""

    def __init__(self, message: str, *, received: int, reused: bool, waited: float = 0.0) -> None:
        super().__init__(message)
        self.received = received
        self.reused = reused
        self.waited = waited

    @property
    def silent(self) -> bool:
        """No byte of a response arrived."""
        return self.received == 0

    @property
    def stale(self) -> bool:
        """The backend had closed the idle connection before the request was written to it.

        The FIN or RST then arrives within a round trip. If it arrives later, the backend had received the request.
        """
        return self.silent and self.reused and self.waited < _RACE


class Closed(httpx.ReadError):
    """The router itself closed the connection, before the response ended."""


class Withdrawn(httpx.ReadError):
    """An operator has taken the backend out: the router itself ended what was in flight there."""


class Malformed(httpx.RemoteProtocolError):
    """The backend did not speak HTTP/1.1."""


class FirstByteTimeout(httpx.ReadTimeout):
    """No response head within `first_byte` seconds."""


class IdleTimeout(httpx.ReadTimeout):
    """No byte of the body for `idle` seconds, except heartbeats."""


class TotalTimeout(httpx.ReadTimeout):
    """The `deadline` passed."""


# The most specific exception comes first.
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


def outcome_of(exc: BaseException) -> Outcome:
    """The Outcome of a request or a body that ended with `exc`."""
    if isinstance(exc, Disconnected) and exc.stale:
        return Outcome.STALE
    if isinstance(exc, RouterError):
        return exc.outcome
    for kind, outcome in _OUTCOMES:
        if isinstance(exc, kind):
            return outcome
    if isinstance(exc, Exception):
        # A defect of the router
        return Outcome.INTERNAL_ERROR
    # A cancelled task means that the client disconnected, or that another answer was taken: see `models.LOST`.
    return LOST.get(exc.args[0], CLIENT_GONE) if exc.args else CLIENT_GONE


class Reason(StrEnum):
    """The reason for a retry."""

    CONNECT = "connect"
    STALE = "stale"
    RESET = "reset"
    STATUS = "status"


class Failure(NamedTuple):
    """An attempt without an answer, or with one that may be retried."""

    backend: Backend
    outcome: Outcome
    # None: not retryable
    reason: Reason | None
    # The retry needs no permit: the request was never sent, or its backend had no recent failures. A backend that
    # dies fails many requests at once, and retrying them elsewhere moves load without adding any.
    free: bool
    # The backend received the request, may have executed it, and sent no byte.
    silent: bool = False
    # An answer with a status of RETRY_ON_STATUS
    reply: Reply | None = None
    # Why there was no connection, in the system's words
    cause: str | None = None
    # An operator has taken the backend out: the attempt counts as none.
    withdrawn: bool = False


def classify(exc: httpx.TransportError, backend: Backend, route: Route, free: bool) -> Failure:
    """Decide whether a failed attempt may be retried; the client has received nothing yet.

    Not connected: yes, the request was never sent. A reused connection that ends at once without a byte: yes, the
    backend had closed it before (of 257 such failures measured, none was executed). Any other end without a byte: only
    on routes where a second execution does no harm, since the backend may have executed it. Otherwise: no.

    If an operator took the backend out, always: that order says that another one is to have the request.
    """
    outcome = outcome_of(exc)
    if isinstance(exc, Withdrawn):
        return Failure(backend, outcome, Reason.RESET, free=True, withdrawn=True)
    silent = isinstance(exc, Disconnected) and exc.silent and not exc.stale
    if outcome is Outcome.CONNECT_FAILED:
        return Failure(backend, outcome, Reason.CONNECT, free=True, cause=cause_of(exc))
    reason = None
    if outcome is Outcome.STALE:
        reason = Reason.STALE
    elif silent and route.repeatable:
        reason = Reason.RESET
    return Failure(backend, outcome, reason, free, silent)
