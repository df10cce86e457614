"""What must hold when all is over, whatever it was: nothing in flight, nothing open, nothing running, no complaint."""

import asyncio
import gc
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.conftest import Served

# From the end of the body of `quiet` to silence.
SECONDS = 2.0


@asynccontextmanager
async def quiet(served: Served) -> AsyncIterator[None]:
    """Whatever happens inside, afterwards the router is as it was: fails after two seconds with what is left.

    Engines that the body starts must be stopped by it, or have been started before.
    """
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    before = _Snapshot(served)
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    try:
        yield
        await before.comes_back(SECONDS)
        assert (await served.client.get("/healthz")).status_code == 200
        gc.collect()  # a task whose exception nobody retrieved complains when it is collected
        assert complaints == []
    finally:
        loop.set_exception_handler(handler)


class _Snapshot:
    """What was open and running at one moment."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._active = _active(served)
        self._files = _open_files() - _client_files(served)
        self._tasks = asyncio.all_tasks()

    async def comes_back(self, seconds: float) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while left := self._left():
            assert asyncio.get_running_loop().time() < deadline, f"not quiet: {left}"
            if not left.keys() - {"files", "tasks"}:
                # What is kept for the next request is not a leak; closing it ends its task at the engine.
                self._served.router.transport.retain(set())  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)

    def _left(self) -> dict[str, object]:
        """What is not as it was, by its name; of a count that should be 0, any other is wrong, below it too."""
        models = list(self._served.router.fleet.models.values())
        left = {
            "requests": self._served.router.load.in_flight,
            "requests of models": [model for model in models if model.in_flight],
            "requests at backends": [backend for model in models for backend in model.backends if backend.in_flight],
            "connections in use": max(0, _active(self._served) - self._active),
            "files": max(0, _open_files() - _client_files(self._served) - self._files),
            "tasks": asyncio.all_tasks() - self._tasks,
        }
        return {name: value for name, value in left.items() if value}


def _active(served: Served) -> int:
    return sum(map(int, re.findall(r"(\d+) active", repr(served.router.transport))))


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _client_files(served: Served) -> int:
    """Both ends of the connections that the test's own client keeps."""
    return 2 * len(served.client._transport._pool.connections)  # type: ignore[attr-defined]
