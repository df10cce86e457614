"""Models that name others: virtual models, and targets of features. Checked once all entries are read. Pure."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from inference_api.routing.entries import CatalogueEntry, EntryKey

# Virtual models on the way to a model at most
DEEPEST = 3
# Keys that a virtual model may have beside its own
_OF_VIRTUAL = frozenset({"name", "version", "owner", "aliases", "created"})


class Refers(NamedTuple):
    """How the value of a key names other models. `path`: where, for messages.

    `is_virtual`: the entry stands for them, and has no backends; it is refused if one of them does not exist, and may
    have only the keys `beside`. Other names that do not exist are left out.
    `follows`: requests go on from there, so that there may be no cycle.
    """

    names: Callable[[Any], Iterable[str]]
    path: str
    is_virtual: bool = False
    follows: bool = False
    beside: frozenset[str] = frozenset()


class Findings(NamedTuple):
    """Entries to refuse, with the reason by name, and warnings about others."""

    refused: dict[str, str]
    warnings: list[str]


def virtual_key(entry: "CatalogueEntry") -> str | None:
    """The key that makes an entry a virtual model, or None."""
    return next((key.name for key, refers in _given(entry) if refers.is_virtual), None)


def beside(referring: "Mapping[str, EntryKey[Any]]") -> dict[str, frozenset[str]]:
    """The keys that make an entry a virtual model, and all that it may then have."""
    found = {}
    for name, key in referring.items():
        if key.refers is not None and key.refers.is_virtual:
            found[name] = _OF_VIRTUAL | key.refers.beside | {name}
    return found


def excess_key(entry: "CatalogueEntry") -> str | None:
    """Why the keys of an entry do not go together: a virtual model has few."""
    for key, refers in _given(entry):
        given = entry.model_fields_set - _OF_VIRTUAL - refers.beside - {key.name}
        if refers.is_virtual and given:
            allowed = ", ".join(sorted((_OF_VIRTUAL | refers.beside) - {"name"}))
            return f"the key {sorted(given)[0]!r} does not go with `{key.name}`, only {allowed} do"
    return None


def members_of(entry: "CatalogueEntry") -> Iterator[str]:
    """The names that a virtual model stands for."""
    for key, name in _references(entry):
        if key.is_virtual:
            yield name


def check(entries: Mapping[str, "CatalogueEntry"]) -> Findings:
    """Look at what all entries name."""
    # Adapters that engines list are not known yet.
    others = frozenset(name for entry in entries.values() for name in entry.adapters or ())
    refused: dict[str, str] = {}
    # Refusing an entry may take a member from another one.
    while found := _refused({name: one for name, one in entries.items() if name not in refused}, others):
        refused |= found
    left = {name: one for name, one in entries.items() if name not in refused}
    known = left.keys() | others
    warnings = [
        f"model {entry.name!r}: {refers.path}: there is no model {name!r}; it is left out"
        for entry in left.values()
        for refers, name in _references(entry)
        if not refers.is_virtual and name not in known
    ]
    return Findings(refused, warnings)


def _refused(entries: Mapping[str, "CatalogueEntry"], others: frozenset[str]) -> dict[str, str]:
    linked = {name: entry for name, entry in entries.items() if any(True for _ in _references(entry))}
    found = {}
    for name, entry in linked.items():
        reason = _missing(entry, entries, others) or _cycle(name, linked) or _too_deep(name, linked)
        if reason is not None:
            found[name] = reason
    return found


def _missing(entry: "CatalogueEntry", entries: Mapping[str, Any], others: frozenset[str]) -> str | None:
    for refers, name in _references(entry):
        if refers.is_virtual and name not in entries and name not in others:
            return f"{refers.path}: there is no model {name!r}"
    return None


def _cycle(start: str, linked: Mapping[str, "CatalogueEntry"]) -> str | None:
    """The shortest way from a model back to itself."""
    ways, seen = [[start]], set()
    for way in ways:
        for refers, name in _references(linked[way[-1]]):
            if not refers.follows:
                continue
            if name == start:
                return f"a cycle: {' -> '.join([*way, start])}"
            if name in linked and name not in seen:
                seen.add(name)
                ways.append([*way, name])
    return None


def _too_deep(start: str, linked: Mapping[str, "CatalogueEntry"]) -> str | None:
    ways = [[start]] if virtual_key(linked[start]) is not None else []
    for way in ways:
        if len(way) > DEEPEST:
            return f"a chain of more than three virtual models: {' -> '.join(way)}"
        members = (name for name in members_of(linked[way[-1]]) if name in linked and name not in way)
        ways += [[*way, name] for name in members if virtual_key(linked[name]) is not None]
    return None


def _references(entry: "CatalogueEntry") -> Iterator[tuple[Refers, str]]:
    for key, refers in _given(entry):
        for name in refers.names(key.of(entry)):
            yield refers, name


def _given(entry: "CatalogueEntry") -> Iterator[tuple["EntryKey[Any]", Refers]]:
    """The keys of an entry that name other models."""
    # At once for nearly all: there may be ten thousand entries.
    if not entry.model_fields_set.isdisjoint(entry.referring):
        for name, key in entry.referring.items():
            if getattr(entry, name) is not None and key.refers is not None:
                yield key, key.refers
