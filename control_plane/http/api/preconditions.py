"""ETags of objects: PUT, PATCH and DELETE say which version they change (RFC 9110, 13; RFC 6585, 3)."""

from typing import Any

import orjson
from fastapi import Request, Response

from control_plane.errors import Refused
from registry_stub import conditional


def etag_of(body: Any) -> str:
    """The ETag of an object as it is served."""
    return conditional.etag_of(orjson.dumps(body, option=orjson.OPT_SORT_KEYS))


def require(request: Request, etag: str | None, creates: bool = False) -> None:
    """Raises Refused unless the request names the present version: 428 without a precondition, 412 with another.

    `etag`: None if the object does not exist. `creates`: the request may make it, with `If-None-Match: *`.
    """
    match, none_match = request.headers.getlist("if-match"), request.headers.getlist("if-none-match")
    if not match and not none_match:
        fix = "If-Match: <its ETag>"
        if creates:
            fix += ", or If-None-Match: * to create it"
        raise Refused(428, "precondition_required", f"Send the version that you change: {fix}.")
    if match and not conditional.names(match, etag, weak=False):
        found = f"its ETag is {etag}" if etag else "it does not exist"
        message = f"The object is not what If-Match names: {found}. GET it, apply the change and try again."
        raise Refused(412, "precondition_failed", message)
    if none_match and conditional.names(none_match, etag, weak=True):
        message = f"The object exists with the ETag {etag}. Send If-Match with it to replace it."
        raise Refused(412, "precondition_failed", message)


def tagged(response: Response, body: Any) -> Any:
    """The body, with its ETag in the answer."""
    response.headers["ETag"] = etag_of(body)
    return body
