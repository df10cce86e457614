"""Every service outside that the control plane asks; what is not set up is absent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from control_plane.clients.router import Router
from control_plane.pure.lifecycle import Driver, DriverName
from control_plane.settings import Settings


@dataclass(frozen=True)
class Connections:
    """`router`: of ROUTER_URL. `drivers`: what starts and stops engines, by name."""

    router: Router | None = None
    drivers: Mapping[DriverName, Driver] = field(default_factory=lambda: MappingProxyType({}))

    def end_answers(self) -> None:
        """End the answers that people wait for in the console: they would hold the process."""
        if self.router is not None:
            self.router.stop()
        for driver in self.drivers.values():
            driver.end()

    async def close(self) -> None:
        if self.router is not None:
            await self.router.close()
        for driver in self.drivers.values():
            await driver.close()


def connections(settings: Settings) -> Connections:
    router = None if settings.router_url is None else Router(settings.router_url)
    return Connections(router, _drivers(settings))


def _drivers(settings: Settings) -> Mapping[DriverName, Driver]:
    return {}
