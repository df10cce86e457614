"""The composition root: builds every object and joins them. The only file that knows of optional features."""

import asyncio
import functools
import logging
import math
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
from starlette.routing import Route
from starlette.types import ASGIApp

from inference_api.discovery.cluster import Cluster
from inference_api.discovery.dns import Discovery
from inference_api.discovery.endpointslices import EndpointSlices, watched_in
from inference_api.discovery.engines import EngineFacts
from inference_api.discovery.load import LoadSignal
from inference_api.discovery.resolver import Resolve, Resolver, resolve
from inference_api.errors import RouterError
from inference_api.http.admission import Admission
from inference_api.http.backends import Backends
from inference_api.http.head import RequestHeaders
from inference_api.http.pages import Models, Named, Observed, Probes, create_pages
from inference_api.http.pipeline import INFERENCE_ROUTES, Dispatch, Gate, Inference
from inference_api.models import Outcome
from inference_api.observe.accounts import Accounts
from inference_api.observe.families import Families
from inference_api.observe.lag import LoopLag
from inference_api.observe.log import Fields
from inference_api.observe.metrics import Metrics
from inference_api.observe.scrape import Exposition, process_collectors
from inference_api.routing.backend import Backend, Fleet
from inference_api.routing.balance import make_balancer
from inference_api.routing.breaker import Breaker
from inference_api.routing.catalogue import Catalogue
from inference_api.routing.files import Reloader, static_source
from inference_api.routing.health import Health
from inference_api.routing.origin import Origin
from inference_api.routing.prober import Prober
from inference_api.routing.registry import Registry
from inference_api.settings import Settings
from inference_api.upstream.attempt import SendAttempt, SendToBackend
from inference_api.upstream.credentials import Tokens
from inference_api.upstream.forward import Forward
from inference_api.upstream.limits import Limits
from inference_api.upstream.prepare import Prepare
from inference_api.upstream.retry import RetryPolicy
from inference_api.upstream.transport import Transport
from inference_api.upstream.trust import Trust

if TYPE_CHECKING:
    from inference_api.features.tracing import Tracing

logger = logging.getLogger(__name__)

# Seconds: the router's own questions to a backend are too far apart to share a connection.
_OWN_KEEPALIVE = 0.1
# Seconds that a scrape on OPS_PORT leaves to the event loop after every slice.
_BESIDE = 0.001


Run = Callable[[], Coroutine[Any, Any, None]]


class Router:
    """The router's parts, joined. `app` serves requests; `ops` serves probes and metrics on a port of their own.

    With a `cluster`, its API tells which pods a Service has, and DNS only what the other names mean. `tokens`: the
    variables of the environment. `catalogue` stands for the file of the settings. Raises CatalogueError when the
    static catalogue cannot be read.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        catalogue: Catalogue | None = None,
        tokens: Mapping[str, str] | None = None,
        access_log: Callable[[Fields], None] | None = None,
        dropped_lines: Callable[[], int] = int,
        transport: httpx.AsyncBaseTransport | None = None,
        registry_client: httpx.AsyncClient | None = None,
        resolve: Resolve = resolve,
        cluster: Cluster | None = None,
        rand: random.Random | None = None,
        tracing: "Tracing | None" = None,
        revision: str = "",
    ) -> None:
        rand = rand or random.Random()

        def mint_id() -> str:
            return f"{rand.getrandbits(128):032x}"

        self._resolver, self._trust, self._tokens = Resolver(resolve), Trust(), Tokens(tokens or {})
        self.transport = transport or self._make_transport(settings.upstream_keepalive)
        # What the router asks for itself neither waits behind the traffic nor passes for a sign of life in it.
        self._own_transport = transport or self._make_transport(_OWN_KEEPALIVE)
        reported = settings.load_signal_interval > 0
        self.fleet = Fleet(lambda name: make_balancer(name, rand.random, reported))
        self.discovery = self._discover(settings, cluster, rand)
        self._slices = self._watch(cluster, rand) if cluster else None
        self._finders = [finder for finder in (self.discovery, self._slices) if finder]
        self._client = registry_client or self._registry_client(settings)
        self._catalogue = static_source(settings.catalogue, catalogue, self._prepare)
        self.registry = self._make_registry(settings, rand)
        self._catalogue.take = self.registry.replace_static
        self._reloader = Reloader((self._catalogue, self._tokens, self._trust))
        self.metrics = Metrics(lambda: self.fleet.models)
        self._lag = LoopLag(self.metrics.loop_lag.observe)
        self.health = _health(self.fleet, self.transport, settings, rand)
        self._accounts = Accounts(self.metrics, access_log)
        self._tracing = tracing
        inside = self._accounts if tracing is None else tracing.accounts(self.metrics, access_log)
        self._background = self._beside_requests(settings, rand)
        self.admission = Admission(settings.max_in_flight, settings.max_buffered_bytes)
        self.probes = self._make_probes(settings, self._exposition(settings, revision, dropped_lines))
        policy = RetryPolicy(_limits(settings), rand.random)
        forward = self._make_forward(settings, policy, rand)
        self._ops_pages = [*self.probes.ops_routes(), *Backends(self.fleet, policy.resting.get).routes()]
        self.app = self._surface(self._gate(settings, inside, forward, mint_id), mint_id, settings.ops_port is None)
        self.ops: ASGIApp = Named(create_pages(self._ops_pages), mint_id)

    def _make_transport(self, keepalive: float, **more: Any) -> Transport:
        return Transport(keepalive=keepalive, tls=self._trust, resolver=self._resolver, **more)

    def _registry_client(self, settings: Settings) -> httpx.AsyncClient | None:
        url = settings.registry_url
        if url is None:
            return None
        # No proxies or netrc from the environment: where the catalogue comes from is a setting, so it may be anywhere.
        transport = self._make_transport(_OWN_KEEPALIVE, may_reach=lambda address: True)
        token = settings.registry_token
        headers = {"authorization": f"Bearer {token.get_secret_value()}"} if token else {}
        return httpx.AsyncClient(base_url=url, headers=headers, timeout=5.0, trust_env=False, transport=transport)

    def _discover(self, settings: Settings, cluster: Cluster | None, rand: random.Random) -> Discovery:
        watched = watched_in(cluster) if cluster else lambda host: False
        look_up, every = self._resolver.look_up, settings.discovery_interval
        return Discovery(self.fleet, look_up, every, rand.random, self._forget_backends, watched)

    def _watch(self, cluster: Cluster, rand: random.Random) -> EndpointSlices:
        failures = self.discovery.failures
        return EndpointSlices(self.fleet, cluster, failures, rand=rand.random, on_leave=self._forget_backends)

    def _make_registry(self, settings: Settings, rand: random.Random) -> Registry:
        return Registry(
            self.fleet,
            self._catalogue.load(),
            self._client,
            settings.registry_refresh,
            rand=rand.random,
            on_change=self._catalogue_changed,
            prepare=self._prepare,
        )

    def _make_probes(self, settings: Settings, exposition: Exposition) -> Probes:
        required = settings.registry_required == "on"
        return Probes(self.registry, exposition, self._lag.silence, required)

    def _exposition(self, settings: Settings, revision: str, dropped_lines: Callable[[], int]) -> Exposition:
        families = Families(
            self.metrics,
            self.registry.status,
            lambda: self.discovery.failures,
            lambda: self.probes.state == "draining",
            self._lag.silence,
            revision,
            dropped_lines,
        )
        return Exposition(families, process_collectors(), 0.0 if settings.ops_port is None else _BESIDE)

    def _gate(self, settings: Settings, accounts: Accounts, send: Forward, mint_id: Callable[[], str]) -> Gate:
        return Gate(
            accounts,
            self.registry.resolve,
            send=send,
            read_headers=RequestHeaders(frozenset(name.encode() for name in settings.forward_headers)),
            mint_id=mint_id,
            max_body=settings.max_body_bytes,
            write_stall=settings.write_stall_timeout,
        )

    def _surface(self, gate: Gate, mint_id: Callable[[], str], ops: bool) -> ASGIApp:
        inference: dict[str, ASGIApp] = {
            route.path: Inference(route, gate, self.admission) for route in INFERENCE_ROUTES
        }
        if self._tracing is not None:
            inference = {route.path: self._tracing.layer(inference[route.path], route) for route in INFERENCE_ROUTES}
        # Registered a second time so that a wrong method on them is a 405 that says which one is right.
        pages = [Route(path, endpoint, methods=["POST"]) for path, endpoint in inference.items()]
        pages += Models(self.fleet, self.registry.resolve).routes()
        pages += self._ops_pages if ops else self.probes.routes()
        return Dispatch(inference, Named(Observed(create_pages(pages, self._lifespan), self._accounts), mint_id))

    def _beside_requests(self, settings: Settings, rand: random.Random) -> list[Run]:
        """What the lifespan keeps running; the optional ones last."""
        engines = EngineFacts(self.fleet, self._own_transport, rand=rand.random)
        prober = self._make_prober(settings, rand)
        run = [self._reloader.run, self.registry.run, *(finder.run for finder in self._finders)]
        run += [engines.run, self.health.run, prober.run, self._lag.run, self._make_signal(settings, rand).run]
        return run

    @asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncIterator[None]:
        await self.registry.start()
        await asyncio.gather(*(finder.start() for finder in self._finders))
        tasks = [asyncio.create_task(run()) for run in (self._open, *self._background)]
        try:
            yield
        finally:
            self.drain()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.transport.aclose()
            await self._own_transport.aclose()
            await self._resolver.aclose()
            if self._client is not None:
                await self._client.aclose()

    async def _open(self) -> None:
        """Ready, once it is known where to send requests; what comes before that is answered all the same."""
        if self._slices:
            await self._slices.known()
        if self.probes.state == "starting":
            self.probes.state = "ready"

    def drain(self) -> None:
        """The process has been asked to stop: no new traffic, please; what comes is still answered."""
        self.probes.state = "draining"

    def reload(self) -> None:
        """Read catalogue, credentials and trusted certificates again, now; what is in flight goes on."""
        logger.info("configuration is read again")
        self._reloader.now()

    def refused(self, error: RouterError, request_id: str, size: int) -> None:
        """A request was refused before it was one: counted and logged like the others."""
        seen = self._accounts.begin("other")
        seen.request_id = request_id
        seen.refused(error, error.status, size)
        seen.end(error.outcome)

    def _make_forward(self, settings: Settings, policy: RetryPolicy, rand: random.Random) -> Forward:
        send: SendAttempt = SendToBackend(self.transport, self._attempted, self.health.answered, rand)
        if self._tracing is not None:
            send = self._tracing.attempts(send)
        return Forward(send, Prepare(_limits(settings), self._tokens), policy, self.metrics.retry)

    def _make_prober(self, settings: Settings, rand: random.Random) -> Prober:
        every, patience = settings.health_interval, settings.health_timeout
        heard = _heard(self.transport)
        return Prober(self.fleet, self._own_transport, self._checked, heard, every, patience, rand.random)

    def _make_signal(self, settings: Settings, rand: random.Random) -> LoadSignal:
        slept, every = self.health.slept, settings.load_signal_interval
        if not every:
            return LoadSignal(
                self.fleet,
                self._own_transport,
                settings.health_interval,
                on_sleep=slept,
                sleep_only=True,
                heard=_heard(self.transport),
                rand=rand.random,
            )
        failed = functools.partial(self.metrics.probe_failed, kind="metrics")
        return LoadSignal(self.fleet, self._own_transport, every, failed, slept, rand=rand.random)

    def _attempted(self, backend: Backend, outcome: Outcome) -> None:
        self.metrics.attempt(backend, outcome)
        self.health.ended(backend, outcome)

    def _checked(self, origin: Origin, passed: bool) -> None:
        if not passed:
            self.metrics.probe_failed(origin, "health")
        self.health.checked(origin, passed)

    def _prepare(self, catalogue: Catalogue) -> None:
        """In a thread, or at the start: what a catalogue names is read before it is served."""
        self._tokens.prepare(catalogue.values())

    def _catalogue_changed(self) -> None:
        self._tokens.retain(model.entry for model in self.fleet.models.values())
        self.metrics.forget_models()
        self._forget_backends()
        for finder in self._finders:
            finder.wake()

    def _forget_backends(self) -> None:
        """Of backends that left the catalogue, connections are closed as they become idle, and series are dropped."""
        self.metrics.forget_backends()
        origins = {b.url for model in self.fleet.models.values() for b in model.backends}
        for transport in (self.transport, self._own_transport):
            if isinstance(transport, Transport):
                transport.retain(origins)


def _heard(transport: httpx.AsyncBaseTransport) -> Callable[[str], float]:
    """When a byte last came from an origin; of one that cannot be asked, the best is believed."""
    return transport.last_read if isinstance(transport, Transport) else lambda origin: math.inf


def _health(fleet: Fleet, transport: httpx.AsyncBaseTransport, settings: Settings, rand: random.Random) -> Health:
    breaker = Breaker(settings.breaker_failures, settings.breaker_cooldown, rand.random)
    return Health(
        fleet, breaker, _heard(transport), settings.connect_timeout, settings.first_byte_timeout, rand=rand.random
    )


def _limits(settings: Settings) -> Limits:
    return Limits(
        settings.connect_timeout,
        settings.first_byte_timeout,
        settings.idle_timeout,
        settings.total_timeout,
        settings.stream_timeout,
        settings.max_attempts,
        settings.retry_on_status,
        settings.retry_budget,
    )
