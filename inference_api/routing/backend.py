"""The state of one address of an engine: an Origin, and one Backend per model served there."""

from collections.abc import Callable
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import httpx

from inference_api.models import Outcome
from inference_api.routing.addresses import place_of
from inference_api.routing.breaker import Circuit, due


class Reading(NamedTuple):
    """The load that an engine reports: running requests, waiting requests, used share of the KV cache."""

    running: float
    waiting: float
    kv_cache: float | None


class Override(NamedTuple):
    """What an operator has ordered for a backend: no new requests, and with `out` an end to those in flight.

    `since`: seconds of the loop's clock.
    """

    id: str
    action: Literal["drain", "out"]
    reason: str
    since: float


class Origin(Circuit):
    """The state that Backends at one URL share: fifty adapters in one pod have one circuit, health check and load.

    The circuit counts attempts without an answer, and 502, 503, 504, of all models.

    `url` identifies it, with `#address` appended if its host name was looked up.
    """

    __slots__ = (
        "_addresses", "asleep", "backends", "base_path", "cause", "crowded_since", "healthy", "host", "in_flight",
        "label", "passed", "reading", "refused", "reported", "scraped_at", "sessions", "streak", "stuck_since", "url",
    )  # fmt: skip

    def __init__(self, url: str) -> None:
        super().__init__()
        parts = urlsplit(url)
        # Identity
        self.url = url
        # With the path: two engines may share a host behind a gateway. With the address: a name may have many.
        self.label = place_of(url)
        self.host = parts.netloc.encode("ascii")
        self.base_path = parts.path
        self._addresses: dict[str, tuple[httpx.URL, bytes]] = {}
        # The Backends of the models that are served here, oldest first
        self.backends: dict[Backend, None] = {}
        # Attempts of all models, until their answers end
        self.in_flight = 0
        # Those of them that may be silent for as long as their clients are
        self.sessions = 0
        # The circuit opened because no connection could be made
        self.refused = False
        # Reason for which the last health check failed, or None
        self.cause: str | None = None
        # Health checks: passes in a row, or failures if negative; time of the last pass
        self.healthy = True
        self.streak = 0
        self.passed = 0.0
        # Watchdog: time since which it has several requests in flight; time since which it is stuck
        self.crowded_since: float | None = None
        self.stuck_since: float | None = None
        # Reported by the engine, see discovery.engine_metrics; None: not reported
        self.asleep: bool | None = None
        self.reported = 0.0
        self.reading: Reading | None = None
        self.scraped_at = 0.0

    @property
    def up(self) -> bool:
        """Whether it passes its health checks, and is not stuck."""
        return self.healthy and self.stuck_since is None

    @property
    def usable(self) -> bool:
        return self.opened is None and self.up and not self.asleep

    def address(self, path: str) -> tuple[httpx.URL, bytes]:
        """URL and request target of a route here; parsing a URL costs more than forwarding a request."""
        address = self._addresses.get(path)
        if address is None:
            base, target = self.url.partition("#")[0], self.base_path + path
            address = self._addresses[path] = httpx.URL(base + path), target.encode("ascii")
        return address

    def based(self, base_path: str) -> Callable[[str], tuple[httpx.URL, bytes]]:
        """`address`, with `base_path` for the leading /v1 of a route."""
        known: dict[str, tuple[httpx.URL, bytes]] = {}

        def address(path: str) -> tuple[httpx.URL, bytes]:
            found = known.get(path)
            if found is None:
                found = known[path] = self.address(base_path + path[3:] if path.startswith("/v1/") else path)
            return found

        return address

    def __repr__(self) -> str:
        return f"<Origin {self.label} of {len(self.backends)} models: {self.in_flight} in flight>"


class Backend:
    """One backend of a model: an address, which may serve other models, too, and the state of this model there.

    `in_flight` is exact on every path, for admission and drain; balancing uses `origin.in_flight`.
    """

    __slots__ = (
        "address", "base_path", "changed", "circuit", "compared", "errors", "extra", "full_weight", "host",
        "in_flight", "label", "lacks", "last_error", "late", "model", "origin", "override", "recent", "refuses",
        "share", "spared_until", "url", "was_usable", "weight",
    )  # fmt: skip

    def __init__(self, model: str, url: str, weight: float = 1.0, origin: Origin | None = None) -> None:
        # Identity
        self.model = model
        self.origin = origin or Origin(url)
        self.url = url
        self.label = self.origin.label
        self.host = self.origin.host
        # URL and request target of a route here, for this model
        self.base_path: str | None = None
        self.address: Callable[[str], tuple[httpx.URL, bytes]] = self.origin.address
        # Load: `weight` is its current part of its full weight
        self.in_flight = 0
        self.weight = self.full_weight = weight
        self.share = 1.0
        # Errors in a row for this model; whether all are 4xx, and whether any followed an answer's head
        self.errors = 0
        # Recent errors, which decay, and their addition to the load if others have fewer, see `faults`
        self.recent = 0.0
        self.extra = 0
        self.refuses = True
        self.late = False
        # Whether it is being compared, the earliest next comparison, and the circuit that this may open
        self.compared = False
        self.spared_until = 0.0
        self.circuit = Circuit()
        # What it serves instead of the model, and the fix; None: it has the model, or is not asked
        self.lacks: str | None = None
        # Beside circuits and health; None: it may have requests
        self.override: Override | None = None
        # For operators: time of its last change of state, and outcome and time of its last failed attempt
        self.was_usable = True
        self.changed: float | None = None
        self.last_error: tuple[Outcome, float] | None = None

    @property
    def closed(self) -> bool:
        """Whether all of its circuits are closed."""
        return self.circuit.opened is None and self.origin.opened is None

    @property
    def failing(self) -> bool:
        """Whether a circuit is open because the backend cannot serve; a circuit opened by 4xx does not count."""
        return self.origin.opened is not None or (self.circuit.opened is not None and not self.refuses)

    @property
    def serving(self) -> bool:
        """Whether it is awake and has the model, as its engine reports, and no operator has ordered otherwise."""
        return not self.origin.asleep and self.lacks is None and self.override is None

    @property
    def usable(self) -> bool:
        return self.circuit.opened is None and self.lacks is None and self.override is None and self.origin.usable

    @property
    def is_out(self) -> bool:
        """Whether an operator has ordered that not even the requests in flight go on."""
        override = self.override
        return override is not None and override.action == "out"

    @property
    def due(self) -> float:
        """Time at which a request may try it, if a circuit is not closed."""
        return max(due(circuit) for circuit in (self.circuit, self.origin) if circuit.opened is not None)

    def rebase(self, base_path: str | None) -> None:
        """Set what stands for the leading /v1 of routes, from the next request on."""
        if base_path != self.base_path:
            self.base_path = base_path
            self.address = self.origin.address if base_path is None else self.origin.based(base_path)

    def note(self, now: float) -> None:
        """Record that its availability changed."""
        if self.usable is not self.was_usable:
            self.was_usable, self.changed = not self.was_usable, now

    def weigh(self, share: float) -> None:
        """Set its share of its full weight; balancers see it with the next tuple of backends."""
        self.share = share
        self.weight = self.full_weight * share

    def __repr__(self) -> str:
        return f"<Backend {self.label} of {self.model}: {self.in_flight} in flight>"
