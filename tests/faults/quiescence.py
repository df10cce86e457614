"""What must hold when all is over: nothing in flight, nothing open, nothing left running, nothing complained of."""

import asyncio
import gc
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Container, Set
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.conftest import Served
from tests.fakes import FakeEngine, until

# From the end of the last request to silence; it takes milliseconds, unless the machine has other things to do.
SECONDS = 30.0
STRANGER = "of a stranger"


class Connection(NamedTuple):
    """An open one, by the ports of whoever asks and of the engine."""

    client: int
    engine: int


class Quiescence:
    """Given the state before a test by `begin`, `check` waits for the same state after it."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self.routers: list[Served] = []
        self.engines: list[FakeEngine] = []
        self._before: set[object] = set()

    def begin(self) -> None:
        """From here on nothing may be added that stays."""
        self._before = {*open_files(), *asyncio.all_tasks()}

    async def check(self, complaints: list[logging.LogRecord]) -> None:
        """Fails with what is left, if there is anything left in the end."""
        try:
            await until(lambda: not any(self._in_flight().values()), self._seconds)
        except AssertionError:
            raise AssertionError(f"not quiet: {self._in_flight()}") from None
        for served in self.routers:
            assert (await served.client.get("/healthz")).status_code == 200
            await served.client.aclose()
        await self._gone(self._left)
        assert [record.getMessage() for record in complaints if record.levelno >= logging.ERROR] == []

    async def check_engines(self) -> None:
        """The same of the engines alone, when whoever asked them has ended."""
        await self._gone(self._connections)

    async def _gone(self, left: Callable[[], Set[object]]) -> None:
        """Wait until nothing is there that was there from now on: a router's own looks at its engines come and go."""
        deadline = asyncio.get_running_loop().time() + self._seconds
        stays = set(left())
        while stays:
            if asyncio.get_running_loop().time() > deadline:
                stays -= self._strangers()
                assert not stays, f"not quiet: {[_told(one) for one in stays]}"
            self._close_idle()
            await asyncio.sleep(0.005)
            stays &= left()

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

    def _close_idle(self) -> None:
        """What is kept for the next request, or for the next look of the router's own, is not a leak."""
        for served in self.routers:
            for transport in (served.router.core.transport, served.router.core.own_transport):
                transport.retain(set())  # type: ignore[attr-defined]

    def _connections(self) -> Set[object]:
        return {Connection(port, engine.port) for engine in self.engines for port in engine.clients.values()}

    def _left(self) -> Set[object]:
        tasks = {task for task in asyncio.all_tasks() if not _stands(task)}
        return {*self._connections(), *open_files(), *tasks} - self._before

    def _strangers(self) -> set[object]:
        """Connections of processes that have nothing to do with the tests and know the port from before."""
        ours, found = own_sockets(), set[object]()
        for engine in self.engines:
            for task, port in engine.clients.items():
                if owner_of(port, engine.port, ours) == STRANGER:
                    accepted = f"socket:[{inode_of(engine.port, port)}]"
                    found |= {task, Connection(port, engine.port)}
                    found |= {file for file in open_files() if file[1] == accepted}
        return found


def _told(left: object) -> str:
    if isinstance(left, Connection):
        return f"a connection to an engine, {owner_of(left.client, left.engine, own_sockets())}"
    return f"the file {left[1]}" if isinstance(left, tuple) else repr(left)


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
    inode = inode_of(port, server)
    if inode is None:
        return "of nobody"
    # One whose process has ended has no inode.
    return "ours" if inode in ours or inode == "0" else STRANGER


def inode_of(local: int, remote: int) -> str | None:
    """Of the end of a connection on this machine that has this port."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if (int(fields[1][9:], 16), int(fields[2][9:], 16)) == (local, remote):
            return fields[9]
    return None


def open_files(but: Container[int] = ()) -> set[tuple[int, str]]:
    """Number and what it is: of a connection its inode, which no other gets. `but`: without those of these ports."""
    found = set()
    for file in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            kind = os.readlink(f"/proc/self/fd/{file}")
            if not kind.startswith("socket:") or _is_connection(file, but):
                found.add((file, kind))
    return found


def _is_connection(file: int, but: Container[int]) -> bool:
    """Neither an engine's listener, nor of the pair for signals, which the event loop has anew whenever it is run."""
    found = socket.socket(fileno=file)
    try:
        if found.family == socket.AF_UNIX or found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False
        ends = [found.getsockname()]
        with suppress(OSError):  # the other end has gone
            ends.append(found.getpeername())
        return not any(end[1] in but for end in ends)
    finally:
        found.detach()


# One stretch of a test, for tests that have the router and its engines already


@asynccontextmanager
async def quiet(served: Served, seconds: float = SECONDS) -> AsyncIterator[None]:
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
        await before.comes_back(seconds)
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
        self._before = {*open_files(_client_ports(served)), *asyncio.all_tasks()}

    async def comes_back(self, seconds: float) -> None:
        """Wait until each has been as it was: a router's own looks at its engines come and go."""
        deadline = asyncio.get_running_loop().time() + seconds
        stays = self._left()
        while stays:
            assert asyncio.get_running_loop().time() < deadline, f"not quiet: {stays}"
            if not any(isinstance(one, str) for one in stays):
                # What is kept for the next request is not a leak; closing it ends its task at the engine.
                self._served.router.core.transport.retain(set())  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
            stays &= self._left()

    def _left(self) -> set[object]:
        """What is not as it was, by its name; of a count that should be 0, any other is wrong, below it too."""
        models = list(self._served.router.core.fleet.models.values())
        left = {
            "requests": self._served.router.core.admission.in_flight,
            "requests of models": any(model.in_flight for model in models),
            "requests at backends": any(backend.in_flight for model in models for backend in model.backends),
            "requests at addresses": any(b.origin.in_flight for model in models for b in model.backends),
            "connections in use": max(0, active(self._served) - self._active),
        }
        found: set[object] = {name for name, value in left.items() if value}
        return found | ({*open_files(_client_ports(self._served)), *asyncio.all_tasks()} - self._before)


def _client_ports(served: Served) -> set[int]:
    """Of the connections that the test's own client keeps."""
    pool = served.client._transport._pool  # type: ignore[attr-defined]
    made = [one._connection for one in pool.connections if one._connection is not None]
    return {one._network_stream.get_extra_info("client_addr")[1] for one in made}
