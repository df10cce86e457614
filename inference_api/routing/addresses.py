"""The addresses of a model: what its entries, and what was found behind their names, come to."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from inference_api.routing.entries import MAX_BACKENDS, BackendEntry


class Address(NamedTuple):
    """One backend that a BackendEntry stands for.

    `url` is the entry's; where its host name was looked up, with the address after a `#`. No other URL has a fragment.
    """

    url: str
    weight: float


def addresses_of(entries: Iterable[BackendEntry], addresses: Mapping[str, Sequence[str]]) -> list[Address]:
    """The backends of these entries; `addresses` has what is known of those that are to be found.

    By host name what it was looked up to, or by URL the URLs of its backends, where an entry's Service is watched.
    What two names lead to is one backend, so that none gets two shares, or has two series of one label.
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
    """host:port/path of an Address, the host being the address if it was looked up."""
    rest, _, address = url.partition("://")[2].partition("#")
    if not address:
        return rest
    netloc, slash, path = rest.partition("/")
    # A name has no colon of its own.
    _, colon, port = netloc.partition(":")
    return f"[{address}]{colon}{port}{slash}{path}" if ":" in address else f"{address}{colon}{port}{slash}{path}"
