"""A router, as the control plane asks it: with a key of its own, and the answer as bytes, while they come."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Final, NamedTuple

import httpx
import orjson

from control_plane.clients.http import http_client

# Seconds: to connect and to send; between two bytes, which the router bounds itself
_CONNECT, _READ = 5.0, 600.0
# Seconds in which a router learns of a new key; between two tries, at first and at most
PATIENCE, _FIRST, _LONGEST = 5.0, 0.05, 0.5
# Seconds of one answer at most; answers that one user has at once
LONGEST, AT_ONCE = 600.0, 4
# Bytes of the answer that says a key is unknown
_SMALL = 16 * 1024
_PASSED: Final = ("content-type", "x-request-id", "retry-after")
_PREFIX: Final = "x-inference-"
CHAT: Final = "/v1/chat/completions"


class RouterAway(Exception):
    """The router cannot be reached, or broke off before its answer began. The message has no address."""


class TooManyAnswers(Exception):
    """One user has as many answers at once as there may be."""


class Answer(NamedTuple):
    """`headers`: those that a browser may have. `body`: as it comes; RouterAway, if it breaks off.

    `unknown_key`: the router refuses the key, after all patience.
    """

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]
    unknown_key: bool = False


class Router:
    """`url`: as ROUTER_URL has it. `patience`: seconds for which a key may be unknown to it."""

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self._url = url
        self._patience = patience
        self._open: set[asyncio.Timeout] = set()
        self._having: Counter[str] = Counter()
        self._stopped = False
        timeout = httpx.Timeout(_CONNECT, read=_READ)
        self._client = http_client(timeout)

    async def close(self) -> None:
        await self._client.aclose()

    def stop(self) -> None:
        """End all answers, so that the process can end: who reads one gets RouterAway."""
        self._stopped = True
        for bound in self._open:
            if not bound.expired():
                bound.reschedule(asyncio.get_running_loop().time())

    @contextmanager
    def turn(self, whose: str) -> Iterator[None]:
        """One of the answers that somebody may have at once. Raises TooManyAnswers."""
        if self._having[whose] >= AT_ONCE:
            raise TooManyAnswers
        self._having[whose] += 1
        try:
            yield
        finally:
            self._having[whose] -= 1
            if not self._having[whose]:
                del self._having[whose]

    @asynccontextmanager
    async def ask(
        self,
        key: str,
        body: bytes | None,
        request_id: str | None = None,
        longest: float = LONGEST,
        path: str = CHAT,
    ) -> AsyncIterator[Answer]:
        """POST, or GET without a body; leaving the block ends the request. Raises RouterAway, also within the block.

        `longest`: seconds for all of it.
        """
        if self._stopped:
            raise RouterAway("the control plane is being stopped")
        bound = asyncio.timeout(longest)
        try:
            async with bound:
                self._open.add(bound)
                async with self._asked(key, body, request_id, path) as answer:
                    yield answer
        except TimeoutError:
            why = "the control plane is being stopped" if self._stopped else f"the answer takes more than {longest:g} s"
            raise RouterAway(why) from None
        finally:
            self._open.discard(bound)

    @asynccontextmanager
    async def _asked(self, key: str, body: bytes | None, request_id: str | None, path: str) -> AsyncIterator[Answer]:
        headers = {
            "authorization": f"Bearer {key}",
            **({} if body is None else {"content-type": "application/json"}),
            # The bytes are passed on as they are.
            "accept-encoding": "identity",
            "user-agent": "inference-api-console",
            **({} if request_id is None else {"x-request-id": request_id}),
        }
        method = "GET" if body is None else "POST"
        deadline, pause = time.monotonic() + self._patience, _FIRST
        while True:
            request = self._client.build_request(method, self._url + path, content=body, headers=headers)
            try:
                response = await self._client.send(request, stream=True)
            except httpx.HTTPError as exc:
                raise RouterAway(f"the router does not answer ({type(exc).__name__})") from None
            try:
                start = await _start(response)
                unknown = _is_unknown_key(response.status_code, start)
                if not unknown or time.monotonic() + pause > deadline:
                    passed = {name: value for name, value in response.headers.items() if _is_passed(name)}
                    yield Answer(response.status_code, passed, _body(start, response), unknown)
                    return
            finally:
                await response.aclose()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST)


async def read(body: AsyncIterator[bytes], most: int) -> bytes:
    """All of it, or the first `most` bytes and one more."""
    found = b""
    async for chunk in body:
        found += chunk
        if len(found) > most:
            break
    return found[: most + 1]


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
