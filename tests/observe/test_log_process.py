"""The log of a process: nobody reads it, somebody does, and the process ends, by itself or not."""

import asyncio
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command import command, ready
from tests.fakes import CHAT

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """(end to read, end to write) of a pipe that takes 4 KiB: some ten lines."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    yield reader, writer
    os.close(reader)
    os.close(writer)


async def test_a_router_whose_log_nobody_reads_answers_and_stops(
    tmp_path: Path, start_engine: Start, pipe: tuple[int, int]
) -> None:
    engine = await start_engine()
    async with command(tmp_path, engine, stdout=pipe[1]) as router:
        await ready(router.client)
        statuses = [(await router.client.post("/v1/chat/completions", json=CHAT)).status_code for _ in range(100)]
        page = (await router.client.get("/metrics")).text
        began = time.monotonic()
        code, _, err = await router.stop()
        took = time.monotonic() - began

    assert statuses == [200] * 100
    # They wait still, for a reader who comes back.
    assert "inference_api_log_lines_dropped_total 0" in page
    assert (code, err) == (0, "")
    # A second for the log; the rest is the machine's.
    assert took < 6


async def test_a_router_that_stops_has_written_every_line(
    tmp_path: Path, start_engine: Start, pipe: tuple[int, int]
) -> None:
    engine = await start_engine()
    async with command(tmp_path, engine, stdout=pipe[1]) as router:
        reading = asyncio.create_task(asyncio.to_thread(read_until, pipe[0], b'"stopped"'))
        await ready(router.client)
        for number in range(100):
            await router.client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": str(number)})
        code, _, _ = await router.stop()
        lines = [json.loads(line) for line in (await asyncio.wait_for(reading, 10)).splitlines()]

    assert code == 0
    chats = [line["request_id"] for line in lines if line.get("route") == "chat_completions"]
    assert chats == [str(number) for number in range(100)]
    assert (lines[0]["event"], lines[-1]["event"]) == ("serving", "stopped")


def read_until(fd: int, mark: bytes) -> bytes:
    read = b""
    while mark not in read or not read.endswith(b"\n"):
        read += os.read(fd, 65536)
    return read


PROGRAM = """\
import gc, logging, sys, threading, warnings
from inference_api.observe.log import configure_logging, log_unhandled
configure_logging("info", "json")
log_unhandled()
"""


def run(program: str, **streams: Any) -> subprocess.CompletedProcess[bytes]:
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 20} | streams
    return subprocess.run([sys.executable, "-c", PROGRAM + program], check=False, **settings)


def test_the_traceback_that_ends_the_process_goes_to_stderr_and_what_came_before_to_the_log() -> None:
    done = run("logging.info('before')\nraise RuntimeError('boom')")

    assert done.returncode == 1
    assert done.stderr.startswith(b"Traceback (most recent call last):\n")
    assert done.stderr.endswith(b"RuntimeError: boom\n")
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["before"]


def test_a_process_ends_though_nobody_reads_what_it_says_at_the_end(pipe: tuple[int, int]) -> None:
    # No SIGPIPE, no full buffer that Python itself would wait for: the pipe is full before it says a word.
    os.write(pipe[1], b"x" * 4096)
    done = run("logging.info('before')\nraise RuntimeError('boom')", stdout=pipe[1], stderr=pipe[1])

    assert done.returncode == 1


STRAY = """\
class Stray:
    def __del__(self):
        raise ValueError('a finalizer')
Stray()
def fail():
    raise ValueError('a thread')
thread = threading.Thread(target=fail, name='side')
thread.start()
thread.join()
warnings.warn('a warning')
"""


def test_what_python_prints_to_stderr_beside_the_work_is_logged() -> None:
    done = run(STRAY)

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (0, b"")
    assert [line["level"] for line in lines] == ["error", "error", "warning"]
    assert [line["exception"].splitlines()[-1] for line in lines[:2]] == [
        "ValueError: a finalizer",
        "ValueError: a thread",
    ]
    assert "side" in lines[1]["event"]
    assert "a warning" in lines[2]["event"]
    assert lines[2]["logger"] == "py.warnings"


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_process_that_was_started_without_a_stream_runs(closed: str) -> None:
    program = PROGRAM + "logging.info('here')\nthread = threading.Thread(target=int, args='x')\nthread.start()"
    command = ["sh", "-c", f'exec "$0" "$@" {closed}>&-', sys.executable, "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, timeout=20)

    assert (done.returncode, done.stderr) == (0, b"")
    assert (b"here" in done.stdout) == (closed != "1")
