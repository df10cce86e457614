"""Every refusal of the control plane as an exception, in the one envelope of router and control plane.

`message` is a sentence with the fix; `code` is for programs; `param` names the offending key.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError


class Problem(NamedTuple):
    """One invalid value of a body."""

    param: str
    message: str


class Refused(Exception):
    """An answer other than 2xx."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        errors: Sequence[Problem] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        self.errors = tuple(errors)


class StorageUnavailable(Refused):
    """`seconds`: after which to try again."""

    def __init__(self, seconds: int = 5) -> None:
        message = "The control plane cannot use its database at the moment. Try again later; routers go on as they are."
        super().__init__(503, "storage_unavailable", message, headers={"Retry-After": str(seconds)})


class NotFound(Refused):
    """An object that does not exist, or that the caller may not see: both look alike."""

    def __init__(self, kind: str, id: str) -> None:
        super().__init__(404, "not_found", f"There is no {kind} {id[:128]!r}, or you may not see it.")


class Forbidden(Refused):
    def __init__(self, message: str) -> None:
        super().__init__(403, "forbidden", message)


class NotAuthenticated(Refused):
    def __init__(self) -> None:
        message = "Log in, or send a management token as 'Authorization: Bearer mt-ia-...'."
        super().__init__(
            401, "not_authenticated", message, headers={"WWW-Authenticate": 'Bearer realm="control-plane"'}
        )


class Invalid(Refused):
    """A value of the body or query that cannot be used."""

    def __init__(self, *problems: Problem) -> None:
        first = problems[0]
        super().__init__(422, "validation_error", f"{first.param}: {first.message}", param=first.param, errors=problems)


def problems_of(error: ValidationError) -> list[Problem]:
    """What is wrong with a value, in the words of the API."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[:50]
    return [Problem(".".join(map(str, one["loc"])), reason_of(one["msg"])) for one in found]


def reason_of(message: str) -> str:
    """The message of pydantic as part of a sentence."""
    text = message.removeprefix("Value error, ")
    return f"{text[0].lower()}{text[1:]}" if text else text


def envelope(error: Refused, request_id: str) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    detail: dict[str, Any] = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    if error.errors:
        detail["errors"] = [problem._asdict() for problem in error.errors]
    return {"error": detail, "request_id": request_id}
