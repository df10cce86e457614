"""Overrides: what operators order for backends in the control plane, polled by GET /overrides, with REPORT_INTERVAL.

    drain           no new requests; those in flight run to their end
    out             no new requests; those in flight end: on another backend, or as a broken stream
    reset_circuit   the circuit is closed and failures are forgotten, once

A backend with an override is not among those that requests choose from, so a request pays nothing for it. The last
document holds while the control plane is away, each override until its own end.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import httpx

from inference_api.core import Core
from inference_api.errors import printable
from inference_api.feature import Feature, Switch
from inference_api.features import reports
from inference_api.features.overriding.orders import MOST, Obeyed, Order, Orders, read_orders
from inference_api.observe.exposition import Family
from inference_api.observe.families import gauge
from inference_api.routing.backend import Backend, Override
from inference_api.routing.registry import MAX_BYTES, RegistryError
from inference_api.routing.snapshots import Keeper, Snapshot, SnapshotFile
from inference_api.settings import Settings
from inference_api.threads import in_thread
from inference_api.upstream.transport import Transport

logger = logging.getLogger(__name__)

_NAME = "overrides"
# Seconds that the start waits for the first answer; between two looks at the clock
_PATIENCE = 5.0
_LOOK = 0.5
# Backends whose state changes before requests have their turn
_SLICE = 200
_SHOWN = 10


def build(core: Core, settings: Settings) -> Feature | None:
    """Off unless there are reports, which say that they are obeyed."""
    if not settings.of(reports.Options).report_interval or core.registry_client is None:
        return None
    overrides = Overrides(core, core.registry_client, settings.registry_refresh)
    core.at_start(overrides.start)
    return Feature(_NAME, collect=overrides.collect, tasks=(overrides.run,))


class Overrides:
    """Follows the document, and applies it to the fleet. `now`: Unix seconds."""

    def __init__(
        self,
        core: Core,
        client: httpx.AsyncClient,
        refresh: float,
        patience: float = _PATIENCE,
        now: Callable[[], float] = time.time,
        look: float = _LOOK,
    ) -> None:
        self._core = core
        self._patience = patience
        self._now = now
        self._look = look
        self._snapshot = Snapshot(client, f"/{_NAME}", self, refresh, MAX_BYTES, rand=core.rand.random)
        file = core.provided(SnapshotFile)
        self._keeper = None if file is None else Keeper(file, _NAME, is_dated=False)
        # What is listed, and what of it holds
        self._listed: list[Order] | None = None
        self._orders = Orders()
        # Id -> loop time since which it is obeyed
        self._since: dict[str, float] = {}
        # Ids of `reset_circuit` that were obeyed
        self._done: set[str] = set()
        self._obeyed = Obeyed()
        self._applying = asyncio.Lock()
        self._unknown: set[str] = set()
        self._complaint: str | None = None
        core.snapshots[_NAME] = self._snapshot
        core.provide(self._obeyed)
        core.fleet.override_of = self._override_of

    async def start(self) -> None:
        """The first poll, before the first request; if it fails, what the file has."""
        await self._snapshot.start(self._patience)
        if self._listed is None and self._keeper is not None:
            await self._read_file(self._keeper)

    async def run(self) -> None:
        """Follow until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._snapshot.run())
            group.create_task(self._watch())
            if self._keeper is not None:
                group.create_task(self._keeper.run())

    def collect(self) -> Iterator[Family]:
        orders = self._orders
        return families({action: orders.count(action) for action in ("drain", "out")})

    # The answers

    async def take(self, content: Sequence[bytes]) -> bool:
        listed, unknown = await in_thread(partial(read_orders, content), _NAME)
        if unknown - self._unknown:
            logger.warning("overrides with unknown actions are ignored: %s", ", ".join(sorted(unknown)[:_SHOWN]))
            self._unknown |= unknown
        await self._apply(listed)
        if self._keeper is not None:
            self._keeper.keep(content)
        return True

    def confirm(self) -> None:
        if self._complaint is not None:
            logger.info("the registry gives the overrides again")
        self._complaint = None
        if self._keeper is not None:
            self._keeper.confirm()

    def failed(self, error: RegistryError) -> None:
        if error.reason != self._complaint:
            self._complaint = error.reason
            logger.warning("the overrides cannot be refreshed, the last ones hold: %s", error)

    async def _read_file(self, keeper: Keeper) -> None:
        try:
            async with asyncio.timeout(self._patience):
                content, _ = await keeper.load()
            listed, _ = await in_thread(partial(read_orders, content), _NAME)
        except (OSError, ValueError) as exc:
            reason = (exc.strerror if isinstance(exc, OSError) else None) or exc
            logger.warning("INFERENCE_API_POLICY_CACHE gives no overrides: %s", reason)
            return
        if self._listed is None:
            await self._apply(listed)
            logger.warning("the registry has given no overrides: those of INFERENCE_API_POLICY_CACHE hold")

    async def _watch(self) -> None:
        """End those whose time is over, also without a control plane."""
        while True:
            await asyncio.sleep(self._look)
            if self._listed is not None and self._orders.are_old(self._now()):
                await self._apply(self._listed)

    # What follows

    async def _apply(self, listed: list[Order]) -> None:
        async with self._applying:
            self._listed = listed
            before, orders = self._orders, Orders(listed, self._now())
            self._since = {order.id: self._since.get(order.id, time.monotonic()) for order in orders.held}
            # From now on for backends that come
            self._orders = orders
            _log_changes(before, orders)
            await self._administer({*before.backends(), *orders.backends()})
            self._reset(orders)
            self._obeyed.ids = [order.id for order in orders.held]

    async def _administer(self, labels: set[str]) -> None:
        """Apply the orders for the backends with these labels."""
        number = 0
        ending = set()
        for origin in list(self._core.fleet.origins.values()):
            if origin.label not in labels:
                continue
            for backend in list(origin.backends):
                override = self._override_of(backend)
                if override != backend.override:
                    self._core.health.administer(backend, override)
                    if backend.is_out:
                        ending.add(origin.url)
                number += 1
                if number % _SLICE == 0:
                    await asyncio.sleep(0)
        if ending and isinstance(self._core.transport, Transport):
            await self._core.transport.withdraw(ending)

    def _override_of(self, backend: Backend) -> Override | None:
        order = self._orders.of(backend.label, backend.model)
        if order is None:
            return None
        return Override(order.id, "out" if order.action == "out" else "drain", order.reason, self._since[order.id])

    def _reset(self, orders: Orders) -> None:
        resets = {order.id: order for order in orders.resets}
        new = [order for id, order in resets.items() if id not in self._done]
        self._done |= resets.keys()
        if len(self._done) > 2 * MOST:
            self._done = {*resets}
        if not new:
            return
        places = {(order.backend, order.model) for order in new}
        for origin in list(self._core.fleet.origins.values()):
            for backend in list(origin.backends):
                if (origin.label, None) in places or (origin.label, backend.model) in places:
                    self._core.health.reset(backend)


def _log_changes(before: Orders, after: Orders) -> None:
    old, new = ({order.id: order for order in orders.held} for orders in (before, after))
    begun = [order for id, order in new.items() if id not in old]
    ended = [order for id, order in old.items() if id not in new]
    fields = {name: _shown(orders) for name, orders in (("begun", begun), ("ended", ended)) if orders}
    if fields:
        logger.info("the overrides have changed", extra={"fields": fields})


def _shown(orders: Sequence[Order]) -> list[str]:
    shown = [f"{one.action} {printable(one.backend)} {printable(one.model or '')}".strip() for one in orders[:_SHOWN]]
    return shown if len(orders) <= _SHOWN else [*shown, f"and {len(orders) - _SHOWN} more"]


def families(active: Mapping[str, int]) -> Iterator[Family]:
    """`active`: by action."""
    series = [((action,), float(count)) for action, count in active.items()]
    yield gauge("overrides_active", "Overrides of operators that hold.", ("action",), series)


FEATURE = Switch(build)
