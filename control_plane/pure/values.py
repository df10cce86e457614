"""Which values of JSON and YAML everyone who gets them later can read."""

from datetime import date
from typing import Any

_DEEPEST = 64
_LARGEST = 2**63


class Unusable(ValueError):
    """The message is a reason. `place`: of the value, such as `limits.0.requests`; empty: all of it."""

    def __init__(self, reason: str, place: str) -> None:
        super().__init__(reason)
        self.place = place


def check(value: Any) -> None:
    """Raises Unusable."""
    pending = [(value, 1, "")]
    while pending:
        one, depth, place = pending.pop()
        if isinstance(one, dict | list):
            if depth > _DEEPEST:
                raise Unusable(f"it is nested more than {_DEEPEST} deep", place)
            members = one.items() if isinstance(one, dict) else enumerate(one)
            pending += [(each, depth + 1, f"{place}.{name}" if place else f"{name}") for name, each in members]
            if isinstance(one, dict):
                pending += [(name, depth, place) for name in one]
        elif isinstance(one, str):
            if "\0" in one:
                raise Unusable("it has the character NUL", place)
        elif isinstance(one, int | float):
            # Of fractions, too: PostgreSQL gives 1e300 back as an integer.
            if not -_LARGEST <= one < _LARGEST:
                raise Unusable("it has a number that is too large", place)
        elif one is not None and not isinstance(one, date):
            raise Unusable(f"it has a value of the type {type(one).__name__}", place)
