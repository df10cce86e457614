"""Every error the router itself can answer with, and the one function that renders it.

RouterError
+-- BadRequest 400            +-- HeadersTooLarge 431     +-- ModelNotFound 404     +-- UnknownURL 404
+-- InvalidJSON 400           +-- MethodNotAllowed 405    +-- TooLarge 413          +-- UnsupportedMediaType 415
+-- InvalidRequest 422        +-- RequestTimeout 408      +-- URITooLong 414        +-- InternalError 500
+-- ResponseNotFound 404
+-- UpstreamError             an attempt failed and was not, or could not be, repeated
|   +-- UpstreamReset 502
|   +-- UpstreamProtocolError 502
|   +-- UpstreamTimeout 504
+-- Unavailable 503           +-- NoBackend   +-- Overloaded   +-- RegistryUnavailable   +-- ShuttingDown

ClientGone                    not an answer: nobody is there to read one
"""

from collections.abc import Mapping, Sequence

import orjson

from inference_api.models import Outcome, RawHeaders

_SHOWN = 64
# The OpenAI SDK obeys it; without it, it decides by the status.
NOT_AGAIN = (b"x-should-retry", b"false")


class ClientGone(Exception):
    """The client left before the answer was complete."""


class RouterError(Exception):
    """An error with an HTTP status and an OpenAI `type` and `code`; the message is shown to the client.

    No message may name a backend address, a key, or the content of a prompt.
    """

    status = 500
    type = "server_error"
    code = "internal_error"
    outcome = Outcome.REFUSED
    # What the log says beside the message, which goes to the client
    logged: Mapping[str, str] = {}

    def __init__(self, message: str, *, param: str | None = None, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = list(headers)


class _ClientError(RouterError):
    type = "invalid_request_error"


class BadRequest(_ClientError):
    status, code = 400, "bad_request"


class InvalidJSON(_ClientError):
    status, code = 400, "invalid_json"


class ModelNotFound(_ClientError):
    status, code = 404, "model_not_found"

    def __init__(self, name: str, known: Sequence[str]) -> None:
        listed = f" Known models: {', '.join(known)}." if 0 < len(known) <= 10 else " GET /v1/models lists them."
        super().__init__(f"The model {printable(name)!r} does not exist.{listed}", param="model")
        self.logged = {"asked_model": printable(name)[:_SHOWN]}


class ResponseNotFound(_ClientError):
    status, code = 404, "response_not_found"

    def __init__(self, response: str) -> None:
        super().__init__(f"There is no response {printable(response)!r}, or it is not known where it is.", param="id")


class UnknownURL(_ClientError):
    status, code = 404, "unknown_url"

    def __init__(self, method: str, path: str, meant: str | None = None) -> None:
        hint = "See GET /v1/models to begin with."
        if meant is not None:
            once = " The base URL ends in /v1 once." if meant.startswith("/v1/") else ""
            hint = f"Did you mean {meant}?{once}"
        super().__init__(f"Unknown request URL: {printable(method)} {printable(path)}. {hint}")
        self.logged = {"path": printable(path)[:_SHOWN]}


class MethodNotAllowed(_ClientError):
    status, code = 405, "method_not_allowed"

    def __init__(self, method: str, path: str, allow: str) -> None:
        message = f"{printable(method)} is not allowed on {printable(path)}; use {allow}."
        super().__init__(message, headers=[(b"allow", allow.encode())])


class TooLarge(_ClientError):
    status, code = 413, "request_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request body is larger than the limit of {limit} bytes.")


class URITooLong(_ClientError):
    status, code = 414, "uri_too_long"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request target is longer than the limit of {limit} bytes.")


class UnsupportedMediaType(_ClientError):
    status, code = 415, "unsupported_media_type"


class RequestTimeout(_ClientError):
    status, code = 408, "request_timeout"


class HeadersTooLarge(_ClientError):
    status, code = 431, "headers_too_large"


class InvalidRequest(_ClientError):
    status, code = 422, "validation_error"


def answer_validation_with(status: int) -> None:
    """Give InvalidRequest this status from now on, in the whole process: VALIDATION_STATUS."""
    InvalidRequest.status = status


class InternalError(RouterError):
    outcome = Outcome.INTERNAL_ERROR

    def __init__(self) -> None:
        super().__init__("The router failed to handle this request. Its log has the details under this request id.")


class UpstreamError(RouterError):
    """No usable answer came from the model's backends; `outcome` says how the last attempt ended."""

    status = 502

    def __init__(self, message: str, outcome: Outcome, *, final: bool = False) -> None:
        # `final`: every backend was tried, or a repetition would do harm or cost as much again; tell the SDK not to.
        super().__init__(message, headers=[NOT_AGAIN] if final else [])
        self.outcome = outcome


class UpstreamReset(UpstreamError):
    code = "upstream_reset"


class UpstreamProtocolError(UpstreamError):
    code = "upstream_protocol_error"


class UpstreamTimeout(UpstreamError):
    status, code = 504, "upstream_timeout"


class _Unavailable(RouterError):
    status = 503

    def __init__(self, message: str, retry_after: int = 5) -> None:
        # 1..60: newer SDKs ignore more than 60 (node) or give up at more than 120 (python).
        super().__init__(message, headers=[(b"retry-after", b"%d" % min(max(retry_after, 1), 60))])
        self.logged = {"why": message}


class NoBackend(_Unavailable):
    code, outcome = "no_backend_available", Outcome.NO_BACKEND

    def __init__(
        self,
        model: str,
        retry_after: int = 5,
        *,
        final: bool = False,
        asleep: bool = False,
        none: bool = False,
        why: str | None = None,
    ) -> None:
        message = f"No backend of the model {printable(model)!r} can take a request now"
        if none:
            message = f"The model {printable(model)!r} has no backends"
        if asleep:
            # Somebody has to wake one first, and that takes a while.
            message, retry_after = f"{message}: all of them are asleep", 10
        super().__init__(f"{message}.", retry_after)
        if why is not None:
            self.logged = {"why": why}
        if final:
            self.headers.append(NOT_AGAIN)


class RegistryUnavailable(_Unavailable):
    """Not a 404, which clients take for final: the registry may know the name."""

    code, outcome = "registry_unavailable", Outcome.NO_BACKEND

    def __init__(self, name: str) -> None:
        message = (
            f"It is not known yet whether the model {printable(name)!r} exists: the model registry has not answered "
            "since this router started. GET /v1/models lists what is served meanwhile."
        )
        super().__init__(message)
        self.param = "model"
        self.logged = {"asked_model": printable(name)[:_SHOWN], "why": "the registry has not answered yet"}


class Overloaded(_Unavailable):
    code, outcome = "overloaded", Outcome.SHED


class ShuttingDown(_Unavailable):
    code, outcome = "shutting_down", Outcome.SHED

    def __init__(self) -> None:
        super().__init__("This router is shutting down; the next one takes over.", retry_after=1)


def printable(text: str) -> str:
    """At most 64 characters of what a client sent, without control characters, for use in a message."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: _SHOWN + 1])
    return shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."


def render(error: RouterError, request_id: str) -> tuple[int, RawHeaders, bytes]:
    """(status, headers, body) of an error answer in the OpenAI envelope, with every key present."""
    detail = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    body = orjson.dumps({"error": detail, "request_id": request_id})
    headers: RawHeaders = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id.encode()),
        *error.headers,
    ]
    return error.status, headers, body


def error_event(code: str, message: str) -> bytes:
    """One SSE event that the OpenAI chat, OpenAI responses and Anthropic clients all raise on."""
    inner = {"message": message, "type": "server_error", "param": None, "code": code}
    outer = {"type": "error", "code": code, "message": message, "param": None, "error": inner}
    return b"event: error\ndata: " + orjson.dumps(outer) + b"\n\n"
