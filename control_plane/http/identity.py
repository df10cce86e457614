"""Who asks: a service token on the machine side; a session or a management token under /api/v1."""

from starlette.requests import Request

from control_plane.errors import Refused
from control_plane.http.requests import ADDRESS, REQUEST_ID
from control_plane.plane import Act, Plane
from control_plane.pure.roles import Principal
from control_plane.services import people, tokens


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
