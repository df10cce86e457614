"""A Health over a model whose clock, engines and requests the test sets."""

from random import Random
from typing import Any

from inference_api.models import Outcome
from inference_api.routing.backend import Backend
from inference_api.routing.balance import make_balancer
from inference_api.routing.breaker import Breaker
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.fleet import Fleet, Model
from inference_api.routing.health import Health


class Request:
    def done(self) -> bool:
        return False


class Ward:
    """A Health over a model `m`, with time, the engines' last bytes and the current request set by hand."""

    def __init__(self, *hosts: str, poll_every: float = 1.0, **entry: Any) -> None:
        self.now = 1000.0
        self.last_byte_at: dict[str, float] = {}
        self.request = Request()
        self.fleet = Fleet(lambda name: make_balancer(name, Random(1).random))
        self.list(*hosts, **entry)
        breaker = Breaker(5, 60.0, lambda: 0.5)
        self.health = Health(
            self.fleet,
            breaker,
            lambda url: self.last_byte_at.get(url, 0.0),
            clock=lambda: self.now,
            owner=lambda: self.request,
            connect=2.0,
            rand=Random(1).random,
            poll_every=poll_every,
        )

    def list(self, *hosts: str, **entry: Any) -> None:
        backends = [{"url": f"http://{host}"} for host in hosts]
        catalogue = parse_catalogue({"models": [{"name": "m", "backends": backends, **entry}]})
        assert not catalogue.problems
        self.fleet.update(catalogue)

    @property
    def model(self) -> Model:
        return self.fleet.models["m"]

    @property
    def backends(self) -> tuple[Backend, ...]:
        return self.model.backends

    @property
    def available(self) -> str:
        return "".join(backend.label for backend in self.model.available)

    def attempt(self, backend: Backend, outcome: Outcome, status: int | None = None) -> None:
        """One attempt of a request of its own, from head to end."""
        self.request = Request()
        self.report(backend, outcome, status)

    def report(self, backend: Backend, outcome: Outcome, status: int | None = None) -> None:
        if status is not None:
            self.health.answered(backend, status)
        self.health.ended(backend, outcome)

    def open(self, *backends: Backend, outcome: Outcome = Outcome.RESET) -> None:
        for backend in backends:
            for _ in range(5):
                self.attempt(backend, outcome)

    def choose(self, *tried: Backend) -> Backend | None:
        """What a new request is given."""
        self.request = Request()
        return self.model.choose("", tried)

    def chosen(self, times: int = 200) -> set[Backend | None]:
        return {self.choose() for _ in range(times)}

    def check(self, backend: Backend, *results: bool) -> None:
        for passed in results:
            self.health.checked(backend.origin, passed)

    def poll(self, seconds: float = 1.0, times: int = 1) -> None:
        for _ in range(times):
            self.now += seconds
            self.health.poll()
