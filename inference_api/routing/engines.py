"""Asks the engines, now and then, what only they know: the context length that /v1/models shows."""

import asyncio
import logging
import random
from collections.abc import Callable

import httpx
import orjson

from inference_api.routing.backend import Backend, Fleet, Model

logger = logging.getLogger(__name__)

_EVERY = 60.0
_PATIENCE = 5.0
# A model list is a few KiB; an engine that sends more is not listened to.
_MAX_BYTES = 1 << 20
_AT_ONCE = 16


class EngineFacts:
    """Fills in `Model.max_model_len` from the first replica that tells it; silence leaves what was known."""

    def __init__(
        self,
        fleet: Fleet,
        transport: httpx.AsyncBaseTransport,
        every: float = _EVERY,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self._fleet = fleet
        self._transport = transport
        self._every = every
        self._rand = rand

    async def run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                # The boundary of a background task: what the engines say of themselves is not worth stopping for.
                logger.exception("asking the engines failed")
            await asyncio.sleep(self._every * (0.8 + 0.4 * self._rand()))

    async def look(self) -> None:
        """Ask every model whose length is not known yet, a few at a time."""
        unknown = iter([model for model in self._fleet.models.values() if model.max_model_len is None])

        async def worker() -> None:
            for model in unknown:
                await self._ask(model)

        async with asyncio.TaskGroup() as group:
            for _ in range(_AT_ONCE):
                group.create_task(worker())

    async def _ask(self, model: Model) -> None:
        for backend in model.backends[:3]:
            try:
                async with asyncio.timeout(_PATIENCE):
                    length = await self._max_model_len(model, backend)
            except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError):
                continue
            if length is not None:
                model.max_model_len = length
                self._fleet.version += 1
                return

    async def _max_model_len(self, model: Model, backend: Backend) -> int | None:
        url, _ = backend.address("/v1/models")
        request = httpx.Request("GET", url, extensions={"timeout": {"connect": _PATIENCE}, "origin": backend.url})
        response = await self._transport.handle_async_request(request)
        body = bytearray()
        stream = response.stream
        assert isinstance(stream, httpx.AsyncByteStream)
        try:
            async for chunk in stream:
                body += chunk
                if len(body) > _MAX_BYTES:
                    return None
        finally:
            await stream.aclose()
        return _length(orjson.loads(bytes(body)), model.entry.served_model_name or model.name)


def _length(document: object, name: str) -> int | None:
    cards = document.get("data") if isinstance(document, dict) else None
    for card in cards if isinstance(cards, list) else []:
        if isinstance(card, dict) and (card.get("id") == name or len(cards or ()) == 1):
            length = card.get("max_model_len")
            return length if type(length) is int and length > 0 else None
    return None
