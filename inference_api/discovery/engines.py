"""Polls the engines once a minute for the context length that /v1/models shows."""

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Mapping

import httpx
import orjson

from inference_api.discovery.listing import fetch
from inference_api.discovery.naming import IGNORES_NAMES, misnamed, names_in
from inference_api.pace import spread
from inference_api.routing.backend import Backend
from inference_api.routing.entries import CatalogueEntry
from inference_api.routing.fleet import Fleet, Model

logger = logging.getLogger(__name__)

_EVERY = 60.0


class EngineFacts:
    """Keeps `Model.max_model_len` up to date from the first backend that reports it; a restart may change it.

    A backend that does not answer changes nothing. `headers`: of the router's own requests to the backends of an entry.
    The names of models with `discover` are compared elsewhere.
    """

    def __init__(
        self,
        fleet: Fleet,
        transport: httpx.AsyncBaseTransport,
        every: float = _EVERY,
        rand: Callable[[], float] = random.random,
        timeout: float = 5.0,
        concurrency: int = 16,
        headers: Callable[[CatalogueEntry], Mapping[str, str]] = lambda entry: {},
    ) -> None:
        self._headers = headers
        self._timeout = timeout
        self._concurrency = concurrency
        self._fleet = fleet
        self._transport = transport
        self._every = every
        self._rand = rand
        # Mismatches that were logged, by model and URL
        self._misnamed: dict[tuple[str, str], str] = {}

    async def run(self) -> None:
        while True:
            try:
                await self.poll()
            except Exception:
                # The boundary of a background task: requests do not need these facts.
                logger.exception("polling the models of engines failed")
            await asyncio.sleep(spread(self._every, self._rand()))

    async def poll(self) -> None:
        """Poll for every model, a few at a time; once per engine, whatever the number of its models."""
        together: defaultdict[str, list[Model]] = defaultdict(list)
        for model in self._fleet.models.values():
            if asked := _asked(model):
                together[asked[0].url].append(model)
        self._misnamed = {key: text for key, text in self._misnamed.items() if key[0] in self._fleet.models}
        groups = iter(together.values())

        async def worker() -> None:
            for models in groups:
                answers: dict[str, object] = {}
                for model in models:
                    await self._update(model, answers)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._concurrency, len(together))):
                group.create_task(worker())

    async def _update(self, model: Model, answers: dict[str, object]) -> None:
        """Update one model. `answers`: answers of engines in this poll, by URL."""
        for backend in _asked(model):
            if backend.url not in answers:
                answers[backend.url] = await self._ask(backend, self._headers(model.entry))
            self._compare(model, backend, answers[backend.url])
            length = _length(answers[backend.url], model.entry.served_model_name or model.name)
            if length is None:
                continue
            if length != model.max_model_len:
                model.max_model_len = length
                self._fleet.version += 1
            return

    def _compare(self, model: Model, backend: Backend, document: object) -> None:
        """Log once that a backend does not serve the model's name: every request for it would be a 404."""
        names = names_in(document)
        if names is None or model.entry.engine in IGNORES_NAMES or model.entry.discover:
            return
        wrong, key = misnamed(model.entry, names), (model.name, backend.url)
        if wrong is None:
            self._misnamed.pop(key, None)
        elif self._misnamed.get(key) != wrong:
            self._misnamed[key] = wrong
            fields = {"model": model.name, "backend": backend.label}
            logger.warning("a backend does not serve the model of its entry: it %s", wrong, extra={"fields": fields})

    async def _ask(self, backend: Backend, headers: Mapping[str, str]) -> object:
        """The models in its /v1/models, None without an answer."""
        try:
            async with asyncio.timeout(self._timeout):
                return orjson.loads((await fetch(self._transport, backend, headers, self._timeout))[1])
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError):
            return None


def _asked(model: Model) -> tuple[Backend, ...]:
    """A few of many backends, those that answer first; none of a provider."""
    return () if model.entry.is_provider else (model.available or model.backends)[:3]


def _length(document: object, name: str) -> int | None:
    cards = document.get("data") if isinstance(document, dict) else None
    for card in cards if isinstance(cards, list) else []:
        if isinstance(card, dict) and (card.get("id") == name or len(cards or ()) == 1):
            length = card.get("max_model_len")
            return length if type(length) is int and length > 0 else None
    return None
