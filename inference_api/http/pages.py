"""The routes that the router answers itself: models, probes, metrics, and errors for unknown paths."""

import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from time import monotonic
from typing import Any, Protocol

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference_api import __version__
from inference_api.errors import MethodNotAllowed, RouterError, UnknownURL
from inference_api.headers import extra_pairs
from inference_api.http import wire
from inference_api.http.accounts import ACCOUNT
from inference_api.http.negotiation import OPENMETRICS, TEXT, takes_gzip, wants_openmetrics
from inference_api.http.pipeline import Resolve
from inference_api.http.suggestions import meant
from inference_api.models import Outcome
from inference_api.observe.account import Account
from inference_api.observe.scrape import Exposition
from inference_api.routing.fleet import Fleet, Model, may_use
from inference_api.routing.registry import Registry
from inference_api.routing.standing import no_backend

logger = logging.getLogger(__name__)


class Models:
    """GET /v1/models and /v1/models/{id}. The list is rendered once per change of the fleet."""

    def __init__(self, fleet: Fleet, resolve: Resolve) -> None:
        self._fleet = fleet
        self._resolve = resolve
        self._version = -1
        self._rendered = b""

    async def list_all(self, request: Request) -> Response:
        caller = request.scope[ACCOUNT].caller
        if caller is not None:
            seen = [model for model in self._listed() if may_use(caller, model)]
            return Response(wire.model_list(seen), media_type="application/json")
        if self._version != self._fleet.version:
            self._version = self._fleet.version
            self._rendered = wire.model_list(self._listed())
        return Response(self._rendered, media_type="application/json")

    def _listed(self) -> Iterator[Model]:
        """Those of the catalogue, and the adapters that a backend has."""
        return (model for model in self._fleet.served.values() if model.parent is None or model.backends)

    async def retrieve(self, request: Request) -> Response:
        model = self._resolve(request.path_params["model"], request.scope[ACCOUNT].caller)
        if model.parent is not None and not model.backends:
            raise no_backend(model, monotonic())
        return Response(wire.json_bytes(wire.model_card(model)), media_type="application/json")

    def routes(self) -> list[Route]:
        return [Route("/v1/models", self.list_all), Route("/v1/models/{model:path}", self.retrieve)]


# Neither counted nor logged: probes arrive every few seconds, and not from clients.
_PROBES = frozenset({"/", "/health", "/healthz", "/readyz", "/metrics", "/backends"})
# Open to callers without keys.
OPEN_PATHS = frozenset(
    {"/health", "/healthz", "/readyz", "/metrics", "/version", "/openapi.json", "/docs", "/backends"}
)


class Finder(Protocol):
    """Finds backends; the first time may take a while."""

    async def known(self) -> None: ...


class Probes:
    """/healthz: liveness. /readyz: readiness, and the source of the catalogue. /metrics: Prometheus metrics.

    /health and /version are for clients of vLLM; `/` is the default of load balancers, and answers as /readyz.

    `silence`: seconds since the last turn of the event loop of requests, None while it is not running; with OPS_PORT,
    another loop answers even if that one hangs. `registry_required`: not ready before the registry has given a
    catalogue; otherwise, not ready without a model. `ready`: reasons of features not to be ready, or None.

    `late`, `hung`: seconds without a turn of that loop after which /readyz, and /healthz, fail.
    """

    late, hung = 5.0, 30.0

    def __init__(
        self,
        registry: Registry,
        exposition: Exposition,
        silence: Callable[[], float | None] = lambda: None,
        registry_required: bool = False,
        ready: Sequence[Callable[[], str | None]] = (),
    ) -> None:
        self._registry = registry
        self._registry_required = registry_required
        self._exposition = exposition
        self._silence = silence
        self._ready = ready
        self.state = "starting"

    async def open(self, finder: "Finder | None") -> None:
        """Become ready, once `finder` has found the backends."""
        if finder is not None:
            await finder.known()
        if self.state == "starting":
            self.state = "ready"

    def drain(self) -> None:
        self.state = "draining"

    async def healthz(self, request: Request) -> Response:
        if (self._silence() or 0.0) > self.hung:
            return JSONResponse({"status": "hung"}, 503)
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        status = self._registry.status()
        state = "hung" if (self._silence() or 0.0) > self.late else self.state
        if state == "ready" and self._registry.awaited and (self._registry_required or not status.models):
            state = "registry_unavailable"
        if state == "ready":
            state = next((reason for ready in self._ready if (reason := ready()) is not None), state)
        body = {"status": state, "catalogue": status.source, "models": status.models}
        return JSONResponse(body, 200 if state == "ready" else 503)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def metrics(self, request: Request) -> Response:
        if self._exposition.busy:
            return Response("Too many concurrent scrapes; retry later.\n", 503, {"retry-after": "1"}, "text/plain")
        openmetrics = wants_openmetrics(",".join(request.headers.getlist("accept")))
        gzip = takes_gzip(",".join(request.headers.getlist("accept-encoding")))
        headers = {"content-type": OPENMETRICS if openmetrics else TEXT, "vary": "accept, accept-encoding"}
        if gzip:
            headers["content-encoding"] = "gzip"
        return Page(self._exposition.page(openmetrics, gzip), headers=headers)

    def routes(self) -> list[Route]:
        """Routes on the clients' port, too, for load balancers and clients of engines."""
        return [
            Route("/", self.readyz),
            Route("/health", self.healthz),
            Route("/healthz", self.healthz),
            Route("/readyz", self.readyz),
            Route("/version", self.version),
        ]

    def ops_routes(self) -> list[Route]:
        """All routes, including those that name backends: for operators."""
        return [*self.routes(), Route("/metrics", self.metrics)]


class Page(StreamingResponse):
    """A response generated while it is sent; a disconnect, or HEAD, closes the generator."""

    def __init__(self, pieces: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(pieces, headers=headers)
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._pieces):
            if scope["method"] == "HEAD":
                await self._pieces.aclose()
            await super().__call__(scope, receive, send)


class _Pages:
    """The pages as one app: a request id on every answer, and status and size in the Account.

    Errors are raised, as those of the pipelines are; `http.accounts` answers them.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self._paths = [route.path for route in router.routes if isinstance(route, Route)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        account: Account = scope[ACCOUNT]
        account.silent = scope["path"] in _PROBES
        account.route = "models" if scope["path"].startswith("/v1/models") else "other"

        async def noted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
                more = extra_pairs(account.answer_headers)
                message["headers"] = [*others, (b"x-request-id", account.request_id.encode()), *more]
                account.status = message["status"]
                account.outcome = Outcome.OK if account.status < 400 else Outcome.REFUSED
            else:
                account.size += len(message.get("body", b""))
            await send(message)

        # With an `app` in the scope Starlette raises its errors; without one it answers in plain text.
        scope["app"] = self
        try:
            await self._router(scope, receive, noted_send)
        except HTTPException as exc:
            raise self._refusal(exc, scope["method"], scope["path"]) from None

    def _refusal(self, exc: HTTPException, method: str, path: str) -> RouterError:
        if exc.status_code == 405:
            # Starlette joins a set, whose order differs between processes.
            allow = ", ".join(sorted((exc.headers or {}).get("Allow", "GET").split(", ")))
            return MethodNotAllowed(method, path, allow)
        return UnknownURL(method, path, meant(path, self._paths))


def create_pages(
    routes: list[Route],
    lifespan: Callable[[Any], AbstractAsyncContextManager[None]] | None = None,
) -> ASGIApp:
    """The app of these routes."""
    return _Pages(Router(routes, redirect_slashes=False, lifespan=lifespan))
