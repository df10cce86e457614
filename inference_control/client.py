"""/api/v1 over HTTP: pages, versions, and errors as exceptions."""

import ipaddress
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, TypeAlias
from urllib.parse import urlsplit

import httpx

from inference_control.resources import Resource

# Names and values; a name may be there twice.
Query: TypeAlias = Sequence[tuple[str, str]]
# Objects per page
_PAGE = 200
_TIMEOUT = 30.0


class Refused(Exception):
    """The control plane refused; the message is its own."""


class NotReachable(Exception):
    """No answer that is the control plane's."""


class Client:
    """`url`: of the control plane. Raises Refused, NotReachable."""

    def __init__(self, url: str, token: str, transport: httpx.BaseTransport | None = None) -> None:
        self._url = url
        headers = {"authorization": f"Bearer {token}", "accept": "application/json"}
        self._http = httpx.Client(
            base_url=f"{url.rstrip('/')}/api/v1", headers=headers, timeout=_TIMEOUT, transport=transport
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def listed(self, resource: Resource, name: str | None, query: Query, most: int | None) -> Iterator[Any]:
        """The objects of all pages, at most `most`."""
        after: str | None = None
        while True:
            size = _PAGE if most is None else min(_PAGE, most)
            page = self._json("GET", resource.path(name), params=[*query, ("limit", str(size)), *_after(after)])
            yield from page["data"]
            after = page["next"]
            if most is not None:
                most -= len(page["data"])
            if after is None or most == 0:
                return

    def get(self, resource: Resource, name: str | None, query: Query = ()) -> Any:
        return self._json("GET", resource.path(name), params=list(query))

    def create(self, resource: Resource, name: str | None, body: Any) -> Any:
        if resource.create == "put":
            return self._json("PUT", resource.path(name), json=body, headers={"If-None-Match": "*"})
        # With its id a request that is repeated by a proxy is carried out once.
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        return self._json("POST", resource.path(name), json=body, headers=headers)

    def change(self, resource: Resource, name: str | None, changes: Mapping[str, Any], whole: bool) -> Any:
        """Change an object. `whole`: `changes` is all of it; else what differs from the version that is read first."""
        path = resource.path(name)
        answer = self._send("GET", path)
        current = answer.json()
        headers = {"If-Match": answer.headers.get("etag", "*")}
        if resource.change == "patch":
            return self._json("PATCH", path, json=changes, headers=headers)
        kept = {} if whole else {key: value for key, value in current.items() if key not in resource.shown_only}
        body = {key: value for key, value in {**kept, **changes}.items() if whole or value is not None}
        return self._json("PUT", path, json=body, headers=headers)

    def delete(self, resource: Resource, name: str) -> None:
        path = resource.path(name)
        etag = self._send("GET", path).headers.get("etag", "*")
        self._send("DELETE", path, headers={"If-Match": etag})

    def rotate(self, resource: Resource, name: str, body: Any) -> Any:
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        return self._json("POST", f"{resource.path(name)}/rotate", json=body, headers=headers)

    def _json(self, method: str, path: str, **request: Any) -> Any:
        return self._send(method, path, **request).json()

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **request)
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise NotReachable(f"{self._url} cannot be reached: {exc or type(exc).__name__}") from None
        if answer.is_success:
            return answer
        raise _error(answer, self._url)


def is_safe(url: str) -> bool:
    """Whether a token may be sent there: encrypted, or within this machine."""
    parts = urlsplit(url)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def _after(after: str | None) -> list[tuple[str, str]]:
    return [] if after is None else [("after", after)]


def _error(answer: httpx.Response, url: str) -> Exception:
    try:
        body = answer.json()
        error = body["error"]
        text = f"{error['code']}: {error['message']}"
        text += "".join(f"\n  {one['param']}: {one['message']}" for one in error.get("errors", [])[1:])
        return Refused(f"{text} (request {body['request_id']})")
    except (ValueError, KeyError, TypeError):
        return NotReachable(f"{url} answered {answer.status_code}, and not as a control plane does")
