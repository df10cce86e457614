"""Keys of cached answers: a digest of all that an answer depends on. Pure.

Two bodies share a key only if every engine reads the same from them: white space, the order of members, and the
spelling of strings do not count, and nothing else is left out. A doubt makes two keys: it costs a hit, not a wrong
answer.
"""

import json
from collections.abc import Generator
from hashlib import sha256
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NewType

import orjson

from inference_api.models import Call
from inference_api.upstream.rewrite import Content, edited

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

Digest = NewType("Digest", bytes)

# Grows when the same answer gets another key, or another shape.
VERSION = b"1"
# Bytes up to which a body is read as JSON, in at most two milliseconds; a larger one counts byte for byte.
SMALL = 128 * 1024
# Bytes of a large body that are hashed at once: a fifth of a millisecond
_SLICE = 256 * 1024
# How the rest of the key was made: no two kinds can be equal.
_CANONICAL, _SPELLED, _BYTES = b"c", b"s", b"b"
# Headers that go to engines and change no answer
_NEUTRAL = frozenset(
    {
        *(b"accept", b"content-type", b"endpoint-load-metrics-format", b"traceparent", b"tracestate"),
        *(b"user-agent", b"x-session-id"),
    }
)
# Integers of more digits are no longer exact in every parser.
_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)
_LONG_NUMBER = b"0" * 19
# Members and items up to which an unusual body is read by Python
_FEW = 4000


def beginning(entry: bytes) -> "Hash":
    """What all keys of a model have in common; `entry`: the content of its catalogue entry."""
    return sha256(b"%b %d:%b" % (VERSION, len(entry), entry))


def small(common: "Hash", call: Call, scope: bytes) -> Digest:
    """The key of a request with a body of at most SMALL bytes. `scope`: who may share the answer."""
    hashed = _begin(common, call, scope)
    kind, text = canonical(_joined(edited(call.body, call.edits)) if call.edits else call.body)
    hashed.update(kind)
    hashed.update(text)
    return Digest(hashed.digest())


def large(common: "Hash", call: Call, scope: bytes) -> Generator[None, None, Digest]:
    """The same in slices, for a larger one."""
    hashed = _begin(common, call, scope)
    hashed.update(_BYTES)
    body = edited(call.body, call.edits)
    for piece in body if isinstance(body, tuple) else (body,):
        view = memoryview(piece)
        for at in range(0, len(view), _SLICE):
            hashed.update(view[at : at + _SLICE])
            yield
    return Digest(hashed.digest())


def canonical(body: bytes) -> tuple[bytes, bytes]:
    """How a body was read, and what of it counts."""
    try:
        text = orjson.dumps(orjson.loads(body), option=orjson.OPT_SORT_KEYS)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        # NaN, a lone surrogate, deep nesting: engines in Python read those.
        return _spelled(body)
    # A colon in a string is one in both texts, as none is escaped; and so a repeated member, which orjson drops, shows.
    if (
        body.find(b"\\u") >= 0
        or body.count(b":") != text.count(b":")
        or body.translate(_DIGITS).find(_LONG_NUMBER) >= 0
    ):
        return _spelled(body, text)
    return _CANONICAL, text


def _spelled(body: bytes, plain: bytes | None = None) -> tuple[bytes, bytes]:
    """With numbers as they are spelled, and every repeated member; `plain`, if that loses nothing."""
    if body.count(b",") > _FEW:
        return _BYTES, body
    spelling = _Spelling()
    try:
        value = json.loads(
            body.decode("utf-8-sig", "surrogatepass"),
            object_pairs_hook=spelling.members,
            parse_int=spelling.number,
            parse_float=spelling.number,
            parse_constant=spelling.constant,
        )
        if plain is not None and not spelling.is_unusual:
            return _CANONICAL, plain
        return _SPELLED, json.dumps(value).encode()
    except (ValueError, RecursionError):
        return _BYTES, body


class _Spelling:
    """Makes values of JSON that lose neither a repeated member nor a digit; strings and lists stay as they are."""

    def __init__(self) -> None:
        # Whether plain values would have lost one
        self.is_unusual = False

    def members(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) != len({name for name, _ in pairs}):
            self.is_unusual = True
        # Repeated ones stay in their order: some engines take the first, others the last.
        return {"{": sorted(pairs, key=itemgetter(0))}

    def number(self, digits: str) -> dict[str, str]:
        if digits.encode().translate(_DIGITS).find(_LONG_NUMBER) >= 0:
            self.is_unusual = True
        return {"0": digits}

    def constant(self, name: str) -> dict[str, str]:
        self.is_unusual = True
        return {"c": name}


def _begin(common: "Hash", call: Call, scope: bytes) -> "Hash":
    hashed = common.copy()
    # The target of a request has no line breaks, and neither has a header.
    hashed.update(b"%b%b\n%d:%b\n" % (call.route.path.encode(), call.suffix, len(scope), scope))
    for name, value in call.headers:
        if name not in _NEUTRAL:
            hashed.update(b"%b:%b\n" % (name, value))
    return hashed


def _joined(body: Content) -> bytes:
    return b"".join(body) if isinstance(body, tuple) else body
