"""Identifiers: a prefix for the kind, and a ULID, which sorts by time."""

import secrets

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LENGTH, _RANDOM_BITS = 26, 80


def new_id(prefix: str, at: int) -> str:
    """`ovr_01JDSX7Z3W8Q4M5N6P7R8S9T0V` for the prefix `ovr` and a time in Unix milliseconds."""
    number = at << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
    return f"{prefix}_{''.join(_ALPHABET[number >> 5 * place & 31] for place in reversed(range(_LENGTH)))}"


def first_id(prefix: str, at: int) -> str:
    """The smallest id of that moment, to find ids by time."""
    number = at << _RANDOM_BITS
    return f"{prefix}_{''.join(_ALPHABET[number >> 5 * place & 31] for place in reversed(range(_LENGTH)))}"
