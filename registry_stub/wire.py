"""Reads and checks a write: the entry in its body, and the preconditions in its headers."""

from collections.abc import Callable

import orjson
from pydantic import ValidationError
from starlette.requests import Request

from inference_api.app import ENTRY
from inference_api.routing.catalogue import describe
from inference_api.routing.entries import CatalogueEntry
from registry_stub import conditional
from registry_stub.errors import Refused

MAX_BODY_BYTES = 1024 * 1024


async def read_entry(request: Request, name: str) -> CatalogueEntry:
    """The entry in the body, which must be the one the URL names. Raises Refused."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        message = f"The content type {media_type[:128]!r} is not supported; send the entry as application/json."
        raise Refused(415, "unsupported_media_type", message)
    body = await _read_body(request)
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise Refused(400, "invalid_json", f"The body is not JSON: {exc}.") from None
    try:
        # From the bytes, not from orjson's objects: the messages then use the words of JSON, not of Python.
        entry = ENTRY.model_validate_json(body)
    except ValidationError as exc:
        param = ".".join(map(str, exc.errors()[0]["loc"])) or None
        raise Refused(422, "validation_error", f"The entry is not valid: {describe(exc)}.", param=param) from None
    if entry.name != name:
        message = f"The body has the name {entry.name!r} but the URL has {name[:128]!r}; make them agree."
        raise Refused(422, "validation_error", message, param="name")
    return entry


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    if int(request.headers.get("content-length", "0")) <= MAX_BODY_BYTES:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                break
        else:
            return bytes(body)
    message = f"The request body is larger than the limit of {MAX_BODY_BYTES} bytes; split the entry or shorten it."
    # close: reusing the connection would require reading the rest of the body.
    raise Refused(413, "request_too_large", message, headers={"Connection": "close"})


def preconditions(request: Request, name: str) -> Callable[[str | None], None]:
    """A function that raises Refused when the stored ETag (None: nothing stored) is not what the request asks for."""
    match = request.headers.getlist("if-match")
    none_match = request.headers.getlist("if-none-match")

    def check(etag: str | None) -> None:
        if match and not conditional.names(match, etag, weak=False):
            found = f"its ETag is {etag}" if etag else "it does not exist"
            message = f"The model {name!r} is not what If-Match names: {found}. GET it, apply the change and try again."
            raise Refused(412, "precondition_failed", message)
        if none_match and conditional.names(none_match, etag, weak=True):
            message = f"The model {name!r} exists with the ETag {etag}. Leave out If-None-Match to replace it."
            raise Refused(412, "precondition_failed", message)

    return check
