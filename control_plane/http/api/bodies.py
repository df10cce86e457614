"""ASGI layer of /api/v1: bodies are JSON that everyone who gets it later can read.

Python's own reader takes NaN, halves of surrogate pairs, numbers of any size and any nesting. Databases store them not
or otherwise, and routers refuse a policy with them as a whole.
"""

import json

import orjson
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from control_plane.errors import Invalid, Problem, Refused
from control_plane.http.requests import render
from control_plane.pure import values


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
                raise Refused(400, "bad_request", "The URL has the character NUL; no name has one.")
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
        orjson.loads(body)
        values.check(json.loads(body))
    except values.Unusable as exc:
        raise Invalid(Problem(exc.place.replace("\0", "?")[:128] or "body", str(exc))) from None
    except RecursionError:
        raise _unreadable("it is nested too deeply") from None
    except ValueError as exc:
        raise _unreadable(str(exc)) from None


def _unreadable(reason: str) -> Refused:
    return Refused(400, "invalid_json", f"The body is not JSON that can be used: {reason}.")
