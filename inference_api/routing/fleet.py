"""The live state of a catalogue: a Model holds its backends, the Fleet all models, and the adapters of engines."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

from inference_api.models import Caller
from inference_api.routing.addresses import addresses_of
from inference_api.routing.backend import Backend, Origin, Override
from inference_api.routing.balancer import Balancer
from inference_api.routing.entries import BalancingName, CatalogueEntry
from inference_api.routing.references import members_of

# Initial part of its weight for a new or recovered backend.
FIRST_SHARE = 0.1


class Guard(Protocol):
    """Chooses for a Model while a circuit of a backend is not closed, or a comparison runs."""

    def choose(self, model: "Model", key: str, tried: Collection[Backend]) -> Backend | None: ...


class Model:
    """A resolved name: its catalogue entry, its backends, and its requests in flight."""

    __slots__ = (
        "_guard", "adapters", "available", "awake", "backends", "balancer", "entry", "further", "guard", "in_flight",
        "leaving", "max_model_len", "members", "name", "open", "panic", "parent", "parts", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        entry: CatalogueEntry,
        backends: tuple[Backend, ...],
        balancer: Balancer[Backend],
        guard: Guard | None = None,
        parent: "Model | None" = None,
    ) -> None:
        self.name = entry.name
        self.entry = entry
        self.balancer = balancer
        # Of an adapter: the model that it is a view of
        self.parent = parent
        # Found by discovery: its adapters, and names beside those of its entry
        self.adapters: tuple[Adapter, ...] = ()
        self.further: tuple[str, ...] = ()
        # Shared: replaced as a whole, never edited, so that balancers may cache by identity.
        self.backends = backends
        self.available = self.awake = backends
        # Backends with a circuit that is not closed, in the order in which they become half-open.
        self.open: tuple[Backend, ...] = ()
        self.panic = False
        # `guard`, while it is needed.
        self._guard = guard
        self.guard: Guard | None = None
        # Removed, with attempts in flight: a backend that returns must not look idle.
        self.leaving: tuple[Backend, ...] = ()
        # All models that it stands for, if it is a virtual one
        self.members: tuple[str, ...] = ()
        # Live state
        self.in_flight: int = 0 if parent is None else parent.in_flight
        # Called when there may be a place, or a backend, for a request that waits; empty while none does.
        self.waiting: tuple[Callable[[], None], ...] = () if parent is None else parent.waiting
        self.max_model_len: int | None = entry.max_model_len if parent is None else parent.max_model_len
        # The parts of features that apply to its entry, composed at its first request: see `feature.ByModel`.
        self.parts: Any = None
        # An address that serves another model may have state already.
        self.refresh()

    def choose(self, key: str, tried: Collection[Backend] = ()) -> Backend | None:
        """The backend for the next attempt, or None. The caller must use it: choosing may claim the half-open probe."""
        if self.guard is not None:
            return self.guard.choose(self, key, tried)
        return self.balancer.choose(self.available, key, tried)

    def protect(self, guard: Guard) -> None:
        self._guard = guard
        self.refresh()

    def adopt(self, entry: CatalogueEntry, backends: tuple[Backend, ...], balancer: Balancer[Backend]) -> None:
        """Apply a new entry, or new backends; attempts in flight stay counted."""
        if entry is not self.entry:
            self.max_model_len = entry.max_model_len
        self.entry, self.balancer = entry, balancer
        if backends != self.backends:
            left = {*self.backends, *self.leaving}.difference(backends)
            self.leaving = tuple(backend for backend in left if backend.in_flight)
            self.backends = backends
            known: dict[frozenset[str], tuple[Backend, ...]] = {}
            for adapter in self.adapters:
                adapter.follow(known)
            self.refresh()
        self.wake()

    def subscribe(self, wake: Callable[[], None]) -> None:
        """Call `wake` when a request ends, a backend comes or goes, or the entry changes; it must not raise."""
        self.waiting = (*self.waiting, wake)

    def unsubscribe(self, wake: Callable[[], None]) -> None:
        self.waiting = tuple(one for one in self.waiting if one != wake)

    def wake(self) -> None:
        for wake in self.waiting:
            wake()

    def refresh(self, reweighed: bool = False) -> None:
        """Recompute the available backends after a change of state or (`reweighed`) of a share.

        All are available if more than half would be out: then detection is wrong, or the rest would be overloaded. An
        only backend is always available: there is no alternative. Sleeping backends are out in any case, and those that
        do not have the model: the engine reports that itself, and would not answer.
        """
        self.awake = backends = tuple(backend for backend in self.backends if backend.serving)
        usable = [backend for backend in backends if backend.usable]
        self.open = tuple(sorted((backend for backend in backends if not backend.closed), key=attrgetter("due")))
        self.guard = self._guard if self.open or any(backend.compared for backend in backends) else None
        self.panic = 1 < len(backends) > 2 * len(usable)
        if self.panic or len(backends) == 1:
            usable = list(backends)
        if len(usable) == len(self.backends) and all(backend.share == 1.0 for backend in usable):
            self.available = self.backends
        elif reweighed or usable != list(self.available):
            self.available = tuple(usable)
        if self.adapters:
            self._refresh_adapters(reweighed)
        if self.waiting:
            self.wake()

    def _refresh_adapters(self, reweighed: bool) -> None:
        """Once for all adapters that have the same backends: a model may have a thousand."""
        known: dict[tuple[Backend, ...], Model] = {self.backends: self}
        for adapter in self.adapters:
            like = known.get(adapter.backends)
            if like is None:
                adapter.refresh(reweighed)
                known[adapter.backends] = adapter
            else:
                adapter.copy(like)

    def __repr__(self) -> str:
        return f"<Model {self.name}: {len(self.available)}/{len(self.backends)} backends, {self.in_flight} in flight>"


def may_use(caller: Caller | None, model: Model) -> bool:
    """Whether a caller may see and use a model, and all that it stands for."""
    return caller is None or (caller.may_use(model.name) and all(caller.may_use(name) for name in model.members))


class Adapter(Model):
    """A LoRA adapter that engines serve beside a model, its parent: a view of that, with a name of its own.

    Its backends are the same objects, so that an address has one circuit and one count. Its requests count in the
    parent. `holders`: URLs of the backends that have it; None: all of the parent's have it.
    """

    __slots__ = ("holders", "origin_entry")
    parent: Model

    def __init__(self, name: str, parent: Model, balancer: Balancer[Backend]) -> None:
        self.holders: frozenset[str] | None = frozenset()
        # The parent's entry that its own is a copy of
        self.origin_entry = parent.entry
        own = {"name": name, "aliases": (), "served_model_name": None}
        super().__init__(parent.entry.model_copy(update=own), (), balancer, parent._guard, parent)

    @property
    def in_flight(self) -> int:
        return self.parent.in_flight

    @in_flight.setter
    def in_flight(self, count: int) -> None:
        self.parent.in_flight = count

    @property
    def waiting(self) -> tuple[Callable[[], None], ...]:
        return self.parent.waiting

    @waiting.setter
    def waiting(self, waiting: tuple[Callable[[], None], ...]) -> None:
        self.parent.waiting = waiting

    @property
    def max_model_len(self) -> int | None:
        return self.parent.max_model_len

    @max_model_len.setter
    def max_model_len(self, length: int | None) -> None:
        self.parent.max_model_len = length

    def hold(self, holders: frozenset[str] | None, known: dict[frozenset[str], tuple[Backend, ...]]) -> bool:
        """Set the backends that have it. Returns whether it must be refreshed. `known`: as in `follow`."""
        if holders == self.holders:
            return False
        self.holders = holders
        self.follow(known)
        return True

    def follow(self, known: dict[frozenset[str], tuple[Backend, ...]]) -> None:
        """Take its backends from those of its parent. `known`: those of the same holders, of this parent."""
        everything, holders = self.parent.backends, self.holders
        if holders is None:
            self.backends = everything
            return
        if holders not in known:
            found = tuple(backend for backend in everything if backend.url in holders)
            known[holders] = everything if len(found) == len(everything) else found
        self.backends = known[holders]

    def copy(self, like: Model) -> None:
        """Take the state of a Model with the same backends."""
        self.awake, self.open, self.guard = like.awake, like.open, like.guard
        self.panic, self.available = like.panic, like.available


class Found(NamedTuple):
    """The names that discovery adds to those of the catalogue.

    `adapters`: name -> the parent's name, and URLs of the backends that have it (None: all). `aliases`: name -> model.
    """

    adapters: Mapping[str, tuple[str, frozenset[str] | None]]
    aliases: Mapping[str, str]


# Gets the models of the catalogue, and all of its names, which are not to be found.
Find = Callable[[Mapping[str, Model], Collection[str]], Found]


class Fleet:
    """Every Model by all of its names. Models persist across catalogue changes, with their state."""

    def __init__(self, make_balancer: Callable[[BalancingName], Balancer[Backend]]) -> None:
        self._make_balancer = make_balancer
        # The models of the catalogue; and these with their adapters. Replaced as a whole.
        self.models: dict[str, Model] = {}
        self.served: dict[str, Model] = self.models
        # Name or alias -> Model; the only look-up of a request.
        self.by_name: dict[str, Model] = {}
        # The part of it that the catalogue gives
        self._named: dict[str, Model] = {}
        self._find: Find | None = None
        self._extended: set[Model] = set()
        # Results of `discovery: dns`: host name -> addresses, see `discovery`; URL -> URLs of backends, see
        # `endpointslices`. A host name is no URL.
        self.addresses: dict[str, Sequence[str]] = {}
        # URL -> Origin, of all backends, and of removed ones with attempts in flight.
        self.origins: dict[str, Origin] = {}
        self._vacant: set[Origin] = set()
        self._guard: Guard | None = None
        # What is ordered for a backend that comes; None: nothing ever is.
        self.override_of: Callable[[Backend], Override | None] | None = None
        # Grows with every change of the list of models.
        self.version = 0

    def protect(self, guard: Guard) -> None:
        """Give every model this guard, which chooses while it is needed."""
        self._guard = guard
        for model in self.served.values():
            model.protect(guard)

    def discover(self, find: Find) -> None:
        """Have `find` name what is served beside the catalogue: now, with every catalogue, and at each `link`."""
        self._find = find
        self.link()

    def update(self, catalogue: Mapping[str, CatalogueEntry]) -> None:
        """Apply a catalogue. Removed backends finish their attempts in flight."""
        models = {entry.name: self._model(entry) for entry in catalogue.values()}
        gone = [model for name, model in self.models.items() if name not in models]
        for model in gone:
            self._move(model.backends, ())
        self._forget_vacant()
        self._named = {alias: models[entry.name] for entry in catalogue.values() for alias in entry.aliases} | models
        self.models = models
        for model in models.values():
            model.members = tuple(self._members(model))
        self.link()
        for model in gone:
            model.wake()

    def link(self) -> None:
        """Make the names: those of the catalogue, and what discovery has found."""
        self.version += 1
        found = self._find(self.models, self._named) if self._find is not None else None
        before = {name: model for name, model in self.served.items() if isinstance(model, Adapter)}
        if not before and (found is None or not (found.adapters or found.aliases)):
            self._forget_further()
            self.by_name, self.served = self._named, self.models
            return
        assert found is not None
        adapters = {name: self._adapter(name, parent, before) for name, (parent, _) in found.adapters.items()}
        of_model: dict[Model, list[Adapter]] = {adapter.parent: [] for adapter in before.values()}
        for adapter in adapters.values():
            of_model.setdefault(adapter.parent, []).append(adapter)
        for model, those in of_model.items():
            model.adapters = tuple(those)
            known: dict[frozenset[str], tuple[Backend, ...]] = {}
            if any([adapter.hold(found.adapters[adapter.name][1], known) for adapter in those]):
                model._refresh_adapters(False)
        further = {alias: self.models[name] for alias, name in found.aliases.items()}
        self._forget_further()
        self._extended = {*further.values()}
        for alias, model in further.items():
            model.further += (alias,)
        self.by_name, self.served = {**further, **adapters, **self._named}, {**self.models, **adapters}
        # Requests may wait for those that have changed, or are gone.
        for model in of_model:
            model.wake()
        for adapter in before.values():
            adapter.wake()

    def _adapter(self, name: str, parent: str, before: Mapping[str, Adapter]) -> Adapter:
        model, known = self.models[parent], before.get(name)
        if known is None or known.parent is not model or known.origin_entry is not model.entry:
            return Adapter(name, model, self._make_balancer(model.entry.balancing))
        return known

    def _forget_further(self) -> None:
        for model in self._extended:
            model.further = ()
        self._extended = set()

    def _members(self, model: Model) -> dict[str, None]:
        """The names of all models that a virtual one stands for, also by others; {} for any other model."""
        found = dict.fromkeys(members_of(model.entry))
        for name in list(found):
            if (member := self.models.get(name)) is not None:
                found |= self._members(member)
        return found

    def _model(self, entry: CatalogueEntry) -> Model:
        known = self.models.get(entry.name)
        if known is not None and known.entry == entry:
            return known
        backends = self._backends(entry, known)
        balancer = self._make_balancer(entry.balancing)
        if known is None:
            self._move((), backends)
            return Model(entry, backends, balancer, self._guard)
        self._move(known.backends, backends)
        known.adopt(entry, backends, balancer)
        return known

    def resolve(self, name: str, addresses: Sequence[str], models: Iterable[str]) -> None:
        """Set the addresses of a host name or URL; `models`: those that use it."""
        # Backends that the first poll finds are not new, and need no slow start.
        joining = name in self.addresses
        self.addresses[name] = addresses
        for user in models:
            if (model := self.models.get(user)) is not None:
                backends = self._backends(model.entry, model, joining)
                self._move(model.backends, backends)
                model.adopt(model.entry, backends, model.balancer)
        self._forget_vacant()

    def _backends(self, entry: CatalogueEntry, known: Model | None, joining: bool = True) -> tuple[Backend, ...]:
        by_url = {} if known is None else {backend.url: backend for backend in (*known.leaving, *known.backends)}
        backends = []
        for url, weight in addresses_of(entry.backends, self.addresses):
            backend, origin = by_url.get(url), self._origin(url)
            if backend is None or backend.origin is not origin:
                backend = Backend(entry.name, url, origin=origin)
                # Slow start for a new backend beside warm ones.
                backend.share = 0.0 if joining and known and known.backends else 1.0
            if self.override_of is not None and backend not in origin.backends:
                backend.override = self.override_of(backend)
            backend.rebase(entry.base_path)
            backend.full_weight = weight
            backend.weigh(max(backend.share, first_share(entry.balancing)))
            backends.append(backend)
        return tuple(backends)

    def _origin(self, url: str) -> Origin:
        origin = self.origins.get(url)
        if origin is None:
            origin = self.origins[url] = Origin(url)
        return origin

    def _move(self, before: Sequence[Backend], after: Sequence[Backend]) -> None:
        """Update the origins of a model's backends."""
        if before == after:
            return
        for backend in set(before).difference(after):
            del backend.origin.backends[backend]
            if not backend.origin.backends:
                self._vacant.add(backend.origin)
        for backend in after:
            backend.origin.backends[backend] = None

    def _forget_vacant(self) -> None:
        """Drop origins without a model, once their attempts have ended."""
        for origin in [origin for origin in self._vacant if origin.backends or not origin.in_flight]:
            self._vacant.discard(origin)
            if not origin.backends:
                self.origins.pop(origin.url, None)


def first_share(balancing: BalancingName) -> float:
    """The initial part of a cold backend's weight. With prefix affinity all of it: a growing weight would move keys."""
    return 1.0 if balancing == "prefix_affinity" else FIRST_SHARE
