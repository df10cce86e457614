"""GET /policy from its parts: a key is rendered once, and only shards that have changed are compressed anew.

With 100,000 keys the document has 20 MB. Its gzip is put together from a deflate stream per shard (RFC 1951: each ends
on a byte, and refers to nothing before it).
"""

import struct
import zlib
from collections.abc import Iterable, Mapping
from hashlib import sha256
from types import MappingProxyType
from typing import Any, NamedTuple

import orjson

from control_plane.pure.times import shown

# Of gzip: magic number, deflate, no name, no time, unknown system
_HEAD = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
_LEVEL = 5


class Item(NamedTuple):
    """A key as JSON, and what decides whether it is in the policy."""

    organisation: str | None
    body: bytes


class Shard(NamedTuple):
    """Keys whose ids begin with one character: items by id, in the order of ids; their deflate stream, and SHA-256."""

    items: Mapping[str, Item]
    compressed: bytes
    digest: bytes

    @classmethod
    def of(cls, items: Mapping[str, Item]) -> "Shard":
        ordered = dict(sorted(items.items()))
        text = b",".join([one.body for one in ordered.values()])
        return cls(MappingProxyType(ordered), deflated(text), sha256(text).digest())


Shards = Mapping[str, Shard]


def deflated(text: bytes) -> bytes:
    """A part of a deflate stream that others can stand before and behind."""
    stream = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    return stream.compress(text) + stream.flush(zlib.Z_FULL_FLUSH)


_COMMA = deflated(b",")
_END = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS).flush(zlib.Z_FINISH)


def changed(shards: Shards, items: Mapping[str, Item | None], ended: frozenset[str]) -> Shards:
    """The shards with these items; None: without that key. `ended`: organisations whose keys are taken out."""
    found = dict(shards)
    by_shard: dict[str, dict[str, Item | None]] = {}
    for id, item in items.items():
        by_shard.setdefault(id[0], {})[id] = item
    for name, shard in shards.items() if ended else ():
        for id, item in shard.items.items():
            if item.organisation in ended:
                by_shard.setdefault(name, {}).setdefault(id, None)
    for name, changes in by_shard.items():
        known: Mapping[str, Item] = shards[name].items if name in shards else {}
        merged: dict[str, Item | None] = {**known, **changes}
        kept = {id: item for id, item in merged.items() if item is not None}
        if not kept:
            found.pop(name, None)
        elif kept != known:
            found[name] = Shard.of(kept)
    return MappingProxyType(dict(sorted(found.items())))


class Made(NamedTuple):
    """A document, its gzip, and what is equal for equal documents only."""

    body: bytes
    compressed: bytes
    identity: bytes


def document(before: Mapping[str, Any], shards: Shards, after: Mapping[str, Any]) -> Made:
    """The members before the keys, the keys, and those after."""
    head, tail = _members(before, b'"keys":['), _members(after, b"")
    start, end = b"{" + head, b"]" + (b"," if tail else b"") + tail + b"}"
    keys = [item.body for shard in shards.values() for item in shard.items.values()]
    body = b"".join((start, b",".join(keys), end))
    parts = [deflated(start)]
    for number, shard in enumerate(shards.values()):
        parts += [_COMMA, shard.compressed] if number else [shard.compressed]
    parts.append(deflated(end))
    trailer = struct.pack("<II", zlib.crc32(body), len(body) & 0xFFFF_FFFF)
    identity = b"".join([sha256(start).digest(), *(shard.digest for shard in shards.values()), sha256(end).digest()])
    return Made(body, b"".join([_HEAD, *parts, _END, trailer]), identity)


def _members(values: Mapping[str, Any], last: bytes) -> bytes:
    members = [orjson.dumps(name) + b":" + orjson.dumps(value) for name, value in values.items()]
    return b",".join([*members, *([last] if last else [])])


def listed(bodies: Iterable[bytes]) -> orjson.Fragment:
    """A list of what is JSON already."""
    return orjson.Fragment(b"[" + b",".join(bodies) + b"]")


def key_item(row: Any) -> bytes:
    """A row of `keys` as the policy has it: without what is the default. Its JSON columns are text."""
    found: dict[str, Any] = {"id": row.id, "name": row.name, "digest": row.digest}
    for name in ("organisation", "user"):
        if (value := getattr(row, name)) is not None:
            found[name] = value
    if row.models is not None:
        found["models"] = orjson.Fragment(row.models)
    if row.limits not in ("[]", None):
        found["limits"] = orjson.Fragment(row.limits)
    if row.budget is not None:
        found["budget"] = orjson.Fragment(row.budget)
    if row.priority:
        found["priority"] = row.priority
    if row.weight != 1:
        found["weight"] = row.weight
    if row.expires_at is not None:
        found["expires"] = shown(row.expires_at)
    if row.disabled:
        found["disabled"] = True
    # One that is over stays: the router says then until when it was valid.
    if row.previous_digest is not None:
        found["previous"] = {"digest": row.previous_digest, "until": shown(row.previous_until)}
    return orjson.dumps(found)
