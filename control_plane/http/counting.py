"""Counts and times requests, with a bounded set of labels."""

from collections.abc import Sequence
from typing import Any

from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from control_plane.metrics import Metrics

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})
# Of a request's scope: the pattern of its route
ROUTE = "control_plane.route"


class Counted:
    """ASGI layer: counts and times every request, with a bounded set of labels."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._metrics = metrics
        # Starlette leaves the handler in the scope; what it mounts notes its route itself.
        self._patterns: dict[Any, str] = {route.endpoint: route.path for route in routes if isinstance(route, Route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics, began = self._metrics, self._metrics.clock()
        # For requests without an answer, an outer layer makes one.
        status = 500

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted_send)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            route = scope.get(ROUTE) or self._patterns.get(scope.get("endpoint"), "other")
            metrics.requests.labels(method, route, str(status)).inc()
            metrics.durations.labels(method, route).observe(metrics.clock() - began)
