"""What the OpenAPI document says beside the signatures of the handlers."""

from typing import Any

MERGE_PATCH = "A JSON merge patch (RFC 7396): what is given is changed, null takes it away."


def shows(model: Any, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """The shape of an answer that a handler makes itself."""
    return {status: {"model": model}}


# `responses` of operations that ask a service outside
OUTSIDE: dict[int | str, dict[str, Any]] = {status: {} for status in (404, 409, 410, 502)}
