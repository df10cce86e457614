"""Servers as child processes: started without waiting, told ready by HTTP, stopped by their own process group."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

BIN = Path(sys.executable).parent
_STARTED: list["Process"] = []


class Process:
    """A server on 127.0.0.1; its output goes to a file. `{port}` becomes its port, in arguments and in environ."""

    def __init__(self, name: str, arguments: Sequence[str | Path], logs: Path, **environ: str) -> None:
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = logs / f"{name}.log"
        self._command = [str(argument) for argument in arguments], environ
        self._child = self._start(*self._command)
        _STARTED.append(self)

    def restart(self) -> None:
        """Once more, on the same port; it must have ended."""
        self._child = self._start(*self._command)

    def _start(self, arguments: list[str], environ: dict[str, str]) -> "subprocess.Popen[bytes]":
        def placed(text: str) -> str:
            return text.replace("{port}", str(self.port))

        with self.log.open("ab") as log:
            return subprocess.Popen(
                list(map(placed, arguments)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=clean_environ() | {name: placed(value) for name, value in environ.items()},
                start_new_session=True,
            )

    def wait_until_ready(self, path: str, seconds: float) -> None:
        def ready() -> bool:
            assert self.alive, f"{self.name} ended with {self._child.returncode}:\n{self.tail()}"
            with suppress(httpx.TransportError):
                return httpx.get(self.url + path, timeout=5, trust_env=False).status_code == 200
            return False

        assert until(ready, seconds, pause=0.1), f"{self.name} was not ready after {seconds} s:\n{self.tail()}"

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        return self._child.returncode

    def terminate(self) -> None:
        self._child.terminate()

    def stop(self, patience: float = 15) -> None:
        """SIGTERM for the server, and SIGKILL for whatever of its group is left after that."""
        if self.alive:
            self.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(patience)
        self.kill()

    def kill(self) -> None:
        """SIGKILL for the server and its children, as when a pod's memory runs out."""
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def sample(self, metric: str) -> float:
        """A metric of this server, by a pattern of its name; summed over its labels, 0 if there are none yet."""
        text = httpx.get(self.url + "/metrics", timeout=10, trust_env=False).text
        return sum(map(float, re.findall(rf"^{metric}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)))


@contextmanager
def stopping() -> Iterator[list[Process]]:
    """Processes that are put into this list are stopped at the end, together, however it comes."""
    processes: list[Process] = []
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.stop()


def logs() -> Iterator[tuple[str, str]]:
    return ((process.name, process.tail()) for process in _STARTED)


def until(holds: Callable[[], bool], seconds: float, pause: float = 0.02) -> bool:
    """Whether it held within so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True


def free_port() -> int:
    """Below the ports that the system gives out: what is killed can come back to its port."""
    while True:
        port = random.randrange(10_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def clean_environ() -> dict[str, str]:
    """The environment without what would bend a server: the router's own settings and proxies."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("INFERENCE_API_", "VLLM_")) and not name.lower().endswith("_proxy")
    }
