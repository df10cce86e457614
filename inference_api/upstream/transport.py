"""The port to the backends: an httpx transport with one connection pool per origin.

Differences to httpx's own (docs/adr/0001): a request cancelled at any point closes its connection and leaks nothing, no
operation scans a pool, bytes beyond the end of a response never reach the next one, there are no cookies, redirects,
proxies or environment, and the body can be pushed instead of pulled.

    transport = Transport()
    response = await transport.handle_async_request(request)       # returns at the end of the response head
    response.stream.push_to(sink)  or  async for chunk in response.stream
    await response.stream.aclose()                                 # before the end: closes the connection

Request extensions it reads: `timeout` {connect, first_byte, idle} in seconds (or an httpx client's `read` for the last
two), `deadline` in loop time, `fresh` (do not reuse a connection), `target` (path and query, as httpx defines it),
`origin` (scheme://host:port, to save parsing; with `#address` after it the connection goes to that address, and the
URL's host is only the server name of TLS).
Errors are httpx's ConnectError, ConnectTimeout and PoolTimeout (no file descriptor left), and those of `failures`, with
the number of response bytes and whether the connection was reused.
"""

import asyncio
import ssl
from collections.abc import Callable, Iterable
from time import monotonic

import httpx

from inference_api.discovery.resolver import Resolver
from inference_api.headers import header_lines
from inference_api.routing.backend import Backend
from inference_api.routing.urls import is_usable_address
from inference_api.upstream.connection import BackendConnection
from inference_api.upstream.deadlines import Timeout
from inference_api.upstream.dial import Dialer
from inference_api.upstream.failures import TotalTimeout, Withdrawn
from inference_api.upstream.pool import Pool
from inference_api.upstream.response import ResponseStream
from inference_api.upstream.rewrite import Content
from inference_api.upstream.trust import Trust

_TAKEN_OUT = "an operator has taken the backend out"
# Requests that are ended before others have their turn
_AT_ONCE = 50


class Transport(httpx.AsyncBaseTransport):
    """An httpx transport over one Pool per origin.

    `keepalive`: seconds an idle connection may be reused; must be below the backend's own (vLLM closes after 5).
    `tls`: returns the context for a new connection to an https origin; by default the system's trust.
    `resolver`: resolves host names, by default one of its own.
    `may_reach`: whether a connection may lead to an IP address.
    """

    def __init__(
        self,
        *,
        keepalive: float = 3.0,
        tls: Callable[[], ssl.SSLContext] | None = None,
        resolver: Resolver | None = None,
        may_reach: Callable[[str], bool] = is_usable_address,
    ) -> None:
        self._keepalive = keepalive
        self._may_reach = may_reach
        self._tls = tls or Trust()
        self._resolver = resolver or Resolver()
        self._own_resolver = None if resolver else self._resolver
        self._pools: dict[str, Pool] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        extensions = request.extensions
        target = extensions.get("target") or request.url.raw_path
        head = request_head(request.method, target, header_lines(request.headers.raw))
        given = extensions.get("timeout") or {}
        stream = await self.send(
            extensions.get("origin"),
            request.url,
            head,
            await request.aread(),
            Timeout(
                given.get("connect"),
                given.get("first_byte", given.get("read")),
                given.get("idle", given.get("read")),
            ),
            extensions.get("deadline"),
            extensions.get("fresh", False),
        )
        return httpx.Response(stream.status, headers=stream.headers, stream=stream)

    async def send(
        self,
        origin: str | None,
        url: httpx.URL,
        head: bytes,
        body: Content,
        timeouts: Timeout,
        deadline: float | None,
        fresh: bool,
        backend: Backend | None = None,
    ) -> ResponseStream:
        """As `handle_async_request`, without the 12 us for an httpx.Request and an httpx.Response.

        `head`: request line and headers, as bytes. `backend`: raises Withdrawn if an operator takes that out.
        Returns at the end of the response head.
        """
        pool = self._pools.get(origin) if origin is not None else None
        if pool is None:
            pool = self._pool(origin, url)
        connection = None if fresh else pool.take()
        if connection is None:
            connection = await _connect(pool, timeouts.connect, deadline)
            if backend is not None and backend.is_out:
                connection.close()
                raise Withdrawn(_TAKEN_OUT)
        stream = connection.exchange(head, body, timeouts, deadline, backend)
        try:
            await stream.head
        except BaseException:
            connection.abandon(stream)
            # It has the error, whose traceback has this frame: a ring, left for the garbage collector.
            del stream
            raise
        return stream

    async def withdraw(self, origins: Iterable[str]) -> None:
        """End what is in flight at these origins on backends that an operator has taken out."""
        for origin in origins:
            pool = self._pools.get(origin)
            for number, connection in enumerate(() if pool is None else pool.out(), start=1):
                if connection.is_out:
                    connection.fail(Withdrawn(_TAKEN_OUT))
                if number % _AT_ONCE == 0:
                    await asyncio.sleep(0)

    async def aclose(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        if self._own_resolver is not None:
            await self._own_resolver.aclose()

    def retain(self, origins: set[str]) -> None:
        """Drop the pools of other origins: idle connections close now, streams run to the end."""
        for origin in self._pools.keys() - origins:
            self._pools.pop(origin).close_idle()

    def last_read(self, origin: str) -> float:
        """Loop time of the last byte from this origin, 0 if there was none."""
        pool = self._pools.get(origin)
        return 0.0 if pool is None else pool.last_read

    def _pool(self, origin: str | None, url: httpx.URL) -> Pool:
        origin = origin or str(url.copy_with(raw_path=b"/", fragment=None)).rstrip("/")
        pool = self._pools.get(origin)
        if pool is None:
            secure = url.scheme == "https"
            port = url.port or (443 if secure else 80)
            dialer = Dialer(origin.partition("#")[2] or url.host, self._resolver, self._may_reach)
            tls = self._tls if secure else None
            pool = self._pools[origin] = Pool(url.host, port, self._keepalive, dialer, tls)
        return pool

    def __repr__(self) -> str:
        return f"<Transport {list(self._pools.values())}>"


async def _connect(pool: Pool, seconds: float | None, deadline: float | None) -> BackendConnection:
    """A new connection, within the connect timeout and the deadline. Raises as `Pool.connect`."""
    left = None if deadline is None else deadline - monotonic()
    if left is None or (seconds is not None and seconds <= left):
        return await pool.connect(seconds)
    try:
        return await pool.connect(left)
    except httpx.ConnectTimeout as exc:
        raise TotalTimeout("the time for the request ended before there was a connection") from exc


def request_head(method: str, target: bytes, lines: bytes) -> bytes:
    """A head of lines that `header_lines` made. Raises httpx.LocalProtocolError if `target` holds a line break."""
    return b"%b %b HTTP/1.1\r\n%b\r\n" % (method.encode("ascii"), one_line(target), lines)


def one_line(target: bytes) -> bytes:
    """The target. Raises httpx.LocalProtocolError if it holds a line break."""
    # Not `in`: for bytes it creates and drops an exception each time.
    if len(target.translate(None, b"\n\r\0")) != len(target):
        raise httpx.LocalProtocolError("a request target holds a line break")
    return target
