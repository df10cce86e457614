"""Health checks: requests /health of every address, on separate connections."""

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from typing import Literal

import httpx

from inference_api.pace import spread
from inference_api.routing.backend import Origin
from inference_api.routing.causes import cause_of
from inference_api.routing.entries import Engine
from inference_api.routing.fleet import Fleet, Model

logger = logging.getLogger(__name__)

# Seconds over which the first checks are spread.
_FIRST = 3.0
# Healthy engines may answer slowly: SGLang generates a token first, with a timeout of 20 s; in llama.cpp, all threads
# may be busy with a long prompt.
_LEAST_TIMEOUT: dict[Engine, float] = {"sglang": 25.0, "llamacpp": 25.0}
# Engines close an idle connection before the next check.
_HEADERS = {"connection": "close", "user-agent": "inference-api"}


class Prober:
    """Reports to `on_check` whether an address passes: it answers in time, with a status below 500.

    An address has one check for all of its models; one of providers alone is not asked, and passes. Engines without
    /health pass, too. A timeout does not count while
    the backend sends bytes of other answers: it is busy.

    `last_byte_at(url)`: loop time of the backend's last byte. `every`: seconds between two checks, +-20 %; the first
    one comes within `first`. `timeout`: seconds for one, at least `_LEAST_TIMEOUT`. `enrol_every`: seconds until a
    new address is found. `concurrency`: of a thousand backends with a hundred that hang, about 50 are checked at a
    time. `transport` should not be the one of the traffic.
    """

    def __init__(
        self,
        fleet: Fleet,
        transport: httpx.AsyncBaseTransport,
        on_check: Callable[[Origin, bool], None],
        last_byte_at: Callable[[str], float],
        every: float = 10.0,
        timeout: float = 5.0,
        rand: Callable[[], float] = random.random,
        first: float = _FIRST,
        enrol_every: float = 1.0,
        concurrency: int = 128,
    ) -> None:
        # Configuration
        self._fleet = fleet
        self._transport = transport
        self._on_check = on_check
        self._last_byte_at = last_byte_at
        self._every = every
        self._timeout = timeout
        self._rand = rand
        self._first = min(every, first)
        self._enrol_every = enrol_every
        # Addresses with a running task
        self._watched: set[Origin] = set()
        self._slots = asyncio.Semaphore(concurrency)

    async def run(self) -> None:
        """Check until cancelled; new addresses are found within a second, removed ones dropped."""
        async with asyncio.TaskGroup() as group:
            while True:
                for origin in self._fleet.origins.values():
                    if origin.backends and origin not in self._watched:
                        self._watched.add(origin)
                        group.create_task(self._watch(origin))
                await asyncio.sleep(self._enrol_every)

    async def _watch(self, origin: Origin) -> None:
        # Spread, to avoid a burst; soon, so that the operator sees unreachable backends at the start.
        await asyncio.sleep(self._first * self._rand())
        while origin.backends:
            before = origin.cause
            try:
                passed = await self._check(origin)
                if origin.cause != before:
                    _log_change(origin)
                if passed is not None:
                    self._on_check(origin, passed)
            except Exception:
                # The boundary of a background task: a failed check must not end the others.
                logger.exception("a health check could not be made", extra={"fields": {"backend": origin.label}})
            await asyncio.sleep(spread(self._every, self._rand()))
        self._watched.discard(origin)

    async def _check(self, origin: Origin) -> bool | None:
        if all(model.entry.is_provider for model in self._models(origin)):
            # Not asked: one that was stuck gets a request again, one that was checked before comes back.
            origin.cause = None
            return True
        async with self._slots:
            return await self.check(origin)

    def _models(self, origin: Origin) -> Iterator[Model]:
        models = (self._fleet.models.get(backend.model) for backend in origin.backends)
        return (model for model in models if model is not None)

    async def check(self, origin: Origin) -> bool | None:
        """Make one health check; None: no result. Sets `origin.cause` to the reason of a failure."""
        began = asyncio.get_running_loop().time()
        try:
            url, target = origin.address("/health")
            extensions = {"origin": origin.url, "target": target, "fresh": True}
            async with asyncio.timeout(self._timeout_of(origin)):
                request = httpx.Request("GET", url, headers=_HEADERS, extensions=extensions)
                response = await self._transport.handle_async_request(request)
        except TimeoutError as exc:
            return None if self._last_byte_at(origin.url) >= began else _failed(origin, cause_of(exc))
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            return _failed(origin, cause_of(exc))
        assert isinstance(response.stream, httpx.AsyncByteStream)
        await response.stream.aclose()
        if response.status_code >= 500:
            return _failed(origin, f"status {response.status_code}")
        origin.cause = None
        return True

    def _timeout_of(self, origin: Origin) -> float:
        least = (_LEAST_TIMEOUT.get(model.entry.engine, 0.0) for model in self._models(origin))
        return max(self._timeout, *least, 0.0)

    def __repr__(self) -> str:
        return f"<Prober of {len(self._watched)} addresses>"


def _failed(origin: Origin, cause: str) -> Literal[False]:
    origin.cause = cause
    return False


def _log_change(origin: Origin) -> None:
    """Log each change once. `health` decides whether the backend is out."""
    fields = {"model": next((backend.model for backend in origin.backends), None), "backend": origin.label}
    if origin.cause is None:
        logger.info("a backend can be reached again", extra={"fields": fields})
    else:
        logger.warning("a backend cannot be reached", extra={"fields": fields | {"cause": origin.cause}})
