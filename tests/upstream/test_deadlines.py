"""When an exchange has taken too long: a BackendConnection whose clock and timers are set by hand."""

import asyncio
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from inference_api.upstream.connection import BackendConnection
from inference_api.upstream.deadlines import Timeout
from inference_api.upstream.failures import Disconnected, FirstByteTimeout, IdleTimeout, TotalTimeout
from inference_api.upstream.repeated_head import RepeatedHeads
from inference_api.upstream.response import ResponseStream
from tests.fakes import LAST_CHUNK, chunk

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
X = chunk(b"x")


class Clock:
    """As much of an event loop as a connection needs."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now = 1000.0
        self.timers: list[Any] = []
        self.create_future = loop.create_future

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> Any:
        timer = SimpleNamespace(when=when, callback=callback)
        timer.cancel = lambda: self.timers.remove(timer)
        self.timers.append(timer)
        return timer

    def wait(self, seconds: float) -> None:
        until = self.now + seconds
        while due := [timer for timer in self.timers if timer.when <= until]:
            timer = min(due, key=lambda timer: timer.when)
            self.timers.remove(timer)
            self.now = timer.when
            timer.callback()
        self.now = until


class Bench:
    """A connection, and the exchange on it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.clock = cast(Any, Clock(loop))
        nothing = lambda *_: None  # noqa: E731
        pool = SimpleNamespace(last_read=0.0, heads=RepeatedHeads(), release=nothing, discard=nothing)
        self.connection = BackendConnection(pool, self.clock)
        names = ("write", "abort", "pause_reading", "resume_reading")
        transport: Any = SimpleNamespace(get_write_buffer_size=lambda: 0, **dict.fromkeys(names, nothing))
        self.connection.connection_made(transport)

    def exchange(self, first_byte: float | None, idle: float | None, total: float | None = None) -> ResponseStream:
        deadline = None if total is None else self.clock.now + total
        self.stream = self.connection.exchange(b"", b"", Timeout(None, first_byte, idle), deadline)
        return self.stream

    def play(self, *steps: float | bytes | str) -> httpx.TransportError | None:
        """Seconds that pass, bytes that are read, `pause` and `resume` of the reader; why the exchange ended."""
        for step in steps:
            if isinstance(step, bytes):
                self.connection.data_received(step)
            elif isinstance(step, str):
                getattr(self.stream, step)()
            else:
                self.clock.wait(step)
        return self.stream.error


@pytest.fixture
def bench() -> Iterator[Bench]:
    loop = asyncio.new_event_loop()
    yield Bench(loop)
    loop.close()


@pytest.mark.parametrize(
    ("limits", "steps", "error"),
    [
        ((1, 9, 9), (0.9,), None),
        ((1, 9, 9), (1.0,), FirstByteTimeout),
        ((1, 9, 9), (HEAD[:20], 1.0), FirstByteTimeout),
        ((1, 9, 9), (b"HTTP/1.1 100 Continue\r\n\r\n", 1.0), FirstByteTimeout),
        ((None, 1, None), (100.0,), None),
        ((9, 1, None), (HEAD, 0.9), None),
        ((9, 1, None), (HEAD, X, 1.0), IdleTimeout),
        ((0.5, 1, None), (HEAD, X, 1.0), IdleTimeout),
        ((None, 1, None), (5.0, HEAD, X, 1.0), IdleTimeout),
        ((9, 1, None), (HEAD, *(X, 0.9) * 9), None),
        ((9, 1, 3), (HEAD, *(X, 0.9) * 4), TotalTimeout),
        ((9, None, 3), (3.0,), TotalTimeout),
        ((None, None, None), (1e6, HEAD, 1e6), None),
        ((9, 1, None), (HEAD, "pause", 100.0), None),
        ((9, 1, None), (HEAD, "pause", 100.0, "resume", 0.9), None),
        ((9, 1, None), (HEAD, "pause", 100.0, "resume", 1.0), IdleTimeout),
        ((9, 1, 50), (HEAD, "pause", 50.0), TotalTimeout),
    ],
)
def test_how_long_an_exchange_may_take(
    limits: tuple[float | None, ...], steps: tuple[Any, ...], error: type[httpx.TransportError] | None, bench: Bench
) -> None:
    bench.exchange(*limits)

    assert type(bench.play(*steps)) is (error or type(None))
    assert bench.connection.closed == (error is not None)


@pytest.mark.parametrize(
    ("first", "second", "error"),
    [((1, 1), (None, None), None), ((1, 1), (50, 50), None), ((50, 50), (1, 50), FirstByteTimeout)],
)
def test_a_timer_of_an_earlier_exchange_neither_ends_nor_puts_off_the_next(
    first: tuple[float, float], second: tuple[Any, Any], error: type[httpx.TransportError] | None, bench: Bench
) -> None:
    bench.exchange(*first)
    # An idle connection may be silent.
    assert bench.play(HEAD + X + LAST_CHUNK, 100.0) is None
    bench.exchange(*second)

    assert type(bench.play(10.0)) is (error or type(None))


@pytest.mark.parametrize(("waited", "stale"), [(0.9, True), (1.1, False)])
def test_a_backend_that_held_a_request_for_long_had_received_it(waited: float, stale: bool, bench: Bench) -> None:
    bench.exchange(9, 9)
    bench.play(HEAD + LAST_CHUNK)
    bench.exchange(9, 9)
    bench.play(waited)
    bench.connection.connection_lost(None)

    error = bench.stream.error
    assert isinstance(error, Disconnected)
    assert (error.silent, error.reused, error.stale) == (True, True, stale)
