"""The URLs and addresses that a backend may have: a registry must not direct the router to arbitrary hosts."""

import ipaddress
import re
from functools import lru_cache
from urllib.parse import urlsplit

import httpx

# Cloud metadata services without a link-local address, and the names of all.
_METADATA_HOSTS = frozenset(
    {
        "metadata",
        "metadata.google.internal",
        "metadata.goog",
        "instance-data",
        "instance-data.ec2.internal",
        "fd00:ec2::254",
        "fd20:ce::254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
    }
)
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?")
# IPv6 ranges whose low 32 bits are an IPv4 address: compatible, and NAT64.
_EMBEDDING = (ipaddress.IPv6Network("::/96"), ipaddress.IPv6Network("64:ff9b::/96"))


def check_backend_url(url: str) -> str:
    """The base of `url`, to which routes are appended. Raises ValueError with the reason.

    A registry must not direct the router to arbitrary hosts: only http(s), no credentials in the URL, and no
    link-local, metadata, multicast or unspecified address, in any spelling the resolver would accept.
    """
    # First, so that no message below can show a password or a token.
    if "@" in url:
        raise ValueError("a backend url carries user information; put the token in `credentials: {env: NAME}` instead")
    if "?" in url or "#" in url:
        raise ValueError("a backend url must not have a query or a fragment")
    shown = url[:200]
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise ValueError(f"backend url {shown!r} has spaces, control characters or backslashes")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        same = httpx.URL(url).host.lower() == host
    except (ValueError, httpx.InvalidURL):
        raise ValueError(f"backend url {shown!r} is not a URL with a host and a port of at most 65535") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"backend url {shown!r} must start with http:// or https://")
    if not host or port == 0 or not same or not _is_host(host, parts.netloc):
        raise ValueError(f"backend url {shown!r} names no usable host, or port 0")
    if "%" in parts.path or not {".", ".."}.isdisjoint(parts.path.split("/")):
        raise ValueError(f"backend url {shown!r} must not have '.', '..' or '%' in its path")
    if host.rstrip(".") in _METADATA_HOSTS or _is_forbidden_address(host):
        raise ValueError(f"backend url {shown!r} points at a link-local, metadata or unusable address")
    return _base(url)


def _base(url: str) -> str:
    """Remove slashes and /v1 at the end: every route is appended with its own /v1.

    Removes all of them, so that a router accepts unchanged what a registry has normalised.
    """
    scheme, _, rest = url.partition("://")
    host, *path = rest.split("/")
    while path and path[-1] in ("", "v1"):
        path.pop()
    return f"{scheme}://{'/'.join((host, *path))}"


# Cached: the same thousand addresses are checked every few seconds.
@lru_cache(maxsize=16384)
def is_usable_address(address: str) -> bool:
    """Whether a resolved address is allowed, by the same rule as one in a URL."""
    return is_address(address) and not _is_forbidden_address(address)


def is_address(host: str) -> bool:
    """Whether it is an IP address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_host(host: str, netloc: str) -> bool:
    if ":" in host:
        return netloc.lower().startswith(f"[{host}]")
    return _HOST_NAME.fullmatch(host) is not None


def _is_forbidden_address(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # "0x7f.1", "2130706433": numbers that resolvers read as an IPv4 address.
        last = host.rstrip(".").rsplit(".", 1)[-1]
        return last.isdigit() or last.startswith("0x")
    if isinstance(address, ipaddress.IPv6Address):
        address = _embedded(address) or address
    return (
        address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or address == ipaddress.IPv4Address("255.255.255.255")
        or str(address) in _METADATA_HOSTS
    )


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address embedded in an IPv6 one, or None."""
    if address == ipaddress.IPv6Address("::1"):
        return None
    if address.ipv4_mapped or address.sixtofour:
        return address.ipv4_mapped or address.sixtofour
    if any(address in network for network in _EMBEDDING):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None
