"""/console/static/<digest>/<file>: open to everybody, kept by browsers for ever."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from control_plane import web
from control_plane.errors import NotFound
from control_plane.http.requests import route_of

_FOREVER = "public, max-age=31536000, immutable"


async def static(request: Request) -> Response:
    route_of(request.scope)
    digest, name = request.path_params["digest"], request.path_params["name"]
    asset = web.assets().get(name)
    if asset is None or not web.base().endswith(f"/{digest}"):
        # Of another release: a page that is loaded again names the files of this one.
        raise NotFound("file", name)
    headers = {"Cache-Control": _FOREVER, "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(asset.compressed, 200, {**headers, "Content-Encoding": "gzip"}, asset.media_type)
    return Response(asset.body, 200, headers, asset.media_type)


ROUTES = (Route("/console/static/{digest}/{name}", static),)
