"""Asks every address for its /health, again and again, beside the traffic and never in its way."""

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Literal

import httpx

from inference_api.pace import spread
from inference_api.routing.backend import Fleet
from inference_api.routing.causes import cause_of
from inference_api.routing.entries import Engine
from inference_api.routing.origin import Origin

logger = logging.getLogger(__name__)

# How often it looks for addresses that are new.
_ENROL_EVERY = 1.0
# Seconds in which each of them is asked for the first time.
_FIRST = 3.0
# A thousand backends, every tenth of them hung, take about 50 at a time.
_AT_ONCE = 128
# Engines that are well may take longer than most: SGLang generates a token first, and gives up after 20 s itself; in
# llama.cpp all threads that could answer may be waiting for a long prompt.
_LEAST_PATIENCE: dict[Engine, float] = {"sglang": 25.0, "llamacpp": 25.0}
# An answer is enough; a connection that is kept would be closed by the engine before the next time.
_HEADERS = {"connection": "close", "user-agent": "inference-api"}


class Prober:
    """Reports to `on_check` whether an address passes: it answers in time, with a status below 500.

    It is asked once, whatever the number of its models.

    That is a pass for engines without a /health, too. A timeout while bytes of other answers come from the backend
    (`heard(url)`: when the last one did, in loop time) is no verdict: it is busy. `every`: seconds between two checks,
    +-20 %, the first one within `first`; `patience`: seconds for one, at least, see `_LEAST_PATIENCE`. `transport`
    should not be the one that carries the traffic.
    """

    def __init__(
        self,
        fleet: Fleet,
        transport: httpx.AsyncBaseTransport,
        on_check: Callable[[Origin, bool], None],
        heard: Callable[[str], float],
        every: float = 10.0,
        patience: float = 5.0,
        rand: Callable[[], float] = random.random,
        first: float = _FIRST,
    ) -> None:
        # Configuration
        self._fleet = fleet
        self._transport = transport
        self._on_check = on_check
        self._heard = heard
        self._every = every
        self._patience = patience
        self._rand = rand
        self._first = min(every, first)
        # Those that have a task here
        self._watched: set[Origin] = set()
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def run(self) -> None:
        """Check until cancelled; addresses that come are found within a second, those that left are let go."""
        async with asyncio.TaskGroup() as group:
            while True:
                for origin in self._fleet.origins.values():
                    if origin.backends and origin not in self._watched:
                        self._watched.add(origin)
                        group.create_task(self._watch(origin))
                await asyncio.sleep(_ENROL_EVERY)

    async def _watch(self, origin: Origin) -> None:
        # Spread: a thousand at once would be a burst. Soon: who starts a router wants to know who cannot be reached.
        await asyncio.sleep(self._first * self._rand())
        while origin.backends:
            before = origin.cause
            try:
                async with self._slots:
                    passed = await self.check(origin)
                if origin.cause != before:
                    _tell(origin)
                if passed is not None:
                    self._on_check(origin, passed)
            except Exception:
                # The boundary of a background task: one odd engine must not end the checks of the others.
                logger.exception("a health check could not be made", extra={"fields": {"backend": origin.label}})
            await asyncio.sleep(spread(self._every, self._rand()))
        self._watched.discard(origin)

    async def check(self, origin: Origin) -> bool | None:
        """One health check; None: no verdict. `origin.cause` is then why it failed."""
        began = asyncio.get_running_loop().time()
        try:
            url, target = origin.address("/health")
            extensions = {"origin": origin.url, "target": target, "fresh": True}
            async with asyncio.timeout(self._patience_with(origin)):
                request = httpx.Request("GET", url, headers=_HEADERS, extensions=extensions)
                response = await self._transport.handle_async_request(request)
        except TimeoutError as exc:
            return None if self._heard(origin.url) >= began else _failed(origin, cause_of(exc))
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            return _failed(origin, cause_of(exc))
        assert isinstance(response.stream, httpx.AsyncByteStream)
        await response.stream.aclose()
        if response.status_code >= 500:
            return _failed(origin, f"status {response.status_code}")
        origin.cause = None
        return True

    def _patience_with(self, origin: Origin) -> float:
        models = (self._fleet.models.get(backend.model) for backend in origin.backends)
        return max(self._patience, *(_LEAST_PATIENCE.get(model.entry.engine, 0.0) for model in models if model), 0.0)

    def __repr__(self) -> str:
        return f"<Prober of {len(self._watched)} addresses>"


def _failed(origin: Origin, cause: str) -> Literal[False]:
    origin.cause = cause
    return False


def _tell(origin: Origin) -> None:
    """Once for each change, whatever comes of it: what is out, and what is not, is decided in `health`."""
    fields = {"model": next((backend.model for backend in origin.backends), None), "backend": origin.label}
    if origin.cause is None:
        logger.info("a backend can be reached again", extra={"fields": fields})
    else:
        logger.warning("a backend cannot be reached", extra={"fields": fields | {"cause": origin.cause}})
