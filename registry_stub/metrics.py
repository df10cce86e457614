"""The metrics of the registry. With a few requests a second, prometheus-client's counters suffice."""

import platform
import time
from collections.abc import Callable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference_api import __version__
from inference_api.http.negotiation import OPENMETRICS, TEXT, wants_openmetrics

_METHODS = frozenset({"GET", "HEAD", "PUT", "DELETE"})
_ROUTES = {"/models": "models", "/models/": "models", "/healthz": "healthz", "/metrics": "metrics"}


class Metrics:
    """`models()`: how many there are. `clock`: monotonic seconds."""

    def __init__(self, models: Callable[[], float], clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "model_registry_http_requests", "Requests answered.", ["method", "route", "code"], registry=self._registry
        )
        self.durations = Histogram(
            "model_registry_http_request_duration_seconds",
            "Seconds from the request to the end of the answer.",
            ["method", "route"],
            registry=self._registry,
        )
        Gauge("model_registry_models", "Models in the registry.", registry=self._registry).set_function(models)
        build = Gauge(
            "model_registry_build_info",
            "Always 1; the labels say what runs.",
            ["version", "python_version"],
            registry=self._registry,
        )
        build.labels(__version__, platform.python_version()).set(1)

    async def page(self, request: Request) -> Response:
        openmetrics = wants_openmetrics(",".join(request.headers.getlist("accept")))
        write: Callable[[CollectorRegistry], bytes] = generate_openmetrics if openmetrics else generate_latest
        return Response(write(self._registry), headers={"content-type": OPENMETRICS if openmetrics else TEXT})


class Counters(Protocol):
    """What requests are counted in. `clock`: monotonic seconds."""

    clock: Callable[[], float]
    requests: Counter
    durations: Histogram


def route_of(scope: Scope) -> str:
    """The label of a request of the registry."""
    return _route(scope["path"])


class Counted:
    """ASGI layer: counts and times every request, with a bounded set of labels.

    `route`: the label of a request, asked for at its end. `methods`: those with a label of their own.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Counters,
        route: Callable[[Scope], str] = route_of,
        methods: frozenset[str] = _METHODS,
    ) -> None:
        self._app = app
        self._methods = methods
        self._metrics = metrics
        self._route = route

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
            method = scope["method"] if scope["method"] in self._methods else "other"
            route = self._route(scope)
            metrics.requests.labels(method, route, str(status)).inc()
            metrics.durations.labels(method, route).observe(metrics.clock() - began)


def _route(path: str) -> str:
    return _ROUTES.get(path) or ("model" if path.startswith("/models/") else "other")
