"""Connects to a host by the first of its addresses that accepts: RFC 8305, "happy eyeballs".

The addresses are tried in the system's order, families in turn, each a quarter of a second after the one before, or at
once when that has failed. The first connection wins, the others are given up. TLS belongs to the connection: an address
whose handshake hangs is passed like one that swallows packets.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import chain, zip_longest
from typing import Protocol, TypeVar

import httpx

from inference_api.discovery.resolver import Resolver
from inference_api.routing.urls import is_address, is_usable_address

# File descriptors, and ports to connect from
LACKS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)

# Seconds between two attempts, as RFC 8305 recommends.
DELAY = 0.25
# Seconds for which an address that failed, or was overtaken, is tried after the others.
_AVOIDED = 60.0
# A name may have thousands: each attempt is a packet to somebody.
_MOST = 32


class Closable(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=Closable)
Attempt = Callable[[str], Awaitable[C]]


class Dialer:
    """Connects to one host, and remembers which of its addresses failed.

    `may_reach`: whether a connection may lead to an IP address. `delay`: seconds between two attempts.
    """

    def __init__(
        self,
        host: str,
        resolver: Resolver,
        may_reach: Callable[[str], bool] = is_usable_address,
        delay: float = DELAY,
    ) -> None:
        # Configuration
        self.host = host
        self._resolver = resolver
        self._may_reach = may_reach
        self._delay = delay
        self._given = [host] if is_address(host) else None
        # Shared: until when an address comes last
        self._avoided: dict[str, float] = {}

    async def dial(self, attempt: Attempt[C], seconds: float | None) -> C:
        """A connection that `attempt` made to one address. The caller keeps the time, `seconds` says how much there is.

        Raises what the attempts raise, OSError or UnicodeError if there is no address, httpx.ConnectError if none may
        be reached.
        """
        if self._given is not None:
            return await self._dial(self._given, attempt)
        addresses = await self._resolver.addresses(self.host, seconds)
        try:
            return await self._dial(addresses, attempt)
        except BaseException as exc:
            self._resolver.doubt(self.host)
            if not isinstance(exc, OSError) or exc.errno in LACKS:
                raise
            # What was remembered may be out of date; a look-up for each connection would not have been.
            newer = await self._resolver.addresses(self.host, seconds)
            if newer == addresses:
                raise
            return await self._dial(newer, attempt)

    async def _dial(self, addresses: Sequence[str], attempt: Attempt[C]) -> C:
        # A name may be made to resolve to what a URL may not name.
        allowed = [address for address in addresses if self._may_reach(address)]
        if not allowed:
            raise httpx.ConnectError("the backend's name leads to an address that no backend may have")
        if len(allowed) == 1:
            return await attempt(allowed[0])
        return await race(in_turn(allowed, self._avoid())[:_MOST], attempt, self._delay, self._note)

    def _avoid(self) -> Collection[str]:
        if self._avoided:
            now = asyncio.get_running_loop().time()
            self._avoided = {address: until for address, until in self._avoided.items() if now < until}
        return self._avoided

    def _note(self, address: str, good: bool) -> None:
        if good:
            self._avoided.pop(address, None)
        else:
            self._avoided[address] = asyncio.get_running_loop().time() + _AVOIDED


def in_turn(addresses: Sequence[str], avoided: Collection[str] = ()) -> list[str]:
    """The families in turn, beginning with that of the first address; those that are avoided come last."""
    last = [address for address in addresses if address in avoided]
    if last and len(last) < len(addresses):
        return in_turn([address for address in addresses if address not in avoided]) + in_turn(last)
    first = [address for address in addresses if (":" in address) == (":" in addresses[0])]
    other = [address for address in addresses if (":" in address) != (":" in addresses[0])]
    return [address for address in chain(*zip_longest(first, other)) if address is not None]


async def race(
    addresses: Sequence[str],
    attempt: Attempt[C],
    delay: float,
    note: Callable[[str, bool], None] = lambda address, good: None,
) -> C:
    """The first connection that is made; the others are cancelled, and closed if they are made all the same.

    `note` gets each address and whether it is good; one that took more than `delay` is not, unless it wins. Raises the
    first attempt's error when all fail, but before that a lack of our own.
    """
    running: dict[asyncio.Future[C], str] = {}
    errors: list[OSError] = []
    left = iter(addresses)
    try:
        while True:
            if (address := next(left, None)) is not None:
                running[asyncio.ensure_future(attempt(address))] = address
            elif not running:
                raise next((error for error in errors if error.errno in LACKS), errors[0])
            timeout = None if address is None else delay
            done, _ = await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not done and address is not None:
                note(address, False)
            for tried in [one for one in running if one in done]:
                at = running.pop(tried)
                error = tried.exception()
                note(at, error is None)
                if error is None:
                    return tried.result()
                if not isinstance(error, OSError):
                    raise error
                errors.append(error)
    finally:
        for loser in running:
            loser.cancel()
            loser.add_done_callback(_drop)


def _drop(loser: asyncio.Future[C]) -> None:
    # It may have won in the same turn of the loop.
    if not loser.cancelled() and loser.exception() is None:
        loser.result().close()
