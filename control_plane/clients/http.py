"""The client of a service outside: what it trusts, and what it does not take from the environment."""

import ssl
from collections.abc import Mapping
from functools import cache

import httpx


def http_client(timeout: httpx.Timeout | float | None, headers: Mapping[str, str] | None = None) -> httpx.AsyncClient:
    """No proxies and no netrc of the environment, no redirects: tokens go to the configured address alone.

    TLS trusts the system's certificates, or SSL_CERT_FILE and SSL_CERT_DIR, as routers do.
    """
    return httpx.AsyncClient(
        timeout=timeout, headers=headers, verify=_trusted(), trust_env=False, follow_redirects=False
    )


@cache
def _trusted() -> ssl.SSLContext:
    """One for all clients: the certificates take tens of milliseconds to read."""
    return ssl.create_default_context()
