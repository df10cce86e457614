"""What people type: fields of forms, where a login leads, and forms of an object that has changed meanwhile."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from control_plane.errors import Invalid, Problem, Refused, problems_of
from control_plane.http.api.preconditions import etag_of

Model = TypeVar("Model", bound=BaseModel)
# The public part of a secret: of a key, or of a token
SECRET = re.compile(r"(sk|mt|st)-ia-([0-9A-Za-z]{12})(?![0-9A-Za-z])")
HOME, LOGIN = "/console/", "/console/login"


class Form:
    """The fields of a form, none of them with a NUL."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self._pairs = pairs
        # Of a field that is given twice the last
        self.values: Mapping[str, str] = dict(pairs)

    def text(self, name: str) -> str:
        """Without spaces around it; empty if it was not sent."""
        return self.values.get(name, "").strip()

    def optional(self, name: str) -> str | None:
        return self.text(name) or None

    def raw(self, name: str) -> str:
        """As it was typed: a password, a prompt. Line ends are those of Unix."""
        return self.values.get(name, "").replace("\r\n", "\n")

    def several(self, name: str) -> list[str]:
        return [value for key, value in self._pairs if key == name]

    def number(self, name: str) -> int | None:
        """Raises Invalid."""
        given = self.text(name)
        try:
            return int(given) if given else None
        except ValueError:
            raise Invalid(Problem(name, f"must be a whole number, not {given[:40]!r}")) from None

    def decimal(self, name: str) -> float | None:
        """Raises Invalid."""
        given = self.text(name)
        try:
            return float(given) if given else None
        except ValueError:
            raise Invalid(Problem(name, f"must be a number, not {given[:40]!r}")) from None

    def words(self, name: str) -> list[str]:
        """Separated by commas, spaces or lines."""
        return self.text(name).replace(",", " ").split()


def body(kind: type[Model], fields: Mapping[str, Any]) -> Model:
    """The body of a request of /api/v1, of what was typed. Raises Invalid."""
    try:
        return kind.model_validate(fields)
    except ValidationError as exc:
        raise Invalid(*problems_of(exc)) from None


async def form(request: Request) -> Form:
    """Raises Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Refused(415, "unsupported_media_type", "Send the form as application/x-www-form-urlencoded.")
    try:
        text = (await request.body()).decode()
        found = parse_qsl(text, keep_blank_values=True, max_num_fields=500, errors="strict")
    except ValueError:
        found = None
    # NUL: PostgreSQL has no such text, and nobody has such a name.
    if found is None or any("\0" in value for _, value in found):
        raise Refused(400, "bad_request", "The form cannot be read.")
    return Form(found)


def local(target: str | None) -> str:
    """A page of the console to go to; anything else is its first page."""
    if target is None or not target.startswith("/console") or target.startswith("//") or "\\" in target:
        return HOME
    return target if target.isascii() and target.isprintable() else HOME


def unreadable() -> Refused:
    """Of a form that no page of this release has."""
    return Refused(400, "bad_request", "The form cannot be read: open it again.")


def unchanged(given: str, tag: Callable[[Any], Any] = lambda shown: shown) -> Callable[[Any], None]:
    """Refuses the change of an object that is no longer the one of the form, which had the ETag `given`.

    `tag`: what the ETag of the object is made of.
    """

    def check(shown: Any) -> None:
        if etag_of(tag(shown)) != given:
            message = "Somebody has changed this meanwhile. Look at what it is now, and change that."
            raise Refused(412, "precondition_failed", message)

    return check
