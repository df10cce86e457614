"""How an attempt fails: the transport's exceptions, the Outcome of each, and which failures a repeat is safe after."""

from enum import StrEnum
from typing import NamedTuple

import httpx

from inference_api.models import Outcome, Reply, Route
from inference_api.routing.backend import Backend

# Seconds; a hundred round trips within a cluster, so that a busy event loop makes no difference.
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
        """Not one byte of a response came."""
        return self.received == 0

    @property
    def stale(self) -> bool:
        """The backend had closed the idle connection already when the request was written to it.

        The news of that takes a round trip. If it comes later, the backend had received the request.
        """
        return self.silent and self.reused and self.waited < _RACE


class Closed(httpx.ReadError):
    """The router itself closed the connection, before the response ended."""


class Malformed(httpx.RemoteProtocolError):
    """The backend did not speak HTTP/1.1."""


class FirstByteTimeout(httpx.ReadTimeout):
    """No response head within `first_byte` seconds."""


class IdleTimeout(httpx.ReadTimeout):
    """Nothing of the body for `idle` seconds, but signs of life."""


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
    for kind, outcome in _OUTCOMES:
        if isinstance(exc, kind):
            return outcome
    # A cancelled task is a client that left; any other exception is a defect of the router.
    return Outcome.INTERNAL_ERROR if isinstance(exc, Exception) else Outcome.CLIENT_GONE


class Reason(StrEnum):
    """Why an attempt is repeated."""

    CONNECT = "connect"
    STALE = "stale"
    RESET = "reset"
    STATUS = "status"


class Failure(NamedTuple):
    """An attempt that gave no answer, or one that another attempt may improve on."""

    backend: Backend
    outcome: Outcome
    # None: it may not be repeated
    reason: Reason | None
    # The repeat needs no permit. It was never sent, or its backend had no recent failures: a backend that dies takes
    # many requests with it at once, and to send them elsewhere moves load and adds none.
    free: bool
    # The backend had received the request and sent nothing; it may have executed it.
    silent: bool = False
    # An answer with one of the statuses that are tried again
    reply: Reply | None = None


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
