"""How much of what takes a CPU or memory for seconds is done at once in this process."""

from collections.abc import Iterator
from contextlib import contextmanager

from control_plane.errors import Refused
from control_plane.plane import Plane


@contextmanager
def turn(plane: Plane, kind: str, most: int) -> Iterator[None]:
    """One of `most` of a kind: `triages`. Raises Refused."""
    if plane.turns[kind] >= most:
        message = f"{most} {kind} run already. Try again when one has ended."
        raise Refused(429, f"too_many_{kind}", message, headers={"Retry-After": "5"})
    plane.turns[kind] += 1
    try:
        yield
    finally:
        plane.turns[kind] -= 1
