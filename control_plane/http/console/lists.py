"""Lists of pages: `?after=` is that of /api/v1."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from control_plane.http.api.paging import Place, decoded, encoded
from control_plane.http.console.shell import Visit

T = TypeVar("T")
ROWS = 50


class Rows(NamedTuple):
    """`after`: of the next page; None: it is the last."""

    rows: Sequence[Any]
    after: str | None


def after(visit: Visit, *kinds: type[str | int]) -> Any:
    """The sort key behind which the page begins; None: the first one. Raises Invalid."""
    given = visit.query.get("after")
    return Place(ROWS, None if given is None else decoded(given)).key(*kinds)


def part(visit: Visit, rows: Iterable[T], place: Callable[[T], tuple[str | int, ...]], *kinds: type[str | int]) -> Rows:
    """A page of `rows`, which are all, in the order of `place`: their sort key, of `kinds`. Raises Invalid."""
    begin = after(visit, *kinds)
    rest = [one for one in rows if begin is None or place(one) > tuple(begin)]
    return page(rest, lambda one: list(place(one)))


def page(found: Sequence[T], key: Callable[[T], list[str | int]], most: int = ROWS) -> Rows:
    """Of one row more than `most`. `key`: the sort key of a row."""
    rows = found[:most]
    return Rows(rows, encoded(key(rows[-1])) if len(found) > most else None)
