"""A driver that does what a test says, for what is built on drivers; the real ones have tests of their own."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from control_plane.connections import Connections
from control_plane.pure.lifecycle import DriverError, DriverName, Instance, LogQuery, Observed


class Scripted:
    """Its one object is `engine`. `lines`: of each instance's log; None ends it for who follows."""

    namespace: str | None = None

    def __init__(self, name: DriverName = "processes", largest: int = 4) -> None:
        self.name = name
        self.scales = True
        self.reads_logs = True
        self.largest = largest
        self.observed = Observed(0)
        self.scaled: list[int] = []
        self.lines: list[str | None] = []
        self.problem: DriverError | None = None
        self.changed = asyncio.Event()
        self.following = 0

    def connections(self) -> Connections:
        return Connections(drivers={self.name: self})

    def add(self, *lines: str | None) -> None:
        self.lines += lines
        self.changed.set()

    async def objects(self) -> Sequence[str]:
        return ["engine"]

    async def look(self, object: str) -> Observed:
        self._fail()
        return self.observed if object == "engine" else Observed(None)

    async def scale(self, object: str, instances: int) -> None:
        self._fail()
        self.scaled.append(instances)
        names = [f"engine-{number}" for number in range(instances)]
        self.observed = Observed(instances, tuple(Instance(one, "ready", containers=("main", "side")) for one in names))

    async def log(self, object: str, query: LogQuery) -> AsyncGenerator[str, None]:
        self._fail()
        for line in [line for line in self.lines if line is not None][-query.lines :]:
            yield f"{query.container}: {line}"
        read = len(self.lines)
        self.following += 1
        try:
            while query.follows:
                await self.changed.wait()
                self.changed.clear()
                for new in self.lines[read:]:
                    if new is None:
                        return
                    yield f"{query.container}: {new}"
                read = len(self.lines)
        finally:
            self.following -= 1

    async def run(self) -> None:
        await asyncio.Event().wait()

    def end(self) -> None: ...

    async def close(self) -> None: ...

    def _fail(self) -> None:
        if self.problem is not None:
            raise self.problem
