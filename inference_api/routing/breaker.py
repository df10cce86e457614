"""The circuit breaker of a backend. Pure: outcomes, their owners and the time in; the state of the circuit out.

    closed      `threshold` failures in a row                          -> open
    open        `cooldown` seconds later, +-20 %                       -> half-open
    half-open   one request at a time is let through, as the probe:
                    it gets the head of a good answer                  -> closed
                    it fails                                           -> open
                    it ends without a verdict, because its client left -> half-open, and the next request is the probe

While a circuit is not closed, only the probe counts: earlier attempts show the backend's earlier state, and a backend
that is shutting down finishes its streams while it refuses new connections.
"""

import math
import random
from collections.abc import Callable
from typing import Protocol

from inference_api.pace import spread


class Owner(Protocol):
    """The owner of the probe: the request's task. The probe ends with its owner, reported or not."""

    def done(self) -> bool: ...


class Circuit:
    """The state of a breaker for one backend."""

    __slots__ = ("cooldown", "failures", "opened", "probe", "probed")

    def __init__(self) -> None:
        # Failures in a row; 0 only while the circuit is closed.
        self.failures = 0
        # Time at which it last opened; None: closed.
        self.opened: float | None = None
        # Seconds from opening to half-open.
        self.cooldown = 0.0
        # Owner of the probe, and its start.
        self.probe: Owner | None = None
        self.probed = 0.0


class Breaker:
    """The rules, the same for every circuit. `cooldown` and `now` are seconds, `rand` gives [0, 1)."""

    def __init__(self, threshold: int = 5, cooldown: float = 60.0, rand: Callable[[], float] = random.random) -> None:
        self._threshold = threshold
        self._cooldown = cooldown
        self._rand = rand

    def failed(self, circuit: Circuit, now: float, owner: Owner | None) -> bool:
        """Record a failed attempt of `owner`. True if it opened the circuit, for the first time or again."""
        circuit.failures += 1
        opens = _has_probe(circuit, owner) if circuit.opened is not None else circuit.failures >= self._threshold
        if opens:
            self.open(circuit, now)
        return opens

    def open(self, circuit: Circuit, now: float) -> None:
        """Open the circuit, or reopen it, for a cooldown."""
        circuit.failures = max(circuit.failures, 1)
        _open(circuit, now, spread(self._cooldown, self._rand()))

    def succeeded(self, circuit: Circuit, owner: Owner | None) -> bool:
        """Record a good answer to `owner`. True if it closed the circuit."""
        was_open = circuit.opened is not None
        if was_open and not _has_probe(circuit, owner):
            return False
        circuit.failures = 0
        circuit.opened = circuit.probe = None
        return was_open

    def released(self, circuit: Circuit, owner: Owner | None) -> None:
        """Record the end of an attempt of `owner`, with or without a result."""
        if _has_probe(circuit, owner):
            circuit.probe = None

    def take(self, circuit: Circuit, now: float, owner: Owner, at_most: float = math.inf) -> bool:
        """Make `owner` the probe, if the circuit is half-open and has none; `at_most`: upper limit of the cooldown."""
        if circuit.opened is None or now < circuit.opened + min(circuit.cooldown, at_most):
            return False
        if circuit.probe is not None and not circuit.probe.done():
            return False
        circuit.probe, circuit.probed = owner, now
        return True

    def reset(self, circuit: Circuit) -> None:
        """Close the circuit, as if there had been no failure."""
        circuit.failures, circuit.opened, circuit.probe = 0, None, None

    def suspect(self, circuit: Circuit, now: float) -> None:
        """Make the circuit half-open, since its backend may have recovered."""
        circuit.failures = max(circuit.failures, 1)
        _open(circuit, now, 0.0)


def due(circuit: Circuit) -> float:
    """Time at which the circuit becomes half-open; infinity if it is closed."""
    # Read once: with OPS_PORT another thread may read while it closes.
    opened = circuit.opened
    return math.inf if opened is None else opened + circuit.cooldown


def _has_probe(circuit: Circuit, owner: Owner | None) -> bool:
    return owner is not None and circuit.probe is owner


def _open(circuit: Circuit, now: float, cooldown: float) -> None:
    circuit.opened, circuit.cooldown, circuit.probe = now, cooldown, None
