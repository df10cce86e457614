"""GET requests to a running router."""

from typing import Any

import httpx

from inference_api.routing.causes import cause_of

_TIMEOUT = 10.0


class NotReachable(Exception):
    """The router did not answer, or not with the requested document; the message names the URL."""


def ask(url: str, path: str) -> Any:
    """The JSON document at `path` of the router at `url`, which may end in /v1. Raises NotReachable."""
    asked = url.rstrip("/").removesuffix("/v1") + path
    try:
        # No proxy of the environment: the router is often on this machine.
        response = httpx.get(asked, timeout=_TIMEOUT, trust_env=False)
    except (httpx.UnsupportedProtocol, httpx.InvalidURL):
        raise NotReachable(f"--url {url!r}: must be the URL of a router, such as http://127.0.0.1:8000") from None
    except httpx.HTTPError as exc:
        raise NotReachable(f"{asked}: {cause_of(exc)}; --url must name a router that runs") from None
    if response.status_code != 200:
        hint = "; with INFERENCE_API_OPS_PORT set it is on that port" if path == "/backends" else ""
        raise NotReachable(f"{asked}: answered {response.status_code}{hint}")
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict) or not isinstance(document.get("data"), list):
        raise NotReachable(f"{asked}: its answer is not that of an inference-api")
    return document
