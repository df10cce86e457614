"""What /api/v1 and the console have beside the machine side: protection from other sites' pages, and their headers."""

from collections import OrderedDict

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from control_plane.errors import Refused, StorageUnavailable
from control_plane.http.cookies import SESSION, Cookies
from control_plane.http.identity import PRINCIPAL, SET_COOKIES, act_of
from control_plane.http.requests import render
from control_plane.plane import Plane
from control_plane.services import audit

PATHS = ("/api/v1", "/console")
# The same for everybody, and for ever: browsers keep it.
STATIC = "/console/static/"
# Browsers send no cookie before a login, and another site could still log its visitors in.
LOGINS = frozenset({("POST", "/api/v1/session"), ("POST", "/console/login")})
_HEADERS = [
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_KEPT = _HEADERS[1:]
# Milliseconds between two audit rows of one refusal, and refusals that are remembered
_AGAIN, _REMEMBERED = 60_000, 10_000


class CrossSite(Refused):
    def __init__(self, origin: str) -> None:
        message = (
            f"This request must come from a page of {origin}: it has no Sec-Fetch-Site: same-origin, nor that Origin."
        )
        super().__init__(403, "csrf", message)


class Guarded:
    """ASGI layer around what people use. Other paths pass unchanged."""

    def __init__(self, app: ASGIApp, plane: Plane) -> None:
        self._app = app
        self._plane = plane
        self._cookies = Cookies(plane.settings.origin)
        self._denied: OrderedDict[tuple[str | None, str, str], int] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PATHS):
            await self._app(scope, receive, send)
            return
        cookies: list[str] = []
        scope[SET_COOKIES] = cookies

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] == 403 and scope.get(PRINCIPAL) is not None:
                    await self._note(scope)
                own = _KEPT if scope["path"].startswith(STATIC) and message["status"] in (200, 304) else _HEADERS
                names = {name for name, _ in own}
                kept = [pair for pair in message.get("headers", ()) if pair[0].lower() not in names]
                message["headers"] = [*kept, *own, *((b"set-cookie", one.encode("latin-1")) for one in cookies)]
            await send(message)

        if self._is_cross_site(scope):
            await render(CrossSite(self._plane.settings.origin), scope)(scope, receive, guarded_send)
            return
        await self._app(scope, receive, guarded_send)

    def _is_cross_site(self, scope: Scope) -> bool:
        if scope["method"] in ("GET", "HEAD"):
            return False
        headers = Headers(scope=scope)
        # A page of another site cannot send a token without asking, and nobody allows it.
        by_cookie = self._cookies.has(scope, SESSION) and "authorization" not in headers
        return (by_cookie or (scope["method"], scope["path"]) in LOGINS) and not same_origin(
            headers, self._plane.settings.origin
        )

    async def _note(self, scope: Scope) -> None:
        """An audit row of the refusal; one a minute for who tries the same again and again."""
        request = Request(scope)
        act = act_of(request, scope[PRINCIPAL])
        # NUL: PostgreSQL has no such text, and the refusal must be noted.
        path = scope["path"].replace("\0", "\N{REPLACEMENT CHARACTER}")
        kind, _, rest = path.removeprefix("/api/v1/").removeprefix("/console/").partition("/")
        what = (act.principal.user, scope["method"], scope["path"])
        if act.at - self._denied.get(what, -_AGAIN) < _AGAIN:
            return
        self._denied[what] = act.at
        self._denied.move_to_end(what)
        if len(self._denied) > _REMEMBERED:
            self._denied.popitem(last=False)
        try:
            await audit.note_denied(self._plane, act, kind, rest or None, scope["method"])
        except StorageUnavailable:
            # It is in the log; the request is refused all the same.
            return


def same_origin(headers: Headers, origin: str) -> bool:
    """Whether a browser says that the request comes from a page of `origin`."""
    sites = headers.getlist("sec-fetch-site")
    if sites:
        return sites == ["same-origin"]
    return headers.getlist("origin") == [origin]
