"""Connects to a host by the first of its addresses that accepts: RFC 8305, "happy eyeballs".

Attempts start in the system's order of addresses, families alternating, every 250 ms, or at once after a failure. The
first connection wins, the others are cancelled. The TLS handshake is part of an attempt, so an address with a hanging
handshake is overtaken like one that drops packets.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import chain, zip_longest
from typing import Protocol, TypeVar

import httpx

from inference_api.discovery.resolver import Resolver
from inference_api.routing.urls import is_address, is_usable_address

# No file descriptors, or no local ports, left
LACKS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)

# Seconds between two attempts, as RFC 8305 recommends.
DELAY = 0.25
# Seconds for which an address that failed, or was overtaken, comes last.
_AVOIDED = 60.0
# A name may have thousands of addresses, and each attempt sends a packet.
_MOST = 32


class Closable(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=Closable)
Attempt = Callable[[str], Awaitable[C]]


class Dialer:
    """Connects to one host, and records which of its addresses failed.

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
        # Shared: address -> time until which it comes last
        self._avoided: dict[str, float] = {}

    async def dial(self, attempt: Attempt[C], seconds: float | None) -> C:
        """The first connection that `attempt` makes. The caller enforces the time limit, of which `seconds` are left.

        Raises the error of the attempts, OSError or UnicodeError if the name has no address, httpx.ConnectError if all
        of them are forbidden.
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
            # Cached addresses may be out of date: look the name up again.
            newer = await self._resolver.addresses(self.host, seconds)
            if newer == addresses:
                raise
            return await self._dial(newer, attempt)

    async def _dial(self, addresses: Sequence[str], attempt: Attempt[C]) -> C:
        # DNS may return an address that a URL may not contain.
        allowed = [address for address in addresses if self._may_reach(address)]
        if not allowed:
            raise httpx.ConnectError("the backend's name resolves to a forbidden address")
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
    """Addresses with families alternating, beginning with that of the first; avoided ones come last."""
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
    """The first connection; the others are cancelled, and closed if they complete nevertheless.

    `note` gets each address and whether it is good; a loser that took more than `delay` is not. If all fail, raises the
    first attempt's error, but a shortage of the router's own (descriptors, ports) takes precedence.
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
    # It may have completed in the same turn of the loop.
    if not loser.cancelled() and loser.exception() is None:
        loser.result().close()
