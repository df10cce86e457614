"""ASGI layer of /api/v1: bodies are JSON that everyone who gets it later can read.

Python's own reader takes NaN, halves of surrogate pairs, numbers of any size and any nesting. Databases store them not
or otherwise, and routers refuse a policy with them as a whole.
"""

import json
from typing import Any

import orjson
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from control_plane.errors import Refused
from control_plane.http.requests import render

_NUL = "The character NUL stands in the {}; no name or text here has one."
_DEEPEST = 64
_LARGEST = 2**63


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
        orjson.loads(body)
        _check_values(json.loads(body))
    except RecursionError:
        raise _unreadable("it is nested too deeply") from None
    except ValueError as exc:
        raise _unreadable(str(exc)) from None


def _unreadable(reason: str) -> Refused:
    return Refused(400, "invalid_json", f"The body is not JSON that can be used: {reason}.")


def _check_values(value: Any) -> None:
    """Raises Refused."""
    pending = [(value, 1)]
    while pending:
        one, depth = pending.pop()
        if isinstance(one, dict | list):
            if depth > _DEEPEST:
                raise _unreadable(f"it is nested more than {_DEEPEST} deep")
            pending += [(each, depth + 1) for each in (one.values() if isinstance(one, dict) else one)]
            if isinstance(one, dict):
                pending += [(name, depth) for name in one]
        elif isinstance(one, str):
            if "\0" in one:
                raise Refused(422, "validation_error", _NUL.format("body"))
        elif isinstance(one, int | float) and not -_LARGEST <= one < _LARGEST:
            # Of fractions, too: PostgreSQL gives 1e300 back as an integer.
            raise _unreadable("it has a number that is too large")
