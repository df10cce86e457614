"""Calls that may hang, each in a daemon thread of its own: none blocks another, or the end of the process."""

import asyncio
import errno
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


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
