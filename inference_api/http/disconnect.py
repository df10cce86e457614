"""Notices a client that disconnects while its request is processed, without a task of its own.

The router's own server knows at once: its Cycle is a DisconnectWatcher. Any other reports it through `receive`, which
suspends until then; so `receive` is stepped by hand: once to where it suspends, and again when the future is done.
That is cheaper than a task (docs/adr/0002). Stepping relies on `receive` waiting for a plain future, as uvicorn's does,
or for the next turn of the event loop, and on its not needing a running task.
"""

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any

from starlette.types import Receive

from inference_api.server.cycle import client_gone


class DisconnectWatcher:
    """While entered, cancels its task when the client disconnects; the exit then raises ClientGone."""

    __slots__ = ("_receive", "_receiving", "_task", "_waits_for", "gone")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._task: asyncio.Task[Any] | None = None
        self._receiving: Coroutine[Any, Any, Any] | None = None
        self._waits_for: asyncio.Future[Any] | None = None
        self.gone = False

    def __enter__(self) -> "DisconnectWatcher":
        self._task = asyncio.current_task()
        self._receiving = self._receive()  # type: ignore[assignment]
        self._step(None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self.gone and kind is asyncio.CancelledError:
            client_gone(exc)

    def close(self) -> None:
        """Stop watching: a later disconnect does not affect this request."""
        self._task = None
        receiving, self._receiving = self._receiving, None
        if self._waits_for is not None:
            self._waits_for.remove_done_callback(self._step)
        if receiving is not None:
            receiving.close()

    def _step(self, _: asyncio.Future[Any] | None) -> None:
        if self._receiving is None:
            return  # closed after this call had been scheduled
        try:
            waits_for = self._receiving.send(None)
        except StopIteration as stop:
            self._receiving = self._waits_for = None
            self._received(stop.value)
            return
        if waits_for is None:
            # `asyncio.sleep(0)` of a layer: not for a future, for the next turn of the loop.
            asyncio.get_running_loop().call_soon(self._step, None)
            return
        waits_for._asyncio_future_blocking = False
        self._waits_for = waits_for
        waits_for.add_done_callback(self._step)

    def _received(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.disconnect":
            self._left()

    def _left(self) -> None:
        if self._task is not None:
            self.gone = True
            self._task.cancel()
