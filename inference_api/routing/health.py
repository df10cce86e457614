"""Decides which backends are available: circuit breaker, health checks, stall watchdog.

A backend is out while one of its circuits is not closed (`breaker`), or while its address fails health checks
(`prober`), sleeps (`engine_metrics`), or is stuck: it has requests and has sent no byte for a minute, even if /health
passes. A recovered backend starts slowly. `Model.available` is recomputed at every change; requests only read it.

There are two circuits. Attempts without an answer, and 502, 503 and 504, mean that the address cannot serve: a few in a
row open the circuit of the address, for all of its models. Requests or dialects may cause any other error: `faults`
decides whether the backend is at fault, and then opens the backend's own circuit.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Collection

from inference_api.models import Outcome
from inference_api.routing.backend import Backend, Origin, Override
from inference_api.routing.breaker import Breaker, Owner
from inference_api.routing.faults import DOWN, DOWN_STATUS, Faults
from inference_api.routing.fleet import Fleet, Model, first_share

logger = logging.getLogger(__name__)

# Failed checks in a row until a backend is out, passes in a row until it is back.
_OUT_AFTER, _IN_AFTER = 3, 2
# Requests in flight from which a backend is watched for silence.
_CROWD = 3
_USUAL_FIRST_BYTE = 120.0
# Seconds of slow start, from the initial part of the weight to all of it.
_SLOW_START = 30.0
# Seconds between attempts on a model's only backend while it refuses connections.
_SOLE_COOLDOWN = 1.0

_OK = Outcome.OK
# The address can serve. Outcomes neither here nor in DOWN are neutral: a client disconnect, or the total timeout.
_SERVED = frozenset({_OK, Outcome.UPSTREAM_4XX, Outcome.AUTH_FAILED})

# Outcomes shown as a backend's last error
_ERRORS = DOWN | {
    Outcome.PROTOCOL_ERROR, Outcome.UPSTREAM_5XX, Outcome.TRUNCATED, Outcome.ERROR_EVENT, Outcome.AUTH_FAILED,
}  # fmt: skip


def _loop_time() -> float:
    return asyncio.get_running_loop().time()


def _task() -> Owner:
    task = asyncio.current_task()
    assert task is not None
    return task


class Health:
    """Evaluates every attempt and every health check, and polls all backends once a second.

    `last_byte_at(url)`: time of the last byte from a backend, in seconds of `clock`. `connect`, `first_byte`: default
    timeouts in seconds. `owner()`: the current task; a request is one task from choice to end, which distinguishes the
    probe from other attempts. `rand` gives [0, 1). `stuck_after`: seconds without a byte, longer if the timeout of
    the first byte is longer.
    """

    def __init__(
        self,
        fleet: Fleet,
        breaker: Breaker,
        last_byte_at: Callable[[str], float],
        connect: float = 2.0,
        first_byte: float = 120.0,
        clock: Callable[[], float] = _loop_time,
        owner: Callable[[], Owner] = _task,
        rand: Callable[[], float] = random.random,
        poll_every: float = 1.0,
        stuck_after: float = 60.0,
    ) -> None:
        # Configuration
        self._fleet = fleet
        self._breaker = breaker
        self._poll_every = poll_every
        self._stuck_after = stuck_after
        self._last_byte_at = last_byte_at
        self._connect = connect
        self._first_byte = first_byte
        self._clock = clock
        self._owner = owner
        self._faults = Faults(fleet, breaker, rand, self._refresh_one, self._bring_back)
        # Attempts whose good answers count, too; time of the last poll
        self._samples = self._faults.samples
        self._polled: float | None = None
        fleet.protect(self)

    # Attempts

    def answered(self, backend: Backend, status: int) -> None:
        """Record the head of an answer."""
        if status >= 400 or backend.errors or backend.origin.failures or self._samples:
            self._answered(backend, status)

    def ended(self, backend: Backend, outcome: Outcome) -> None:
        """Record the end of an attempt, with or without an answer."""
        if outcome is not _OK or backend.errors or backend.origin.failures or self._samples:
            self._ended(backend, outcome)

    def _answered(self, backend: Backend, status: int) -> None:
        origin, owner = backend.origin, self._owner()
        if status in DOWN_STATUS:
            self._failed(origin, owner)
        elif origin.opened is not None:
            if status >= 500:
                # No result. Without this, one request after the other would be the probe.
                self._failed(origin, owner)
            elif self._breaker.succeeded(origin, owner):
                self._closed(origin)
        self._faults.answered(backend, owner, self._clock(), status)

    def _ended(self, backend: Backend, outcome: Outcome) -> None:
        origin, owner = backend.origin, self._owner()
        if outcome is Outcome.RESET and backend.is_out:
            # The router has ended it.
            outcome = Outcome.CLIENT_GONE
        if outcome in _ERRORS:
            backend.last_error = outcome, self._clock()
        if outcome in DOWN:
            self._failed(origin, owner, refused=outcome is Outcome.CONNECT_FAILED)
        elif outcome is Outcome.PROTOCOL_ERROR and origin.opened is not None:
            self._failed(origin, owner)
        elif outcome in _SERVED and self._breaker.succeeded(origin, owner):
            self._closed(origin)
        self._faults.ended(backend, owner, self._clock(), outcome)
        self._breaker.released(origin, owner)

    def _failed(self, origin: Origin, owner: Owner, refused: bool = False) -> None:
        if origin.asleep:
            # It is out without a failure; earlier attempts on it carry no new information.
            return
        was_closed = origin.opened is None
        if not self._breaker.failed(origin, self._clock(), owner):
            return
        origin.refused = refused
        self._refresh(origin)
        if was_closed:
            _log(logging.WARNING, "the circuit of a backend is open", origin, failures=origin.failures)

    def _closed(self, origin: Origin) -> None:
        self._come_back(origin)
        _log(logging.INFO, "the circuit of a backend is closed again", origin)

    # Choosing, while a circuit is not closed: Guard

    def choose(self, model: Model, key: str, tried: Collection[Backend]) -> Backend | None:
        now = self._clock()
        if len(model.awake) == 1:
            return self._choose_sole(model, model.awake[0], tried, now)
        if tried:
            # A retry becomes the probe only if no other backend is left.
            return model.balancer.choose(model.available, key, tried) or self._probe(model, tried, now)
        backend = self._probe(model, tried, now) or model.balancer.choose(model.available, key, tried)
        if backend is None or not backend.compared:
            return backend
        return self._faults.choose(model, key, backend, self._owner())

    def _probe(self, model: Model, tried: Collection[Backend], now: float) -> Backend | None:
        for backend in model.open:
            if now < backend.due:
                break
            if backend.origin.up and backend not in tried and self._take(backend, now):
                return backend
        return None

    def _take(self, backend: Backend, now: float) -> bool:
        """Make the request the probe of each circuit that is not closed; other models share that of the address."""
        owner, circuits = self._owner(), (backend.origin, backend.circuit)
        return all(self._breaker.take(circuit, now, owner) for circuit in circuits if circuit.opened is not None)

    def _choose_sole(self, model: Model, sole: Backend, tried: Collection[Backend], now: float) -> Backend | None:
        """A model's only backend is out only while it refuses connections, so that requests fail fast."""
        if sole in tried:
            return None
        origin = sole.origin
        if origin.opened is None or self._breaker.take(origin, now, self._owner(), _SOLE_COOLDOWN):
            return sole
        if not origin.refused:
            return sole
        # After the connect timeout, a running probe has its connection.
        connected = origin.probe is not None and now - origin.probed > (model.entry.timeouts.connect or self._connect)
        return sole if connected else None

    # Health checks

    def checked(self, origin: Origin, passed: bool) -> None:
        """Record the result of a health check."""
        if passed:
            origin.passed = self._clock()
            origin.streak = max(origin.streak, 0) + 1
        else:
            origin.streak = min(origin.streak, 0) - 1
        if origin.healthy and origin.streak <= -_OUT_AFTER:
            origin.healthy = False
            self._refresh(origin)
            _log(logging.WARNING, "a backend fails its health checks", origin, cause=origin.cause)
        elif not origin.healthy and origin.streak >= _IN_AFTER:
            origin.healthy = True
            self._come_back(origin)
            _log(logging.INFO, "a backend passes its health checks again", origin)

    # State that engines report

    def slept(self, origin: Origin, asleep: bool | None) -> None:
        """Record whether a backend sleeps; None: no report for long."""
        was, origin.asleep = origin.asleep, asleep
        if asleep and not was:
            # A sleeping backend is silent, not stuck.
            origin.stuck_since = None
            self._refresh(origin)
            _log(logging.INFO, "a backend is asleep", origin, in_flight=origin.in_flight)
        elif was and not asleep:
            self._come_back(origin)
            _log(logging.INFO, "a backend is awake again", origin, told=asleep is not None)

    def compared_name(self, backend: Backend, lacks: str | None) -> None:
        """Record what a backend serves instead of its model; None: it has the model, or is not asked any more."""
        was, backend.lacks = backend.lacks, lacks
        if lacks == was:
            return
        fields = {"model": backend.model, "backend": backend.label}
        if lacks is None:
            self._bring_back(backend)
            logger.info("a backend serves the model of its entry again", extra={"fields": fields})
        else:
            self._refresh_one(backend)
            logger.warning("a backend does not serve the model of its entry: it %s", lacks, extra={"fields": fields})

    # Orders of operators

    def administer(self, backend: Backend, override: Override | None) -> None:
        """Set what is ordered for a backend; None: nothing any more, and it returns with a slow start."""
        was, backend.override = backend.override, override
        if override is None:
            self._bring_back(backend)
        elif was is None:
            self._refresh_one(backend)

    def reset(self, backend: Backend) -> None:
        """Close the circuits of a backend, and forget its failures."""
        origin, circuit = backend.origin, backend.circuit
        was_open, was_aside = origin.opened is not None, circuit.opened is not None
        self._breaker.reset(origin)
        self._breaker.reset(circuit)
        origin.refused = False
        self._faults.forget(backend)
        backend.last_error = None
        if was_open:
            self._come_back(origin)
        elif was_aside:
            self._bring_back(backend)
        else:
            self._refresh_one(backend)

    # Once a second

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._poll_every)
            try:
                self.poll()
            except Exception:
                # The boundary of a background task: a failed poll must not end the next ones.
                logger.exception("polling the state of backends failed")

    def poll(self) -> None:
        """Find stuck and recovered backends, and raise the shares of backends in slow start."""
        now = self._clock()
        grown = 0.0 if self._polled is None else (now - self._polled) / _SLOW_START
        self._polled = now
        self._faults.poll(now)
        for origin in list(self._fleet.origins.values()):
            self._watch(origin, now)
        for model in self._fleet.models.values():
            growing = [backend for backend in model.backends if backend.share < 1.0]
            for backend in growing:
                backend.weigh(min(1.0, backend.share + grown))
            if growing:
                model.refresh(reweighed=True)

    def _watch(self, origin: Origin, now: float) -> None:
        if origin.in_flight - origin.sessions < _CROWD or origin.asleep:
            origin.crowded_since = None
        elif origin.crowded_since is None:
            origin.crowded_since = now
        if origin.stuck_since is not None:
            self._watch_stuck(origin, origin.stuck_since, now)
        elif origin.crowded_since is not None and self._is_silent(origin, origin.crowded_since, now):
            origin.stuck_since = now
            self._refresh(origin)
            _log(logging.WARNING, "a backend is stuck", origin, in_flight=origin.in_flight)

    def _is_silent(self, origin: Origin, crowded: float, now: float) -> bool:
        """Whether it has been silent for longer than the first-byte timeouts of all of its models."""
        since = max(crowded, self._last_byte_at(origin.url))
        if now - since < self._stuck_after:
            return False
        return now - since >= max(
            (self._longest_silence(model) for model in self._models(origin)), default=self._stuck_after
        )

    def _longest_silence(self, model: Model) -> float:
        return self._stuck_after * max(1.0, (model.entry.timeouts.first_byte or self._first_byte) / _USUAL_FIRST_BYTE)

    def _watch_stuck(self, origin: Origin, since: float, now: float) -> None:
        answered = self._last_byte_at(origin.url) > since
        if not answered:
            if origin.crowded_since is not None or origin.passed <= since:
                return
            # The waiting requests have timed out. It may have recovered; one request tries.
            self._breaker.suspect(origin, now)
        origin.stuck_since = None
        self._come_back(origin)
        _log(logging.INFO, "a backend is no longer stuck", origin, answered=answered)

    # What follows

    def _models(self, origin: Origin) -> list[Model]:
        models = [self._fleet.models.get(backend.model) for backend in origin.backends]
        return [model for model in models if model is not None]

    def _come_back(self, origin: Origin) -> None:
        """Clear one reason for being out; backends without another one return with a slow start."""
        for backend in origin.backends:
            self._bring_back(backend)

    def _bring_back(self, backend: Backend) -> None:
        model = self._fleet.models.get(backend.model)
        if model is not None and backend.usable:
            backend.weigh(first_share(model.entry.balancing))
        self._refresh_one(backend, reweighed=backend.usable)

    def _refresh(self, origin: Origin) -> None:
        for backend in origin.backends:
            self._refresh_one(backend)

    def _refresh_one(self, backend: Backend, reweighed: bool = False) -> None:
        model = self._fleet.models.get(backend.model)
        if model is None:
            return
        was_panic = model.panic
        backend.note(self._clock())
        model.refresh(reweighed)
        if model.panic and not was_panic:
            fields = {"model": model.name, "backends": len(model.backends)}
            logger.warning("more than half of a model's backends are out; all are used", extra={"fields": fields})


def _log(level: int, text: str, origin: Origin, **fields: object) -> None:
    """Log a change of an address once, with the first of its models."""
    models = [backend.model for backend in origin.backends]
    if len(models) > 1:
        fields = {"models": len(models), **fields}
    named = {"model": models[0], "backend": origin.label} if models else {"backend": origin.label}
    logger.log(level, text, extra={"fields": {**named, **fields}})
