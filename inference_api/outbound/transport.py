"""The port to the replicas: an httpx transport with one connection pool per origin.

It differs from httpx's own where a router suffers (docs/adr/0001): a request cancelled at any point closes its
connection and leaks nothing, no pool is ever scanned, bytes beyond the end of a response are never given to the next
one, there are no cookies, redirects, proxies or environment, and the body can be pushed instead of pulled.

    transport = Transport()
    response = await transport.handle_async_request(request)       # returns at the end of the response head
    response.stream.push_to(sink)  or  async for chunk in response.stream
    await response.stream.aclose()                                 # before the end: closes the connection

Request extensions it reads: `timeout` {connect, first_byte, idle} in seconds, `deadline` in loop time, `fresh` (do not
reuse a connection), `target` (path and query, as httpx defines it), `origin` (scheme://host:port, to save parsing).
Errors are httpx's: ConnectError, ConnectTimeout, PoolTimeout (no file descriptor left), and those of `connection`,
which say how many response bytes had come and whether the connection had been used before.
"""

import asyncio
import errno
import ssl
from typing import Any

import httpx

from inference_api.models import RawHeaders
from inference_api.outbound.connection import Connection, Disconnected, ResponseStream


class Request(httpx.Request):
    """An httpx.Request without the 4 us of normalising what is already normal: lower-case raw headers, a bytes body."""

    def __init__(self, url: httpx.URL, headers: RawHeaders, body: bytes, extensions: dict[str, Any]) -> None:
        self.method = "POST"
        self.url = url
        self.raw_headers = headers
        self.body = body
        self.extensions = extensions

    @property
    def headers(self) -> httpx.Headers:  # type: ignore[override]
        return httpx.Headers(self.raw_headers)

    @property
    def stream(self) -> httpx.ByteStream:  # type: ignore[override]
        return httpx.ByteStream(self.body)


class Response(httpx.Response):
    """An httpx.Response that builds its Headers only when somebody asks."""

    def __init__(self, status: int, headers: RawHeaders, stream: "ResponseStream") -> None:
        self.status_code = status
        self.raw_headers = headers
        self.stream = stream
        self.extensions = {}
        self.is_closed = self.is_stream_consumed = False

    @property
    def headers(self) -> httpx.Headers:  # type: ignore[override]
        return httpx.Headers(self.raw_headers)


class Pool:
    """The connections to one origin: the last one used is reused first, so that the others can expire.

    It has no limit and so no queue: the number of requests in the router is what bounds it.
    """

    def __init__(self, scheme: str, host: str, port: int, keepalive: float, tls: ssl.SSLContext | None) -> None:
        # Configuration
        self.host = host
        self.port = port
        self._loop = asyncio.get_running_loop()
        self._keepalive = keepalive
        self._tls = tls if scheme == "https" else None
        # Shared: every open connection, and the reusable ones, oldest first
        self._open: set[Connection] = set()
        self._idle: dict[Connection, None] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self.last_read = 0.0

    def take(self) -> Connection | None:
        """An idle connection that the replica should still hold open, or None."""
        if not self._idle:
            return None
        connection, _ = self._idle.popitem()
        if self._loop.time() - connection.idle_since < self._keepalive:
            return connection
        # The youngest is too old, so all of them are.
        connection.close()
        self.close_idle()
        return None

    async def connect(self, seconds: float | None) -> Connection:
        """A new connection. Raises httpx.ConnectError, ConnectTimeout or PoolTimeout; cancelling leaves nothing."""
        connection = Connection(self, self._loop)
        self._open.add(connection)
        try:
            async with asyncio.timeout(seconds):
                await self._loop.create_connection(
                    lambda: connection,
                    self.host,
                    self.port,
                    ssl=self._tls,
                    server_hostname=self.host if self._tls else None,
                )
        except TimeoutError as exc:
            connection.close()
            raise httpx.ConnectTimeout("no connection to the replica in time") from exc
        except (OSError, UnicodeError) as exc:  # UnicodeError: a label that IDNA refuses
            connection.close()
            if isinstance(exc, OSError) and exc.errno in (errno.EMFILE, errno.ENFILE):
                # The lack is ours; the replica has done nothing.
                raise httpx.PoolTimeout("no file descriptor left for a connection") from exc
            raise httpx.ConnectError("no connection to the replica") from exc
        except BaseException:
            connection.close()
            raise
        return connection

    def release(self, connection: Connection) -> None:
        connection.idle_since = self._loop.time()
        self._idle[connection] = None
        if self._sweep is None:
            self._sweep = self._loop.call_later(self._keepalive, self._close_expired)

    def discard(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def close_idle(self) -> None:
        for connection in list(self._idle):
            connection.close()

    def close(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in list(self._open):
            connection.fail(Disconnected("the router closed the connection", received=0, reused=False))

    def _close_expired(self) -> None:
        self._sweep = None
        now = self._loop.time()
        while self._idle:
            oldest = next(iter(self._idle))
            wait = oldest.idle_since + self._keepalive - now
            if wait > 0:
                self._sweep = self._loop.call_later(wait, self._close_expired)
                return
            oldest.close()

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def active(self) -> int:
        return len(self._open) - len(self._idle)

    def __repr__(self) -> str:
        return f"<Pool {self.host}:{self.port}: {self.active} active, {self.idle} idle>"


class Transport(httpx.AsyncBaseTransport):
    """An httpx transport over one Pool per origin.

    `keepalive`: seconds an idle connection may be reused; must be below the replica's own (vLLM closes after 5).
    `tls`: the context for https origins; by default the system's trust, made when the first one is needed.
    """

    def __init__(self, *, keepalive: float = 3.0, tls: ssl.SSLContext | None = None) -> None:
        self._keepalive = keepalive
        self._tls = tls
        self._pools: dict[str, Pool] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        extensions = request.extensions
        if isinstance(request, Request):
            headers, body = request.raw_headers, request.body
        else:
            headers, body = request.headers.raw, await request.aread()
        head = request_head(request.method, extensions.get("target") or request.url.raw_path, headers)
        pool = self._pool(extensions.get("origin"), request.url)
        connection = None if extensions.get("fresh") else pool.take()
        if connection is None:
            connection = await pool.connect((extensions.get("timeout") or {}).get("connect"))
        stream = connection.exchange(head, body, extensions)
        try:
            await stream.head
        except BaseException:
            connection.abandon(stream)
            raise
        return Response(stream.status, stream.headers, stream)

    async def aclose(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def retain(self, origins: set[str]) -> None:
        """Forget the pools of other origins: their idle connections close now, their streams run to the end."""
        for origin in self._pools.keys() - origins:
            self._pools.pop(origin).close_idle()

    def last_read(self, origin: str) -> float:
        """Loop time of the last byte that came from there, 0 if none did."""
        pool = self._pools.get(origin)
        return 0.0 if pool is None else pool.last_read

    def _pool(self, origin: str | None, url: httpx.URL) -> Pool:
        origin = origin or str(url.copy_with(raw_path=b"/")).rstrip("/")
        pool = self._pools.get(origin)
        if pool is None:
            if url.scheme == "https" and self._tls is None:
                self._tls = ssl.create_default_context()
            port = url.port or (443 if url.scheme == "https" else 80)
            pool = self._pools[origin] = Pool(url.scheme, url.host, port, self._keepalive, self._tls)
        return pool

    def __repr__(self) -> str:
        return f"<Transport {list(self._pools.values())}>"


def request_head(method: str, target: bytes, headers: RawHeaders) -> bytes:
    """Request line and header lines. Raises httpx.LocalProtocolError if a part of them would start another line."""
    parts = [method.encode("ascii"), b" ", target, b" HTTP/1.1\r\n"]
    for name, value in headers:
        parts += (name, b": ", value, b"\r\n")
    parts.append(b"\r\n")
    head = b"".join(parts)
    lines = len(headers) + 2
    if head.count(b"\n") != lines or head.count(b"\r") != lines or b"\0" in head:
        raise httpx.LocalProtocolError("a request header holds a line break")
    return head
