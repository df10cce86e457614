"""The label of a request in metrics: the pattern of its route."""

from collections.abc import Callable, Sequence
from typing import Any

from starlette.routing import BaseRoute, Route
from starlette.types import Scope

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})
# Of a request's scope: the pattern of its route
ROUTE = "control_plane.route"


def route_among(routes: Sequence[BaseRoute]) -> Callable[[Scope], str]:
    """The pattern by which one of these answered; `other` if none did."""
    # Starlette leaves the handler in the scope; what it mounts notes its route itself.
    patterns: dict[Any, str] = {route.endpoint: route.path for route in routes if isinstance(route, Route)}
    return lambda scope: scope.get(ROUTE) or patterns.get(scope.get("endpoint"), "other")
