"""Lists, page by page: `?limit=50&after=<next>` -> `{"data": [...], "next": "..." | null}`."""

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import orjson
from fastapi import Depends, Query
from pydantic import BaseModel

from control_plane.errors import Invalid, Problem

T = TypeVar("T")
R = TypeVar("R")


class Page(BaseModel, Generic[T]):
    """`next`: for `?after=`; null on the last page."""

    data: list[T]
    next: str | None


class Place(NamedTuple):
    """`after`: the sort key of the last object of the page before, as the list that made it has it; None: the first."""

    limit: int
    after: list[str | int] | None

    def key(self, *kinds: type[str | int]) -> Any:
        """The sort key `after`, of these types; None: the first page. Raises Invalid."""
        if self.after is not None and [type(one) for one in self.after] != list(kinds):
            raise _wrong()
        return self.after


def _place(
    limit: Annotated[int, Query(ge=1, le=200, description="objects at most")] = 50,
    after: Annotated[str | None, Query(max_length=1000, description="`next` of the page before")] = None,
) -> Place:
    return Place(limit, None if after is None else decoded(after))


Paging = Annotated[Place, Depends(_place)]


def page(rows: Sequence[R], place: Place, key: Callable[[R], list[str | int]], show: Callable[[R], T]) -> Page[T]:
    """A page of rows, of which one more than `limit` was read. `key`: the sort key of a row."""
    kept = rows[: place.limit]
    more = len(rows) > place.limit
    return Page(data=[show(row) for row in kept], next=encoded(key(kept[-1])) if more else None)


def encoded(key: list[str | int]) -> str:
    """`next` of a page whose last object has this sort key."""
    return base64.urlsafe_b64encode(orjson.dumps(key)).decode().rstrip("=")


def decoded(text: str) -> list[str | int]:
    """Raises Invalid."""
    try:
        found = orjson.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, binascii.Error):
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str | int) for one in found):
        raise _wrong()
    if any("\0" in one if isinstance(one, str) else not -(2**63) <= one < 2**63 for one in found):
        # No database stores these.
        raise _wrong()
    return found


def _wrong() -> Invalid:
    return Invalid(Problem("after", "must be the `next` of the page before"))
