"""Requests to the API server of a Kubernetes cluster: a list and a watch of EndpointSlices.

Two requests over httpx; docs/adr/0012 says why this is not a client library.
"""

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx
import orjson

from inference_api.discovery.cluster import Cluster, ClusterError, read_bearer, read_tls
from inference_api.discovery.slices import SERVICE_LABEL

_PAGE = 50
_MAX_REFUSAL = 64 * 1024


class ApiError(Exception):
    """A request to the API server failed; `reason` is a short word for metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Event(NamedTuple):
    """A change of one object."""

    kind: str
    document: dict[str, Any]
    version: str


class Api:
    """A connection to the API server, for one list and the watches after it. Token and CA are read each time."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._limits = cluster.limits
        try:
            tls = read_tls(cluster.url, cluster.ca)
        except ClusterError as exc:
            raise ApiError("credentials", str(exc)) from exc
        # No proxies or certificates of the environment, no redirects: only the API server gets the token.
        timeout = httpx.Timeout(None, connect=self._limits.connect, write=self._limits.connect)
        self._client = httpx.AsyncClient(
            base_url=cluster.url, verify=tls, timeout=timeout, trust_env=False, follow_redirects=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def slices(self, namespace: str, names: Sequence[str]) -> tuple[list[Any], str]:
        """The EndpointSlices of these Services, decoded from JSON, and their resource version. Raises ApiError."""
        found: list[Any] = []
        token = ""
        try:
            async with asyncio.timeout(self._limits.list):
                while True:
                    more = {"continue": token} if token else {}
                    page = await self._page(namespace, {**self._selector(names), "limit": str(_PAGE), **more})
                    # In a thread: a thousand endpoints take some milliseconds to parse.
                    items, version, token = await asyncio.to_thread(_read_page, page)
                    found += items
                    if not token:
                        return found, version
                    if len(found) > self._limits.slices:
                        raise ApiError("garbage", f"it lists more than {self._limits.slices} slices")
        except TimeoutError as exc:
            raise ApiError("timeout", f"its list did not end within {self._limits.list:.0f} s") from exc
        except httpx.HTTPError as exc:
            raise _unreachable(exc) from exc

    async def _page(self, namespace: str, query: dict[str, str]) -> bytes:
        request = self._request(namespace, query)
        response = await self._client.send(request, stream=True)
        try:
            body = bytearray()
            async for data in response.aiter_raw():
                body += data
                if len(body) > self._limits.page:
                    raise ApiError("garbage", f"a page of its list has more than {self._limits.page} bytes")
        finally:
            await response.aclose()
        if response.status_code != 200:
            raise _refusal(response.status_code, body)
        return bytes(body)

    async def watch(
        self,
        namespace: str,
        names: Sequence[str],
        version: str,
        seconds: float,
        take: Callable[[list[Event]], None],
    ) -> None:
        """Yield the events after `version`, those of one read together; first an empty batch when the watch begins.

        Returns when the server ends the watch, or after so many seconds. Raises ApiError, with the reason `gone` if
        `version` is too old for the server, and `closed` if the connection broke.
        """
        until = asyncio.get_running_loop().time() + seconds
        # The server ends it first, if it can.
        query = {"watch": "1", "allowWatchBookmarks": "true", "resourceVersion": version}
        query["timeoutSeconds"] = str(max(1, int(seconds)))
        request = self._request(namespace, self._selector(names) | query)
        try:
            async with asyncio.timeout(self._limits.head):
                response = await self._client.send(request, stream=True)
        except TimeoutError as exc:
            raise ApiError("timeout", f"it did not begin a watch within {self._limits.head:.0f} s") from exc
        except httpx.HTTPError as exc:
            raise _unreachable(exc) from exc
        try:
            async with asyncio.timeout_at(until):
                if response.status_code != 200:
                    raise _refusal(response.status_code, await _beginning(response))
                take([])
                await _follow(response, take, self._limits.line)
        except TimeoutError:
            return
        except httpx.HTTPError as exc:
            raise ApiError("closed", f"its watch broke off ({type(exc).__name__})") from exc
        finally:
            await response.aclose()

    def _request(self, namespace: str, query: dict[str, str]) -> httpx.Request:
        # Not compressed: limits on bytes read are then limits on memory.
        headers = {"accept": "application/json", "accept-encoding": "identity", "authorization": self._bearer()}
        path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        return self._client.build_request("GET", path, params=query, headers=headers)

    def _selector(self, names: Sequence[str]) -> dict[str, str]:
        chosen = f"{SERVICE_LABEL} in ({','.join(names)})" if len(names) <= self._limits.names else SERVICE_LABEL
        return {"labelSelector": chosen}

    def _bearer(self) -> str:
        try:
            return read_bearer(self._cluster.token)
        except ClusterError as exc:
            raise ApiError("credentials", str(exc)) from None


class Lines:
    """Splits bytes into lines as they arrive; keeps at most `limit` bytes of an incomplete one."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The lines complete by now, without empty ones. Raises ApiError if one is too long."""
        begin, _, last = data.rpartition(b"\n")
        lines: list[bytes] = []
        if len(last) < len(data):
            lines = (bytes(self._rest) + begin).split(b"\n")
            self._rest.clear()
        self._rest += last
        if len(self._rest) > self._limit or any(len(line) > self._limit for line in lines):
            raise ApiError("garbage", f"an event has more than {self._limit} bytes")
        return [line for line in lines if line.strip()]


async def _follow(response: httpx.Response, take: Callable[[list[Event]], None], limit: int) -> None:
    lines = Lines(limit)
    async for data in response.aiter_raw():
        if complete := lines.feed(data):
            take([read_event(line) for line in complete])


def read_event(line: bytes) -> Event:
    """Parse an event of a watch. Raises ApiError if it is invalid, or reports the end of the watch."""
    try:
        event = orjson.loads(line)
        kind, document = event["type"], event["object"]
        if kind == "ERROR":
            raise _status(document)
        version = document["metadata"]["resourceVersion"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as exc:
        raise ApiError("garbage", "its watch sent an invalid event") from exc
    if not isinstance(version, str) or not version:
        raise ApiError("garbage", "its watch sent an invalid event")
    return Event(str(kind), document, version)


def _read_page(body: bytes) -> tuple[list[Any], str, str]:
    try:
        document = orjson.loads(body)
        metadata = document["metadata"]
        # An empty list may be null, as Go encodes a nil slice.
        items, version, token = document["items"] or [], metadata["resourceVersion"], metadata.get("continue") or ""
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as exc:
        raise ApiError("garbage", "its answer is not a list of EndpointSlices") from exc
    if not (isinstance(items, list) and isinstance(version, str) and version and isinstance(token, str)):
        raise ApiError("garbage", "its answer is not a list of EndpointSlices")
    return items, version, token


async def _beginning(response: httpx.Response) -> bytes:
    body = b""
    async for data in response.aiter_raw():
        body += data
        if len(body) > _MAX_REFUSAL:
            break
    return body


def _refusal(status: int, body: bytes | bytearray) -> ApiError:
    """The error for an answer other than 200; Kubernetes gives the reason in a Status."""
    try:
        message = str(orjson.loads(body)["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = "no reason given"
    reason = "gone" if status == 410 else "status"
    return ApiError(reason, f"it answered with the status {status}: {message[:300]!r}")


def _status(document: Any) -> ApiError:
    """The error for a Status that ends a watch; 410: the version is too old."""
    code = document.get("code") if isinstance(document, dict) else None
    reason = "gone" if code == 410 else "status"
    return ApiError(reason, f"its watch ended with the status {str(code)[:10]}")


def _unreachable(exc: httpx.HTTPError) -> ApiError:
    reason = "timeout" if isinstance(exc, httpx.TimeoutException) else "connect"
    return ApiError(reason, f"it cannot be reached ({type(exc).__name__})")
