"""One engine as a process of this machine: started, checked, started again when it ends, and stopped."""

import asyncio
import logging
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, STDOUT
from asyncio.subprocess import Process as Child
from collections import deque
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx

from control_plane.clients.process_log import ProcessLog
from control_plane.pure.lifecycle import Event, Exit, Instance, Observed, State
from control_plane.pure.lines import Lines
from control_plane.pure.processes import Command, Pace, ended_because, next_pause
from inference_api import supervisor
from inference_api.routing.causes import cause_of

log = logging.getLogger(__name__)

# Lines of the log that go with a failure; events that are kept
_TAIL, _EVENTS = 20, 50
# Seconds: until what has the port has answered, and until what was killed has ended
_CONNECT, _KILLED = 1.0, 5.0
_SIGNALS = {number.value: number.name for number in signal.Signals}
# The settings of this project, with its secrets, are none of an engine's business.
_OWN = ("INFERENCE_API_", "REGISTRY_STUB_", "CONTROL_PLANE_")


class Process:
    """`look`: what is to be seen of it. `run` does what `want` and `end` ask for."""

    def __init__(self, command: Command, client: httpx.AsyncClient, pace: Pace) -> None:
        self.command = command
        self.log = ProcessLog()
        self._client = client
        self._pace = pace
        self._wanted = command.starts
        self._must_stop = False
        self._state: State = "stopped"
        self._reason: str | None = None
        self._since: int | None = None
        self._restarts = 0
        self._last_exit: Exit | None = None
        self._events: deque[Event] = deque(maxlen=_EVENTS)
        # Monotonic seconds: when it became ready, when it starts again, and when it has to have ended
        self._ready_at: float | None = None
        self._again_at: float | None = None
        self._ends_at: float | None = None
        self._news = asyncio.Event()

    def look(self) -> Observed:
        reason = self._reason
        # It may be wanted no more, or at once, and not know it yet.
        if self._again_at is not None and self._state == "failing":
            reason = f"{reason}; it starts again in {max(0.0, self._again_at - time.monotonic()):.0f} s"
        name = self.command.name
        tail = self.log.last(_TAIL) if self._state == "failing" else ()
        one = Instance(
            *(name, self._state, reason, self._since, self._restarts, self._last_exit),
            containers=(name,),
            address=self.command.place,
            tail=tail,
        )
        return Observed(int(self._wanted), (one,), tuple(reversed(self._events)))

    def want(self, wanted: bool) -> None:
        """Start it, or stop it: returns at once."""
        if wanted == self._wanted or self._ends_at is not None:
            return
        self._wanted = wanted
        # Also if it is wanted again before that is done.
        self._must_stop = self._must_stop or not wanted
        if wanted and self._state == "stopped":
            self._become("loading")
        elif not wanted:
            self._become("stopped" if self._again_at is not None else "stopping")
        self._news.set()

    def end(self) -> None:
        """Stop it for good, soon."""
        if self._ends_at is None:
            self._ends_at = time.monotonic() + self._pace.ending
            self._wanted, self._must_stop = False, True
            self.log.end()
            self._news.set()

    async def run(self) -> None:
        """Until `end`."""
        pause: float | None = None
        while self._ends_at is None:
            if self._must_stop:
                pause, self._restarts, self._must_stop = None, 0, False
            if not self._wanted:
                self._become("stopped")
                await self._wait()
                continue
            self._become("loading")
            try:
                failed = await self._live()
            except Exception:
                # The boundary of a background task: the others must go on.
                log.exception("a process cannot be run")
                failed = "internal error"
            if failed is not None and not self._must_stop:
                self._fail(failed)
                ready_for = 0.0 if self._ready_at is None else time.monotonic() - self._ready_at
                pause = next_pause(self._pace, pause, ready_for)
                await self._rest(pause)

    async def _rest(self, seconds: float) -> None:
        """Until it is to start again, or is not wanted any more."""
        self._again_at = time.monotonic() + seconds
        while not self._must_stop and (left := self._again_at - time.monotonic()) > 0:
            await self._wait(left)
        self._again_at = None
        self._restarts += 1

    async def _live(self) -> str | None:
        """From its start to its end. Returns why it is none that was asked for."""
        self._ready_at = None
        self.log.begin()
        if await _is_taken(self.command.health):
            taken = f"port {urlsplit(self.command.health).port} is taken: something else listens where its health is"
            self.log.add([taken])
            return taken
        try:
            child = await self._start()
        except OSError as exc:
            return f"it cannot be started: {exc.strerror or exc}"
        reaping = asyncio.create_task(child.wait())
        reaping.add_done_callback(lambda _: self._news.set())
        output, health = asyncio.create_task(self._read(child)), asyncio.create_task(self._check())
        try:
            while not self._must_stop and not reaping.done():
                await self._wait()
            health.cancel()
            asked = not reaping.done()
            if asked:
                await self._stop(child, reaping)
            code = await reaping
            await asyncio.wait([output], timeout=_KILLED)
        finally:
            health.cancel()
            output.cancel()
            _kill(child)
        why = ended_because(code, _SIGNALS)
        if not asked:
            self._last_exit = Exit(code, _SIGNALS.get(code - 128), _now())
            return why
        self._say(False, "Stopped", why)
        return None

    async def _start(self) -> Child:
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(_OWN)}
        arguments: tuple[Any, ...] = (supervisor.__file__, self.command.cwd or ".", *self.command.command)
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", *arguments),
            stdin=PIPE,
            stdout=PIPE,
            stderr=STDOUT,
            env={**inherited, **self.command.environment},
            start_new_session=True,
        )
        self._say(False, "Started", f"process {child.pid}")
        return child

    async def _stop(self, child: Child, reaping: "asyncio.Task[int]") -> None:
        """SIGTERM for the command, and SIGKILL for all that it has started."""
        self._become("stopping")
        with suppress(ProcessLookupError):
            child.terminate()
        until = time.monotonic() + self.command.stop_after
        while not reaping.done():
            ends_at = until if self._ends_at is None else min(until, self._ends_at)
            if (left := ends_at - time.monotonic()) <= 0:
                break
            await self._wait(left)
        if not reaping.done():
            self._say(True, "Killed", "it did not end after SIGTERM")
            assert child.stdin is not None
            child.stdin.close()
            await asyncio.wait([reaping], timeout=_KILLED)
            _kill(child)

    async def _read(self, child: Child) -> None:
        lines = Lines()
        assert child.stdout is not None
        while data := await child.stdout.read(64 * 1024):
            self.log.add(lines.feed(data))
        self.log.add(lines.end())

    async def _check(self) -> None:
        failures = 0
        while True:
            problem = await self._problem()
            failures = 0 if problem is None else failures + 1
            if problem is None and self._state in ("loading", "failing"):
                self._ready_at = self._ready_at or time.monotonic()
                self._become("ready")
                self._say(False, "Ready", "its health answers 200")
            elif self._state == "ready" and failures >= self._pace.failures:
                self._fail(f"its health has failed {failures} times: {problem}")
            await asyncio.sleep(self._pace.loading if self._state == "loading" else self._pace.ready)

    async def _problem(self) -> str | None:
        """Why it is not healthy; None: it is."""
        try:
            async with self._client.stream("GET", self.command.health) as answer:
                return None if answer.status_code == 200 else f"status {answer.status_code}"
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            return cause_of(exc)

    async def _wait(self, seconds: float | None = None) -> None:
        """Until something happens."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)
        self._news.clear()

    def _become(self, state: State, reason: str | None = None) -> None:
        if state != self._state:
            self._state, self._since = state, _now()
        self._reason = reason

    def _fail(self, reason: str) -> None:
        self._become("failing", reason)
        self._say(True, "Failed", reason)

    def _say(self, warns: bool, reason: str, message: str) -> None:
        name = self.command.name
        self._events.append(Event(_now(), warns, reason, message, name))
        fields = {"process": name, "event": reason, "reason": message}
        log.log(logging.WARNING if warns else logging.INFO, "the process of an engine", extra={"fields": fields})


def _kill(child: Child) -> None:
    """What is left of the session, if the supervisor itself was killed."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


async def _is_taken(url: str) -> bool:
    """Whether something listens there already: it would be taken for the process that starts."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(parts.hostname, port), _CONNECT)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


def _now() -> int:
    return time.time_ns() // 1_000_000
