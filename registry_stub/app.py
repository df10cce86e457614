"""The HTTP API of the registry: reads are open; writes are conditional, and need a token or are refused."""

import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from functools import partial

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from registry_stub import conditional
from registry_stub.database import StoreError
from registry_stub.errors import Refused, render
from registry_stub.metrics import Counted, Metrics
from registry_stub.store import Document, NameTaken, Store, Stored
from registry_stub.wire import preconditions, read_entry

log = logging.getLogger("registry_stub")


def create_app(
    store: Store,
    token: str | None = None,
    clock: Callable[[], float] = time.time,
    *,
    read_only: bool = False,
    ops_port: int | None = None,
) -> ASGIApp:
    """The registry over an open store; with a token, PUT and DELETE need it as a bearer token.

    `read_only`: PUT and DELETE are refused. `ops_port` serves metrics and /healthz only, and no other port serves
    metrics: monitoring needs no access to the port of writes.
    """
    surface, metrics = _Surface(store, token, clock, read_only), Metrics(lambda: len(store.snapshot.models))
    models = [
        Route("/models", surface.listing),
        Route("/models/", surface.listing),
        # One route for all methods, so that the Allow header of a 405 names them all.
        Route("/models/{name:path}", surface.model, methods=["GET", "PUT", "DELETE"]),
    ]
    health, page = Route("/healthz", _healthz), Route("/metrics", metrics.page)
    if ops_port is None:
        return _served([*models, health, page], metrics)
    return _ByPort(ops_port, _served([health, page], metrics), _served([*models, health], metrics))


def _served(routes: list[Route], metrics: Metrics) -> Starlette:
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Counted, metrics)],
        exception_handlers=dict.fromkeys((Refused, HTTPException, StoreError, ClientDisconnect, Exception), _failed),
    )
    app.router.redirect_slashes = False
    return app


class _ByPort:
    """ASGI app: dispatches by the local port of the connection, which clients cannot forge."""

    def __init__(self, ops_port: int, ops: ASGIApp, main: ASGIApp) -> None:
        self._ops_port = ops_port
        self._ops = ops
        self._main = main

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._ops if scope["server"][1] == self._ops_port else self._main
        await app(scope, receive, send)


class _Surface:
    def __init__(self, store: Store, token: str | None, clock: Callable[[], float], read_only: bool) -> None:
        self._store = store
        self._read_only = read_only
        self._token_digest = None if token is None else hashlib.sha256(token.encode(errors="surrogateescape")).digest()
        self._clock = clock

    async def listing(self, request: Request) -> Response:
        return _conditional(request, self._store.snapshot.listing)

    async def model(self, request: Request) -> Response:
        name: str = request.path_params["name"]
        if request.method == "PUT":
            self._authorize(request)
            return await self._put(request, name)
        if request.method == "DELETE":
            self._authorize(request)
            return await self._delete(request, name)
        return _conditional(request, _known(name, self._store.snapshot.models.get(name)))

    async def _put(self, request: Request, name: str) -> Response:
        entry = await read_entry(request, name)
        current = preconditions(request, name)

        def check(stored: Stored | None) -> None:
            current(stored.etag if stored else None)

        # In a thread: a commit waits for the disk, which must not delay readers and probes.
        try:
            stored, created = await run_in_threadpool(self._store.put, entry, int(self._clock()), check)
        except NameTaken as exc:
            message = f"The model {name!r} is not stored: {exc}. Choose another name, or change that model first."
            raise Refused(409, "name_taken", message, param=exc.param) from None
        log.info("model %s %s", name, "created" if created else "stored")
        headers = {"ETag": stored.etag, **({"Location": f"/models/{name}"} if created else {})}
        return _json(stored.body, 201 if created else 200, headers)

    async def _delete(self, request: Request, name: str) -> Response:
        current = preconditions(request, name)

        def check(stored: Stored | None) -> None:
            current(_known(name, stored).etag)

        await run_in_threadpool(self._store.delete, name, check)
        log.info("model %s deleted", name)
        return Response(status_code=204)

    def _authorize(self, request: Request) -> None:
        if self._read_only:
            message = "This registry takes no changes: it was started without a token. Its operator can set one."
            raise Refused(403, "read_only", message)
        if self._token_digest is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # latin-1 restores the header's bytes; comparing digests takes constant time.
        digest = hashlib.sha256(given.strip().encode("latin-1")).digest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest, self._token_digest):
            message = "Changing the registry needs its token; send it as 'Authorization: Bearer <token>'."
            raise Refused(401, "invalid_api_key", message, headers={"WWW-Authenticate": 'Bearer realm="registry"'})


async def _healthz(request: Request) -> Response:
    return _json(b'{"status":"ok"}')


_json = partial(Response, media_type="application/json")


def _conditional(request: Request, document: Document) -> Response:
    # no-cache: proxies may store a copy, but must revalidate it.
    headers = {"ETag": document.etag, "Cache-Control": "no-cache"}
    if conditional.names(request.headers.getlist("if-none-match"), document.etag, weak=True):
        return Response(status_code=304, headers=headers)
    return _json(document.body, headers=headers)


def _known(name: str, stored: Stored | None) -> Stored:
    if stored is None:
        message = f"The model {name[:128]!r} is not in the registry. GET /models lists those that are."
        raise Refused(404, "model_not_found", message, param="name")
    return stored


async def _failed(request: Request, error: Exception) -> Response:
    return render(_translate(request, error))


def _translate(request: Request, error: Exception) -> Refused:
    # Not request.url: it contains the Host header, which may be invalid.
    path: str = request.scope["path"][:128]
    match error:
        case Refused():
            return error
        case HTTPException(status_code=405, headers=headers):
            # Sorted: Starlette lists them in the order of a set.
            allow = ", ".join(sorted((headers or {})["Allow"].split(", ")))
            message = f"{request.method[:32]} is not allowed on {path!r}; use {allow}."
            return Refused(405, "method_not_allowed", message, headers={"Allow": allow})
        case HTTPException():
            message = f"The URL {path!r} is unknown. The registry answers on /models and /models/{{name}}."
            return Refused(404, "unknown_url", message)
        case ClientDisconnect():
            # The client is gone; this avoids a traceback for a disconnect within the body.
            return Refused(400, "bad_request", "The request ended before its body did.")
        case StoreError():
            # Log only: the reason names files of this host.
            log.error("%s %r failed: %s", request.method, path, error)
            message = "The registry could not write the change to its disk, and nothing was changed. Try again later."
            return Refused(503, "storage_unavailable", message, headers={"Retry-After": "5"})
        case _:
            # The traceback is logged by the server.
            message = "The registry failed to handle this request; its log has the details."
            return Refused(500, "internal_error", message)
