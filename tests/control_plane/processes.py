"""`control-plane` as a process of its own."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx

from tests.ports import free_port

COMMAND = (sys.executable, "-m", "control_plane")


class Served:
    """A running `control-plane serve`. `client` has no credentials."""

    def __init__(self, process: Process, port: int, client: httpx.AsyncClient, output: Path) -> None:
        self.process = process
        self.port = port
        self.client = client
        self._output = output

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        """Its log so far."""
        return self._output.read_text()

    async def ready(self) -> None:
        async with asyncio.timeout(120):
            while True:
                assert self.process.returncode is None, self.output
                with suppress(httpx.TransportError):
                    if (await self.client.get("/readyz")).status_code == 200:
                        return
                await asyncio.sleep(0.05)

    async def stop(self, number: int = signal.SIGTERM, patience: float = 20) -> int:
        self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), patience)


@asynccontextmanager
async def served(
    folder: Path, database_url: str, *options: str, port: int | None = None, **settings: str
) -> AsyncIterator[Served]:
    """The command, ready. Keywords are settings."""
    port = port or free_port()
    variables = {f"CONTROL_PLANE_{name.upper()}": value for name, value in settings.items()}
    variables |= {"CONTROL_PLANE_DATABASE_URL": database_url, "CONTROL_PLANE_PORT": str(port)}
    output = folder / f"control-plane-{port}.log"
    with output.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "serve", *options, env=environment(variables), stdout=log, stderr=log, cwd=folder
        )
    try:
        async with httpx.AsyncClient(
            verify=False, base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False
        ) as client:
            running = Served(process, port, client, output)
            await running.ready()
            yield running
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def run(*arguments: str, **settings: str) -> tuple[int, str, str]:
    """A command that ends: exit code, stdout, stderr."""
    variables = {f"CONTROL_PLANE_{name.upper()}": value for name, value in settings.items()}
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, env=environment(variables), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def environment(variables: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CONTROL_PLANE_")}
    return {**kept, "PYTHONPATH": str(Path(__file__).parents[2]), **variables}
