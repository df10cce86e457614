"""The addresses of a model, from its entries and the results of discovery."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from inference_api.routing.entries import MAX_BACKENDS, BackendEntry


class Address(NamedTuple):
    """One backend that a BackendEntry stands for.

    `url` is the entry's, with `#address` appended if its host name was looked up. No other URL has a fragment.
    """

    url: str
    weight: float


def addresses_of(entries: Iterable[BackendEntry], addresses: Mapping[str, Sequence[str]]) -> list[Address]:
    """The backends of these entries; `addresses` holds the results of discovery.

    Its keys are host names (values: addresses), or for watched Services the entries' URLs (values: backend URLs). An
    address behind two names is one backend, so that it gets one share of traffic and one series per label.
    """
    entries = tuple(entries)
    found = [Address(entry.url, entry.weight) for entry in entries if entry.discovery == "static"]
    taken = {backend.url.partition("://")[2] for backend in found}
    for entry in entries:
        for url in _found(entry, addresses) if entry.discovery == "dns" else ():
            place = place_of(url)
            if place not in taken:
                taken.add(place)
                found.append(Address(url, entry.weight))
    return found[:MAX_BACKENDS]


def _found(entry: BackendEntry, addresses: Mapping[str, Sequence[str]]) -> Sequence[str]:
    watched = addresses.get(entry.url)
    return [f"{entry.url}#{address}" for address in addresses.get(entry.host, ())] if watched is None else watched


def place_of(url: str) -> str:
    """host:port/path of an Address; the host is the address if it was looked up."""
    rest, _, address = url.partition("://")[2].partition("#")
    if not address:
        return rest
    netloc, slash, path = rest.partition("/")
    # A host name has no colon.
    _, colon, port = netloc.partition(":")
    return f"[{address}]{colon}{port}{slash}{path}" if ":" in address else f"{address}{colon}{port}{slash}{path}"
