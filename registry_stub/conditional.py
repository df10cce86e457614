"""Conditional requests (RFC 9110, 13): which entity tags a header field names. Pure."""

import hashlib
import re
from collections.abc import Sequence

_TAG = re.compile(r'(W/)?("[\x21\x23-\x7e\x80-\xff]*")')


def etag_of(body: bytes) -> str:
    """A strong ETag that depends on the bytes alone, so a client's copy stays valid when the registry restarts."""
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def names(fields: Sequence[str], etag: str | None, *, weak: bool) -> bool:
    """Whether the If-Match or If-None-Match fields of a request name `etag`; None stands for nothing stored.

    If-None-Match compares weakly: `W/"x"` names `"x"`. If-Match does not, so there a weak tag never matches.
    """
    if etag is None:
        return False
    if any(field.strip() == "*" for field in fields):
        return True
    # findall on the joined fields, not split(","): a comma is legal inside a tag.
    return any(tag == etag and (weak or not prefix) for prefix, tag in _TAG.findall(", ".join(fields)))
