"""Engines as processes of this machine: small real ones, by the driver that starts, checks and stops them."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from control_plane.clients.process_log import ProcessLog
from control_plane.clients.processes import Processes, read
from control_plane.pure.lifecycle import MOST_LINES, DriverError, Instance, LogQuery, standing
from control_plane.pure.processes import Command, Pace, ProcessesError, commands_of, next_pause
from tests.control_plane.processes import run, served
from tests.fakes import in_background, until
from tests.ports import free_port

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

# Answers /health on its port; what else it does is in the words after that.
ENGINE = """
import http.server, os, signal, subprocess, sys
port, words = int(sys.argv[1]), sys.argv[2:]
healthy = "sick" not in words
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global healthy
        if self.path == "/sicken":
            healthy = False
        if self.path == "/exit":
            os._exit(3)
        self.send_response(200 if healthy else 503)
        self.end_headers()
    def log_message(self, *words):
        pass
if "deaf" in words:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "core" in words:
    core = subprocess.Popen(["sleep", "1000"], start_new_session="daemon" in words)
    print("core", core.pid, flush=True)
print("begins", os.getpid(), os.environ.get("WORD"), flush=True)
http.server.ThreadingHTTPServer.allow_reuse_address = True
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
QUICK = Pace(loading=0.02, ready=0.05, answers=2, first=0.05, longest=0.2, steady=60, failures=2, ending=0.5)
# With pauses in which nobody misses that one is failing
PAUSES = QUICK._replace(first=2, longest=2)
Start = Callable[..., Any]


def command(name: str = "a", *words: str, port: int | None = None, **more: Any) -> Command:
    port = port or free_port()
    line = (sys.executable, "-I", "-S", "-c", ENGINE, str(port), *words)
    return Command(**{"name": name, "command": line, "health": f"http://127.0.0.1:{port}/health", **more})


async def ending(driver: Processes) -> None:
    with suppress(asyncio.CancelledError):
        await driver.run()


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """`await start(command, ...)` -> a driver of these processes, which runs."""
    async with AsyncExitStack() as stack:

        async def begin(*commands: Command, pace: Pace = QUICK) -> Processes:
            driver = Processes(commands, pace)
            stack.push_async_callback(driver.close)
            task = await stack.enter_async_context(in_background(ending(driver)))
            stack.callback(task.cancel)
            return driver

        yield begin


async def one(driver: Processes, name: str = "a") -> Instance:
    [found] = (await driver.look(name)).instances
    return found


async def becomes(driver: Processes, state: str, name: str = "a") -> Instance:
    async with asyncio.timeout(60):
        while True:
            if (found := await one(driver, name)).state == state:
                return found
            await asyncio.sleep(0.01)


async def until_restarted(driver: Processes, times: int) -> None:
    async with asyncio.timeout(60):
        while True:
            if (await one(driver)).restarts >= times:
                return
            await asyncio.sleep(0.01)


async def lines(driver: Processes, name: str = "a", **query: Any) -> list[str]:
    return [line async for line in driver.log(name, LogQuery(name, **query))]


async def word(driver: Processes, beginning: str, place: int = 1) -> str:
    """A word of the first line of the log that begins so."""
    async with asyncio.timeout(60):
        while True:
            if found := [line for line in await lines(driver) if line.startswith(beginning)]:
                return found[0].split()[place]
            await asyncio.sleep(0.01)


def stat(pid: int) -> list[str]:
    """State and parent of a process, and more; X: there is none."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return ["X"]


async def gone(*pids: int) -> None:
    """Wait until there are no such processes; an orphan is a zombie where nobody waits for it."""
    await until(lambda: all(stat(pid)[0] in "XZ" for pid in pids))


async def test_a_process_is_started_becomes_ready_and_is_stopped(start: Start) -> None:
    port = free_port()
    driver = await start(command(port=port, environment={"WORD": "given"}))
    assert await driver.objects() == ["a"]
    assert standing(await driver.look("a")).state == "stopped"

    await driver.scale("a", 1)
    assert standing(await driver.look("a")).state == "loading"
    ready = await becomes(driver, "ready")
    assert await word(driver, "begins", 2) == "given"
    pid = int(await word(driver, "begins"))
    await driver.scale("a", 0)
    assert standing(await driver.look("a")).state == "stopping"
    stopped = await becomes(driver, "stopped")

    assert (ready.restarts, ready.last_exit, ready.tail) == (0, None, ())
    # It was asked to.
    assert stopped.last_exit is None
    assert ready.address == f"127.0.0.1:{port}"
    assert stat(pid) == ["X"]
    events = (await driver.look("a")).events
    assert [event.reason for event in events] == ["Stopped", "Ready", "Started"]


async def test_it_gets_no_settings_of_the_control_plane(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTROL_PLANE_SERVICE_TOKEN", "hush")
    monkeypatch.setenv("OF_THE_MACHINE", "kept")
    show = ("sh", "-c", "echo ${CONTROL_PLANE_SERVICE_TOKEN-none} $OF_THE_MACHINE; pwd; cat; exit 4")
    driver = await start(Command(name="a", command=show, cwd="/tmp", health=f"http://127.0.0.1:{free_port()}/"))

    await driver.scale("a", 1)
    failing = await becomes(driver, "failing")

    assert failing.tail == ("none kept", "/tmp")
    assert failing.last_exit is not None
    assert failing.last_exit.code == 4


@pytest.mark.parametrize(("words", "stop_after"), [(("core",), 20), (("core", "deaf"), 0.1), (("core", "daemon"), 20)])
async def test_what_a_process_has_started_ends_with_it(start: Start, words: tuple[str, ...], stop_after: float) -> None:
    driver = await start(command("a", *words, stop_after=stop_after))
    await driver.scale("a", 1)
    await becomes(driver, "ready")
    core, pid = int(await word(driver, "core")), int(await word(driver, "begins"))

    await driver.scale("a", 0)
    await becomes(driver, "stopped")

    await gone(core, pid)
    killed = [event for event in (await driver.look("a")).events if event.reason == "Killed"]
    assert len(killed) == ("deaf" in words)


async def test_one_that_is_killed_starts_again(start: Start) -> None:
    # Its end is told by its supervisor, not by what its health answers meanwhile.
    driver = await start(command("a", "core"), pace=PAUSES._replace(failures=1000))
    await driver.scale("a", 1)
    await becomes(driver, "ready")
    first, core = int(await word(driver, "begins")), int(await word(driver, "core"))

    os.kill(first, signal.SIGKILL)
    failing = await becomes(driver, "failing")
    await gone(core)
    again = await becomes(driver, "ready")

    assert failing.reason is not None
    assert failing.reason.startswith("SIGKILL; it starts again in ")
    assert failing.tail[-1].startswith(f"begins {first}")
    assert again.last_exit is not None
    assert (again.restarts, again.last_exit.code, again.last_exit.reason) == (1, 137, "SIGKILL")
    assert int(await word(driver, "begins")) != first
    assert (await lines(driver, previous=True))[-1].startswith(f"begins {first}")


async def test_a_supervisor_that_is_killed_leaves_nothing(start: Start) -> None:
    driver = await start(command("a", "core"), pace=PAUSES)
    await driver.scale("a", 1)
    await becomes(driver, "ready")
    first, core = int(await word(driver, "begins")), int(await word(driver, "core"))

    os.kill(int(stat(first)[1]), signal.SIGKILL)
    await becomes(driver, "failing")

    await gone(first, core)


@pytest.mark.parametrize(
    ("line", "code", "reason", "tail"),
    [
        (["/nowhere/engine"], 127, "exit code 127: the command was not found", "No such file or directory"),
        ([__file__], 126, "exit code 126: the command is not executable", "Permission denied"),
        (["sh", "-c", "echo out of memory; exit 1"], 1, "exit code 1", "out of memory"),
        (["sh", "-c", "echo no; kill -TERM $$"], 143, "SIGTERM", "no"),
    ],
)
async def test_a_command_that_fails_says_why(start: Start, line: list[str], code: int, reason: str, tail: str) -> None:
    driver = await start(Command(name="a", command=tuple(line), health=f"http://127.0.0.1:{free_port()}/"))
    await driver.scale("a", 1)
    await becomes(driver, "failing")
    await until_restarted(driver, 2)
    failing = await becomes(driver, "failing")
    found = standing(await driver.look("a"))

    await driver.scale("a", 0)
    stopped = await one(driver)

    assert failing.last_exit is not None
    assert failing.last_exit.code == code
    assert failing.reason is not None
    assert failing.reason.startswith(f"{reason}; it starts again in ")
    assert tail in failing.tail[-1]
    assert found.state == "failing"
    assert (stopped.state, stopped.reason) == ("stopped", None)


async def test_a_port_that_is_taken_is_no_health(start: Start) -> None:
    async with await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0) as other:
        port = other.sockets[0].getsockname()[1]
        driver = await start(command(port=port))
        await driver.scale("a", 1)
        failing = await becomes(driver, "failing")
    await becomes(driver, "ready")

    assert failing.reason is not None
    assert failing.reason.startswith(f"port {port} is taken")
    assert f"port {port} is taken" in failing.tail[-1]


async def test_one_whose_health_fails_is_failing_and_runs_on(start: Start) -> None:
    port = free_port()
    driver = await start(command(port=port))
    await driver.scale("a", 1)
    await becomes(driver, "ready")

    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /sicken HTTP/1.0\r\n\r\n")
    failing = await becomes(driver, "failing")
    writer.close()

    assert failing.reason == "its health has failed 2 times: status 503"
    assert (failing.restarts, failing.last_exit) == (0, None)
    await driver.scale("a", 0)
    await becomes(driver, "stopped")


async def test_one_that_never_becomes_ready_is_loading(start: Start) -> None:
    driver = await start(command("a", "sick", starts=True))
    await word(driver, "begins")

    assert (await one(driver)).state == "loading"


async def test_one_that_is_to_start_while_it_stops_starts_afterwards(start: Start) -> None:
    driver = await start(command("a", "deaf", stop_after=0.3))
    await driver.scale("a", 1)
    await becomes(driver, "ready")
    first = await word(driver, "begins")

    await driver.scale("a", 0)
    await becomes(driver, "stopping")
    await driver.scale("a", 1)
    assert (await one(driver)).state == "stopping"
    again = await becomes(driver, "ready")

    assert await word(driver, "begins") != first
    assert again.restarts == 0


async def test_lines_are_followed_over_restarts_until_the_end(start: Start) -> None:
    driver = await start(command())
    reading: list[str] = []

    async def follow() -> None:
        async for line in driver.log("a", LogQuery("a", follows=True)):
            reading.append(line)

    async with in_background(follow()) as task:
        await driver.scale("a", 1)
        await until(lambda: len(reading) == 1)
        await becomes(driver, "ready")
        os.kill(int(reading[0].split()[1]), signal.SIGKILL)
        await until(lambda: len(reading) == 2)
        driver.end()
        await asyncio.wait_for(task, 30)

    assert all(line.startswith("begins ") for line in reading)


async def test_what_is_asked_in_vain_is_refused(start: Start) -> None:
    driver = await start(command())

    for asked, reason in (
        (driver.scale("b", 1), "not_found"),
        (driver.scale("a", 2), "invalid"),
        (lines(driver, "b"), "not_found"),
        (lines(driver, previous=True), "gone"),
        (lines(driver, container="other"), "not_found"),
    ):
        with pytest.raises(DriverError) as caught:
            await asked
        assert caught.value.reason == reason
    assert (await driver.look("b")).wanted is None


async def test_a_slow_reader_loses_the_oldest_lines_and_is_told() -> None:
    log = ProcessLog(waiting=3)
    log.begin()
    log.add(["old", "last"])
    reader = log.follow(1)

    first = await anext(reader)
    log.add(str(number) for number in range(5))
    missing, *rest = [await anext(reader) for _ in range(4)]
    log.end()

    assert first == "last"
    assert "2 lines" in missing
    assert rest == ["2", "3", "4"]
    assert [line async for line in reader] == []


def test_the_last_lines_of_two_runs_are_kept() -> None:
    log = ProcessLog()
    for run_number in range(3):
        log.begin()
        log.add(f"{run_number}-{number}" for number in range(MOST_LINES + 1))

    assert len(log.last(MOST_LINES + 1)) == MOST_LINES
    assert log.last(1) == (f"2-{MOST_LINES}",)
    assert log.last(1, previous=True) == (f"1-{MOST_LINES}",)
    assert log.last(0) == ()


def test_pauses_double_until_it_was_ready_for_long() -> None:
    pace = Pace()
    pauses = [next_pause(pace, None, 0)]
    while len(pauses) < 8:
        pauses.append(next_pause(pace, pauses[-1], 59))

    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert next_pause(pace, 60, 60) == 1


GOOD = "{name: a, command: [engine], health: 'http://127.0.0.1:8001/health'}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "file: must be a mapping"),
        ("processes: [", "it is not YAML in line "),
        ("process: []", "unknown key 'process'; did you mean 'processes'?"),
        (f"processes: [{GOOD}, {GOOD}]", "two processes have the name 'a'"),
        (f"processes: [{GOOD[:-1]}, helth: b}}]", "processes.0: unknown key 'helth'; did you mean 'health'?"),
        (GOOD.join(("processes: [", "]")).replace("[engine]", "engine"), "processes.0.command: must be a list"),
        (f"processes: [{GOOD[:-1]}, environment: {{A: 1}}}}]", "processes.0.environment.A: must be text"),
        (f"processes: [{GOOD[:-1]}, cwd: here}}]", "processes.0.cwd: must be an absolute path"),
        (f"processes: [{GOOD}]".replace("http:", "ftp:"), "processes.0.health: must be a URL"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(text: str, said: str) -> None:
    with pytest.raises(ProcessesError) as caught:
        commands_of(text)

    assert said in str(caught.value)


def test_errors_and_representations_have_no_command_and_no_environment() -> None:
    text = "processes: [{name: a, command: [engine, --key, hush], environment: {KEY: hush}, health: %s}]"

    with pytest.raises(ProcessesError) as caught:
        commands_of(text % "hush")
    with pytest.raises(ProcessesError) as scanned:
        commands_of(text % "'hush")

    assert "hush" not in str(caught.value) + str(scanned.value)
    assert "hush" not in repr(commands_of(text % "'http://127.0.0.1:1/'"))


def test_the_example_can_be_used() -> None:
    example = Path(__file__).parents[2] / "examples" / "engines" / "processes.yaml"

    assert [one.starts for one in commands_of(example.read_text())] == [True, False]


@pytest.mark.parametrize(("mode", "fits"), [(0o600, True), (0o644, True), (0o664, False), (0o646, False)])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int, fits: bool) -> None:
    path = tmp_path / "processes.yaml"
    path.write_text(f"processes: [{GOOD}]")
    path.chmod(mode)

    if fits:
        assert [one.name for one in read(path)] == ["a"]
    else:
        with pytest.raises(ProcessesError, match="chmod go-w"):
            read(path)


async def test_a_control_plane_does_not_start_with_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/cp.sqlite3"

    code, _, said = await run("serve", database_url=url, port="0", processes=str(tmp_path / "missing.yaml"))

    assert code == 2
    assert said.startswith("control-plane: CONTROL_PLANE_PROCESSES='")
    assert "missing.yaml': it cannot be read: No such file or directory" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_processes_end_with_the_control_plane(tmp_path: Path, number: int) -> None:
    wanted, pids = command("a", "core", "deaf", starts=True, stop_after=600), tmp_path / "pids"
    shown = wanted.model_dump(mode="json")
    shown["command"] = ["sh", "-c", f'exec "$@" > {pids}', "sh", *wanted.command]
    path = tmp_path / "processes.yaml"
    path.write_text(yaml.safe_dump({"processes": [shown]}))
    path.chmod(0o600)

    def written() -> list[int]:
        return [int(line.split()[1]) for line in pids.read_text().splitlines()] if pids.exists() else []

    async with served(tmp_path, f"sqlite:///{tmp_path}/cp.sqlite3", processes=str(path)) as plane:
        await until(lambda: len(written()) == 2)
        code = await plane.stop(number, patience=60)

    assert code == (0 if number == signal.SIGTERM else -number)
    await gone(*written())
