"""The documents that routers poll: ETags, long polls, gzip; and the registry's /models, read and written."""

from collections.abc import Callable
from typing import NamedTuple

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from control_plane.errors import Forbidden, Refused
from control_plane.http.identity import management_act, plane_of, service_act
from control_plane.plane import Plane
from control_plane.services import models
from inference_api.http.negotiation import takes_gzip
from registry_stub import conditional
from registry_stub.errors import Refused as RegistryRefused
from registry_stub.store import Stored
from registry_stub.wire import preconditions, read_entry

# Seconds that a request may wait for a change at most
LONGEST_WAIT = 30


class Content(NamedTuple):
    """`compressed`: the same, by gzip."""

    body: bytes
    etag: str
    compressed: bytes | None = None


def routes(*documents: str) -> list[Route]:
    """`documents` beside the models: their names are their paths."""
    return [
        Route("/models", _listing),
        Route("/models/", _listing),
        # One route for all methods, so that the Allow header of a 405 names them all.
        Route("/models/{name:path}", _model, methods=["GET", "PUT", "DELETE"]),
        *(Route(f"/{name}", _document(name)) for name in documents),
    ]


def _document(name: str) -> Callable[[Request], object]:
    async def page(request: Request) -> Response:
        service_act(request, "snapshots")
        return await answer(request, name, lambda plane: _whole(plane, name))

    return page


async def _listing(request: Request) -> Response:
    return await answer(request, models.DOCUMENT, lambda plane: _whole(plane, models.DOCUMENT))


async def _model(request: Request) -> Response:
    name: str = request.path_params["name"]
    try:
        if request.method == "PUT":
            return await _put(request, name)
        if request.method == "DELETE":
            return await _delete(request, name)
        return await answer(request, models.DOCUMENT, lambda plane: _one(plane, name))
    except RegistryRefused as exc:
        # Of the parts that the registry shares: the same answer, in the envelope of the control plane.
        raise Refused(exc.status, exc.code, exc.message, param=exc.param, headers=exc.headers) from None


def _whole(plane: Plane, name: str) -> Content:
    found = plane.documents.get(name)
    return Content(found.body, found.etag, found.compressed)


def _one(plane: Plane, name: str) -> Content:
    found = known(name, models.catalogue(plane).stored.get(name))
    return Content(found.body, found.etag)


def known(name: str, stored: Stored | None) -> Stored:
    if stored is None:
        message = f"The model {name[:128]!r} is not in the registry. GET /models lists those that are."
        raise Refused(404, "model_not_found", message, param="name")
    return stored


async def answer(request: Request, document: str, read: Callable[[Plane], Content]) -> Response:
    """A conditional answer; with `Prefer: wait=N` and the newest ETag, when the content changes."""
    plane = plane_of(request)
    content = read(plane)
    # no-cache: proxies may store a copy, but must revalidate it.
    headers = {"Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
    given = request.headers.getlist("if-none-match")
    if given and (seconds := _wait(request)) is not None:
        headers["Preference-Applied"] = f"wait={seconds}"
        if conditional.names(given, content.etag, weak=True):
            await plane.documents.wait(document, lambda: _etag(plane, read), content.etag, seconds)
            content = read(plane)
    headers["ETag"] = content.etag
    if conditional.names(given, content.etag, weak=True):
        return Response(status_code=304, headers=headers)
    if content.compressed is not None and takes_gzip(",".join(request.headers.getlist("accept-encoding"))):
        headers["Content-Encoding"] = "gzip"
        return json(content.compressed, headers=headers)
    return json(content.body, headers=headers)


def _etag(plane: Plane, read: Callable[[Plane], Content]) -> str | None:
    try:
        return read(plane).etag
    except Refused:
        return None


def _wait(request: Request) -> int | None:
    """Seconds of `Prefer: wait=N` (RFC 7240), at most LONGEST_WAIT."""
    for preference in ",".join(request.headers.getlist("prefer")).split(","):
        name, _, value = preference.strip().partition("=")
        value = value.strip().strip('"')
        if name.strip().lower() == "wait" and value.isascii() and value.isdigit():
            return min(int(value[:9]), LONGEST_WAIT)
    return None


async def _put(request: Request, name: str) -> Response:
    act = await management_act(request)
    if not act.principal.may("catalogue.write"):
        raise Forbidden("Changing the catalogue needs the role admin or operator on the platform.")
    entry = await read_entry(request, name)
    current = preconditions(request, name)
    stored, created = await models.put(
        plane_of(request), act, entry, lambda stored: current(stored.etag if stored else None)
    )
    headers = {"ETag": stored.etag, **({"Location": f"/models/{name}"} if created else {})}
    return json(stored.body, 201 if created else 200, headers)


async def _delete(request: Request, name: str) -> Response:
    act = await management_act(request)
    if not act.principal.may("catalogue.write"):
        raise Forbidden("Changing the catalogue needs the role admin or operator on the platform.")
    current = preconditions(request, name)
    await models.delete(plane_of(request), act, name, lambda stored: current(known(name, stored).etag))
    return Response(status_code=204)


def json(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")


async def healthz(request: Request) -> Response:
    return json(b'{"status":"ok"}')


async def readyz(request: Request) -> Response:
    """Ready once the memory is filled; the database of the moment does not matter."""
    if plane_of(request).documents.filled:
        return json(b'{"status":"ok"}')
    return json(orjson.dumps({"status": "the database has not been read yet"}), 503, {"Retry-After": "1"})
