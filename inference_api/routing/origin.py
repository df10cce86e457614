"""One address of an engine, and what is known of it, whichever of its models a request was for."""

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx

from inference_api.routing.addresses import place_of
from inference_api.routing.breaker import Circuit

if TYPE_CHECKING:
    from inference_api.discovery.gauges import Reading
    from inference_api.routing.backend import Backend


class Origin(Circuit):
    """Shared by the Backends at one URL: fifty adapters in one pod are one circuit, one health check and one load.

    The circuit is that of the address: of what never was an answer, and of 502, 503, 504, whatever the model.

    `url` is what it is known by; where its host name was looked up, the address follows after a `#`.
    """

    __slots__ = (
        "_addresses",
        "asleep",
        "backends",
        "base_path",
        "cause",
        "crowded",
        "healthy",
        "host",
        "in_flight",
        "label",
        "passed",
        "reading",
        "refused",
        "reported",
        "scraped",
        "streak",
        "stuck",
        "url",
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
        self.crowded: float | None = None
        self.stuck: float | None = None
        # What it says of itself, if it is asked: see `load`; None: it does not say
        self.asleep: bool | None = None
        self.reported = 0.0
        self.reading: Reading | None = None
        self.scraped = 0.0

    @property
    def up(self) -> bool:
        """It passes its health checks, and is not stuck."""
        return self.healthy and self.stuck is None

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
