"""The one rewrite there is: the body's `model` becomes the backend's `served_model_name`; every other byte stays."""

import orjson

from inference_api.outbound.scanner import find


def rewrite_json(body: bytes, name: str, span: tuple[int, int] | None = None) -> bytes:
    """`body`, a JSON object with a string under `model`, with `name` there instead. `span`: where it is, if known."""
    span = span or find(body, "model")
    return body if span is None else replaced(body, span, orjson.dumps(name))


def replaced(body: bytes, span: tuple[int, int], value: bytes) -> bytes:
    view = memoryview(body)
    return b"".join((view[: span[0]], value, view[span[1] :]))
