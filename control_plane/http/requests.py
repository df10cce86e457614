"""What every request passes: an id, the address of its client, bounds of its body, and errors in one envelope."""

import logging
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from control_plane.errors import Problem, Refused, StorageUnavailable, envelope, reason_of
from control_plane.http.counting import ROUTE
from control_plane.metrics import Metrics
from inference_api.features.trusted_proxies import Network, TrustedProxies

log = logging.getLogger(__name__)

REQUEST_ID: Final = "control_plane.request_id"
ADDRESS: Final = "control_plane.address"
# Of a request's scope: what makes the answer of a refusal, where that is not JSON
RENDERER: Final = "control_plane.renderer"
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LONGEST_MESSAGE = 2000


class Identified:
    """ASGI layer: gives each request an id, which its answer has, and the address of its client."""

    def __init__(self, app: ASGIApp, trusted: tuple[Network, ...]) -> None:
        self._app = app
        self._proxies = TrustedProxies(trusted)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        given = next((value.decode("latin-1") for name, value in headers if name == b"x-request-id"), "")
        request_id = given if _ID.fullmatch(given) else secrets.token_hex(8)
        forwarded = b",".join(value for name, value in headers if name == b"x-forwarded-for")
        peer = (scope.get("client") or ("",))[0]
        scope[REQUEST_ID], scope[ADDRESS] = request_id, self._proxies.locate(peer, forwarded)

        async def identified_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        await self._app(scope, receive, identified_send)


class Rendered:
    """ASGI layer: refusals of paths that begin with `start` are answered by `renderer(error, scope)`.

    A script that asks for JSON gets that.
    """

    def __init__(self, app: ASGIApp, start: str, renderer: Callable[[Refused, Scope], Response]) -> None:
        self._app = app
        self._start = start
        self._renderer = renderer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(self._start):
            accepted = b",".join(value for name, value in scope["headers"] if name == b"accept")
            if b"application/json" not in accepted:
                scope[RENDERER] = self._renderer
        await self._app(scope, receive, send)


class Bounded:
    """ASGI layer: refuses bodies larger than `most` bytes, before or while they are read.

    `others`: bounds by the beginning of the path.
    """

    def __init__(self, app: ASGIApp, most: int, others: Mapping[str, int]) -> None:
        self._app = app
        self._most = most
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size = 0
        path: str = scope["path"]
        most = next((bound for start, bound in self._others.items() if path.startswith(start)), self._most)

        async def bounded_receive() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > most:
                    raise TooLarge(most)
            return message

        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > most:
            await render(TooLarge(most), scope)(scope, receive, send)
            return

        async def bounded_send(message: Message) -> None:
            if size <= most:
                await send(message)
            elif message["type"] == "http.response.start":
                # Whatever a handler, or what reads the body for it, makes of TooLarge.
                await render(TooLarge(most), scope)(scope, receive, send)

        await self._app(scope, bounded_receive, bounded_send)


class TooLarge(Refused):
    def __init__(self, most: int) -> None:
        message = f"The request body is larger than the limit of {most} bytes; split it or shorten it."
        # close: reusing the connection would require reading the rest of the body.
        super().__init__(413, "request_too_large", message, headers={"Connection": "close"})


def render(error: Refused, scope: Scope) -> Response:
    if len(error.message) > _LONGEST_MESSAGE:
        error.message = error.message[:_LONGEST_MESSAGE] + "..."
    if (renderer := scope.get(RENDERER)) is not None:
        made: Response = renderer(error, scope)
        return made
    body = orjson.dumps(envelope(error, scope.get(REQUEST_ID, "")))
    return Response(body, error.status, error.headers, media_type="application/json")


class Failures:
    """Turns every exception of a handler into an answer."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def handlers(self) -> Mapping[Any, Any]:
        kinds = (Refused, RequestValidationError, HTTPException, ClientDisconnect, Exception)
        return dict.fromkeys(kinds, self.answer)

    async def answer(self, request: Request, error: Exception) -> Response:
        refused = translate(request, error)
        if isinstance(refused, StorageUnavailable):
            self._metrics.database_errors.inc()
        return render(refused, request.scope)


def translate(request: Request, error: Exception) -> Refused:
    # Not request.url: it contains the Host header, which may be invalid.
    path: str = request.scope["path"][:128]
    match error:
        case Refused():
            return error
        case RequestValidationError():
            return _invalid(error)
        case HTTPException(__cause__=Refused() as cause):
            # Of the body, which FastAPI reads.
            return cause
        case HTTPException(status_code=405):
            allow = ", ".join(_methods(request))
            message = f"{request.method[:32]} is not allowed on {path!r}; use {allow}."
            return Refused(405, "method_not_allowed", message, headers={"Allow": allow})
        case HTTPException(status_code=404):
            return Refused(404, "unknown_url", f"The URL {path!r} is unknown.")
        case HTTPException(status_code=status):
            return Refused(status, "bad_request", "The request cannot be read.")
        case ClientDisconnect():
            # The client is gone; this avoids a traceback for a disconnect within the body.
            return Refused(400, "bad_request", "The request ended before its body did.")
        case _:
            # The traceback is logged by the server.
            message = "The control plane failed to handle this request; its log has the details."
            return Refused(500, "internal_error", message)


def _methods(request: Request) -> list[str]:
    """Those of the first pattern that the URL has: each may have a route of its own."""
    matching = [one for one in request.app.state.routes if one.matches(request.scope)[0] is not Match.NONE]
    same = [one for one in matching if getattr(one, "path", None) == getattr(matching[0], "path", None)]
    return sorted({method for one in same for method in getattr(one, "methods", None) or ()})


def _invalid(error: RequestValidationError) -> Refused:
    errors = error.errors()
    if any(one["type"] == "json_invalid" for one in errors):
        reason = errors[0].get("ctx", {}).get("error", "")
        return Refused(400, "invalid_json", f"The body is not JSON: {reason or 'it cannot be parsed'}.")
    problems = [Problem(_place(one["loc"]), reason_of(one["msg"])) for one in errors[:50]]
    first = problems[0]
    return Refused(
        422, "validation_error", f"{first.param}: {first.message}", param=first.param or None, errors=problems
    )


def _place(loc: tuple[Any, ...]) -> str:
    """`limits.0.per`; the part of the request that it is in is known from the name."""
    return ".".join(map(str, loc[1:])) or str(loc[0])


def route_of(scope: Scope, prefix: str = "") -> None:
    """Note the pattern of the matched route, for metrics."""
    route = scope.get("route")
    path = getattr(route, "path", None)
    if path is not None:
        scope[ROUTE] = f"{prefix}{path}"
