"""Requests to the API server of a Kubernetes cluster, over httpx: docs/adr/0029 says why this is no client library.

Token and CA are read anew each time. Every failure is a DriverError, without address and token.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import httpx
import orjson

from control_plane.pure.lifecycle import DriverError
from inference_api.discovery.cluster import ClusterError, read_bearer, read_tls

AGENT: Final = "inference-control-plane"
_PAGE = 250
_MERGE: Final = "application/merge-patch+json"
_ADDRESS = re.compile(
    r"https?://\S+|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b|\[?(?:[0-9a-f]{0,4}:){3,}[0-9a-f]{0,4}\]?(?::\d+)?"
)


class ApiLimits(NamedTuple):
    """Seconds to connect, between two reads of an answer, and for a whole list or change; bytes of a page; objects.

    etcd has objects of up to 1.5 MB, which grow in JSON; pods have some 10 kB.
    """

    connect: float = 5.0
    read: float = 10.0
    whole: float = 15.0
    page: int = 32 * 1024 * 1024
    objects: int = 20_000


class Kind(NamedTuple):
    """A resource, as rules of a Role name it. `part`: its subresource."""

    group: str
    version: str
    resource: str
    part: str = ""

    @property
    def name(self) -> str:
        return f"{self.resource}/{self.part}" if self.part else self.resource

    def path(self, namespace: str, name: str = "") -> str:
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root, "namespaces", namespace, self.resource, name, self.part]
        return "/".join(part for part in parts if part)


class Call(NamedTuple):
    """What is asked of the API server, in the words of a Role. `name`: of one object; empty: of all."""

    verb: str
    kind: Kind
    namespace: str
    name: str = ""

    def __str__(self) -> str:
        of = f" of '{self.name}'" if self.name else ""
        return f"{self.verb} {self.kind.name}{of} in the namespace '{self.namespace}'"


class ApiServer(NamedTuple):
    """`token`, `ca`: files of the pod's service account. Without, it must ask for none, as `kubectl proxy`."""

    url: str
    token: Path | None = None
    ca: Path | None = None
    limits: ApiLimits = ApiLimits()


class Api:
    """Connections to an API server for a few requests that belong together. Raises DriverError, as all its methods."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server
        self._limits = server.limits
        try:
            tls = read_tls(server.url, server.ca)
        except ClusterError as exc:
            raise _unusable(exc) from None
        # No proxies or certificates of the environment, no redirects: only the API server gets the token.
        self._client = httpx.AsyncClient(base_url=server.url, verify=tls, trust_env=False, follow_redirects=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def all(self, kind: Kind, namespace: str, **query: str) -> list[Any]:
        """All items, decoded from JSON. Begins once more if they change too much while it reads page by page."""
        call = Call("list", kind, namespace)
        try:
            return await self._pages(call, query)
        except DriverError as exc:
            if exc.reason != "gone":
                raise
        return await self._pages(call, query)

    async def _pages(self, call: Call, query: Mapping[str, str]) -> list[Any]:
        found: list[Any] = []
        more: dict[str, str] = {}
        async with self._bounded(call):
            while True:
                async with self.open(call, {**query, "limit": str(_PAGE), **more}) as response:
                    page = await self._body(call, response)
                # In a thread: it takes milliseconds.
                items, token = await asyncio.to_thread(_read_page, call, page)
                found += items
                if len(found) > self._limits.objects:
                    raise DriverError("garbage", f"The cluster has more than {self._limits.objects} objects to {call}.")
                if not token:
                    return found
                more = {"continue": token}

    async def merge(self, call: Call, patch: Mapping[str, Any], **query: str) -> Any:
        """Change one object: as it is then, decoded from JSON."""
        async with self._bounded(call), self.open(call, query, orjson.dumps(patch)) as response:
            body = await self._body(call, response)
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError:
            raise DriverError("garbage", f"The answer of the API server is no object, asked to {call}.") from None

    @asynccontextmanager
    async def open(
        self, call: Call, query: Mapping[str, str], body: bytes | None = None, may_wait: bool = False
    ) -> AsyncIterator[httpx.Response]:
        """An answer of the status 200; leaving the block ends the request. `may_wait`: it may be silent for long."""
        silence = None if may_wait else self._limits.read
        try:
            async with asyncio.timeout(silence):
                response = await self._client.send(self._request(call, query, body, silence), stream=True)
            try:
                if response.status_code != 200:
                    raise _refusal(call, response.status_code, await self._body(call, response))
                yield response
            finally:
                await response.aclose()
        except (TimeoutError, httpx.TimeoutException):
            raise DriverError("slow", f"The API server did not answer in time, asked to {call}.") from None
        except httpx.ConnectError as exc:
            raise DriverError("away", f"The API server cannot be reached ({_cause(exc)}).") from None
        except httpx.HTTPError as exc:
            why = f"The API server broke off ({type(exc).__name__}), asked to {call}."
            raise DriverError("away", why) from None

    async def _body(self, call: Call, response: httpx.Response) -> bytes:
        body = bytearray()
        async for data in response.aiter_raw():
            body += data
            if len(body) > self._limits.page:
                raise DriverError("garbage", f"The API server sent too much, asked to {call}.")
        return bytes(body)

    @asynccontextmanager
    async def _bounded(self, call: Call) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._limits.whole):
                yield
        except TimeoutError:
            why = f"The API server took more than {self._limits.whole:g} s, asked to {call}."
            raise DriverError("slow", why) from None

    def _request(
        self, call: Call, query: Mapping[str, str], body: bytes | None, silence: float | None
    ) -> httpx.Request:
        # Not compressed: limits on bytes read are then limits on memory.
        headers = {"accept": "application/json", "accept-encoding": "identity", "user-agent": AGENT}
        if body is not None:
            headers["content-type"] = _MERGE
        if self._server.token is not None:
            try:
                headers["authorization"] = read_bearer(self._server.token)
            except ClusterError as exc:
                raise _unusable(exc) from None
        return self._client.build_request(
            "GET" if body is None else "PATCH",
            call.kind.path(call.namespace, call.name),
            params=dict(query),
            content=body,
            headers=headers,
            timeout=httpx.Timeout(self._limits.connect, read=silence),
        )


def _unusable(exc: ClusterError) -> DriverError:
    return DriverError("away", f"The credentials of this pod cannot be used: {exc}.")


def _cause(exc: BaseException) -> str:
    """Of an error whose own text has the address."""
    return "its certificate is refused" if "CERTIFICATE" in str(exc) else type(exc).__name__


def _read_page(call: Call, body: bytes) -> tuple[list[Any], str]:
    try:
        document = orjson.loads(body)
        # An empty list may be null, as Go encodes a nil slice.
        items, token = document["items"] or [], document["metadata"].get("continue") or ""
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        items, token = None, ""
    if not (isinstance(items, list) and isinstance(token, str)):
        raise DriverError("garbage", f"The answer of the API server is no list, asked to {call}.")
    return items, token


def _refusal(call: Call, status: int, body: bytes) -> DriverError:
    """The error for an answer other than 200; Kubernetes gives the reason in a Status."""
    said = _message(body)
    match status:
        case 401:
            fix = "check the service account of its pod, or what stands behind CONTROL_PLANE_KUBERNETES_URL"
            return DriverError("forbidden", f"The API server does not know the control plane (401): {fix}.")
        case 403:
            return DriverError("forbidden", _forbidden(call, said))
        case 404:
            return DriverError("not_found", f"There is nothing to {call} (404).")
        case 409:
            return DriverError("conflict", f"The object has changed meanwhile, asked to {call} (409): try again.")
        case 410:
            return DriverError("gone", f"What it listed has changed meanwhile, asked to {call} (410): try again.")
        case 429:
            return DriverError("slow", f"The API server has too many requests, asked to {call} (429): try again later.")
    if status >= 500:
        reason = "slow" if status == HTTPStatus.GATEWAY_TIMEOUT else "away"
        return DriverError(reason, f"The API server failed with the status {status}, asked to {call}{said}.")
    reason = "invalid" if status in (400, 422) else "garbage"
    return DriverError(reason, f"The API server refused with the status {status} to {call}{said}.")


def _forbidden(call: Call, said: str) -> str:
    # That is how RBAC says it; else it is an admission rule, such as a quota, which a right does not help.
    if said and " cannot " not in said:
        return f"A rule of the cluster forbids to {call} (403){said}."
    group = f" of the API group '{call.kind.group}'" if call.kind.group else ""
    names = f", with '{call.name}' in resourceNames," if call.verb == "patch" else ""
    fix = f"give its Role the verb '{call.verb}' on '{call.kind.name}'{group}{names}"
    return f"The control plane may not {call} (403): {fix} and bind it to its service account."


def _message(body: bytes) -> str:
    """What the server says, as the end of a sentence, without addresses."""
    try:
        message = orjson.loads(body)["message"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""
    return f": {_ADDRESS.sub('<address>', message[:300])}" if isinstance(message, str) and message else ""
