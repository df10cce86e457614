"""API keys: their form, checksum and digests. Pure.

`sk-ia-` + id (12) + `-` + secret (43) + checksum (6), in base62. The checksum refuses typos and made-up keys without
a look-up. Keys are random, so a fast digest is safe: a slow one would be paid at every request.
"""

import hashlib
import hmac
import secrets
import string
import zlib
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
ID_LENGTH, SECRET_LENGTH, CHECKSUM_LENGTH = 12, 43, 6
# Prefixes by purpose; no kind is valid for another's purpose.
KEY, MANAGEMENT, SERVICE = "sk-ia-", "mt-ia-", "st-ia-"
LENGTH = len(KEY) + ID_LENGTH + 1 + SECRET_LENGTH + CHECKSUM_LENGTH

_KEY = KEY.encode()
_CHECKED = LENGTH - CHECKSUM_LENGTH
_DASH = len(KEY) + ID_LENGTH
_BASE62 = frozenset(ALPHABET.encode())


class NewKey(NamedTuple):
    """A key, its public id, and its digest for a policy. The key itself is stored nowhere."""

    key: str
    id: str
    digest: str


def new_key(pepper: str | None = None, prefix: str = KEY, id: str | None = None) -> NewKey:
    """Make a random key. `id`: of a key that gets another secret."""
    id = id or _random(ID_LENGTH)
    start = f"{prefix}{id}-{_random(SECRET_LENGTH)}"
    key = start + checksum(start.encode())
    return NewKey(key, id, digest(key.encode(), pepper))


def checksum(start: bytes) -> str:
    """The checksum of the characters before it: CRC-32 in base62, the most significant digit first."""
    number, digits = zlib.crc32(start), ""
    for _ in range(CHECKSUM_LENGTH):
        number, digit = divmod(number, 62)
        digits = ALPHABET[digit] + digits
    return digits


def digest(key: bytes, pepper: str | None = None) -> str:
    """The digest as a policy has it: `sha256:` or, with a pepper, `hmac-sha256:`, and hex digits."""
    return f"sha256:{sha256(key).hex()}" if pepper is None else f"hmac-sha256:{hmac_sha256(key, pepper.encode()).hex()}"


def digests(key: bytes, kinds: Collection[str], peppers: Iterable[bytes]) -> Iterator[bytes]:
    """The raw digests of a key, of these kinds only, one for each pepper."""
    if "sha256" in kinds:
        yield sha256(key)
    if "hmac-sha256" in kinds:
        for pepper in peppers:
            yield hmac_sha256(key, pepper)


def sha256(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def hmac_sha256(key: bytes, pepper: bytes) -> bytes:
    return hmac.digest(pepper, key, "sha256")


def is_well_formed(key: bytes, prefix: bytes = _KEY) -> bool:
    """Whether it has the form of a key, and a matching checksum."""
    return (
        len(key) == LENGTH
        and key[: len(prefix)] == prefix
        and key[_DASH] == 0x2D
        and zlib.crc32(key[:_CHECKED]) == _number(key[_CHECKED:])
        and _BASE62.issuperset(key[len(prefix) : _DASH])
        and _BASE62.issuperset(key[_DASH + 1 :])
    )


def id_of(key: bytes) -> str:
    """The public id of a well-formed key."""
    return key[len(KEY) : _DASH].decode()


_VALUES = {character: value for value, character in enumerate(ALPHABET.encode())}


def _number(digits: bytes) -> int:
    number = 0
    for character in digits:
        number = number * 62 + _VALUES.get(character, 1 << 40)
    return number


def _random(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))
