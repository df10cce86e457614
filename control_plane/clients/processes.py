"""The driver `processes`: engines as processes of this machine, whose commands are in a file alone."""

import asyncio
import logging
import stat
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from control_plane.clients.http import http_client
from control_plane.clients.process import Process
from control_plane.pure.lifecycle import MOST_LINES, DriverError, DriverName, LogQuery, Observed
from control_plane.pure.processes import Command, Pace, ProcessesError, commands_of
from control_plane.settings import PREFIX, Settings, SettingsError

log = logging.getLogger(__name__)


def read(path: Path) -> tuple[Command, ...]:
    """The commands of a file. Raises ProcessesError: a clause with the fix."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            text = file.read().decode()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else "it is not UTF-8"
        raise ProcessesError(f"it cannot be read: {reason}") from None
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ProcessesError("others may write it, and so choose what is run; chmod go-w it")
    commands = commands_of(text)
    if mode & stat.S_IROTH and any(one.has_secrets for one in commands):
        log.warning(
            "everybody may read the file of the processes, which has secrets", extra={"fields": {"file": str(path)}}
        )
    return commands


class Processes:
    """A `Driver` whose objects are one process each. They end with the control plane."""

    name: DriverName = "processes"
    namespace: str | None = None
    scales = reads_logs = True
    largest = 1

    def __init__(self, commands: Sequence[Command], pace: Pace | None = None) -> None:
        self._pace = pace or Pace()
        self._client = http_client(self._pace.answers)
        self._processes = {one.name: Process(one, self._client, self._pace) for one in commands}

    async def objects(self) -> Sequence[str]:
        return sorted(self._processes)

    async def look(self, object: str) -> Observed:
        found = self._processes.get(object)
        return Observed(None) if found is None else found.look()

    async def scale(self, object: str, instances: int) -> None:
        if instances not in (0, 1):
            raise DriverError("invalid", "A process runs once, or not at all.")
        self._find(object).want(bool(instances))

    async def log(self, object: str, query: LogQuery) -> AsyncGenerator[str, None]:
        found = self._find(object)
        if query.instance != object or query.container not in (None, object):
            raise DriverError("not_found", f"The process {object[:64]!r} has one log, under its own name.")
        if query.previous and not found.log.has_previous:
            raise DriverError("gone", f"The process {object[:64]!r} has not run before.")
        count = min(query.lines, MOST_LINES)
        if query.follows and not query.previous:
            async for line in found.log.follow(count):
                yield line
        else:
            for line in found.log.last(count, query.previous):
                yield line

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(one.run()) for one in self._processes.values()]
            try:
                await asyncio.Event().wait()
            finally:
                self.end()
                if running:
                    await asyncio.wait(running)

    def end(self) -> None:
        for one in self._processes.values():
            one.end()

    async def close(self) -> None:
        await self._client.aclose()

    def _find(self, object: str) -> Process:
        found = self._processes.get(object)
        if found is None:
            raise DriverError("not_found", f"The file of {PREFIX}PROCESSES has no process {object[:64]!r}.")
        return found


def driver(settings: Settings) -> Processes | None:
    """As it is set up. Raises SettingsError."""
    if settings.processes is None:
        return None
    try:
        return Processes(read(settings.processes))
    except ProcessesError as exc:
        raise SettingsError(f"{PREFIX}PROCESSES={str(settings.processes)!r}: {exc}") from None
