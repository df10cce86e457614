"""Who may call what under /api/v1: one table of routes, looked at before every handler.

A route without a row answers nobody. Handlers look again at the object: `Act.principal.may(permission, organisation)`.
"""

from typing import Annotated, Literal

from fastapi import Depends, Request

from control_plane.errors import Forbidden
from control_plane.http.identity import anonymous, authenticated, plane_of
from control_plane.http.requests import route_of
from control_plane.plane import Act, Plane
from control_plane.pure.roles import Permission

# open: without a login; self: whoever is logged in
Access = Permission | Literal["open", "self"]
PREFIX = "/api/v1"

ROUTES: dict[tuple[str, str], Access] = {
    ("POST", "/session"): "open",
    ("DELETE", "/session"): "self",
    ("GET", "/me"): "self",
    ("PATCH", "/me"): "self",
    ("GET", "/me/sessions"): "self",
    ("DELETE", "/me/sessions"): "self",
    ("GET", "/me/sessions/{id}"): "self",
    ("DELETE", "/me/sessions/{id}"): "self",
    ("GET", "/organisations"): "organisations.see",
    ("POST", "/organisations"): "organisations.write",
    ("GET", "/organisations/{name}"): "organisations.see",
    # Which fields: services.organisations.
    ("PATCH", "/organisations/{name}"): "limits.write",
    ("DELETE", "/organisations/{name}"): "organisations.write",
    ("GET", "/organisations/{name}/members"): "members.see",
    ("GET", "/organisations/{name}/members/{user}"): "members.see",
    ("PUT", "/organisations/{name}/members/{user}"): "members.write",
    ("DELETE", "/organisations/{name}/members/{user}"): "members.write",
    ("GET", "/users"): "organisations.write",
    ("POST", "/users"): "organisations.write",
    ("GET", "/users/{name}"): "organisations.write",
    ("PATCH", "/users/{name}"): "organisations.write",
    ("DELETE", "/users/{name}"): "organisations.write",
    ("DELETE", "/users/{name}/sessions"): "organisations.write",
    ("POST", "/users/{name}/setup"): "organisations.write",
    # The own ones; service tokens: services.issuing.
    ("GET", "/tokens"): "self",
    ("POST", "/tokens"): "self",
    ("GET", "/tokens/{id}"): "self",
    ("PATCH", "/tokens/{id}"): "self",
    ("DELETE", "/tokens/{id}"): "self",
    ("POST", "/tokens/{id}/rotate"): "self",
    # An export needs audit.export, too.
    ("GET", "/audit"): "audit.see",
    ("GET", "/models"): "models.see",
    ("GET", "/models/{name:path}"): "models.see",
    ("PUT", "/models/{name:path}"): "catalogue.write",
    ("DELETE", "/models/{name:path}"): "catalogue.write",
    # In an organisation: the state of the models that it may use.
    ("GET", "/backends"): "models.see",
    ("GET", "/routers"): "models.see",
    ("GET", "/inspections"): "catalogue.write",
    ("POST", "/inspections"): "catalogue.write",
    ("GET", "/inspections/{id}"): "catalogue.write",
    ("GET", "/overrides"): "backends.see",
    ("GET", "/overrides/{id}"): "backends.see",
    ("POST", "/overrides"): "backends.operate",
    ("DELETE", "/overrides/{id}"): "backends.operate",
    ("GET", "/deployments"): "backends.see",
    ("GET", "/deployments/{model:path}"): "backends.see",
    ("PUT", "/deployments/{model:path}"): "backends.operate",
    ("DELETE", "/deployments/{model:path}"): "backends.operate",
    ("POST", "/model-actions"): "backends.operate",
    ("GET", "/pods"): "backends.see",
    ("GET", "/logs"): "backends.operate",
    ("GET", "/model-tests"): "backends.see",
    ("GET", "/triage"): "backends.operate",
    ("POST", "/triage"): "backends.operate",
    ("GET", "/triage/{id}"): "backends.operate",
    ("GET", "/prices"): "prices.write",
    ("POST", "/prices"): "prices.write",
    ("GET", "/keys"): "keys.see",
    ("POST", "/keys"): "keys.write",
    ("GET", "/keys/{id}"): "keys.see",
    ("PATCH", "/keys/{id}"): "keys.write",
    ("DELETE", "/keys/{id}"): "keys.write",
    ("POST", "/keys/{id}/rotate"): "keys.write",
    ("GET", "/limits"): "settings.see",
    ("POST", "/limits"): "settings.write",
    ("GET", "/limits/{id}"): "settings.see",
    ("PUT", "/limits/{id}"): "settings.write",
    ("DELETE", "/limits/{id}"): "settings.write",
    ("GET", "/budgets"): "settings.see",
    ("POST", "/budgets"): "settings.write",
    ("GET", "/budgets/{id}"): "settings.see",
    ("PUT", "/budgets/{id}"): "settings.write",
    ("DELETE", "/budgets/{id}"): "settings.write",
    ("GET", "/settings"): "settings.see",
    ("GET", "/settings/{key}"): "settings.see",
    ("PUT", "/settings/{key}"): "settings.write",
    ("DELETE", "/settings/{key}"): "settings.write",
    ("GET", "/prompts"): "prompts.see",
    ("POST", "/prompts"): "prompts.draft",
    ("GET", "/prompts/{name}"): "prompts.see",
    ("DELETE", "/prompts/{name}"): "prompts.write",
    ("GET", "/prompts/{name}/versions"): "prompts.see",
    ("POST", "/prompts/{name}/versions"): "prompts.draft",
    ("GET", "/prompts/{name}/versions/{n}"): "prompts.see",
    ("GET", "/prompts/{name}/labels/{label}"): "prompts.see",
    ("PUT", "/prompts/{name}/labels/{label}"): "prompts.write",
    ("DELETE", "/prompts/{name}/labels/{label}"): "prompts.write",
    ("GET", "/usage"): "usage.see",
    ("GET", "/metrics"): "backends.see",
    ("GET", "/metrics/{query}"): "backends.see",
    ("GET", "/requests"): "requests.see",
    ("GET", "/requests/{id}"): "requests.see",
}


async def acting(request: Request) -> Act:
    """Who asks, with the permission of the route somewhere. Raises NotAuthenticated, Forbidden."""
    route_of(request.scope, PREFIX)
    needed = ROUTES.get((request.method, request.scope["route"].path))
    if needed is None:
        raise Forbidden(f"{request.method} of this URL is not open to anyone.")
    if needed == "open":
        return anonymous(request)
    act = await authenticated(request)
    if needed != "self" and act.principal.scope(needed).empty:
        raise Forbidden(f"This needs the permission {needed}, which no role of yours has.")
    return act


Acting = Annotated[Act, Depends(acting)]
ThePlane = Annotated[Plane, Depends(plane_of)]
