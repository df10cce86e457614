"""TRUSTED_PROXIES: the address of a client behind proxies, from the `x-forwarded-for` that they set.

A client can send that header, too: it counts only from trusted peers, and only as far as trusted proxies go.
"""

from collections.abc import Awaitable, Collection
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import NoDecode
from starlette.types import ASGIApp, Receive, Scope
from starlette.types import Send as ASGISend

from inference_api.core import Core
from inference_api.feature import Feature, Switch
from inference_api.http.accounts import ACCOUNT
from inference_api.observe.account import Account
from inference_api.settings import Group, Settings

Network = IPv4Network | IPv6Network
# Addresses whose answer is kept
_KEPT = 4096


class Options(Group):
    trusted_proxies: Annotated[frozenset[Network], NoDecode] = Field(
        default=frozenset(),
        description="addresses or networks of proxies whose `x-forwarded-for` names the client; comma-separated",
    )

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _networks(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return [ip_network(part.strip(), strict=False) for part in value.split(",") if part.strip()]
        except ValueError as exc:
            raise ValueError(f"must be addresses or networks such as 10.0.0.0/8, comma-separated: {exc}") from None


def build(core: Core, settings: Settings) -> Feature | None:
    """Off without a trusted proxy."""
    networks = settings.of(Options).trusted_proxies
    if not networks:
        return None
    return Feature("trusted_proxies", layer=TrustedProxies(networks).layer)


class TrustedProxies:
    """Finds the client of a request that came through proxies in `networks`."""

    def __init__(self, networks: Collection[Network]) -> None:
        self._networks = networks
        # Look-ups and texts of a few proxies and clients repeat.
        self._trusts = lru_cache(_KEPT)(self._is_trusted)
        self._of = lru_cache(_KEPT)(self.client)

    def layer(self, app: ASGIApp) -> ASGIApp:
        # No coroutine of its own, and neither `receive` nor `send` is wrapped: the short cuts stay.
        def located(scope: Scope, receive: Receive, send: ASGISend) -> Awaitable[None]:
            account: Account | None = scope.get(ACCOUNT)
            if account is not None and account.client is not None and self._trusts(account.client[0]):
                lines = [value for name, value in account.head.headers if name == b"x-forwarded-for"]
                if lines:
                    account.client = self._of(account.client[0], b",".join(lines)), 0
            return app(scope, receive, send)

        return located

    def locate(self, peer: str, forwarded: bytes) -> str:
        """The address of the client behind `peer`; `forwarded` counts only from a trusted one."""
        return self._of(peer, forwarded) if forwarded and self._trusts(peer) else peer

    def client(self, peer: str, forwarded: bytes) -> str:
        """The rightmost address that is no trusted proxy.

        If a proxy names something else than an address, that proxy; if all are trusted, the first one.
        """
        found = peer
        for text in reversed(forwarded.split(b",")):
            address = _parsed(text)
            if address is None:
                return found
            found = str(address)
            if not self._contains(address):
                return found
        return found

    def _is_trusted(self, host: str) -> bool:
        address = _parsed(host.encode())
        return address is not None and self._contains(address)

    def _contains(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._networks)


def _parsed(text: bytes) -> IPv4Address | IPv6Address | None:
    """An address, also in brackets or with a port, as some proxies write it."""
    host = text.strip().decode("latin-1")
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


FEATURE = Switch(build, Options)
