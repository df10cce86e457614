"""Every error that the router answers with, and the function that renders it.

RouterError
+-- BadRequest 400            +-- HeadersTooLarge 431     +-- ModelNotFound 404     +-- UnknownURL 404
+-- Unauthorized 401          +-- ModelForbidden 403      +-- ModelNotPriced 403
+-- RateLimited 429           +-- QuotaExceeded 429
+-- InvalidJSON 400           +-- MethodNotAllowed 405    +-- TooLarge 413          +-- UnsupportedMediaType 415
+-- UpgradeRequired 426
+-- InvalidRequest 422        +-- RequestTimeout 408      +-- URITooLong 414        +-- InternalError 500
+-- ResponseNotFound 404      +-- RouteNotServed 404      +-- PromptNotFound 404
+-- PromptVariableMissing 400   +-- PromptVariableUnknown 400   +-- PromptVariableInvalid 400
+-- UpstreamError             an attempt failed and was not, or could not be, repeated
|   +-- UpstreamReset 502
|   +-- UpstreamProtocolError 502
|   +-- UpstreamAuthFailed 502
|   +-- NoConsensus 502
|   +-- UpstreamTimeout 504
+-- Unavailable 503           +-- NoBackend   +-- Overloaded   +-- RegistryUnavailable   +-- ShuttingDown
                              +-- AuthUnavailable   +-- LimitsUnavailable   +-- ModelLoading

ClientGone                    no answer: the client has disconnected
"""

import re
from collections.abc import Mapping, Sequence

import orjson

from inference_api.models import Outcome, RawHeaders

_SHOWN = 64
_SECRET = re.compile(r"([smt][kt]-ia-[0-9A-Za-z]{1,12})-[0-9A-Za-z]+")
# Milliseconds that a client may be told to wait before its own retry
_PATIENCE = 60_000
# The OpenAI SDK obeys it; without it, the SDK decides by the status.
NOT_AGAIN = (b"x-should-retry", b"false")


class ClientGone(Exception):
    """The client disconnected before the answer was complete."""


class RouterError(Exception):
    """An error with an HTTP status and an OpenAI `type` and `code`; the message is shown to the client.

    No message may name a backend address, a key, or the content of a prompt.
    """

    status = 500
    type = "server_error"
    code = "internal_error"
    outcome = Outcome.REFUSED
    # For the metric of rejected requests; "": the code decides
    reason = ""
    # Fields for the log only; the client gets the message
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


class Unauthorized(_ClientError):
    """No valid key; `code`: invalid_api_key, api_key_expired or api_key_disabled."""

    status, code = 401, "invalid_api_key"

    def __init__(self, message: str, code: str = code) -> None:
        super().__init__(message, headers=[(b"www-authenticate", b'Bearer realm="inference-api"')])
        self.code = code


class ModelForbidden(_ClientError):
    """One text whether or not the model exists."""

    status, code = 403, "model_not_found"

    def __init__(self, name: str) -> None:
        message = f"The model {printable(name)!r} does not exist, or this API key may not use it."
        super().__init__(message, param="model")
        self.logged = {"asked_model": printable(name)[:_SHOWN]}


class ModelNotPriced(_ClientError):
    """`holder`: whose budget it is, quoted."""

    status, code = 403, "model_not_priced"

    def __init__(self, name: str, holder: str) -> None:
        super().__init__(f"The model {printable(name)!r} has no price, and {holder} has a cost budget.", param="model")


class RateLimited(RouterError):
    """`kind`: requests or tokens. `wait`: milliseconds after which the same request is let through, not capped."""

    status, code = 429, "rate_limit_exceeded"

    def __init__(self, message: str, kind: str, wait: int) -> None:
        retry = [(b"retry-after", b"%d" % -(-wait // 1000)), (b"retry-after-ms", b"%d" % wait)]
        # SDKs would wait as long.
        super().__init__(message, headers=[*retry, *([NOT_AGAIN] if wait > _PATIENCE else [])])
        self.type = kind


class QuotaExceeded(RouterError):
    """A budget is used up."""

    status, type, code = 429, "insufficient_quota", "insufficient_quota"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers=[NOT_AGAIN])


class PromptNotFound(_ClientError):
    """No stored prompt of this name, or no such version of it; one of another organisation is not found, too."""

    status, code = 404, "prompt_not_found"

    def __init__(self, prompt: str, version: str | None = None, why: str | None = None) -> None:
        param, text = "prompt.version", f"The prompt {printable(prompt)!r} does not exist."
        if version is None:
            param = "prompt.id"
        elif why is None:
            text = f"The prompt {printable(prompt)!r} has no version or label {printable(version)!r}."
        else:
            text = f"The version {printable(version)} of the prompt {printable(prompt)!r} {why}."
        super().__init__(text, param=param)


class _PromptVariable(_ClientError):
    status = 400

    def __init__(self, message: str, variable: str) -> None:
        super().__init__(message, param=f"prompt.variables.{printable(variable)}")


class PromptVariableMissing(_PromptVariable):
    code = "prompt_variable_missing"

    def __init__(self, prompt: str, variable: str) -> None:
        super().__init__(f"The prompt {prompt!r} needs the variable {variable!r}.", variable)


class PromptVariableUnknown(_PromptVariable):
    code = "prompt_variable_unknown"

    def __init__(self, prompt: str, variable: str) -> None:
        super().__init__(f"The prompt {prompt!r} has no variable {printable(variable)!r}.", variable)


class PromptVariableInvalid(_PromptVariable):
    """`problem`: what the value must be; the value itself is not shown."""

    code = "prompt_variable_invalid"

    def __init__(self, prompt: str, variable: str, problem: str) -> None:
        super().__init__(f"The variable {variable!r} of the prompt {prompt!r} {problem}.", variable)


class ResponseNotFound(_ClientError):
    status, code = 404, "response_not_found"

    def __init__(self, response: str) -> None:
        super().__init__(
            f"The response {printable(response)!r} does not exist, or its backend is not known.", param="id"
        )


class UnknownURL(_ClientError):
    status, code = 404, "unknown_url"

    def __init__(self, method: str, path: str, meant: str | None = None) -> None:
        hint = "GET /v1/models lists the models."
        if meant is not None:
            once = " Set the base URL to end in a single /v1." if meant.startswith("/v1/") else ""
            hint = f"Did you mean {meant}?{once}"
        super().__init__(f"Unknown request URL: {printable(method)} {printable(path)}. {hint}")
        self.logged = {"path": printable(path)[:_SHOWN]}


class RouteNotServed(_ClientError):
    """The model has no such route: `routes` of its entry."""

    status, code = 404, "unknown_url"

    def __init__(self, model: str, path: str, routes: Sequence[str]) -> None:
        message = f"The model {printable(model)!r} is not served on {path}; its routes are: {', '.join(routes)}."
        super().__init__(message, param="model")


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


class UpgradeRequired(_ClientError):
    status, code = 426, "upgrade_required"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers=[(b"upgrade", b"websocket"), (b"sec-websocket-version", b"13")])


class HeadersTooLarge(_ClientError):
    status, code = 431, "headers_too_large"


class InvalidRequest(_ClientError):
    status, code = 422, "validation_error"


class InternalError(RouterError):
    outcome = Outcome.INTERNAL_ERROR

    def __init__(self) -> None:
        super().__init__("The router failed to handle this request; its log has the details under the request id.")


class UpstreamError(RouterError):
    """The backends gave no usable answer; `outcome`: of the last attempt."""

    status = 502

    def __init__(self, message: str, outcome: Outcome, *, final: bool = False) -> None:
        # `final`: the SDK must not retry: every backend was tried, or a retry would do harm or cost as much again.
        super().__init__(message, headers=[NOT_AGAIN] if final else [])
        self.outcome = outcome


class UpstreamReset(UpstreamError):
    code = "upstream_reset"


class UpstreamProtocolError(UpstreamError):
    code = "upstream_protocol_error"


class UpstreamAuthFailed(UpstreamError):
    """A backend refused credentials that are not the client's. Its own words may show a part of them."""

    code = "upstream_auth_failed"

    def __init__(self, model: str) -> None:
        message = f"The backend of the model {printable(model)!r} refused the router's credentials."
        super().__init__(message, Outcome.AUTH_FAILED, final=True)


class UpstreamTimeout(UpstreamError):
    status, code = 504, "upstream_timeout"


class NoConsensus(UpstreamError):
    """The members of a vote have answered, and too few of them alike."""

    code = "no_consensus"

    def __init__(self, model: str) -> None:
        message = f"The members of the model {printable(model)!r} did not agree on an answer."
        super().__init__(message, Outcome.VOTE_LOST, final=True)


class _Unavailable(RouterError):
    status = 503

    def __init__(self, message: str, retry_after: int = 5) -> None:
        # 1..60: newer SDKs ignore more than 60 (node) or give up at more than 120 (python).
        super().__init__(message, headers=[(b"retry-after", b"%d" % min(max(retry_after, 1), 60))])
        self.logged = {"why": message}


class NoBackend(_Unavailable):
    code, outcome = "no_backend_available", Outcome.NO_BACKEND
    # Of a request that had been sent to a backend that an operator has then taken out: loop time of its end
    deadline: float | None = None

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
        message = f"The model {printable(model)!r} has no available backend"
        if none:
            message = f"The model {printable(model)!r} has no backends"
        if asleep:
            # An operator has to wake one first, which takes a while.
            message, retry_after = f"{message}: all of them are asleep", 10
        super().__init__(f"{message}.", retry_after)
        if why is not None:
            self.logged = {"why": why}
        if final:
            self.headers.append(NOT_AGAIN)


class RegistryUnavailable(_Unavailable):
    """Unknown name before the first answer of the registry. Not a 404: clients do not retry those."""

    code, outcome = "registry_unavailable", Outcome.NO_BACKEND

    def __init__(self, name: str) -> None:
        message = (
            f"The model {printable(name)!r} is not in the static catalogue, and the model registry has not answered "
            "since this router started; retry shortly. GET /v1/models lists the models that are served now."
        )
        super().__init__(message)
        self.param = "model"
        self.logged = {"asked_model": printable(name)[:_SHOWN], "why": "the registry has not answered yet"}


class AuthUnavailable(_Unavailable):
    """There is no policy yet, so nobody is known."""

    code, outcome = "auth_unavailable", Outcome.SHED

    def __init__(self) -> None:
        super().__init__("The router has no API keys yet: its policy has not been read; retry shortly.")


class LimitsUnavailable(_Unavailable):
    code, outcome = "limits_unavailable", Outcome.SHED

    def __init__(self) -> None:
        super().__init__("The rate limits cannot be checked at the moment; retry shortly.", retry_after=1)


class Overloaded(_Unavailable):
    code, outcome = "overloaded", Outcome.SHED

    def __init__(self, message: str, retry_after: int = 5, reason: str = "") -> None:
        super().__init__(message, retry_after)
        self.reason = reason


class ModelLoading(_Unavailable):
    """No backend was there in time, and none may be for a while."""

    code, outcome = "model_loading", Outcome.NO_BACKEND

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, retry_after=10)
        self.reason = reason


class ShuttingDown(_Unavailable):
    code, outcome = "shutting_down", Outcome.SHED

    def __init__(self) -> None:
        super().__init__("The router is shutting down; retry.", retry_after=1)


def printable(text: str) -> str:
    """A client's text for use in a message: at most 64 characters, no control characters, and no secret of a key."""
    text = without_secrets(text)
    shown = "".join(c if c.isprintable() else "?" for c in text[: _SHOWN + 1])
    return shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."


def without_secrets(text: str) -> str:
    """The text with the secrets of API keys and tokens replaced: clients send them in the wrong place, too."""
    return _SECRET.sub(r"\1-***", text)


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
