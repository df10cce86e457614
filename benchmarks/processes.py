"""Starting and stopping the programs under test, each by its own pid."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import cpu


class CannotStart(Exception):
    """A program ended or did not get ready in time; the message ends with what it wrote."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(
    command: Sequence[str], *, core: int, log: Path, port: int, ready: str, env: Mapping[str, str] | None = None
) -> Iterator[int]:
    """The pid of `command`, pinned to `core`, once GET `ready` says 200; stopped on every way out."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            # Ctrl-C reaches only us, so the order of the end is ours; and the session's number finds its children.
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, port, ready, log)
        yield process.pid
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes], grace: float = 5.0) -> None:
    """SIGTERM, then SIGKILL to whatever of its session is left."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    for pid in cpu.members(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, ready: str, log: Path, patience: float = 60) -> None:
    deadline = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < deadline:
        if _get(port, ready) == 200:
            return
        time.sleep(0.1)
    state = f"ended with {process.returncode}" if process.returncode is not None else f"is not ready after {patience} s"
    tail = log.read_text(errors="replace")[-1500:].strip()
    raise CannotStart(f"{log.stem} {state}; its output ends:\n{tail}")


def _get(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()
