"""From a host name to backends: polls DNS for the names of backends with `discovery: dns`.

Every address of a name is a backend, and the router connects to the address that was checked, not to the name, so that
a later answer of DNS cannot redirect it. A removed address gets no new requests, and its streams run to their end. A
name whose look-up fails, or that suddenly has no address, keeps its addresses.
"""

import asyncio
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress

from inference_api.discovery.resolver import Resolve
from inference_api.pace import spread
from inference_api.routing.entries import MAX_BACKENDS
from inference_api.routing.fleet import Fleet
from inference_api.routing.urls import is_usable_address

logger = logging.getLogger(__name__)

# Hosts that one poll awaits at once; the resolver limits look-ups as a whole.
_CONCURRENCY = 16


class Discovery:
    """Keeps the addresses of a Fleet up to date with DNS.

    `resolve` looks a name up; one that hangs should not delay others. `every`: seconds between two polls, +-20 %;
    `rand` gives [0, 1). `on_leave` is called after addresses were removed. `failures` counts failed look-ups by reason.
    `watched` names are not looked up: a watch finds their backends. `timeout`: seconds per name, `cold_start`: for the
    first poll.
    """

    def __init__(
        self,
        fleet: Fleet,
        resolve: Resolve,
        every: float = 5.0,
        rand: Callable[[], float] = random.random,
        on_leave: Callable[[], None] = lambda: None,
        watched: Callable[[str], bool] = lambda host: False,
        timeout: float = 2.0,
        cold_start: float = 5.0,
    ) -> None:
        # Configuration
        self._timeout = timeout
        self._cold_start = cold_start
        self._fleet = fleet
        self._resolve = resolve
        self._watched = watched
        self._every = every
        self._rand = rand
        self._on_leave = on_leave
        # Shared: host -> names of its models, and the version of the fleet
        self._hosts: dict[str, list[str]] = {}
        self._version = -1
        self._woken = asyncio.Event()
        # Unfinished look-ups, also timed-out ones: one per host
        self._under_way: dict[str, asyncio.Future[Iterable[str]]] = {}
        # Failures that were logged already
        self._failing: set[str] = set()
        self._refused: dict[str, list[str]] = {}
        self.failures: Counter[str] = Counter()

    async def start(self) -> None:
        """The first poll, before the first request, for at most `cold_start` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._cold_start):
                await self.poll()

    async def run(self) -> None:
        """Poll until cancelled."""
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(spread(self._every, self._rand())):
                        await self._woken.wait()
                self._woken.clear()
                try:
                    await self.poll()
                except Exception:
                    # The boundary of a background task: it must survive for the next poll.
                    logger.exception("looking up the hosts of the catalogue failed")
        finally:
            for lookup in self._under_way.values():
                lookup.cancel()

    def wake(self) -> None:
        """Poll now, since the catalogue may name new hosts."""
        self._woken.set()

    async def poll(self) -> None:
        """Look up each host once, a few at a time, and apply changes to the fleet."""
        self._rebuild()
        # Failed ones come last: a name server that hangs must not delay the others.
        hosts = iter(sorted(self._hosts, key=self._failing.__contains__))

        async def worker() -> None:
            for host in hosts:
                if host not in self._under_way:
                    await self._look_up(host)

        async with asyncio.TaskGroup() as group:
            for _ in range(_CONCURRENCY):
                group.create_task(worker())

    def _rebuild(self) -> None:
        """Update the hosts if the catalogue changed; drop removed ones."""
        if self._version == self._fleet.version:
            return
        self._version = self._fleet.version
        hosts: defaultdict[str, list[str]] = defaultdict(list)
        for model in self._fleet.models.values():
            for host in dict.fromkeys(entry.host for entry in model.entry.backends if entry.discovery == "dns"):
                if not self._watched(host):
                    hosts[host].append(model.name)
        for host in self._hosts.keys() - hosts.keys():
            self._fleet.addresses.pop(host, None)
        self._hosts = dict(hosts)
        self._failing &= hosts.keys()
        self._refused = {host: refused for host, refused in self._refused.items() if host in hosts}

    async def _look_up(self, host: str) -> None:
        lookup = self._under_way[host] = asyncio.ensure_future(self._resolve(host))

        def ended(lookup: asyncio.Future[Iterable[str]]) -> None:
            del self._under_way[host]
            # Mark the exception as retrieved: the poll may have timed out.
            _ = lookup.cancelled() or lookup.exception()

        lookup.add_done_callback(ended)
        await asyncio.wait({lookup}, timeout=self._timeout)
        if not lookup.done():
            self._failed(host, "timeout", f"no answer within {self._timeout:.0f} s")
        elif (error := lookup.exception()) is not None:
            self._failed(host, "error", str(error) or type(error).__name__)
        elif usable := self._usable(host, lookup.result()):
            self._found(host, usable)
        else:
            self._failed(host, "empty", "it has no usable address")

    def _usable(self, host: str, found: Iterable[str]) -> tuple[str, ...]:
        addresses = {*found}
        usable = sorted(filter(is_usable_address, addresses))
        refused = sorted(addresses - {*usable})
        if refused and self._refused.get(host) != refused:
            logger.warning("%d addresses of the host %r are refused, first %.64r", len(refused), host, refused[0])
        self._refused[host] = refused
        return tuple(usable[:MAX_BACKENDS])

    def _found(self, host: str, addresses: tuple[str, ...]) -> None:
        if host in self._failing:
            self._failing.discard(host)
            logger.info("the host %r resolves again", host)
        before = self._fleet.addresses.get(host, ())
        if addresses == before:
            return
        self._fleet.resolve(host, addresses, self._hosts.get(host, ()))
        come, gone = {*addresses} - {*before}, {*before} - {*addresses}
        fields = {"addresses": len(addresses), "come": len(come), "gone": len(gone)}
        logger.info("addresses of %r changed", host, extra={"fields": fields})
        if gone:
            self._on_leave()

    def _failed(self, host: str, reason: str, message: str) -> None:
        if host not in self._failing:
            self._failing.add(host)
            known = len(self._fleet.addresses.get(host, ()))
            fields = {"serving": known}
            logger.warning("the host %r cannot be looked up: %.200s", host, message, extra={"fields": fields})
        self.failures[reason] += 1
