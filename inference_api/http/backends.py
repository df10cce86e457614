"""GET /backends: the state of every backend, for operators: it names addresses."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from inference_api.http.wire import json_bytes
from inference_api.routing.backend import Backend
from inference_api.routing.fleet import Fleet
from inference_api.routing.standing import standing

# Backends per slice: this may be the event loop that takes requests.
_SLICE = 200


class Backends:
    """`resting(backend)`: the end of the pause that it asked for, in seconds of the monotonic clock.

    Runs on another thread than the changes of the fleet (OPS_PORT), so it only reads.
    """

    def __init__(self, fleet: Fleet, resting: Callable[[Backend], float | None] = lambda backend: None) -> None:
        self._fleet = fleet
        self._resting = resting
        self._started = time.monotonic()

    def routes(self) -> list[Route]:
        return [Route("/backends", self.page)]

    async def page(self, request: Request) -> Response:
        backends = [backend for model in list(self._fleet.models.values()) for backend in model.backends]
        cards = []
        for start in range(0, len(backends), _SLICE):
            now, wall = time.monotonic(), time.time()
            cards += [self._card(backend, now, wall) for backend in backends[start : start + _SLICE]]
            await asyncio.sleep(0)
        return Response(json_bytes({"data": cards}), media_type="application/json")

    def _card(self, backend: Backend, now: float, wall: float) -> dict[str, Any]:
        """One backend, in the format of router reports; times are Unix milliseconds."""

        def at(moment: float) -> int:
            return int((wall - now + moment) * 1000)

        found = standing(backend, now, self._resting(backend))
        card: dict[str, Any] = {
            "model": backend.model,
            "backend": backend.label,
            "state": found.state,
            "in_flight": backend.in_flight,
            "circuit": found.circuit,
        }
        if found.reason is not None:
            card["reason"] = found.reason[:500]
        since = found.since
        if since is None and found.state != "ready":
            since = self._started
        if since is not None:
            card["since"] = at(since)
        if found.retry_at is not None:
            card["retry_at"] = at(found.retry_at)
        if (reading := backend.origin.reading) is not None:
            card["waiting"] = int(reading.waiting)
            if reading.kv_cache is not None:
                card["kv_usage"] = min(max(reading.kv_cache, 0.0), 1.0)
        if backend.last_error is not None:
            outcome, moment = backend.last_error
            card["last_error"] = {"outcome": outcome.value, "request_id": None, "at": at(moment)}
        return card
