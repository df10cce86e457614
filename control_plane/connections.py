"""Every service outside that the control plane asks; what is not set up is absent."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

from control_plane.clients import kubernetes, processes
from control_plane.clients.folders import Roots
from control_plane.clients.hub import Hub
from control_plane.clients.prometheus import Prometheus
from control_plane.clients.router import Router
from control_plane.pure.lifecycle import Driver, DriverName
from control_plane.settings import Settings


@dataclass(frozen=True)
class Connections:
    """`router`: of ROUTER_URL. `prometheus`: of PROMETHEUS_URL. `drivers`: what starts and stops engines, by name.

    `hub`, `roots`: whose models may be inspected.
    """

    router: Router | None = None
    prometheus: Prometheus | None = None
    drivers: Mapping[DriverName, Driver] = field(default_factory=lambda: MappingProxyType({}))
    hub: Hub | None = None
    roots: Roots | None = None
    _open: set[asyncio.Timeout] = field(default_factory=set, repr=False)

    @asynccontextmanager
    async def bounded(self, seconds: float) -> AsyncIterator[None]:
        """A long answer: TimeoutError within the block, after so many seconds or once `end_answers` was called."""
        async with asyncio.timeout(seconds) as bound:
            self._open.add(bound)
            try:
                yield
            finally:
                self._open.discard(bound)

    @property
    def long_answers(self) -> int:
        """Those that are `bounded` now."""
        return len(self._open)

    def end_answers(self) -> None:
        """End the answers that people wait for: they would hold the process."""
        if self.router is not None:
            self.router.stop()
        for driver in self.drivers.values():
            driver.end()
        for bound in self._open:
            if not bound.expired():
                bound.reschedule(asyncio.get_running_loop().time())

    async def close(self) -> None:
        if self.router is not None:
            await self.router.close()
        if self.prometheus is not None:
            await self.prometheus.close()
        if self.hub is not None:
            await self.hub.close()
        for driver in self.drivers.values():
            await driver.close()


def connections(settings: Settings) -> Connections:
    """Raises SettingsError."""
    router = None if settings.router_url is None else Router(settings.router_url)
    roots = Roots(settings.model_roots) if settings.model_roots else None
    return Connections(router, _prometheus(settings), _drivers(settings), _hub(settings), roots)


def _prometheus(settings: Settings) -> Prometheus | None:
    if settings.prometheus_url is None:
        return None
    token = settings.prometheus_token
    return Prometheus(settings.prometheus_url, None if token is None else token.get_secret_value())


def _hub(settings: Settings) -> Hub | None:
    if settings.hub_endpoint is None:
        return None
    token = settings.hub_token
    return Hub(settings.hub_endpoint, None if token is None else token.get_secret_value())


def _drivers(settings: Settings) -> Mapping[DriverName, Driver]:
    found = [kubernetes.driver(settings), processes.driver(settings)]
    return MappingProxyType({driver.name: driver for driver in found if driver is not None})
