"""A hub of models, as huggingface.co is one: what files a repository has, and parts of them.

Only the host of HUB_ENDPOINT gets the token. A redirect is followed to public addresses only, by https, and to the
address that was looked at, whatever its name means a moment later.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import quote

import httpx
import orjson

from control_plane.clients.http import http_client
from control_plane.kept import Kept
from control_plane.pure.reading import Reader, SourceError, Unreadable

# Seconds: to connect; between two bytes
_CONNECT, _READ = 5.0, 10.0
# Bytes of a description; of a file before the part that is wanted, from a server that has no parts
_LARGEST, _SKIPPED = 16 * 1024 * 1024, 64 * 1024 * 1024
_REDIRECTS, _MOST_FILES = 5, 10_000
# Seconds until another try, where the hub does not say so; and at most
_LATER, _LATEST = 30, 3600
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9._-]{1,96})?")
_REVISION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_COMMIT: Final = re.compile(r"[0-9a-f]{7,64}")
_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_TOKEN: Final = "CONTROL_PLANE_HUB_TOKEN"
# Networks whose addresses stand for others, which may be private; and those that Python took for public for long
_TRANSLATED = "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"
_OLD = "192.0.0.0/24", "::/96", "fec0::/10"
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, (*_TRANSLATED, *_OLD)))


class Hub:
    """`loopback`: whether redirects may lead to this machine, by http, too: as tests need it.

    `kept`: what was found of a commit, which never changes.
    """

    def __init__(self, endpoint: str, token: str | None, loopback: bool = False) -> None:
        self._endpoint = httpx.URL(endpoint)
        self._token = token
        self._loopback = loopback
        timeout = httpx.Timeout(_CONNECT, read=_READ)
        self._client = http_client(timeout)
        self.kept = Kept(200)

    async def close(self) -> None:
        await self._client.aclose()

    async def repository(self, name: str, revision: str | None = None) -> "Repository":
        """`revision`: a branch, tag or commit; None: `main`. Raises SourceError."""
        if not _REPOSITORY.fullmatch(name) or ".." in name:
            raise SourceError("invalid", f"{name[:80]!r} is no repository of a hub: it must be like org/name.")
        if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
            raise SourceError("invalid", f"{revision[:80]!r} is no revision: it must be a branch, a tag or a commit.")
        place = f"/api/models/{name}/revision/{quote(revision or 'main', safe='')}?blobs=true"
        async with self.asked(self.url(place), {}, name) as (answer, _):
            found = await _described(answer)
        commit = found.get("sha")
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise SourceError("failed", "The hub does not say which commit it describes.")
        return Repository(self, name, commit, _files(found), _counts(found))

    def url(self, path: str) -> httpx.URL:
        return httpx.URL(f"{self._endpoint}".rstrip("/") + path)

    @asynccontextmanager
    async def asked(
        self, url: httpx.URL, headers: Mapping[str, str], name: str
    ) -> AsyncIterator[tuple[httpx.Response, httpx.URL]]:
        """An answer of 2xx, whose body is not read yet, and where it comes from. Raises SourceError, in the block, too.

        `name`: of the repository.
        """
        for _ in range(_REDIRECTS):
            request = await self._request(url, headers)
            try:
                answer = await self._client.send(request, stream=True)
            except httpx.HTTPError as exc:
                raise SourceError("away", f"The hub does not answer ({type(exc).__name__}).", _LATER) from None
            try:
                if answer.is_redirect:
                    url = _target(url, answer)
                    continue
                if not answer.is_success:
                    raise _refused(answer, name, self._token is not None)
                yield answer, url
                return
            except httpx.HTTPError as exc:
                raise SourceError("away", f"The hub broke off its answer ({type(exc).__name__}).", _LATER) from None
            finally:
                await answer.aclose()
        raise SourceError("failed", "The hub redirects again and again.")

    async def _request(self, url: httpx.URL, headers: Mapping[str, str]) -> httpx.Request:
        sent = {"accept-encoding": "identity", "user-agent": "inference-api-control-plane", **headers}
        if _origin(url) == _origin(self._endpoint):
            if self._token is not None:
                sent["authorization"] = f"Bearer {self._token}"
            return self._client.build_request("GET", url, headers=sent)
        if url.userinfo or (url.scheme != "https" and not (self._loopback and url.scheme == "http")):
            raise SourceError("failed", "The hub redirects to a URL that is not https; it is not asked.")
        address = await self._public(url)
        # To the address that was looked at; its certificate must be that of the name.
        sent["host"] = url.netloc.decode("ascii")
        return self._client.build_request(
            "GET", url.copy_with(host=address), headers=sent, extensions={"sni_hostname": url.host}
        )

    async def _public(self, url: httpx.URL) -> str:
        """An address of the URL's host, all of which must be public. Raises SourceError."""
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
            found = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise SourceError("away", "The hub redirects to a host that has no address.", _LATER) from None
        addresses = [ipaddress.ip_address(entry[4][0]) for entry in found]
        if not addresses or not all(is_public(one) or (self._loopback and one.is_loopback) for one in addresses):
            raise SourceError("failed", "The hub redirects to an address that is not public; it is not asked.")
        return str(addresses[0])


class Repository:
    """The files of one commit. `counts`: numbers in its safetensors files, as the hub has counted them."""

    notes: tuple[str, ...] = ()

    def __init__(self, hub: Hub, name: str, commit: str, files: Mapping[str, int], counts: Mapping[str, int]) -> None:
        self._hub = hub
        self.name = name
        self.commit: str | None = commit
        self.files = files
        self.counts = counts

    @asynccontextmanager
    async def open(self, path: str) -> AsyncIterator[Reader]:
        yield _File(self._hub, self.name, self._hub.url(f"/{self.name}/resolve/{self.commit}/{quote(path)}"),
                    path, self.files[path])  # fmt: skip


class _File:
    def __init__(self, hub: Hub, repository: str, url: httpx.URL, path: str, size: int) -> None:
        self._hub = hub
        self._repository = repository
        # After the first answer: where that came from
        self._url = url
        self._path = path
        self.size = size

    async def read(self, offset: int, n: int) -> bytes:
        if n == 0:
            return b""
        wanted = {"range": f"bytes={offset}-{offset + n - 1}"}
        async with self._hub.asked(self._url, wanted, self._repository) as (answer, self._url):
            skipped = self._skipped(answer, offset)
            found = bytearray()
            async for chunk in answer.aiter_raw():
                found += chunk[min(skipped, len(chunk)) :]
                skipped -= min(skipped, len(chunk))
                if len(found) >= n:
                    # Whatever else comes is not wanted: leaving the block closes the connection.
                    return bytes(found[:n])
        raise SourceError("failed", f"The hub's answer for {self._path[:80]!r} ends too early.")

    def _skipped(self, answer: httpx.Response, offset: int) -> int:
        """Bytes of the answer before the part. Raises SourceError, Unreadable."""
        if answer.status_code != 206:
            if offset > _SKIPPED:
                raise SourceError("failed", "The hub has no parts of files (Range), and this one is too large.")
            return offset
        found = _RANGE.fullmatch(answer.headers.get("content-range", ""))
        if found is None or int(found[1]) != offset:
            raise SourceError("failed", f"The hub answers with another part of {self._path[:80]!r}.")
        if found[3] not in ("*", str(self.size)):
            raise Unreadable(f"{found[3]} bytes: the hub's description says {self.size}")
        return 0


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_global and not address.is_multicast and not any(address in one for one in _NOT_PUBLIC)


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _target(url: httpx.URL, answer: httpx.Response) -> httpx.URL:
    """Raises SourceError."""
    try:
        return url.join(answer.headers["location"])
    except (KeyError, httpx.InvalidURL, ValueError):
        raise SourceError("failed", "The hub redirects, and does not say where to.") from None


def _refused(answer: httpx.Response, name: str, known: bool) -> SourceError:
    """`known`: whether it got a token."""
    status, word = answer.status_code, answer.headers.get("x-error-code", "")
    token = f"check that {_TOKEN} may read it" if known else f"set {_TOKEN}"
    if word == "GatedRepo" or status == 403:
        fix = "accept its terms on its page, with the account of the token"
        return SourceError("refused", f"{name!r} is gated: {fix}, and {token}.")
    if status == 404 or word in ("RepoNotFound", "RevisionNotFound", "EntryNotFound"):
        return SourceError("not_found", f"The hub has no model {name!r} of this revision, or it is private: {token}.")
    if status == 401:
        return SourceError("refused", f"The hub asks for a token for {name!r}: {token}.")
    if status == 429:
        seconds = _seconds(answer)
        return SourceError("busy", f"The hub has had too many requests: try again in {seconds} s.", seconds)
    if status >= 500:
        return SourceError("away", f"The hub answers {status}: try again later.", _LATER)
    if status == 416:
        return SourceError("failed", "A file of the hub is shorter than its description says.")
    return SourceError("failed", f"The hub answers {status}, which is no answer to this.")


def _seconds(answer: httpx.Response) -> int:
    given = answer.headers.get("retry-after", "")
    return min(max(int(given), 1), _LATEST) if given.isdecimal() and len(given) < 9 else _LATER


async def _described(answer: httpx.Response) -> dict[str, Any]:
    """Raises SourceError."""
    content = bytearray()
    async for chunk in answer.aiter_raw():
        content += chunk
        if len(content) > _LARGEST:
            raise SourceError("failed", "The hub's description of the model is larger than 16 MiB.")
    try:
        found = orjson.loads(bytes(content))
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise SourceError("failed", "The hub's description of the model is no JSON object; is HUB_ENDPOINT a hub?")
    return found


def _files(found: Mapping[str, Any]) -> dict[str, int]:
    """Sizes by path. Raises SourceError."""
    listed = found.get("siblings")
    if not isinstance(listed, list) or len(listed) > _MOST_FILES:
        raise SourceError("failed", f"The hub lists no files of the model, or more than {_MOST_FILES:,}.")
    files = {}
    for one in listed:
        path, size = (one.get("rfilename"), one.get("size")) if isinstance(one, dict) else (None, None)
        if isinstance(path, str) and type(size) is int and size >= 0 and ".." not in path.split("/"):
            files[path] = size
    return files


def _counts(found: Mapping[str, Any]) -> dict[str, int]:
    described = found.get("safetensors")
    counts = described.get("parameters") if isinstance(described, dict) else None
    if not isinstance(counts, dict) or not all(type(one) is int and 0 <= one < 2**63 for one in counts.values()):
        return {}
    return counts
