"""Which route was meant by a URL that is none."""

import difflib
from collections.abc import Iterable

_LONGEST = 128


def meant(path: str, known: Iterable[str]) -> str | None:
    """The path of a route that `path` is a slip of: a base URL with one /v1 too many or too few, a typing error."""
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
