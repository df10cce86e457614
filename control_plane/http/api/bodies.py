"""ASGI layer of /api/v1: bodies are JSON in the strict sense, and no text has the character NUL.

Python's own reader takes NaN and halves of surrogate pairs, and PostgreSQL stores neither these nor NUL.
"""

import orjson
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from control_plane.errors import Refused
from control_plane.http.requests import render

_NUL = "The character NUL stands in the {}; no name or text here has one."


class JsonBodies:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            if "\0" in scope["path"] or b"%00" in scope["query_string"]:
                raise Refused(400, "bad_request", _NUL.format("URL"))
            body = await request.body()
            if body:
                check(request.headers.get("content-type", ""), body)
        except Refused as exc:
            await render(exc, scope)(scope, receive, send)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


def check(content_type: str, body: bytes) -> None:
    """Raises Refused unless it is JSON that can be stored."""
    media_type = content_type.partition(";")[0].strip().lower()
    kind, _, subtype = media_type.partition("/")
    if kind != "application" or not (subtype == "json" or subtype.endswith("+json")):
        message = f"The content type {media_type[:128]!r} is not supported; send the body as application/json."
        raise Refused(415, "unsupported_media_type", message)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise Refused(400, "invalid_json", f"The body is not JSON: {exc}.") from None
    # Most bodies have no escape that could be one.
    if b"\\u0000" in body and b"\0" in orjson.dumps(value).replace(b"\\u0000", b"\0"):
        raise Refused(422, "validation_error", _NUL.format("body"))
