"""Who asks: a service token on the machine side; a session or a management token under /api/v1."""

from typing import Final

from starlette.requests import Request

from control_plane.errors import NotAuthenticated, Refused
from control_plane.http.cookies import SESSION, Cookies
from control_plane.http.requests import ADDRESS, REQUEST_ID
from control_plane.plane import Act, Plane
from control_plane.pure.roles import Principal
from control_plane.services import people, sessions, tokens

# Of a request's scope: who asks, once that is known; headers that its answer gets
PRINCIPAL: Final = "control_plane.principal"
SET_COOKIES: Final = "control_plane.set_cookies"


def plane_of(request: Request) -> Plane:
    plane: Plane = request.app.state.plane
    return plane


def bearer(request: Request) -> str | None:
    """The bearer token; None if there is none, or more than one."""
    given = request.headers.getlist("authorization")
    scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    return token.strip() if scheme.lower() == "bearer" else None


def act_of(request: Request, principal: Principal) -> Act:
    return Act(principal, plane_of(request).clock(), request.scope[ADDRESS], request.scope[REQUEST_ID])


def cookies_of(request: Request) -> Cookies:
    return Cookies(plane_of(request).settings.origin)


def set_session(request: Request, secret: str | None) -> None:
    """Give the browser the cookie of a session; None: take it away."""
    seconds = 0 if secret is None else sessions.LONGEST // 1000
    request.scope[SET_COOKIES].append(cookies_of(request).write(SESSION, secret or "", seconds))


async def principal_of(request: Request) -> Principal | None:
    """Who asks, by a management token or else by the cookie of a session; looked up once for a request."""
    if PRINCIPAL not in request.scope:
        request.scope[PRINCIPAL] = await _find(request)
    found: Principal | None = request.scope[PRINCIPAL]
    return found


async def _find(request: Request) -> Principal | None:
    plane = plane_of(request)
    if "authorization" in request.headers:
        given = bearer(request)
        return None if given is None else await people.by_token(plane, given)
    secret = cookies_of(request).read(request.scope, SESSION)
    found = None if secret is None else await sessions.find(plane, secret)
    if found is None:
        return None
    if found.renewed is not None:
        set_session(request, found.renewed)
    return found.principal


async def authenticated(request: Request) -> Act:
    """Who asks. Raises NotAuthenticated."""
    principal = await principal_of(request)
    if principal is None:
        raise NotAuthenticated
    return act_of(request, principal)


def anonymous(request: Request) -> Act:
    """Somebody who has not logged in."""
    return act_of(request, Principal("user"))


def service_act(request: Request, scope: str) -> Act:
    """The router that asks. Raises Refused: 401 without a service token, 403 if it lacks the scope."""
    given = bearer(request)
    principal = None if given is None else tokens.service(plane_of(request), given)
    if principal is None:
        message = "This needs a service token of the control plane: 'Authorization: Bearer st-ia-...'."
        headers = {"WWW-Authenticate": 'Bearer realm="control-plane"'}
        raise Refused(401, "invalid_api_key", message, headers=headers)
    if scope not in principal.scopes:
        message = (
            f"The service token lacks the scope {scope!r}; it has {', '.join(sorted(principal.scopes)) or 'none'}."
        )
        raise Refused(403, "insufficient_scope", message)
    return act_of(request, principal)


async def management_act(request: Request) -> Act:
    """The bearer of a management token, for writes to the machine side's /models. Raises Refused."""
    given = bearer(request)
    principal = None if given is None else await people.by_token(plane_of(request), given)
    if principal is None:
        message = "Changing the registry needs a management token: 'Authorization: Bearer mt-ia-...'."
        headers = {"WWW-Authenticate": 'Bearer realm="control-plane"'}
        raise Refused(401, "invalid_api_key", message, headers=headers)
    return act_of(request, principal)
