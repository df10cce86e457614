"""One address of an engine and what is known of it: an Origin, and the Backend that each of its models has there."""

from typing import NamedTuple
from urllib.parse import urlsplit

import httpx

from inference_api.models import Outcome
from inference_api.routing.addresses import place_of
from inference_api.routing.breaker import Circuit, due


class Reading(NamedTuple):
    """What a backend says of itself: requests it works on, requests it has waiting, used share of its KV cache."""

    running: float
    waiting: float
    kv_cache: float | None


class Origin(Circuit):
    """Shared by the Backends at one URL: fifty adapters in one pod are one circuit, one health check and one load.

    The circuit is that of the address: of what never was an answer, and of 502, 503, 504, whatever the model.

    `url` is what it is known by; where its host name was looked up, the address follows after a `#`.
    """

    __slots__ = (
        "_addresses", "asleep", "backends", "base_path", "cause", "crowded_since", "healthy", "host", "in_flight",
        "label", "passed", "reading", "refused", "reported", "scraped_at", "streak", "stuck_since", "url",
    )  # fmt: skip

    def __init__(self, url: str) -> None:
        super().__init__()
        parts = urlsplit(url)
        # Identity
        self.url = url
        # The path too: two engines may share a host behind a gateway. The address: a name may have many.
        self.label = place_of(url)
        self.host = parts.netloc.encode("ascii")
        self.base_path = parts.path
        self._addresses: dict[str, tuple[httpx.URL, bytes]] = {}
        # Those of the models that are served here, in the order in which they came
        self.backends: dict[Backend, None] = {}
        # Attempts of all models whose answer has not ended
        self.in_flight = 0
        # Its circuit opened because no connection could be made
        self.refused = False
        # Why the last health check failed; None: it did not
        self.cause: str | None = None
        # Health checks: passes in a row, or failures if negative, and when it last passed one
        self.healthy = True
        self.streak = 0
        self.passed = 0.0
        # Watchdog: since when it has had several requests in flight, and since when it is known to be stuck
        self.crowded_since: float | None = None
        self.stuck_since: float | None = None
        # What it says of itself, if it is asked: see `load`; None: it does not say
        self.asleep: bool | None = None
        self.reported = 0.0
        self.reading: Reading | None = None
        self.scraped_at = 0.0

    @property
    def up(self) -> bool:
        """It passes its health checks, and is not stuck."""
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

    def __repr__(self) -> str:
        return f"<Origin {self.label} of {len(self.backends)} models: {self.in_flight} in flight>"


class Backend:
    """One backend of a model: an address that may serve other models too, and this model's part of it.

    `in_flight` is exact on every path: admission and drain stand on it; balancing goes by `origin.in_flight`.
    """

    __slots__ = (
        "address", "changed", "circuit", "compared", "errors", "extra", "full_weight", "host", "in_flight", "label",
        "last_error", "late", "model", "origin", "recent", "refuses", "share", "spared_until", "url", "was_usable",
        "weight",
    )  # fmt: skip

    def __init__(self, model: str, url: str, weight: float = 1.0, origin: Origin | None = None) -> None:
        # Identity
        self.model = model
        self.origin = origin or Origin(url)
        self.url = url
        self.label = self.origin.label
        self.host = self.origin.host
        self.address = self.origin.address
        # Load: its weight is the share that it gets of its full weight
        self.in_flight = 0
        self.weight = self.full_weight = weight
        self.share = 1.0
        # Errors that it gave this model in a row; whether all are 4xx, and whether any came after an answer's head
        self.errors = 0
        # The recent ones, which fade, and what they add to its load where others have fewer, see `faults`
        self.recent = 0.0
        self.extra = 0
        self.refuses = True
        self.late = False
        # Whether they are compared with what others give, until when not again, and the circuit that this may open
        self.compared = False
        self.spared_until = 0.0
        self.circuit = Circuit()
        # For those who ask what is wrong: when it was last taken out or back, how an attempt last failed and when
        self.was_usable = True
        self.changed: float | None = None
        self.last_error: tuple[Outcome, float] | None = None

    @property
    def closed(self) -> bool:
        """No circuit keeps requests from it."""
        return self.circuit.opened is None and self.origin.opened is None

    @property
    def failing(self) -> bool:
        """A circuit is not closed for what says that it cannot serve; a 4xx, even of its own, does not."""
        return self.origin.opened is not None or (self.circuit.opened is not None and not self.refuses)

    @property
    def usable(self) -> bool:
        return self.circuit.opened is None and self.origin.usable

    @property
    def due(self) -> float:
        """When a request may try it, if one of its circuits is not closed."""
        return max(due(circuit) for circuit in (self.circuit, self.origin) if circuit.opened is not None)

    def note(self, now: float) -> None:
        """Something that keeps it from requests has begun or ended."""
        if self.usable is not self.was_usable:
            self.was_usable, self.changed = not self.was_usable, now

    def weigh(self, share: float) -> None:
        """Give it a share of its full weight; a balancer sees that with the next tuple it is handed."""
        self.share = share
        self.weight = self.full_weight * share

    def __repr__(self) -> str:
        return f"<Backend {self.label} of {self.model}: {self.in_flight} in flight>"
