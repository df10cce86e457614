"""GET /spend: what budgets have spent, for routers."""

import asyncio
import gzip

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from control_plane.http.identity import plane_of, service_act
from control_plane.services import spend
from inference_api.http.negotiation import takes_gzip
from registry_stub import conditional


async def read_spend(request: Request) -> Response:
    service_act(request, "snapshots")
    found = await spend.current(plane_of(request))
    headers = {"Cache-Control": "no-cache", "Vary": "Accept-Encoding", "ETag": found.etag}
    if conditional.names(request.headers.getlist("if-none-match"), found.etag, weak=True):
        return Response(status_code=304, headers=headers)
    body = found.body
    if takes_gzip(",".join(request.headers.getlist("accept-encoding"))):
        headers["Content-Encoding"] = "gzip"
        body = await asyncio.to_thread(gzip.compress, body, 6)
    return Response(body, headers=headers, media_type="application/json")


ROUTES = (Route("/spend", read_spend),)
