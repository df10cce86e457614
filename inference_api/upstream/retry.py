"""Decides whether a failed attempt is retried, after which pause, and on which backend. Sans-IO."""

import random
from collections.abc import Callable, Collection, Sequence
from enum import StrEnum
from time import monotonic, time
from typing import NamedTuple

from inference_api.errors import (
    NoBackend,
    Overloaded,
    RouterError,
    UpstreamProtocolError,
    UpstreamReset,
    UpstreamTimeout,
)
from inference_api.models import Call, Outcome, Reply
from inference_api.pace import back_off
from inference_api.routing.backend import Backend
from inference_api.routing.fleet import Model
from inference_api.routing.standing import SOON, no_backend, why_not
from inference_api.upstream.failures import Failure, Reason
from inference_api.upstream.limits import Limits
from inference_api.upstream.retry_guards import FREE, Permit, PoisonGuard, RetryAfter, RetryBudget, retry_after

# Seconds, the first and the longest; Envoy's.
_BACK_OFF = 0.025, 0.25


class Why(StrEnum):
    """The reason for which an attempt is not retried."""

    # The request may have been executed, or no attempt or backend is left.
    NEVER = "never"
    LATE = "late"
    BUDGET_EXHAUSTED = "budget_exhausted"
    POISON = "poison"

    @property
    def is_limit(self) -> bool:
        """Whether the SDK must not retry either."""
        return self in (Why.BUDGET_EXHAUSTED, Why.POISON)


class Retry(NamedTuple):
    """Retry after `delay` seconds. The caller releases the permit at the end of the next answer."""

    delay: float
    permit: Permit
    # A reused connection failed: the next attempt opens a new one.
    fresh: bool


class GiveUp(NamedTuple):
    """Do not retry. `final`: the answer must forbid the SDK to retry, too."""

    why: Why
    final: bool


class RetryPolicy:
    """Decides what follows a failure, and holds the state for that. Only failures use it.

    `rand` gives [0, 1), `clock` seconds, `wall` Unix seconds.
    """

    def __init__(
        self,
        limits: Limits,
        rand: Callable[[], float] = random.random,
        clock: Callable[[], float] = monotonic,
        wall: Callable[[], float] = time,
    ) -> None:
        self.retry_on_status = limits.retry_on_status
        self._attempts = limits.attempts
        self._rand = rand
        self._clock = clock
        self._wall = wall
        self.budget = RetryBudget(limits.retry_budget)
        self.poison_guard = PoisonGuard(clock)
        self.resting = RetryAfter()

    def busy(self, backend: Backend, reply: Reply) -> Failure:
        """The Failure for an answer with a retryable status, or None."""
        if reply.status in (429, 503):
            self.rest(backend, reply)
        return Failure(backend, Outcome.of_status(reply.status), Reason.STATUS, free=False, reply=reply)

    def rest(self, backend: Backend, reply: Reply) -> None:
        """Let the backend rest for as long as it asks."""
        seconds = retry_after(reply.headers, self._wall())
        if seconds:
            self.resting.pause(backend, seconds, self._clock())

    def decide(self, call: Call, model: Model, past: Sequence[Failure], left: float) -> Retry | GiveUp:
        """Decide what follows the last failure; `left`: seconds until the call's deadline.

        Draws the permit before the pause, so that waiting retries count.
        """
        failure, delay = past[-1], self._delay(model, past)
        why = self._why_not(call, model, past, left - delay)
        if why is not None:
            return self.give_up(model, past, why)
        permit = FREE if failure.free else self.budget.draw(model.name, model.in_flight)
        if permit is None:
            return self.give_up(model, past, Why.BUDGET_EXHAUSTED)
        return Retry(delay, permit, failure.reason in (Reason.STALE, Reason.RESET) and not failure.withdrawn)

    def give_up(self, model: Model, past: Sequence[Failure], why: Why) -> GiveUp:
        # A single busy backend may answer the next attempt.
        all_tried = not _others(model, past) and (past[-1].reply is None or len(past) > 1)
        return GiveUp(why, why.is_limit or all_tried)

    def choose(self, model: Model, key: str, past: Sequence[Failure]) -> Backend | None:
        """The backend for the next attempt. Use at once: choosing may claim the half-open probe."""
        failure = past[-1]
        tried = [failure.backend for failure in past]
        only = failure.reason is Reason.STATUS
        # Prefer backends without recent failures: backends often fail together.
        failing = [backend for backend in model.backends if backend.origin.failures]
        backend = self.rested(model, key, [*tried, *failing], only=True) or self.rested(model, key, tried, only)
        if backend is None and failure.reason is Reason.STALE:
            backend = failure.backend
        return backend

    def rested(self, model: Model, key: str, tried: Collection[Backend] = (), only: bool = False) -> Backend | None:
        """A backend without a Retry-After pause; if all pause, any of them, or None with `only`."""
        backend, resting = model.choose(key, tried), self.resting.paused(self._clock())
        if backend not in resting:
            return backend
        other = model.choose(key, [*tried, *resting])
        return backend if other is None and not only else other

    def _delay(self, model: Model, past: Sequence[Failure]) -> float:
        """Seconds until the next attempt.

        0 after a failure to connect, if another backend follows. After a busy backend others may be busy, too, and the
        same backend may be restarting: both need a pause.
        """
        if past[-1].reason is not Reason.STATUS and _others(model, past):
            return 0.0
        return back_off(len(past), *_BACK_OFF, self._rand())

    def _why_not(self, call: Call, model: Model, past: Sequence[Failure], left: float) -> Why | None:
        failure = past[-1]
        if self._is_poison(call, past):
            return Why.POISON
        if failure.reason is None or sum(not one.withdrawn for one in past) >= self._attempts:
            return Why.NEVER
        if failure.reason is Reason.STATUS and model.panic:
            return Why.NEVER  # the remaining backends are loaded enough
        resting = self.resting.paused(self._clock()) if failure.reason is Reason.STATUS else ()
        if failure.reason is not Reason.STALE and not _others(model, past, resting):
            return Why.NEVER
        return Why.LATE if left <= 0 else None

    def _is_poison(self, call: Call, past: Sequence[Failure]) -> bool:
        """Whether this request killed backends: after two that broke off silently, no other backend may get it."""
        failure = past[-1]
        if failure.silent:
            # An apparent end of an idle connection may have been the first death.
            scene = [failure.backend.label for failure in past if failure.silent or failure.reason is Reason.STALE]
            return self.poison_guard.record(call.body, scene)
        return failure.reason is Reason.STALE and self.poison_guard.is_poison(call.body)


def _others(model: Model, past: Sequence[Failure], resting: Collection[Backend] = ()) -> bool:
    """Whether the model has a backend that has not been tried."""
    tried = [failure.backend for failure in past]
    return any(backend not in tried and backend not in resting for backend in model.available)


def error_of(model: Model, past: Sequence[Failure], give_up: GiveUp, deadline: float | None = None) -> RouterError:
    """The error for the client if no attempt gave an answer; `deadline`: of the request."""
    if past[-1].withdrawn and give_up.why is not Why.LATE:
        gone = no_backend(model, monotonic())
        gone.deadline = deadline
        return gone
    error = _error(past[-1].outcome, model.name, give_up)
    if past[-1].outcome is Outcome.CONNECT_FAILED:
        causes = {failure.backend: failure.cause for failure in past if failure.cause is not None}
        error.logged = {"why": why_not(model, monotonic(), causes)}
    return error


def _error(outcome: Outcome, model: str, give_up: GiveUp) -> RouterError:
    why, final = give_up
    if why is Why.LATE:
        return UpstreamTimeout("The model did not answer in time.", Outcome.TOTAL_TIMEOUT, final=True)
    if outcome is Outcome.SHED:
        return Overloaded("The router has no connection left for this request.", retry_after=1)
    if outcome is Outcome.CONNECT_FAILED:
        # Nothing was executed: the SDK may retry after Retry-After, unless the budget is spent.
        return NoBackend(model, SOON, final=why.is_limit)
    if outcome in (Outcome.FIRST_BYTE_TIMEOUT, Outcome.IDLE_TIMEOUT, Outcome.TOTAL_TIMEOUT):
        # A retry would cost another generation of the same length.
        return UpstreamTimeout("The model did not answer in time.", outcome, final=True)
    if outcome is Outcome.PROTOCOL_ERROR:
        return UpstreamProtocolError("The model's backend gave an answer that is not valid HTTP.", outcome, final=final)
    return UpstreamReset("The model's backend closed the connection before it answered.", Outcome.RESET, final=final)
