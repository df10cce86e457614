"""Calls that may hang, each in a daemon thread of its own: none blocks another, or the end of the process.

And work of a thread that takes long, in slices: the event loop needs the interpreter, too.
"""

import asyncio
import errno
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

# Seconds of work after which a thread gives way to the event loop, and for which it does
_WORK, _REST = 0.001, 0.0005


async def in_thread(call: Callable[[], T], name: str) -> T:
    """Return or raise what `call` does. Cancellation stops the wait; the call itself runs on.

    Raises OSError if no thread can be started.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        result: list[T] = []
        error: Exception | None = None
        try:
            result.append(call())
        except Exception as exc:
            error = exc
        with suppress(RuntimeError):  # The loop is closed: there is no task to wake.
            loop.call_soon_threadsafe(_settle, future, result, error)

    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except RuntimeError as exc:
        raise OSError(errno.EAGAIN, "the system gives no thread") from exc
    return await future


def _settle(future: asyncio.Future[T], result: list[T], error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result[0])


def _rest() -> None:
    time.sleep(_REST)


def giving_way(steps: Generator[None, None, T], rest: Callable[[], None] = _rest) -> T:
    """Run the steps in this thread, which rests after every ms of them. Returns what they return."""
    began = time.perf_counter()
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: T = done.value
            return result
        if time.perf_counter() - began > _WORK:
            rest()
            began = time.perf_counter()


def at_once(steps: Generator[None, None, T]) -> T:
    """Run the steps without a rest."""
    return giving_way(steps, lambda: None)
