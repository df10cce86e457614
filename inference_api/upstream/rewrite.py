"""The only rewrite: `model` in the body becomes the backend's `served_model_name`; all other bytes stay."""

import orjson

from inference_api.upstream.scanner import find

# The bytes of a request body, or consecutive pieces, so that a rewrite does not copy a large body.
Content = bytes | tuple[bytes | memoryview, ...]

# Bytes up to which a copy costs less than pieces.
_COPIED = 128 * 1024


def rewrite_json(body: bytes, name: str, span: tuple[int, int] | None = None) -> Content:
    """`body`, a JSON object with a string under `model`, with `name` there instead. `span`: where it is, if known."""
    span = span or find(body, "model")
    return body if span is None else replaced(body, span, orjson.dumps(name))


def replaced(body: bytes, span: tuple[int, int], value: bytes) -> Content:
    view = memoryview(body)
    pieces = (view[: span[0]], value, view[span[1] :])
    return pieces if len(body) > _COPIED else b"".join(pieces)


def size_of(content: Content) -> int:
    return sum(map(len, content)) if isinstance(content, tuple) else len(content)
