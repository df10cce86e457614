"""The names in the lists of all backends: adapters, with the backends that have them, and further names. Pure.

a backend lists an adapter of a model       a name of its own, for the requests of which it is one of the backends
no backend lists it any more                known for 10 minutes, without a backend; then unknown
a backend says nothing for 3 intervals      it has no adapters
two models have a name                      neither gets it
the catalogue has a name                    it is the catalogue's
"""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping

from inference_api.discovery.listing import Listing, is_name
from inference_api.discovery.naming import printable
from inference_api.routing.backend import Backend
from inference_api.routing.entries import MAX_ADAPTERS, CatalogueEntry
from inference_api.routing.fleet import Adapter, Found, Model

logger = logging.getLogger(__name__)

# Engines whose lists have other models, not further names of one
_OTHER_MODELS = frozenset({"openai", "llamacpp"})
_MAX_ALIASES = 256
# Seconds for which a name without a backend is known
_KNOWN = 600.0
_SHOWN = 5

# A backend, and the path of its list
Place = tuple[str, bytes]
Holders = frozenset[str] | None


def place_of_list(backend: Backend) -> Place:
    return backend.url, backend.address("/v1/models")[1]


def served_name(entry: CatalogueEntry) -> str:
    return entry.served_model_name or entry.name


class Lists:
    """`find` is for `Fleet.discover`. `every`: seconds between two lists of a backend. `clock`: seconds.

    `failures` gets the number of names that were refused, under `refused`. `changed`: since the last `find`.
    """

    def __init__(
        self,
        every: float,
        failures: MutableMapping[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
        known: float = _KNOWN,
        most: int = MAX_ADAPTERS,
    ) -> None:
        self._every = every
        self._keep = 3 * every
        self._failures = Counter[str]() if failures is None else failures
        self._clock = clock
        self._known_for = known
        self._most = most
        self.changed = False
        # Each list, and its time
        self._answers: dict[Place, tuple[Listing, float]] = {}
        # Adapter and URL -> until when the backend does not count as having it: it said so to a request.
        self._denied: dict[tuple[str, str], float] = {}
        # Names with a backend, and names without one and when they lost it -> parent, or model of an alias
        self._held: dict[str, str] = {}
        self._further: dict[str, str] = {}
        self._lost: dict[str, tuple[str, float]] = {}
        self._lost_further: dict[str, tuple[str, float]] = {}
        # What was logged: refused names by reason, and models whose backends differ
        self._refused: dict[str, set[str]] = {}
        self._differing: set[str] = set()

    # Written by the poller, and by requests

    def answered(self, backend: Backend, listing: Listing) -> None:
        """Take the list of a backend."""
        place = place_of_list(backend)
        before = self._answers.get(place)
        if before is None or before[0] != listing:
            self.changed = True
            # One object for equal lists: a fleet has many of them.
            listing = next((one for one, _ in self._answers.values() if one == listing), listing)
        else:
            listing = before[0]
        self._answers[place] = listing, self._clock()
        for key in [key for key in self._denied if key[1] == backend.url]:
            del self._denied[key]
            self.changed = True

    def deny(self, adapter: Adapter, backend: Backend) -> None:
        """Take the adapter from a backend that said that it does not have it, until its next list."""
        self._denied[adapter.name, backend.url] = self._clock() + self._every
        held = adapter.holders
        urls = frozenset(one.url for one in adapter.backends) if held is None else held
        if adapter.hold(urls - {backend.url}, {}):
            adapter.refresh()
        self.changed = True

    def expire(self, places: Collection[Place]) -> list[Place]:
        """Forget what is too old, and backends that are not among `places` any more. Returns the forgotten lists."""
        now = self._clock()
        old = [place for place, (_, at) in self._answers.items() if place not in places or now - at > self._keep]
        for place in old:
            del self._answers[place]
        denied = [key for key, until in self._denied.items() if until <= now]
        for key in denied:
            del self._denied[key]
        lost = [one for one in (self._lost, self._lost_further) for _, at in one.values() if now - at > self._known_for]
        if old or denied or lost:
            self.changed = True
        return old

    # Read by the fleet

    def find(self, models: Mapping[str, Model], taken: Collection[str]) -> Found:
        self.changed = False
        adapters: defaultdict[str, dict[str, Holders]] = defaultdict(dict)
        aliases: defaultdict[str, set[str]] = defaultdict(set)
        excess: set[str] = set()
        neighbours = self._neighbours(models.values())
        for name, model in models.items():
            entry = model.entry
            if not entry.discover and not entry.adapters:
                continue
            offered = self._offered(model, neighbours) if entry.discover else dict.fromkeys(entry.adapters or ())
            if entry.adapters is not None:
                offered = {one: holders for one, holders in offered.items() if one in entry.adapters}
            offered = {one: self._allowed(one, holders, model) for one, holders in offered.items() if one not in taken}
            if len(offered) > self._most:
                excess |= offered.keys()
                # Those that are served already stay.
                kept = sorted(offered, key=lambda one: (self._held.get(one) != name, one))[: self._most]
                offered = {one: offered[one] for one in kept}
                excess -= offered.keys()
            for one, holders in offered.items():
                adapters[one][name] = holders
            if entry.discover and entry.engine not in _OTHER_MODELS:
                for one in sorted(self._names(model, neighbours) - {*taken})[:_MAX_ALIASES]:
                    aliases[one].add(name)
        twice = {one for one, parents in adapters.items() if len({*parents, *aliases.get(one, ())}) > 1}
        twice |= {one for one, owners in aliases.items() if len(owners) > 1}
        self._refuse("they are of more than one model", twice)
        self._refuse(f"a model has at most {self._most} adapters", excess)
        held = {one: next(iter(parents.items())) for one, parents in adapters.items() if one not in twice}
        further = {one: next(iter(owners)) for one, owners in aliases.items() if one not in twice and one not in held}
        known = {*held, *further, *twice, *taken}
        self._held = self._since(self._held, {one: parent for one, (parent, _) in held.items()}, self._lost)
        self._further = self._since(self._further, further, self._lost_further)
        count = Counter(self._held.values())
        for one, parent in self._remembered(self._lost, models, known):
            if count[parent] < self._most:
                count[parent] += 1
                held[one] = parent, frozenset()
        # Not in place: `_further` is the same dictionary.
        further = further | dict(self._remembered(self._lost_further, models, {*known, *held}))
        self._tell_differing(models, neighbours)
        return Found(held, further)

    def _neighbours(self, models: Collection[Model]) -> dict[Place, frozenset[str]]:
        """By place, the engines' names of the models that discover there."""
        names: defaultdict[Place, set[str]] = defaultdict(set)
        for model in models:
            if model.entry.discover:
                for backend in model.backends:
                    names[place_of_list(backend)].add(served_name(model.entry))
        return {place: frozenset(served) for place, served in names.items()}

    def _lists_of(
        self, model: Model, neighbours: Mapping[Place, frozenset[str]]
    ) -> dict[tuple[int, frozenset[str]], tuple[Listing, list[str]]]:
        """The different lists of its backends, with the URLs of those that give it."""
        found: dict[tuple[int, frozenset[str]], tuple[Listing, list[str]]] = {}
        for backend in model.backends:
            place = place_of_list(backend)
            if (answer := self._answers.get(place)) is not None:
                listing, others = answer[0], neighbours.get(place, frozenset())
                found.setdefault((id(listing), others), (listing, []))[1].append(backend.url)
        return found

    def _offered(self, model: Model, neighbours: Mapping[Place, frozenset[str]]) -> dict[str, Holders]:
        """Its adapters, and the URLs of the backends that list them."""
        served = served_name(model.entry)
        lists = self._lists_of(model, neighbours)
        having: defaultdict[str, list[tuple[int, frozenset[str]]]] = defaultdict(list)
        for key, (listing, _) in lists.items():
            for one in listing.adapters_of(served, key[1] - {served}):
                having[one].append(key)
        # One set for all adapters that the same backends have
        holders: dict[tuple[tuple[int, frozenset[str]], ...], frozenset[str]] = {}
        for keys in map(tuple, having.values()):
            if keys not in holders:
                holders[keys] = frozenset(url for key in keys for url in lists[key][1])
        return {one: holders[tuple(keys)] for one, keys in having.items()}

    def _names(self, model: Model, neighbours: Mapping[Place, frozenset[str]]) -> set[str]:
        served = served_name(model.entry)
        lists = self._lists_of(model, neighbours).items()
        names = (one for (_, others), (listing, _) in lists for one in listing.names_of(served, others - {served}))
        return {one for one in names if is_name(one)}

    def _allowed(self, name: str, holders: Holders, model: Model) -> Holders:
        """Without the backends that deny having it."""
        if not self._denied:
            return holders
        urls = [backend.url for backend in model.backends] if holders is None else holders
        allowed = frozenset(url for url in urls if (name, url) not in self._denied)
        return holders if len(allowed) == len(urls) else allowed

    def _since(
        self, before: Mapping[str, str], after: dict[str, str], lost: dict[str, tuple[str, float]]
    ) -> dict[str, str]:
        """Note in `lost` what no backend has any more."""
        now = self._clock()
        for name in before.keys() - after.keys():
            lost[name] = before[name], now
        for name in lost.keys() & after.keys():
            del lost[name]
        # The oldest first. Names of a backend that lists others each time must not add up.
        count = Counter(parent for parent, _ in lost.values())
        for name, (parent, at) in list(lost.items()):
            if now - at > self._known_for or count[parent] > self._most:
                del lost[name]
                count[parent] -= 1
        return after

    def _remembered(
        self, lost: dict[str, tuple[str, float]], models: Mapping[str, Model], known: Collection[str]
    ) -> Iterator[tuple[str, str]]:
        # The newest first
        for name, (parent, _) in reversed(lost.items()):
            model = models.get(parent)
            if name in known or model is None or not model.entry.discover:
                continue
            if model.entry.adapters is None or name in model.entry.adapters:
                yield name, parent

    # Logged once

    def _refuse(self, why: str, names: set[str]) -> None:
        new = names - self._refused.get(why, set())
        self._refused[why] = names
        if new:
            self._failures["refused"] = self._failures.get("refused", 0) + len(new)
            shown = [printable(one) for one in sorted(new)[:_SHOWN]]
            fields = {"names": len(new), "first": shown}
            logger.warning("names that engines list are not served: %s", why, extra={"fields": fields})

    def _tell_differing(self, models: Mapping[str, Model], neighbours: Mapping[Place, frozenset[str]]) -> None:
        differing: dict[str, set[str]] = {}
        for name, model in models.items():
            if model.entry.discover:
                served = served_name(model.entry)
                lists = self._lists_of(model, neighbours).items()
                sets = [listing.adapters_of(served, others - {served}) for (_, others), (listing, _) in lists]
                if model.entry.adapters is not None:
                    sets = [one & frozenset(model.entry.adapters) for one in sets]
                if partial := set[str]().union(*sets) - frozenset.intersection(*sets or [frozenset()]):
                    differing[name] = partial
        for name in differing.keys() - self._differing:
            shown = [printable(one) for one in sorted(differing[name])[:_SHOWN]]
            fields = {"model": name, "adapters": len(differing[name]), "first": shown}
            logger.info("some backends of a model lack adapters that others have", extra={"fields": fields})
        self._differing = {*differing}
