"""A router, as the playground asks it: with a key of its own, and the answer as bytes, while they come."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

import httpx
import orjson

# Seconds: to connect and to send; between two bytes, which the router bounds itself
_CONNECT, _READ = 5.0, 600.0
# Seconds in which a router learns of a new key; between two tries, at first and at most
PATIENCE, _FIRST, _LONGEST = 5.0, 0.05, 0.5
# Bytes of the answer that says a key is unknown
_SMALL = 16 * 1024
_PASSED: Final = ("content-type", "x-request-id", "retry-after")
_PREFIX: Final = "x-inference-"


class RouterAway(Exception):
    """The router cannot be reached, or broke off before its answer began. The message has no address."""


class Answer(NamedTuple):
    """`headers`: those that a browser may have. `body`: as it comes; RouterAway, if it breaks off."""

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]


class Router:
    """`url`: as ROUTER_URL has it. `patience`: seconds for which a key may be unknown to it."""

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self._url = url
        self._patience = patience
        timeout = httpx.Timeout(_CONNECT, read=_READ)
        self._client = httpx.AsyncClient(timeout=timeout, trust_env=False, follow_redirects=False)

    async def close(self) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def chat(self, key: str, body: bytes) -> AsyncIterator[Answer]:
        """POST /v1/chat/completions; leaving the block ends the request. Raises RouterAway."""
        headers = {
            "authorization": f"Bearer {key}",
            "content-type": "application/json",
            # The bytes are passed on as they are.
            "accept-encoding": "identity",
            "user-agent": "inference-api-console",
        }
        url = f"{self._url}/v1/chat/completions"
        deadline, pause = time.monotonic() + self._patience, _FIRST
        while True:
            request = self._client.build_request("POST", url, content=body, headers=headers)
            try:
                response = await self._client.send(request, stream=True)
            except httpx.HTTPError as exc:
                raise RouterAway(f"the router does not answer ({type(exc).__name__})") from None
            try:
                start = await _start(response)
                if not _is_unknown_key(response.status_code, start) or time.monotonic() + pause > deadline:
                    passed = {name: value for name, value in response.headers.items() if _is_passed(name)}
                    yield Answer(response.status_code, passed, _body(start, response))
                    return
            finally:
                await response.aclose()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST)


def _is_passed(name: str) -> bool:
    return name in _PASSED or name.startswith(_PREFIX)


async def _start(response: httpx.Response) -> bytes | None:
    """The whole of a refusal for the key, if it is small; None: nothing is read."""
    if response.status_code != 401 or int(response.headers.get("content-length", _SMALL + 1)) > _SMALL:
        return None
    try:
        return await response.aread()
    except httpx.HTTPError as exc:
        raise RouterAway(f"the router broke off its answer ({type(exc).__name__})") from None


def _is_unknown_key(status: int, content: bytes | None) -> bool:
    if status != 401 or content is None:
        return False
    try:
        return bool(orjson.loads(content)["error"]["code"] == "invalid_api_key")
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return False


async def _body(start: bytes | None, response: httpx.Response) -> AsyncIterator[bytes]:
    if start is not None:
        yield start
        return
    try:
        async for chunk in response.aiter_raw():
            yield chunk
    except httpx.HTTPError as exc:
        raise RouterAway(f"the router broke off its answer ({type(exc).__name__})") from None
