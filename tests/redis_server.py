"""A real redis-server on a Unix socket, which a test can kill, hang and start again."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import redis

BINARY = shutil.which("redis-server")


class RedisServer:
    """Keeps nothing on disk: it is empty after each start. `do`: one command of another client."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self.url = f"unix://{socket}"
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Any = redis.Redis(unix_socket_path=str(socket), decode_responses=True)

    def start(self) -> None:
        assert BINARY is not None
        options = ["--port", "0", "--unixsocket", str(self._socket), "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen([BINARY, *options], stdout=subprocess.DEVNULL, cwd=self._socket.parent)
        deadline = monotonic() + 15
        while True:
            with suppress(redis.RedisError):
                self._client.ping()
                return
            assert monotonic() < deadline, "redis-server did not start"
            sleep(0.01)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._client.close()

    def hang(self) -> None:
        """It accepts connections, as the kernel does, and answers nothing."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def do(self, *command: str | int) -> Any:
        return self._client.execute_command(*command)

    def names(self) -> set[str]:
        """All keys."""
        return set(self.do("KEYS", "*"))


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    if BINARY is None:
        pytest.skip("redis-server is not installed")
    # A path of a Unix socket has 107 characters at most.
    server = RedisServer(folder / "redis")
    server.start()
    try:
        yield server
    finally:
        server.kill()
