"""The connections to one origin: opening, reuse, close."""

import asyncio
import ssl
from collections.abc import Callable

import httpx

from inference_api.upstream.connection import BackendConnection
from inference_api.upstream.dial import LACKS, Dialer
from inference_api.upstream.failures import Closed
from inference_api.upstream.repeated_head import RepeatedHeads


class Pool:
    """The connections to one origin. Reuses the most recent one first, so that the others can expire.

    Has no limit and no queue: the router's limit of requests bounds it.

    `dialer` connects; `tls` returns the context of each new connection, None: no TLS.
    """

    def __init__(
        self,
        host: str,
        port: int,
        keepalive: float,
        dialer: Dialer,
        tls: Callable[[], ssl.SSLContext] | None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        # Configuration
        self.host = host
        self.port = port
        self._loop = loop or asyncio.get_running_loop()
        self._keepalive = keepalive
        self._dialer = dialer
        self._tls = tls
        # Shared: every open connection, and the reusable ones, oldest first
        self._open: set[BackendConnection] = set()
        self._idle: dict[BackendConnection, None] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self.last_read = 0.0
        self.heads = RepeatedHeads()

    def take(self) -> BackendConnection | None:
        """An idle connection younger than `keepalive`, or None."""
        if not self._idle:
            return None
        connection, _ = self._idle.popitem()
        if self._loop.time() - connection.idle_since < self._keepalive:
            return connection
        # The youngest has expired, so all have.
        connection.close()
        self.close_idle()
        return None

    async def connect(self, seconds: float | None) -> BackendConnection:
        """A new connection. Raises httpx.ConnectError, ConnectTimeout or PoolTimeout; cancellation leaks nothing."""
        try:
            async with asyncio.timeout(seconds):
                return await self._dialer.dial(self._attempt, seconds)
        except TimeoutError as exc:
            raise httpx.ConnectTimeout("no connection to the backend in time") from exc
        except (OSError, UnicodeError) as exc:  # UnicodeError: a label that IDNA rejects
            if isinstance(exc, OSError) and exc.errno in LACKS:
                # The router's own shortage, not a fault of the backend.
                raise httpx.PoolTimeout("no file descriptor or port left for a connection") from exc
            raise httpx.ConnectError("no connection to the backend") from exc

    async def _attempt(self, address: str) -> BackendConnection:
        connection = BackendConnection(self, self._loop)
        self._open.add(connection)
        tls = self._tls() if self._tls is not None else None
        try:
            await self._loop.create_connection(
                lambda: connection, address, self.port, ssl=tls, server_hostname=self.host if tls else None
            )
        except BaseException:
            connection.close()
            raise
        return connection

    def release(self, connection: BackendConnection) -> None:
        connection.idle_since = self._loop.time()
        self._idle[connection] = None
        if self._sweep is None:
            self._sweep = self._loop.call_later(self._keepalive, self._close_expired)

    def discard(self, connection: BackendConnection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def out(self) -> list[BackendConnection]:
        """Those with an answer under way of a backend that an operator has taken out."""
        return [one for one in self._open if one.is_out]

    def close_idle(self) -> None:
        for connection in list(self._idle):
            connection.close()

    def close(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in list(self._open):
            connection.fail(Closed("the router closed the connection"))

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
        return f"<Pool {self._dialer.host}:{self.port}: {self.active} active, {self.idle} idle>"
