"""The router that everybody writes first, to compare with: Starlette in front, one httpx.AsyncClient behind."""

import os

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

_client = httpx.AsyncClient(
    base_url=os.environ.get("ENGINE", ""),
    timeout=600,
    limits=httpx.Limits(max_connections=None, max_keepalive_connections=1000),
)


async def forward(request: Request) -> Response:
    headers = {"content-type": request.headers.get("content-type", "application/json")}
    upstream = _client.build_request(request.method, request.url.path, content=await request.body(), headers=headers)
    answer = await _client.send(upstream, stream=True)
    content_type = answer.headers.get("content-type")
    if content_type and content_type.startswith("text/event-stream"):
        return StreamingResponse(answer.aiter_raw(), answer.status_code, media_type=content_type)
    return Response(await answer.aread(), answer.status_code, media_type=content_type)


_PATHS = ("/v1/chat/completions", "/v1/embeddings")
app = Starlette(routes=[Route("/health", forward), *(Route(path, forward, methods=["POST"]) for path in _PATHS)])
