"""Values of JSON that others have made: what is missing, null or of another type reads as nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from control_plane.pure import times

Json = Mapping[str, Any]
# Characters of a text; what is longer is cut
LONGEST = 1_000


def inner(value: object, *path: str) -> Json:
    """The object at that path; an empty one, if there is none."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def objects(value: object) -> Sequence[Json]:
    """The objects of a list."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def string(value: object) -> str:
    return value[:LONGEST] if isinstance(value, str) else ""


def whole(value: object) -> int | None:
    """A whole number that a database could hold."""
    return value if type(value) is int and abs(value) < 2**53 else None


def moment(value: object) -> int | None:
    """Unix milliseconds of an RFC 3339 time."""
    try:
        return times.read(value)
    except (ValueError, TypeError, OverflowError):
        return None
