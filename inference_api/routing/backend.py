"""What lives behind a catalogue entry: a Backend is one replica with its live state, a Model is the set of them."""

from collections.abc import Callable, Collection, Iterable, Mapping
from urllib.parse import urlsplit

import httpx

from inference_api.routing.balance import Policy
from inference_api.routing.catalogue import BackendEntry, CatalogueEntry, PolicyName


class Backend:
    """One replica URL of a model. `in_flight` is exact on every path: balancing, admission and drain stand on it."""

    __slots__ = ("_addresses", "base_path", "failures", "host", "in_flight", "label", "model", "url", "weight")

    def __init__(self, model: str, url: str, weight: float = 1.0) -> None:
        parts = urlsplit(url)
        # Identity
        self.model = model
        self.url = url
        self.weight = weight
        # The path too: two replicas may share a host behind a gateway.
        self.label = parts.netloc + parts.path
        self.host = parts.netloc.encode("ascii")
        self.base_path = parts.path
        self._addresses: dict[str, tuple[httpx.URL, bytes]] = {}
        # Live state
        self.in_flight = 0
        # Consecutive failed attempts
        self.failures = 0

    def address(self, path: str) -> tuple[httpx.URL, bytes]:
        """URL and request target of a route on this replica; parsing a URL costs more than forwarding a request."""
        address = self._addresses.get(path)
        if address is None:
            address = self._addresses[path] = httpx.URL(self.url + path), (self.base_path + path).encode("ascii")
        return address

    def __repr__(self) -> str:
        return f"<Backend {self.label} of {self.model}: {self.in_flight} in flight>"


class Model:
    """A resolved name: its catalogue entry, its replicas, and what they have in flight together."""

    __slots__ = ("available", "backends", "entry", "in_flight", "max_model_len", "name", "policy")

    def __init__(self, entry: CatalogueEntry, backends: tuple[Backend, ...], policy: Policy[Backend]) -> None:
        self.name = entry.name
        self.entry = entry
        self.policy = policy
        # Shared: replaced as a whole, never edited, so that a policy may cache by identity.
        self.backends = backends
        self.available = backends
        # Live state
        self.in_flight = 0
        self.max_model_len: int | None = None

    def adopt(self, entry: CatalogueEntry, backends: tuple[Backend, ...], policy: Policy[Backend]) -> None:
        """Take a new version of the entry; what is in flight stays counted."""
        self.entry, self.policy = entry, policy
        self.max_model_len = None
        if backends != self.backends:
            self.backends = self.available = backends

    def choose(self, key: str, tried: Collection[Backend] = ()) -> Backend | None:
        """The replica for the next attempt, none of `tried`, or None when nothing is left."""
        return self.policy.choose(self.available, key, tried)

    def __repr__(self) -> str:
        return f"<Model {self.name}: {len(self.available)}/{len(self.backends)} backends, {self.in_flight} in flight>"


class Fleet:
    """Every Model by every name it answers to, kept across catalogue changes so that live state survives them."""

    def __init__(self, make_policy: Callable[[PolicyName], Policy[Backend]]) -> None:
        self._make_policy = make_policy
        self.models: dict[str, Model] = {}
        # name or alias -> Model; the one look-up that a request makes.
        self.by_name: dict[str, Model] = {}
        # Grows with every change that a list of the models would show.
        self.version = 0

    def update(self, catalogue: Mapping[str, CatalogueEntry]) -> None:
        """Make the fleet what the catalogue says. Replicas that left finish what they have in flight."""
        models = {entry.name: self._model(entry) for entry in catalogue.values()}
        self.by_name = {alias: models[entry.name] for entry in catalogue.values() for alias in entry.aliases} | models
        self.models = models
        self.version += 1

    def _model(self, entry: CatalogueEntry) -> Model:
        known = self.models.get(entry.name)
        if known is not None and known.entry == entry:
            return known
        backends = self._backends(entry.name, entry.backends, known.backends if known else ())
        policy = self._make_policy(entry.policy)
        if known is None:
            return Model(entry, backends, policy)
        known.adopt(entry, backends, policy)
        return known

    @staticmethod
    def _backends(model: str, entries: Iterable[BackendEntry], known: Iterable[Backend]) -> tuple[Backend, ...]:
        by_url = {backend.url: backend for backend in known}
        backends = []
        for entry in entries:
            backend = by_url.get(entry.url) or Backend(model, entry.url)
            backend.weight = entry.weight
            backends.append(backend)
        return tuple(backends)
