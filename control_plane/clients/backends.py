"""A backend of the catalogue, asked past the routers: by a test of a model, where an operator has chosen one."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson

from control_plane.clients.http import http_client
from control_plane.clients.router import read
from control_plane.pure.model_tests import MOST, Got

# Seconds: to connect and to send; between two bytes
_CONNECT, _READ = 5.0, 60.0
# GET of a path, or POST of a body as JSON
Asks = Callable[[str, dict[str, Any] | None], Awaitable[Got]]


class BackendAway(Exception):
    """It cannot be reached from here, or broke off. The message has no address."""


@asynccontextmanager
async def asking(url: str, headers: Mapping[str, str]) -> AsyncIterator[Asks]:
    """What it yields raises BackendAway. `headers`: of each request. Redirects are not followed."""
    sent = {**headers, "accept-encoding": "identity", "user-agent": "inference-api-console"}
    timeout = httpx.Timeout(_CONNECT, read=_READ)
    async with http_client(timeout) as client:

        async def ask(path: str, body: dict[str, Any] | None) -> Got:
            content = None if body is None else orjson.dumps(body)
            kind = {} if content is None else {"content-type": "application/json"}
            method = "GET" if content is None else "POST"
            try:
                async with client.stream(method, url + path, content=content, headers={**sent, **kind}) as response:
                    return Got(response.status_code, await read(response.aiter_raw(), MOST))
            except (httpx.HTTPError, httpx.InvalidURL) as exc:
                raise BackendAway(f"It does not answer the control plane ({type(exc).__name__}).") from None

        yield ask
