"""The router as a process of its own: `python -m inference_api serve`, on a free port."""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import orjson

from tests.fakes import FakeEngine
from tests.ports import free_port


class Command:
    """A running `python -m inference_api serve`."""

    def __init__(self, process: Process, port: int, client: httpx.AsyncClient, output: Path) -> None:
        self.process = process
        self.port = port
        self.client = client
        self.told = False
        self._output = output

    def tell(self, number: int) -> None:
        self.process.send_signal(number)
        self.told = True

    async def stop(self, patience: float = 20) -> tuple[int, str, str]:
        """Tell it to stop, if nobody has: (exit code, stdout, stderr)."""
        if not self.told and self.process.returncode is None:
            self.tell(signal.SIGTERM)
        code = await asyncio.wait_for(self.process.wait(), patience)
        return code, self._output.with_suffix(".out").read_text(), self._output.with_suffix(".err").read_text()

    @property
    def output(self) -> str:
        """What it has written to stdout so far."""
        return self._output.with_suffix(".out").read_text()

    @property
    def files(self) -> int:
        """How many files and sockets it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@asynccontextmanager
async def command(
    tmp_path: Path,
    *engines: FakeEngine,
    entry: Mapping[str, Any] = MappingProxyType({}),
    environ: Mapping[str, str] = MappingProxyType({}),
    files: int | None = None,
    stdout: int | None = None,
    options: Sequence[str] = (),
    **settings: Any,
) -> AsyncIterator[Command]:
    """The command, started; whether it is ready, or ends, is for the test to see.

    `entry` adds to the model `m`; `files` is its limit of open ones; `stdout` takes its log, else a file does; other
    keywords are settings, None for those that are not to be set; `options` are those of the command line.
    """
    port = free_port()
    chosen = {"catalogue": catalogue_of(tmp_path, *engines, **entry), "port": port, **settings}
    variables = {f"INFERENCE_API_{name.upper()}": str(value) for name, value in chosen.items() if value is not None}
    limited = [] if files is None else ["sh", "-c", 'ulimit -n "$0" && exec "$@"', str(files)]
    output = tmp_path / f"router-{port}"
    # Not pipes: a router must not wait for a test to read its log.
    with output.with_suffix(".out").open("wb") as out, output.with_suffix(".err").open("wb") as err:
        process = await asyncio.create_subprocess_exec(
            *(*limited, sys.executable, "-m", "inference_api", "serve", *options),
            env={**os.environ, **variables, **environ},
            stdout=out if stdout is None else stdout,
            stderr=err,
        )
    try:
        async with httpx.AsyncClient(
            verify=False, base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False
        ) as client:
            yield Command(process, port, client, output)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def catalogue_of(tmp_path: Path, *engines: FakeEngine, **entry: Any) -> Path:
    """A catalogue file whose model `m` has these engines."""
    path = tmp_path / "catalogue.json"
    backends = [{"url": engine.url} for engine in engines]
    path.write_bytes(orjson.dumps({"models": [{"name": "m", "backends": backends, **entry}]}))
    return path


async def ready(client: httpx.AsyncClient, path: str = "/v1/models") -> None:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(path)).status_code == 200:
                    return
            await asyncio.sleep(0.02)


async def closed(port: int) -> None:
    """Wait until nobody listens there."""
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionError:
                return
            writer.close()
            await asyncio.sleep(0.02)


def log_of(out: str) -> list[dict[str, Any]]:
    """The lines of a log; every one is a JSON object with the same three keys first."""
    lines = [orjson.loads(line) for line in out.splitlines()]
    assert all(list(line)[:3] == ["time", "level", "event"] for line in lines)
    return lines
