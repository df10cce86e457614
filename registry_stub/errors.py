"""Every refusal of the registry as one exception, and the one function that renders it."""

import orjson
from starlette.responses import Response

# A body may have thousands of errors; the first few are enough.
_LONGEST_MESSAGE = 2000


class Refused(Exception):
    """An answer other than 2xx: a sentence for the client, `code` for its program, `param` for the offending key."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = headers


def render(error: Refused) -> Response:
    """The OpenAI error envelope, every key present."""
    message = error.message
    if len(message) > _LONGEST_MESSAGE:
        message = message[:_LONGEST_MESSAGE] + "..."
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    detail = {"message": message, "type": kind, "param": error.param, "code": error.code}
    body = orjson.dumps({"error": detail})
    return Response(body, error.status, error.headers, media_type="application/json")
