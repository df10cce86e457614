"""Identifiers: a prefix for the kind, and a ULID, which sorts by time.

Those that one process makes sort in the order in which it makes them, also within a millisecond.
"""

import secrets

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LENGTH, _RANDOM_BITS = 26, 80
_last = 0


def new_id(prefix: str, at: int) -> str:
    """`ovr_01JDSX7Z3W8Q4M5N6P7R8S9T0V` for the prefix `ovr` and a time in Unix milliseconds."""
    global _last
    # Half of the random part leaves room for those that follow in the same millisecond.
    number = at << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS - 1)
    if _last >> _RANDOM_BITS == at:
        number = max(number, _last + 1 + secrets.randbits(32))
    _last = number
    return _shown(prefix, number)


def first_id(prefix: str, at: int) -> str:
    """The smallest id of that moment, to find ids by time."""
    return _shown(prefix, at << _RANDOM_BITS)


def _shown(prefix: str, number: int) -> str:
    return f"{prefix}_{''.join(_ALPHABET[number >> 5 * place & 31] for place in reversed(range(_LENGTH)))}"
