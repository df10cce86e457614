"""Suggests a route for an unknown URL."""

import difflib
from collections.abc import Iterable

_LONGEST = 128


def meant(path: str, known: Iterable[str]) -> str | None:
    """The path of the probably intended route, for a /v1 too many or too few, or a typing error."""
    paths = [one for one in known if "{" not in one]
    if len(path) > _LONGEST:
        return None
    bare = path
    while bare.startswith("/v1/"):
        bare = bare.removeprefix("/v1")
    for candidate in (f"/v1{bare}", bare):
        if candidate in paths:
            return candidate
    close = difflib.get_close_matches(path, paths, n=1, cutoff=0.85)
    return close[0] if close else None
