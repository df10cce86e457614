"""A client on raw sockets. Closed loop: each keep-alive connection sends its next request when it has its answer. Open
loop: requests fall due at a fixed rate, and one that finds no connection free is late, which counts.

While the load runs it only stores what it reads; everything is taken apart and checked afterwards.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from benchmarks import wire

_UNKNOWN = -1
_CHUNKED = 0


@dataclass(slots=True)
class Exchange:
    """One request and the reads that made up its answer, with their times in nanoseconds."""

    sent: int
    """When it was sent; in an open loop, when it was due and would have been with a connection free."""
    reads: list[tuple[int, bytes]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Result:
    """What a load showed from the client's side, times in seconds."""

    requests: int
    events: int
    seconds: float
    latencies: list[float]
    """From a request until the last byte of its answer."""
    first_bytes: list[float]
    delays: list[float]
    """Of each streamed event, from the engine's write to the client's read."""
    reads_with_events: int
    exact: bool
    """Every body was the engine's, byte for byte."""


class _Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, load: "Client") -> None:
        self.load = load
        self.exchange: Exchange | None = None
        self.wanted = _UNKNOWN
        self.received = 0
        self.tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self, request: bytes, due: int) -> None:
        self.wanted, self.received, self.tail = _UNKNOWN, 0, b""
        self.exchange = Exchange(due)
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            return self.load.fail(f"bytes that no request asked for: {data[:200]!r}")
        exchange.reads.append((time.monotonic_ns(), data))
        self.received += len(data)
        if self.wanted == _UNKNOWN and not self._read_head(exchange):
            return None
        if self.wanted != _CHUNKED:
            done = self.received >= self.wanted
        else:
            self.tail = (self.tail + data)[-5:]
            done = self.tail == b"0\r\n\r\n"
        if done:
            self.exchange = None
            self.load.answered(self, exchange)
        return None

    def _read_head(self, exchange: Exchange) -> bool:
        data = exchange.reads[0][1] if len(exchange.reads) == 1 else b"".join(piece for _, piece in exchange.reads)
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            return False
        head = data[:end].lower()
        length = head.find(b"\r\ncontent-length:")
        if not head.startswith(b"http/1.1 200"):
            self.load.fail(f"the answer is not a 200: {data[:600]!r}")
        elif length >= 0:
            self.wanted = end + int(head[length + 17 : head.index(b"\r\n", length + 2)])
        elif b"\r\ntransfer-encoding: chunked" in head:
            self.wanted, self.tail = _CHUNKED, data[-5 - len(exchange.reads[-1][1]) : -len(exchange.reads[-1][1])]
        else:
            self.load.fail(f"the answer has neither Content-Length nor chunks: {data[:end]!r}")
        return self.wanted != _UNKNOWN

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.load.closing:
            self.load.fail(
                f"the router closed a connection {'during an answer' if self.exchange else 'between answers'}"
            )


class Client:
    """The connections, and the load that runs on them."""

    def __init__(self, port: int) -> None:
        # configuration
        self.port = port
        # shared
        self.connections: list[_Connection] = []
        self.closing = False
        # per load
        self.request = b""
        self.to_send = 0
        self.expected = 0
        self.exchanges: list[Exchange] = []
        self.finished: asyncio.Future[None] | None = None
        # Of an open loop: requests per second, and what waits for the other
        self.rate = 0.0
        self.free: list[_Connection] = []
        self.overdue: deque[int] = deque()

    async def connect(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(count):
            _, connection = await loop.create_connection(lambda: _Connection(self), "127.0.0.1", self.port)
            self.connections.append(connection)

    def close(self) -> None:
        self.closing = True
        for connection in self.connections:
            connection.transport.close()

    async def run(self, request: bytes, count: int, patience: float, rate: float = 0.0) -> tuple[float, list[Exchange]]:
        """Send `request` so many times and read the answers: the seconds it took, and what was read.

        `rate`: requests per second, whatever the router does; 0 for a closed loop.
        """
        self.request = request
        self.to_send = self.expected = count
        self.exchanges = []
        self.finished = asyncio.get_running_loop().create_future()
        self.rate = rate
        start = time.monotonic()
        if rate:
            self.free = self.connections[::-1]
            self._send_due(start)
        else:
            for connection in self.connections:
                self._send_next(connection)
        try:
            async with asyncio.timeout(patience):
                await self.finished
        except TimeoutError:
            raise wire.BadAnswer(f"{len(self.exchanges)} of {count} answers after {patience:.0f} s") from None
        return time.monotonic() - start, self.exchanges

    def _send_next(self, connection: _Connection) -> None:
        if self.to_send:
            self.to_send -= 1
            connection.send(self.request, time.monotonic_ns())

    def _send_due(self, start: float) -> None:
        """Whatever fell due since the last poll. A timer of ours that is late is not the router's delay."""
        due = min(self.expected, int((time.monotonic() - start) * self.rate) + 1) - (self.expected - self.to_send)
        self.to_send -= due
        for _ in range(due):
            if self.free:
                self.free.pop().send(self.request, time.monotonic_ns())
            else:
                self.overdue.append(time.monotonic_ns())
        if self.to_send:
            asyncio.get_running_loop().call_later(1 / self.rate, self._send_due, start)

    def answered(self, connection: _Connection, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        if not self.rate:
            self._send_next(connection)
        elif self.overdue:
            connection.send(self.request, self.overdue.popleft())
        else:
            self.free.append(connection)
        if len(self.exchanges) == self.expected:
            self._finish(lambda finished: finished.set_result(None))

    def fail(self, reason: str) -> None:
        self._finish(lambda finished: finished.set_exception(wire.BadAnswer(reason)))

    def _finish(self, how: Callable[[asyncio.Future[None]], None]) -> None:
        if self.finished and not self.finished.done():
            how(self.finished)


def examine(exchanges: list[Exchange], check: Callable[[bytes], wire.Checked], seconds: float) -> Result:
    """Check every answer to the last byte, then measure. Raises BadAnswer."""
    events, exact = 0, True
    for exchange in exchanges:
        checked = check(b"".join(data for _, data in exchange.reads))
        events += checked.events
        exact = exact and checked.exact
    stamped = [(at, stamps) for e in exchanges for at, data in e.reads if (stamps := wire.STAMP.findall(data))]
    return Result(
        requests=len(exchanges),
        events=events,
        seconds=seconds,
        latencies=[(e.reads[-1][0] - e.sent) / 1e9 for e in exchanges],
        first_bytes=[(e.reads[0][0] - e.sent) / 1e9 for e in exchanges],
        delays=[(at - int(stamp)) / 1e9 for at, stamps in stamped for stamp in stamps],
        reads_with_events=len(stamped),
        exact=exact,
    )
