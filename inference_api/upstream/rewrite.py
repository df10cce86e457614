"""The rewrites of a body: `model` becomes the backend's `served_model_name`, and the edits of features; no other byte.

A large body is not copied for them.
"""

from collections.abc import Sequence

import orjson

from inference_api.models import Edit
from inference_api.upstream.scanner import find

# The bytes of a request body, or consecutive pieces, so that a rewrite does not copy a large body.
Content = bytes | tuple[bytes | memoryview, ...]

# Bytes up to which a copy costs less than pieces.
_COPIED = 128 * 1024


def rewrite_json(body: bytes, name: str, span: tuple[int, int] | None = None, edits: Sequence[Edit] = ()) -> Content:
    """`body`, a JSON object with a string under `model`, with `name` there instead. `span`: where it is, if known."""
    span = span or find(body, "model")
    return edited(body, edits if span is None else [*edits, (span, orjson.dumps(name))])


def edited(body: bytes, edits: Sequence[Edit]) -> Content:
    """`body` with other bytes in some spans, which do not overlap."""
    if not edits:
        return body
    view, at = memoryview(body), 0
    pieces: list[bytes | memoryview] = []
    for (start, end), value in edits if len(edits) == 1 else sorted(edits):
        pieces += (view[at:start], value)
        at = end
    pieces.append(view[at:])
    return tuple(pieces) if len(body) > _COPIED else b"".join(pieces)


def size_of(content: Content) -> int:
    return sum(map(len, content)) if isinstance(content, tuple) else len(content)
