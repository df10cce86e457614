"""Finds the edit of a JSON body by which `stream_options.include_usage` is true. Sans-IO.

Byte-exact: what the client wrote stays, but for the value of `include_usage`, or the place where it is added.
"""

import re
from collections.abc import Generator
from typing import Any

from inference_api.models import Edit
from inference_api.upstream.json_text import NotJSON, find_member
from inference_api.upstream.scanner import Scan

NAME = "stream_options"
_FIELD = "include_usage"
_KEY = b'"stream_options"'
_VALUE = re.compile(rb"\s*+:\s*+")
_ALONE = b'{"include_usage":true}'
_ADDED = b'"stream_options":{"include_usage":true},'
# Bytes up to which a document is read token by token; and of the longest `stream_options` that is edited
_SMALL, _LONGEST = 4096, 4096
# What pydantic, in the engines, takes for true
_TRUE = frozenset({"true", "t", "yes", "y", "on", "1"})


def asks(options: Any) -> bool:
    """Whether the client itself asked for usage."""
    value = options.get(_FIELD) if isinstance(options, dict) else None
    return value is True or value == 1 or (isinstance(value, str) and value.lower() in _TRUE)


def add(body: bytes) -> Edit:
    """To a body without `stream_options`."""
    at = body.find(b"{") + 1
    return (at, at), _ADDED


def override(body: bytes) -> Generator[None, None, Edit | None]:
    """To a body with `stream_options`, in slices; the last of several counts.

    None: it is nothing that an engine accepts, or longer than it ever is.
    """
    start = _quickly(body)
    if start is None:
        scan = Scan(body, (NAME,))
        try:
            yield from scan.slices()
        except NotJSON:
            # An engine may read what the scan does not, such as deeper nesting.
            return None
        member = scan.members.get(NAME)
        start = None if member is None else member.value_at()
    if start is None:
        return None
    text = body[start : start + _LONGEST]
    if text.startswith(b"null"):
        return (start, start + 4), _ALONE
    if not text.startswith(b"{"):
        return None
    value, end = find_member(text, _FIELD)
    if not end:
        return None
    if value is not None:
        return (start + value[0], start + value[1]), b"true"
    comma = b"" if text[1:].lstrip()[:1] == b"}" else b","
    return (start + 1, start + 1), b'"include_usage":true' + comma


def _quickly(body: bytes) -> int | None:
    """The offset of the value, without a scan: the key is there once, and cannot be spelled otherwise."""
    if len(body) <= _SMALL:
        span, _ = find_member(body, NAME)
        return None if span is None else span[0]
    if body.count(_KEY) == 1 and body.find(b"\\u") < 0:
        value = _VALUE.match(body, body.find(_KEY) + len(_KEY))
        return None if value is None else value.end()
    return None
