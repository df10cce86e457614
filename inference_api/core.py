"""The router without optional features: creates and connects every core object. `app` adds the features."""

import asyncio
import logging
import math
import platform
import random
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from time import monotonic
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

import httpx

from inference_api.discovery.cluster import Cluster
from inference_api.discovery.dns import Discovery
from inference_api.discovery.endpointslices import EndpointSlices, watched_in
from inference_api.discovery.engine_metrics import EngineMetrics
from inference_api.discovery.engines import EngineFacts
from inference_api.discovery.resolver import Resolve, Resolver, resolve
from inference_api.feature import Run
from inference_api.http.admission import Admission
from inference_api.http.pages import Probes
from inference_api.members import Members
from inference_api.models import Call, Caller, Outcome, Send
from inference_api.observe.exposition import Family
from inference_api.observe.families import Families
from inference_api.observe.lag import LoopLag
from inference_api.observe.legs import Legs
from inference_api.observe.log import Fields
from inference_api.observe.metrics import Metrics
from inference_api.observe.scrape import Exposition, process_collectors
from inference_api.routing.backend import Backend, Origin
from inference_api.routing.balance import BALANCERS
from inference_api.routing.balancer import MakeBalancer
from inference_api.routing.breaker import Breaker
from inference_api.routing.catalogue import Catalogue
from inference_api.routing.entries import CatalogueEntry, Credentials
from inference_api.routing.files import Reloader, Watched, static_source
from inference_api.routing.fleet import Fleet, Model
from inference_api.routing.health import Health
from inference_api.routing.prober import Prober
from inference_api.routing.registry import Registry
from inference_api.routing.snapshots import Snapshot
from inference_api.settings import Settings
from inference_api.upstream.attempt import SendAttempt, SendToBackend
from inference_api.upstream.credentials import Tokens
from inference_api.upstream.failures import Failure
from inference_api.upstream.forward import Forward, OnFailure
from inference_api.upstream.limits import Limits
from inference_api.upstream.prepare import Prepare
from inference_api.upstream.retry import GiveUp, Retry, RetryPolicy
from inference_api.upstream.transport import Transport
from inference_api.upstream.trust import Trust

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds; health checks are too far apart to reuse a connection.
_OWN_KEEPALIVE = 0.1
# Seconds that a scrape on OPS_PORT yields after every slice.
_SCRAPE_PAUSE = 0.001


class Outside(NamedTuple):
    """What the router gets from the process beside settings; tests replace it.

    `variables`: the environment, for credentials and OpenTelemetry. `catalogue` replaces the file of the settings.
    `write_line`: takes the fields of an access line, `write_usage` a usage record as JSON. `transport`,
    `registry_client`, `resolve`: the way to backends, to the registry, and to the addresses of names. `cluster`: the
    Kubernetes API that lists the pods of Services; DNS then resolves only other names.
    """

    variables: Mapping[str, str] = MappingProxyType({})
    catalogue: Catalogue | None = None
    write_line: Callable[[Fields], None] | None = None
    dropped_lines: Callable[[], int] = int
    transport: httpx.AsyncBaseTransport | None = None
    registry_client: httpx.AsyncClient | None = None
    resolve: Resolve = resolve
    cluster: Cluster | None = None
    rand: random.Random | None = None
    revision: str = ""
    write_usage: Callable[[str], None] | None = None


class Core:
    """Raises CatalogueError if the static catalogue cannot be read.

    `balancers`: algorithms by name that replace the core's. `entry`: the class of the catalogue's entries.
    """

    def __init__(
        self,
        settings: Settings,
        outside: Outside,
        balancers: Sequence[Mapping[str, MakeBalancer]] = (),
        entry: type[CatalogueEntry] = CatalogueEntry,
    ) -> None:
        self.settings, self.outside, self._entry = settings, outside, entry
        self.rand = rand = outside.rand or random.Random()
        # Of this process: its name among the routers, and one that no other process ever has.
        self.instance, self.boot = instance_name(settings.port), secrets.token_hex(8)
        self._provided: dict[type, object] = {}
        # Loop time at which the process must have ended; None: it runs.
        self._stop_by: float | None = None
        self._starts: list[Run] = []
        # With keys of their own, callers send none that a backend could refuse.
        self.callers_have_keys = False
        self._on_drain: list[Callable[[], None]] = []
        makers = {name: make for group in (BALANCERS, *balancers) for name, make in group.items()}
        self._resolver, self._trust, self._tokens = Resolver(outside.resolve), Trust(), Tokens(outside.variables)
        self.transport = outside.transport or self._make_transport(settings.upstream_keepalive)
        # Own pools for health checks: they never wait behind traffic, and do not count as its progress.
        self.own_transport = outside.transport or self._make_transport(_OWN_KEEPALIVE)
        self.fleet = Fleet(lambda name: makers[name](rand.random))
        self.discovery = self._make_discovery()
        cluster = outside.cluster
        self.slices = None if cluster is None else self._make_slices(cluster)
        self._finders = [finder for finder in (self.discovery, self.slices) if finder]
        self.registry_client = outside.registry_client or self._registry_client()
        self._catalogue = static_source(settings.catalogue, outside.catalogue, self._read_credentials, entry)
        self.registry = self._make_registry()
        self._catalogue.take = self.registry.replace_static
        # Documents of the registry beside its catalogue that features follow, by their names
        self.snapshots: dict[str, Snapshot] = {}
        # A name to its Model, for a caller: `app` wraps it in what features refuse.
        self.look_up: Callable[[str, Caller | None], Model] = self.registry.resolve
        self.reloader = Reloader((self._catalogue, self._tokens, self._trust))
        self.metrics = Metrics(lambda: self.fleet.served)
        self.lag = LoopLag(self.metrics.loop_lag.observe)
        self.health = self._make_health()
        self._limits = _limits(settings)
        self.retry_policy = RetryPolicy(self._limits, rand.random)
        self.prepare = Prepare(self._limits, self._tokens)
        self.admission = Admission(settings.max_in_flight, settings.max_buffered_bytes)
        # For features that run other models: through their layers, and what is recorded of those runs.
        self.members, self.legs = Members(), Legs(self.fleet)

    def mint_id(self) -> str:
        return f"{self.rand.getrandbits(128):032x}"

    # Bound methods: cheaper to call than an object with __call__.

    def forward(self, send: SendAttempt, failed: Sequence[OnFailure] = ()) -> Send:
        """The attempt loop, from a Call to a Reply; `send` makes one attempt, `failed` get each that fails."""

        def on_failure(call: Call, failure: Failure, decision: Retry | GiveUp) -> None:
            for note in failed:
                note(call, failure, decision)

        def loop(send: SendAttempt) -> Send:
            return Forward(send, self.prepare, self.retry_policy, self.metrics.retry, on_failure).__call__

        self._loop, self._attempt = loop, send
        return loop(send)

    def forward_through(self, wrap: Callable[[SendAttempt], SendAttempt]) -> Send:
        """The same attempt loop, with each attempt inside of `wrap`: for models whose attempts are not like others."""
        return self._loop(wrap(self._attempt))

    def send_attempt(self, wrappers: Sequence[Callable[[SendAttempt], SendAttempt]]) -> SendAttempt:
        """One attempt on a backend, inside of `wrappers`."""
        told = self._attempt_ended, self.health.answered
        send: SendAttempt = SendToBackend(self.transport, *told, self.rand, self._asks_by_itself).__call__
        for wrap in reversed(wrappers):
            send = wrap(send)
        return send

    def tasks(self) -> list[Run]:
        """The background tasks: files, registry, discovery, engines' facts, health, loop lag."""
        rand, every = self.rand.random, self.settings.health_interval
        facts = EngineFacts(self.fleet, self.own_transport, rand=rand, headers=self.own_headers)
        timeout, last_read = self.settings.health_timeout, self.last_read()
        prober = Prober(self.fleet, self.own_transport, self._checked, last_read, every, timeout, rand)
        sleep_poller = EngineMetrics(
            self.fleet,
            self.own_transport,
            every,
            on_sleep=self.health.slept,
            sleep_only=True,
            last_byte_at=last_read,
            rand=rand,
        )
        run = [self.reloader.run, self.registry.run, *(finder.run for finder in self._finders)]
        return [*run, facts.run, self.health.run, prober.run, self.lag.run, sleep_poller.run]

    def drain(self) -> None:
        """The process begins to stop; the second time, it has no time left."""
        delay, timeout = self.settings.drain_delay, self.settings.drain_timeout
        self._stop_by = monotonic() + (delay + timeout if self._stop_by is None else 0.0)
        # In a turn of the loop: a signal may interrupt anything, also before or after the loop.
        with suppress(RuntimeError):
            loop = asyncio.get_running_loop()
            for act in self._on_drain:
                loop.call_soon_threadsafe(act)

    def on_drain(self, act: Callable[[], None]) -> None:
        """Call `act` when the process begins to stop, and maybe again."""
        self._on_drain.append(act)

    @property
    def is_draining(self) -> bool:
        """Whether the process has begun to stop."""
        return self._stop_by is not None

    def seconds_left(self) -> float:
        """Until the end of the drain; infinity before it has begun."""
        return math.inf if self._stop_by is None else self._stop_by - monotonic()

    def provide(self, part: object) -> None:
        """Share an object of one feature with those after it in the list, by its class."""
        self._provided[type(part)] = part

    def provided(self, kind: type[T]) -> T | None:
        """The object of this class that a feature has provided, or None."""
        return cast(T | None, self._provided.get(kind))

    def at_start(self, run: Run) -> None:
        """Await it before the first request, beside the first poll of the registry; it must not take longer."""
        self._starts.append(run)

    def watch(self, watched: Watched) -> None:
        """Reload it when its files change, and at SIGHUP."""
        self.reloader.add(watched)

    def probes(
        self,
        collectors: Sequence[Callable[[], Iterator[Family]]],
        ready: Sequence[Callable[[], str | None]] = (),
    ) -> Probes:
        """Liveness, readiness, and the metrics of the core and of `collectors`. `ready`: reasons not to be ready."""
        families = Families(
            self.metrics,
            self.registry.status,
            lambda: self.discovery.failures,
            lambda: probes.state == "draining",
            self.lag.silence,
            self.outside.revision,
            self.outside.dropped_lines,
            collectors=collectors,
        )
        pause = 0.0 if self.settings.ops_port is None else _SCRAPE_PAUSE
        exposition = Exposition(families, process_collectors(), pause)
        required = self.settings.registry_required == "on"
        probes = Probes(self.registry, exposition, self.lag.silence, required, ready)
        return probes

    @asynccontextmanager
    async def running(self, tasks: Sequence[Run], on_stop: Callable[[], None]) -> AsyncIterator[None]:
        """Run `tasks`, from the first poll of registry and names until all connections are closed.

        `on_stop` is called when shutdown begins.
        """
        await asyncio.gather(self.registry.start(), *(start() for start in self._starts))
        await asyncio.gather(*(finder.start() for finder in self._finders))
        running = [asyncio.create_task(_logged(run)) for run in tasks]
        try:
            yield
        finally:
            on_stop()
            if self._stop_by is None:
                self.drain()
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await self.transport.aclose()
            await self.own_transport.aclose()
            await self._resolver.aclose()
            if self.registry_client is not None:
                await self.registry_client.aclose()

    def own_headers(self, entry: CatalogueEntry) -> dict[str, str]:
        """The headers of the router's own requests to the backends of a model."""
        credentials = entry.credentials
        if not isinstance(credentials, Credentials):
            return entry.headers
        token = self._tokens.get(credentials.source)
        return entry.headers | ({credentials.header: credentials.prefix + token} if token else {})

    def last_read(self) -> Callable[[str], float]:
        """Time of the last byte from an origin; infinity for a transport without that."""
        return self.transport.last_read if isinstance(self.transport, Transport) else lambda origin: math.inf

    def _make_transport(self, keepalive: float, **more: Any) -> Transport:
        return Transport(keepalive=keepalive, tls=self._trust, resolver=self._resolver, **more)

    def _registry_client(self) -> httpx.AsyncClient | None:
        url, token = self.settings.registry_url, self.settings.registry_token
        if url is None:
            return None
        # No proxies or netrc of the environment: only settings decide on the source of the catalogue.
        transport = self._make_transport(_OWN_KEEPALIVE, may_reach=lambda address: True)
        headers = {"authorization": f"Bearer {token.get_secret_value()}"} if token else {}
        return httpx.AsyncClient(base_url=url, headers=headers, timeout=5.0, trust_env=False, transport=transport)

    def _make_discovery(self) -> Discovery:
        cluster, every = self.outside.cluster, self.settings.discovery_interval
        watched = watched_in(cluster) if cluster else lambda host: False
        return Discovery(self.fleet, self._resolver.look_up, every, self.rand.random, self._forget_backends, watched)

    def _make_slices(self, cluster: Cluster) -> EndpointSlices:
        failures, rand = self.discovery.failures, self.rand.random
        return EndpointSlices(self.fleet, cluster, failures, rand=rand, on_leave=self._forget_backends)

    def _make_registry(self) -> Registry:
        return Registry(
            self.fleet,
            self._catalogue.load(),
            self.registry_client,
            self.settings.registry_refresh,
            rand=self.rand.random,
            on_change=self._catalogue_changed,
            prepare=self._read_credentials,
            entry_type=self._entry,
        )

    def _make_health(self) -> Health:
        settings, rand = self.settings, self.rand.random
        breaker = Breaker(settings.breaker_failures, settings.breaker_cooldown, rand)
        connect, first_byte = settings.connect_timeout, settings.first_byte_timeout
        return Health(self.fleet, breaker, self.last_read(), connect, first_byte, rand=rand)

    def _asks_by_itself(self, entry: CatalogueEntry) -> bool:
        """Whether its backends get the router's own credentials, or none."""
        return self.callers_have_keys or isinstance(entry.credentials, Credentials)

    # Events of one part that others handle

    def _attempt_ended(self, backend: Backend, outcome: Outcome) -> None:
        self.metrics.attempt(backend, outcome)
        self.health.ended(backend, outcome)

    def _checked(self, origin: Origin, passed: bool) -> None:
        if not passed:
            self.metrics.probe_failed(origin, "health")
        self.health.checked(origin, passed)

    def _read_credentials(self, catalogue: Catalogue) -> None:
        """Read the files that a catalogue names, before it takes effect; runs in a thread, or at the start."""
        self._tokens.prepare(catalogue.values())

    def _catalogue_changed(self) -> None:
        self._tokens.retain([model.entry for model in self.fleet.models.values()])
        self.prepare.retain(self.fleet.served)
        self.metrics.forget_models()
        self._forget_backends()
        for finder in self._finders:
            finder.wake()

    def _forget_backends(self) -> None:
        """For removed backends: close connections as they become idle, drop series."""
        self.metrics.forget_backends()
        origins = {b.url for model in self.fleet.models.values() for b in model.backends}
        for transport in (self.transport, self.own_transport):
            if isinstance(transport, Transport):
                transport.retain(origins)


def instance_name(port: int) -> str:
    """`<host name>-<port>`, in the characters of a name."""
    host = re.sub(r"[^A-Za-z0-9._-]", "-", platform.node()).lstrip("._-")[:100]
    return f"{host or 'router'}-{port}"


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


async def _logged(run: Run) -> None:
    """Run a background task; an exception that ends it is logged at once, not at the end of the process."""
    try:
        await run()
    except Exception:
        logger.exception("a background task failed, and does not run any more")
