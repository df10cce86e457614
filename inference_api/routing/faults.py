"""Decides the effect of errors that a backend gives and the model's other backends do not.

An error in an answer may be the fault of the request, or not be an error at all. There are two effects.

At once: a backend that answers with errors is faster than a working one, and looks idle. If it recently gave more
errors than the others, the excess counts as requests in flight.

After several errors in a row it is compared with the others (`comparison`). If the backend is at fault, its own circuit
opens, for this model alone: a backend may lack one adapter, or refuse one key, and serve everything else.
"""

import logging
from collections.abc import Callable
from math import sqrt

from inference_api.models import AUTH_FAILED, OK, Outcome
from inference_api.routing.backend import Backend
from inference_api.routing.breaker import Breaker, Owner
from inference_api.routing.comparison import Comparisons, Fault
from inference_api.routing.fleet import Fleet, Model

logger = logging.getLogger(__name__)

# Errors in a row that start a comparison.
_SUSPICIOUS = 3
# Seconds until the next comparison, if the requests were at fault: it costs a few requests their prefix caches.
_PAUSE = 10.0

# Decay of recent errors per second, so that they last for about half a minute. Less than one counts as none.
_FADING = 0.967
# Excess that chance explains: errors, and standard deviations of the common rate.
_CHANCE, _DEVIATIONS = 8, 3.0
# With more backends, the excess is computed once a second, not at every error.
_MANY = 64

# Errors that are not a status, or that a status does not show.
_LATE = frozenset({Outcome.PROTOCOL_ERROR, Outcome.TRUNCATED, Outcome.ERROR_EVENT})
# The address cannot serve: no answer, or one of these. The circuit of the address counts them, see `health`.
DOWN_STATUS = frozenset({502, 503, 504})
DOWN = frozenset({Outcome.CONNECT_FAILED, Outcome.RESET, Outcome.FIRST_BYTE_TIMEOUT, Outcome.IDLE_TIMEOUT})


class Faults:
    """Gets errors, and good answers while it needs them.

    `out` gets each backend whose circuit opens or reopens, `back` each whose circuit closes.
    """

    def __init__(
        self,
        fleet: Fleet,
        breaker: Breaker,
        rand: Callable[[], float],
        out: Callable[[Backend], None],
        back: Callable[[Backend], None],
    ) -> None:
        self._fleet = fleet
        self._breaker = breaker
        self._out = out
        self._back = back
        # Models with recent errors
        self._recent: set[Model] = set()
        self._comparisons = Comparisons(rand)
        # While there are any, good answers are reported, too.
        self.samples = self._comparisons.samples

    def answered(self, backend: Backend, owner: Owner, now: float, status: int) -> None:
        if status in DOWN_STATUS:
            self._failed(backend, owner, now)
        elif status >= 400:
            self._bad(backend, owner, now, refused=status < 500, late=False)
        else:
            self._good(backend, owner, now, complete=False)

    def ended(self, backend: Backend, owner: Owner, now: float, outcome: Outcome) -> None:
        if outcome is OK:
            self._good(backend, owner, now, complete=True)
        elif outcome in _LATE:
            self._bad(backend, owner, now, refused=False, late=True)
        elif outcome in DOWN:
            self._failed(backend, owner, now)
        elif outcome is AUTH_FAILED:
            # Only an operator can mend that, so no circuit opens; where others answer, they get more of the traffic.
            self._count(backend)
        self.samples.pop(owner, None)
        self._breaker.released(backend.circuit, owner)

    def choose(self, model: Model, key: str, backend: Backend, owner: Owner) -> Backend:
        """The backend for a request that the balancer gave to `backend`, which is being compared."""

        def other() -> Backend | None:
            return model.balancer.choose(model.available, key, [one for one in model.backends if one.compared])

        return self._comparisons.assign(backend, other, owner)

    def forget(self, backend: Backend) -> None:
        """Forget all errors of a backend."""
        if backend.compared:
            self._comparisons.end(backend)
        _forget(backend)
        backend.recent, backend.extra, backend.spared_until = 0.0, 0, 0.0

    def poll(self, now: float) -> None:
        """Once a second: decay recent errors, and end comparisons without a result."""
        for model in list(self._recent):
            for backend in model.backends:
                faded = backend.recent * _FADING
                backend.recent = faded if faded >= 1.0 else 0.0
            if not any(backend.recent for backend in model.backends):
                self._recent.remove(model)
            _charge(model)
        for backend in self._comparisons.overdue(now):
            self._conclude(backend, Fault.REQUESTS, now)

    def _bad(self, backend: Backend, owner: Owner, now: float, refused: bool, late: bool) -> None:
        """Record an error. `refused`: a 4xx. `late`: it followed the head of the answer, or replaced it."""
        backend.errors += 1
        backend.refuses &= refused
        backend.late |= late
        self._failed(backend, owner, now)
        model = self._count(backend)
        if model is None:
            return
        if backend.errors >= _SUSPICIOUS and now >= backend.spared_until and _is_comparable(model, backend):
            self._comparisons.begin(backend, now)
            self._out(backend)

    def _count(self, backend: Backend) -> Model | None:
        """Count a recent error, for its load. The model, if it still exists."""
        backend.recent += 1
        model = self._fleet.models.get(backend.model)
        if model is not None:
            self._recent.add(model)
            if len(model.backends) <= _MANY:
                _charge(model)
        return model

    def _good(self, backend: Backend, owner: Owner, now: float, complete: bool) -> None:
        """Record a good answer. Without `complete` only its head, which is enough where errors come with the head."""
        sample = self.samples.get(owner)
        if sample is not None and (complete or not sample.of.late):
            self._heed(owner, backend, now, good=True)
        if backend.circuit.opened is None:
            if complete:
                _forget(backend)
        elif (complete or not backend.late) and self._breaker.succeeded(backend.circuit, owner):
            _forget(backend)
            backend.recent, backend.extra = 0.0, 0
            self._back(backend)
            _log(logging.INFO, "a backend no longer gives errors of its own", backend)

    def _failed(self, backend: Backend, owner: Owner, now: float) -> None:
        """Record the failure of a probe or sample."""
        self._heed(owner, backend, now, good=False)
        if backend.circuit.opened is not None and self._breaker.failed(backend.circuit, now, owner):
            self._out(backend)

    def _heed(self, owner: Owner, backend: Backend, now: float, good: bool) -> None:
        result = self._comparisons.result(owner, backend, good)
        if result is not None:
            self._conclude(*result, now)

    def _conclude(self, backend: Backend, fault: Fault, now: float) -> None:
        self._comparisons.end(backend)
        if fault is Fault.BACKEND:
            self._breaker.open(backend.circuit, now)
            _log(logging.WARNING, "a backend gives errors that others do not", backend)
        else:
            backend.spared_until = now + _PAUSE
        self._out(backend)


def _is_comparable(model: Model, backend: Backend) -> bool:
    if model.panic or backend.compared or not backend.closed:
        return False
    return any(other is not backend and not other.compared for other in model.available)


def _charge(model: Model) -> None:
    """Errors beyond the common rate, by weight: the requests may have caused that rate."""
    # A new backend has not had as many requests as the others.
    settled = [backend for backend in model.available if backend.share == 1.0]
    least = min((backend.recent / backend.weight for backend in settled), default=0.0)
    # With prefix affinity, keys decide which backend gets the bad requests.
    keyed = model.entry.balancing == "prefix_affinity"
    for backend in model.backends:
        usual = least * backend.weight
        beyond = backend.recent - usual - _DEVIATIONS * sqrt(usual) - _CHANCE
        backend.extra = 0 if keyed else max(0, int(beyond))


def _forget(backend: Backend) -> None:
    backend.errors, backend.refuses, backend.late = 0, True, False


def _log(level: int, text: str, backend: Backend) -> None:
    logger.log(level, text, extra={"fields": {"model": backend.model, "backend": backend.label}})
