"""CORS_ORIGINS: which websites may use the router from a browser.

Never with credentials: a key is in `authorization`, which a script sends itself, and not in a cookie that any site
could use.
"""

import re
from collections.abc import Awaitable
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import NoDecode
from starlette.types import ASGIApp, Receive, Scope
from starlette.types import Send as ASGISend

from inference_api.core import Core
from inference_api.feature import Feature, Switch
from inference_api.headers import header_lines
from inference_api.http.accounts import ACCOUNT, respond
from inference_api.models import RawHeaders
from inference_api.observe.account import Account
from inference_api.settings import Group, Settings

ANY = "*"
# As browsers write it: in lower case, without a path, and without the scheme's own port
_ORIGIN = re.compile(r"(?!https://[^/]*:443$|http://[^/]*:80$)[a-z][a-z0-9+.-]*://[a-z0-9._-]+(:\d{1,5})?|"
                     r"https?://\[[0-9a-f:.]+\](:\d{1,5})?")  # fmt: skip
# Headers that a script may read, beside those that browsers always show
EXPOSED = (
    "x-request-id",
    "retry-after",
    "retry-after-ms",
    *(f"x-ratelimit-{what}-{unit}" for unit in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
    *(f"x-inference-{name}" for name in ("model", "fallback", "variant", "votes", "cache", "prompt")),
    "x-inference-budget-remaining",
)
_METHODS = (b"access-control-allow-methods", b"GET, POST, DELETE")
_MAX_AGE = (b"access-control-max-age", b"600")
_EXPOSED = (b"access-control-expose-headers", ", ".join(EXPOSED).encode())
_VARY = (b"vary", b"Origin")
# Under which a head has the lines for its origin
_NAME = "cors"


class Options(Group):
    cors_origins: Annotated[frozenset[str], NoDecode] = Field(
        default=frozenset(),
        description="origins of websites that may use the router from a browser, comma-separated, or `*` for all",
    )

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _exact(cls, origins: frozenset[str]) -> frozenset[str]:
        if ANY in origins and len(origins) > 1:
            raise ValueError("`*` is every origin; give it alone")
        for origin in sorted(origins - {ANY}):
            if not _ORIGIN.fullmatch(origin):
                fix = "must be as browsers send it, such as https://app.example or http://localhost:3000"
                raise ValueError(f"{origin!r} is no origin: it {fix}; or `*`")
        return origins


def build(core: Core, settings: Settings) -> Feature | None:
    """Off without an origin."""
    origins = settings.of(Options).cors_origins
    return Feature("cors", layer=CORS(origins).layer) if origins else None


class CORS:
    """Answers preflight requests, and adds the headers to all other answers for these origins."""

    def __init__(self, origins: frozenset[str]) -> None:
        self._origins = frozenset(origin.encode("ascii") for origin in origins)
        self._any = ANY in origins

    def layer(self, app: ASGIApp) -> ASGIApp:
        # No coroutine of its own, and `send` is not wrapped: the short cuts stay.
        def shared(scope: Scope, receive: Receive, send: ASGISend) -> Awaitable[None]:
            if scope["type"] != "http":
                return app(scope, receive, send)
            account: Account = scope[ACCOUNT]
            notes = account.head.notes
            lines = notes.get(_NAME)
            if lines is None:
                lines = notes[_NAME] = self._lines(account.head.headers)
            if lines:
                if scope["method"] == "OPTIONS" and (preflight := self._preflight(account.head.headers)):
                    return respond(scope, send, 204, preflight)
                account.answer_headers.append(lines)
            return app(scope, receive, send)

        return shared

    def _allowed(self, headers: RawHeaders) -> bytes | None:
        """The origin to name in answers, None if it may not use the router or is not a website."""
        origins = [value for name, value in headers if name == b"origin"]
        if len(origins) != 1:
            return None
        if self._any:
            return ANY.encode()
        return origins[0] if origins[0] in self._origins else None

    def _lines(self, headers: RawHeaders) -> bytes:
        origin = self._allowed(headers)
        return b"" if origin is None else header_lines([(b"access-control-allow-origin", origin), _EXPOSED, _VARY])

    def _preflight(self, headers: RawHeaders) -> RawHeaders:
        """The headers of the answer; none if it is not a preflight request."""
        origin = self._allowed(headers)
        if origin is None or not any(name == b"access-control-request-method" for name, _ in headers):
            return []
        wanted = [value for name, value in headers if name == b"access-control-request-headers"]
        asked = [(b"access-control-allow-headers", b", ".join(wanted))] if wanted else []
        return [(b"access-control-allow-origin", origin), _METHODS, *asked, _MAX_AGE, _VARY]


FEATURE = Switch(build, Options)
