"""GET /backends: the state of every backend, for operators: it names addresses."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from inference_api.http.wire import json_bytes
from inference_api.routing.backend import Backend
from inference_api.routing.fleet import Fleet
from inference_api.routing.standing import row_of

# Backends per slice: this may be the event loop that takes requests.
_SLICE = 200


class Backends:
    """`resting(backend)`: the end of the pause that it asked for, in seconds of the monotonic clock.

    Runs on another thread than the changes of the fleet (OPS_PORT), so it only reads.
    """

    def __init__(self, fleet: Fleet, resting: Callable[[Backend], float | None] = lambda backend: None) -> None:
        self._fleet = fleet
        self._resting = resting
        self._began = time.monotonic()

    def routes(self) -> list[Route]:
        return [Route("/backends", self.page)]

    async def page(self, request: Request) -> Response:
        rows = [row async for some in self.rows() for row in some]
        return Response(json_bytes({"data": rows}), media_type="application/json")

    async def rows(self) -> AsyncIterator[list[dict[str, Any]]]:
        """All backends, in slices: after each, requests have their turn."""
        backends = [backend for model in list(self._fleet.models.values()) for backend in model.backends]
        for start in range(0, len(backends), _SLICE):
            now, wall, resting = time.monotonic(), time.time(), self._resting
            some = backends[start : start + _SLICE]
            yield [row_of(backend, now, wall, self._began, resting(backend)) for backend in some]
            await asyncio.sleep(0)
