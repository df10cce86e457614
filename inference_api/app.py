"""The composition root: builds every object and joins them. The only file that knows of optional features."""

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from starlette.routing import Route
from starlette.types import ASGIApp

from inference_api.errors import RouterError
from inference_api.inbound.pages import Models, Observed, Probes, create_pages
from inference_api.inbound.routes import INFERENCE_ROUTES, Gate, Inference, Load, Surface
from inference_api.observe.log import Fields
from inference_api.observe.metrics import Metrics
from inference_api.observe.observation import Observer
from inference_api.outbound.forward import Forward, Limits
from inference_api.outbound.headers import RequestHeaders
from inference_api.outbound.transport import Transport
from inference_api.routing.backend import Fleet
from inference_api.routing.balance import make_policy
from inference_api.routing.catalogue import load_catalogue
from inference_api.routing.discovery import Discovery, Resolve, resolve
from inference_api.routing.engines import EngineFacts
from inference_api.routing.load import LoadSignal
from inference_api.routing.registry import Registry
from inference_api.settings import Settings


class Router:
    """The router's parts, joined. `app` serves requests; `ops` serves probes and metrics on a port of their own.

    Raises CatalogueError when the static catalogue cannot be read.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        tokens: Mapping[str, str] | None = None,
        access_log: Callable[[Fields], None] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        registry_client: httpx.AsyncClient | None = None,
        resolve: Resolve = resolve,
        rand: random.Random | None = None,
    ) -> None:
        rand = rand or random.Random()

        def mint_id() -> str:
            return f"{rand.getrandbits(128):032x}"

        self.transport = transport or Transport(keepalive=settings.upstream_keepalive)
        reported = settings.load_signal_interval > 0
        self.fleet = Fleet(lambda name: make_policy(name, rand.random, reported))
        self.discovery = Discovery(self.fleet, resolve, settings.discovery_interval, rand.random, self._forget_backends)
        self._client = registry_client or _registry_client(settings)
        self.registry = Registry(
            self.fleet,
            load_catalogue(settings.catalogue),
            self._client,
            settings.registry_refresh,
            rand=rand.random,
            on_change=self._catalogue_changed,
        )
        self.metrics = Metrics(
            lambda: list(self.fleet.models.values()), self.registry.status, lambda: self.discovery.failures
        )
        self._observer = Observer(self.metrics, access_log)
        self._transports = {self.transport}
        self._background = self._beside_requests(settings, transport, rand)
        self.load = Load()
        gate = Gate(
            self._observer,
            self.registry.resolve,
            send=Forward(self.transport, _limits(settings), self.metrics.attempt, tokens or {}, rand),
            read_headers=RequestHeaders(mint_id, frozenset(name.encode() for name in settings.forward_headers)),
            max_body=settings.max_body_bytes,
            max_in_flight=settings.max_in_flight,
            write_stall=settings.write_stall_timeout,
        )
        self.probes = Probes(self.registry, _collectors(self.metrics))
        self.app = self._surface(gate, mint_id, probes=settings.ops_port is None)
        self.ops: ASGIApp = create_pages(self.probes.routes())

    def _surface(self, gate: Gate, mint_id: Callable[[], str], probes: bool) -> ASGIApp:
        inference: dict[str, ASGIApp] = {route.path: Inference(route, gate, self.load) for route in INFERENCE_ROUTES}
        # Registered a second time so that a wrong method on them is a 405 that says which one is right.
        pages = [Route(path, endpoint, methods=["POST"]) for path, endpoint in inference.items()]
        pages += Models(self.fleet, self.registry.resolve).routes()
        if probes:
            pages += self.probes.routes()
        return Surface(inference, Observed(create_pages(pages, self._lifespan), gate.observer, mint_id))

    def _beside_requests(
        self, settings: Settings, transport: httpx.AsyncBaseTransport | None, rand: random.Random
    ) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        """What the lifespan keeps running; the optional ones last."""
        run = [self.registry.run, self.discovery.run, EngineFacts(self.fleet, self.transport, rand=rand.random).run]
        if settings.load_signal_interval:
            # On connections of its own: what a scrape hears must not pass for progress of the requests.
            scraper = transport or Transport(keepalive=settings.upstream_keepalive)
            self._transports.add(scraper)
            failed = functools.partial(self.metrics.probe_failed, kind="metrics")
            run.append(LoadSignal(self.fleet, scraper, settings.load_signal_interval, failed, rand=rand.random).run)
        return run

    @asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncIterator[None]:
        await self.registry.start()
        await self.discovery.start()
        tasks = [asyncio.create_task(run()) for run in self._background]
        self.probes.state = "ready"
        try:
            yield
        finally:
            self.drain()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for transport in self._transports:
                await transport.aclose()
            if self._client is not None:
                await self._client.aclose()

    def drain(self) -> None:
        """The process has been asked to stop: no new traffic, please; what comes is still answered."""
        self.probes.state = "draining"

    def refused(self, error: RouterError, request_id: str, size: int) -> None:
        """A request was refused before it was one: counted and logged like the others."""
        seen = self._observer.begin("other")
        seen.request_id = request_id
        seen.refused(error, error.status, size)
        seen.end(error.outcome)

    def _catalogue_changed(self) -> None:
        self.metrics.forget_models()
        self._forget_backends()
        self.discovery.wake()

    def _forget_backends(self) -> None:
        """Of replicas that left the catalogue, connections are closed as they become idle, and series are dropped."""
        self.metrics.forget_backends()
        urls = {backend.url for model in self.fleet.models.values() for backend in model.backends}
        for transport in self._transports:
            if isinstance(transport, Transport):
                transport.retain(urls)


def _collectors(metrics: Metrics) -> CollectorRegistry:
    collectors = CollectorRegistry()
    for collector in (metrics, ProcessCollector(registry=None), GCCollector(registry=CollectorRegistry())):
        collectors.register(collector)
    return collectors


def _registry_client(settings: Settings) -> httpx.AsyncClient | None:
    if settings.registry_url is None:
        return None
    # No proxies, netrc or certificates from the environment: where the catalogue comes from is a setting.
    return httpx.AsyncClient(base_url=settings.registry_url, timeout=5.0, trust_env=False, follow_redirects=False)


def _limits(settings: Settings) -> Limits:
    return Limits(
        settings.connect_timeout,
        settings.first_byte_timeout,
        settings.idle_timeout,
        settings.total_timeout,
        settings.stream_timeout,
        settings.max_attempts,
        settings.retry_on_status,
    )
