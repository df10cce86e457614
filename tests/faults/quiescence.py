"""What must hold when all is over: nothing in flight, nothing open, nothing left running, nothing complained of."""

import asyncio
import logging
import os
import re

from tests.conftest import Served
from tests.fakes import FakeEngine, until

# From the end of the last request to silence.
SECONDS = 2.0


class Quiescence:
    """Given the state before a test by `begin`, `check` waits for the same state after it."""

    def __init__(self) -> None:
        self.routers: list[Served] = []
        self.engines: list[FakeEngine] = []
        self._files = 0
        self._tasks: set[asyncio.Task[object]] = set()

    def begin(self) -> None:
        """From here on nothing may be added that stays."""
        self._files = open_files()
        self._tasks = asyncio.all_tasks()

    async def check(self, complaints: list[logging.LogRecord]) -> None:
        """Fails with what is left, if there is anything left after 2 s."""
        try:
            await until(lambda: not any(self._in_flight().values()), SECONDS)
            for served in self.routers:
                assert (await served.client.get("/healthz")).status_code == 200
            await self._close_idle()
            await until(lambda: not any(self._left().values()), SECONDS)
        except AssertionError:
            raise AssertionError(f"not quiet: {self._in_flight()} {self._left()}") from None
        assert [record.getMessage() for record in complaints if record.levelno >= logging.ERROR] == []

    def _in_flight(self) -> dict[str, int]:
        """What may be counted only while a request is under way; each is 0, and none is ever below."""
        models = [model for served in self.routers for model in served.router.fleet.models.values()]
        return {
            "requests": sum(served.router.load.in_flight for served in self.routers),
            "backends with requests": sum(b.in_flight != 0 for model in models for b in model.backends),
            "upstream connections in use": sum(active(served) for served in self.routers),
            "requests at engines": sum(engine.busy for engine in self.engines),
        }

    async def _close_idle(self) -> None:
        """What is kept for the next request is not a leak."""
        for served in self.routers:
            await served.client.aclose()
            served.router.transport.retain(set())  # type: ignore[attr-defined]

    def _left(self) -> dict[str, object]:
        return {
            "connections at engines": sum(engine.open for engine in self.engines),
            "files": max(0, open_files() - self._files),
            "tasks": [task for task in asyncio.all_tasks() - self._tasks if "TestRunner" not in repr(task.get_coro())],
        }


def active(served: Served) -> int:
    """Connections to engines that have a request on them."""
    return sum(map(int, re.findall(r"(\d+) active", repr(served.router.transport))))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
