"""What lives behind a catalogue entry: a Backend is one replica with its live state, a Model is the set of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx

from inference_api.routing.balance import Policy
from inference_api.routing.catalogue import CatalogueEntry, PolicyName, place_of, replicas

if TYPE_CHECKING:
    from inference_api.routing.load import Reading


class Backend:
    """One replica of a model. `in_flight` is exact on every path: balancing, admission and drain stand on it.

    `url` is what it is known by; where its host name was looked up, the address follows after a `#`.
    """

    __slots__ = (
        "_addresses",
        "base_path",
        "host",
        "in_flight",
        "label",
        "model",
        "reading",
        "reported",
        "scraped",
        "url",
        "weight",
    )

    def __init__(self, model: str, url: str, weight: float = 1.0) -> None:
        parts = urlsplit(url)
        # Identity
        self.model = model
        self.url = url
        self.weight = weight
        # The path too: two replicas may share a host behind a gateway. The address: a name may have many.
        self.label = place_of(url)
        self.host = parts.netloc.encode("ascii")
        self.base_path = parts.path
        self._addresses: dict[str, tuple[httpx.URL, bytes]] = {}
        # Live state
        self.in_flight = 0
        # What it says of itself, if it is asked: see `load`
        self.reported = 0.0
        self.reading: Reading | None = None
        self.scraped = 0.0

    def address(self, path: str) -> tuple[httpx.URL, bytes]:
        """URL and request target of a route on this replica; parsing a URL costs more than forwarding a request."""
        address = self._addresses.get(path)
        if address is None:
            base, target = self.url.partition("#")[0], self.base_path + path
            address = self._addresses[path] = httpx.URL(base + path), target.encode("ascii")
        return address

    def __repr__(self) -> str:
        return f"<Backend {self.label} of {self.model}: {self.in_flight} in flight>"


class Model:
    """A resolved name: its catalogue entry, its replicas, and what they have in flight together."""

    __slots__ = ("available", "backends", "entry", "in_flight", "leaving", "max_model_len", "name", "policy")

    def __init__(self, entry: CatalogueEntry, backends: tuple[Backend, ...], policy: Policy[Backend]) -> None:
        self.name = entry.name
        self.entry = entry
        self.policy = policy
        # Shared: replaced as a whole, never edited, so that a policy may cache by identity.
        self.backends = backends
        self.available = backends
        # Gone from the catalogue, not yet done: one that comes back must not look idle.
        self.leaving: tuple[Backend, ...] = ()
        # Live state
        self.in_flight = 0
        self.max_model_len: int | None = None

    def adopt(self, entry: CatalogueEntry, backends: tuple[Backend, ...], policy: Policy[Backend]) -> None:
        """Take a new version of the entry, or other replicas of it; what is in flight stays counted."""
        if entry is not self.entry:
            self.max_model_len = None
        self.entry, self.policy = entry, policy
        if backends != self.backends:
            left = {*self.backends, *self.leaving}.difference(backends)
            self.leaving = tuple(backend for backend in left if backend.in_flight)
            self.backends = self.available = backends

    def __repr__(self) -> str:
        return f"<Model {self.name}: {len(self.available)}/{len(self.backends)} backends, {self.in_flight} in flight>"


class Fleet:
    """Every Model by every name it answers to, kept across catalogue changes so that live state survives them."""

    def __init__(self, make_policy: Callable[[PolicyName], Policy[Backend]]) -> None:
        self._make_policy = make_policy
        self.models: dict[str, Model] = {}
        # name or alias -> Model; the one look-up that a request makes.
        self.by_name: dict[str, Model] = {}
        # host name -> addresses, of the backends with `discovery: dns`; see `discovery`.
        self.addresses: dict[str, Sequence[str]] = {}
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
        backends = self._backends(entry, known)
        policy = self._make_policy(entry.policy)
        if known is None:
            return Model(entry, backends, policy)
        known.adopt(entry, backends, policy)
        return known

    def resolve(self, host: str, addresses: Sequence[str], models: Iterable[str]) -> None:
        """The host name has these addresses now; `models` are those that use it."""
        self.addresses[host] = addresses
        for name in models:
            if (model := self.models.get(name)) is not None:
                model.adopt(model.entry, self._backends(model.entry, model), model.policy)

    def _backends(self, entry: CatalogueEntry, known: Model | None) -> tuple[Backend, ...]:
        by_url = {} if known is None else {backend.url: backend for backend in (*known.leaving, *known.backends)}
        backends = []
        for url, weight in replicas(entry.backends, self.addresses):
            backend = by_url.get(url) or Backend(entry.name, url)
            backend.weight = weight
            backends.append(backend)
        return tuple(backends)
