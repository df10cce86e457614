"""What must hold when all is over: nothing in flight, nothing open, nothing left running, nothing complained of."""

import asyncio
import gc
import logging
import os
import re
from collections.abc import AsyncIterator, Container
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tests.conftest import Served
from tests.fakes import FakeEngine, until

# From the end of the last request to silence; it takes milliseconds, unless the machine has other things to do.
SECONDS = 30.0


class Quiescence:
    """Given the state before a test by `begin`, `check` waits for the same state after it."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self.routers: list[Served] = []
        self.engines: list[FakeEngine] = []
        self._files = 0
        self._tasks: set[asyncio.Task[object]] = set()

    def begin(self) -> None:
        """From here on nothing may be added that stays."""
        self._files = open_files()
        self._tasks = asyncio.all_tasks()

    async def check(self, complaints: list[logging.LogRecord]) -> None:
        """Fails with what is left, if there is anything left in the end."""
        try:
            await until(lambda: not any(self._in_flight().values()), self._seconds)
            for served in self.routers:
                assert (await served.client.get("/healthz")).status_code == 200
                await served.client.aclose()
            await until(lambda: self._close_idle() and not any(self._left().values()), self._seconds)
        except AssertionError:
            raise AssertionError(f"not quiet: {self._in_flight()} {self._left()}") from None
        assert [record.getMessage() for record in complaints if record.levelno >= logging.ERROR] == []

    async def check_engines(self) -> None:
        """The same of the engines alone, when whoever asked them has ended."""
        try:
            await until(
                lambda: not any(engine.busy for engine in self.engines) and not self._connections(), self._seconds
            )
        except AssertionError:
            busy = [engine.busy for engine in self.engines]
            raise AssertionError(f"not quiet: requests at engines {busy}, connections {self._connections()}") from None

    def _in_flight(self) -> dict[str, int]:
        """What may be counted only while a request is under way; each is 0, and none is ever below."""
        models = [model for served in self.routers for model in served.router.core.fleet.models.values()]
        return {
            "requests": sum(served.router.core.admission.in_flight for served in self.routers),
            "backends with requests": sum(b.in_flight != 0 for model in models for b in model.backends),
            "addresses with requests": sum(b.origin.in_flight != 0 for model in models for b in model.backends),
            "upstream connections in use": sum(active(served) for served in self.routers),
            "requests at engines": sum(engine.busy for engine in self.engines),
        }

    def _connections(self) -> dict[asyncio.Task[None], str]:
        """The open ones at the engines, by their tasks, and whose each is."""
        found = {task: (engine, port) for engine in self.engines for task, port in engine.clients.items()}
        ours = own_sockets() if found else set()
        owners = {task: owner_of(port, engine.port, ours) for task, (engine, port) in found.items()}
        # A process that has nothing to do with the tests may know the port from before.
        return {task: owner for task, owner in owners.items() if owner != "a stranger"}

    def _close_idle(self) -> bool:
        """What is kept for the next request, or for the next look of the router's own, is not a leak."""
        for served in self.routers:
            for transport in (served.router.core.transport, served.router.core.own_transport):
                transport.retain(set())  # type: ignore[attr-defined]
        return True

    def _left(self) -> dict[str, object]:
        connections = self._connections()
        strangers = {task for engine in self.engines for task in engine.clients} - connections.keys()
        return {
            "connections at engines": list(connections.values()),
            "files": max(0, open_files() - self._files - len(strangers)),
            "tasks": [task for task in asyncio.all_tasks() - self._tasks - strangers if not _stands(task)],
        }


def _stands(task: asyncio.Task[object]) -> bool:
    """Whether it is there for as long as what it is for: the test, a backend, a watch of the fake cluster."""
    return any(name in repr(task.get_coro()) for name in ("TestRunner", "Prober._watch", "Event.wait"))


def active(served: Served) -> int:
    """Connections to engines that have a request on them."""
    return sum(map(int, re.findall(r"(\d+) active", repr(served.router.core.transport))))


def own_sockets() -> set[str]:
    """The inodes of the sockets of this process and of those that it has started."""
    sockets, processes = set(), [os.getpid()]
    while processes:
        process = processes.pop()
        with suppress(OSError):
            for file in os.scandir(f"/proc/{process}/fd"):
                with suppress(OSError):
                    sockets.add(os.readlink(file.path).removeprefix("socket:[").removesuffix("]"))
            for thread in os.listdir(f"/proc/{process}/task"):
                processes += map(int, Path(f"/proc/{process}/task/{thread}/children").read_text().split())
    return sockets


def owner_of(port: int, server: int, ours: Container[str]) -> str:
    """Whose end of a connection to a server on this machine this port is."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *rest = line.split()
        if (int(local[9:], 16), int(remote[9:], 16)) == (port, server):
            inode = rest[5]
            return f"ours, in state {state}" if inode in ours or inode == "0" else "a stranger"
    return "nobody"


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# One stretch of a test, for tests that have the router and its engines already


@asynccontextmanager
async def quiet(served: Served) -> AsyncIterator[None]:
    """Whatever happens inside, afterwards the router is as it was: fails in the end with what is left.

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
        self._active = active(served)
        self._files = open_files() - _client_files(served)
        self._tasks = asyncio.all_tasks()

    async def comes_back(self, seconds: float) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while left := self._left():
            assert asyncio.get_running_loop().time() < deadline, f"not quiet: {left}"
            if not left.keys() - {"files", "tasks"}:
                # What is kept for the next request is not a leak; closing it ends its task at the engine.
                self._served.router.core.transport.retain(set())  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)

    def _left(self) -> dict[str, object]:
        """What is not as it was, by its name; of a count that should be 0, any other is wrong, below it too."""
        models = list(self._served.router.core.fleet.models.values())
        left = {
            "requests": self._served.router.core.admission.in_flight,
            "requests of models": [model for model in models if model.in_flight],
            "requests at backends": [backend for model in models for backend in model.backends if backend.in_flight],
            "requests at addresses": [b.origin for model in models for b in model.backends if b.origin.in_flight],
            "connections in use": max(0, active(self._served) - self._active),
            "files": max(0, open_files() - _client_files(self._served) - self._files),
            "tasks": asyncio.all_tasks() - self._tasks,
        }
        return {name: value for name, value in left.items() if value}


def _client_files(served: Served) -> int:
    """Both ends of the connections that the test's own client keeps."""
    return 2 * len(served.client._transport._pool.connections)  # type: ignore[attr-defined]
