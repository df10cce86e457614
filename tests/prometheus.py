"""A real Prometheus, and what it scrapes where no engine and no GPU is: it is Debian's, and skipped where it is not."""

import asyncio
import math
import re
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.fakes import Line, Received
from tests.ports import free_port

_FOLDER = Path(__file__).parent / "k8s"
# Pages of exporters that cannot run here
TGI = (_FOLDER / "tgi_metrics.txt").read_text()
DCGM = (_FOLDER / "dcgm_metrics.txt").read_text()


class Prometheus:
    """The HTTP API of a running Prometheus."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.url = str(client.base_url).rstrip("/")

    async def ask(self, path: str, **parameters: str) -> Any:
        response = await self._client.get(f"/api/v1/{path}", params=parameters)
        answer = response.json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    async def has(self, expression: str) -> bool:
        """Whether there is a number in the answer."""
        result = (await self.ask("query", query=expression))["result"]
        return any(not math.isnan(float(series["value"][1])) for series in result)

    async def until_has(self, expression: str, seconds: float = 60) -> None:
        async with asyncio.timeout(seconds):
            while not await self.has(expression):  # noqa: ASYNC110
                await asyncio.sleep(0.2)

    async def rules(self) -> list[Any]:
        return [rule for group in (await self.ask("rules"))["groups"] for rule in group["rules"]]

    async def offers(self, variable: str) -> bool:
        """Whether a variable of a dashboard has values; `variable`: label_values(selector, label)."""
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable)
        assert found is not None, variable
        return bool(await self.ask(f"label/{found[2]}/values", **{"match[]": found[1]}))


def binary(name: str, package: str = "prometheus") -> str:
    """Its path; the test is skipped where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not on PATH (Debian: apt-get install {package})")
    return path


@asynccontextmanager
async def prometheus(
    folder: Path,
    targets: Mapping[str, Sequence[str]] = {},
    labels: Mapping[str, str] = {},
    rules: Sequence[Path] = (),
) -> AsyncIterator[Prometheus]:
    """It scrapes these addresses, by job, every second. `folder`/data: its blocks, those that are there already too."""
    config, port = folder / "prometheus.yml", free_port()
    jobs = {name: [url.removeprefix("http://") for url in urls] for name, urls in targets.items()}
    document = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(path) for path in rules],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": addresses, "labels": dict(labels)}]}
            for job, addresses in jobs.items()
        ],
    }
    config.write_text(yaml.safe_dump(document))
    command = [
        binary("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    async with (
        _running(command, folder / "log") as process,
        httpx.AsyncClient(verify=False, base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client,
    ):
        await _ready(client, "/-/ready", process, folder / "log")
        yield Prometheus(client)


@asynccontextmanager
async def node_exporter(folder: Path) -> AsyncIterator[str]:
    """The URL of one of this machine."""
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        binary("prometheus-node-exporter", "prometheus-node-exporter"),
        f"--web.listen-address={url.removeprefix('http://')}",
    ]
    log = folder / "node-exporter.log"
    async with (
        _running(command, log) as process,
        httpx.AsyncClient(verify=False, base_url=url, trust_env=False) as client,
    ):
        await _ready(client, "/metrics", process, log)
        yield url


def growing(page: str) -> Any:
    """A script that serves a page whose numbers are larger each time it is asked."""
    scrapes = iter(range(1, 1000))

    async def script(request: Received, line: Line) -> None:
        number = next(scrapes)
        grown = re.sub(r" ([\d.]+)$", lambda found: f" {float(found[1]) * number}", page, flags=re.MULTILINE)
        await line.send(_answer(grown))

    return script


def constant(page: str) -> Any:
    """A script that serves a page."""

    async def script(request: Received, line: Line) -> None:
        await line.send(_answer(page))

    return script


def _answer(page: str) -> bytes:
    head = "HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4\r\ncontent-length: "
    return f"{head}{len(page.encode())}\r\n\r\n{page}".encode()


@asynccontextmanager
async def _running(command: Sequence[str], log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(*command, stdout=file, stderr=file)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _ready(client: httpx.AsyncClient, path: str, process: asyncio.subprocess.Process, log: Path) -> None:
    async with asyncio.timeout(20):
        while True:
            assert process.returncode is None, _told(log)
            with suppress(httpx.TransportError):
                if (await client.get(path)).status_code == 200:
                    return
            await asyncio.sleep(0.1)


def _told(log: Path) -> str:
    return log.read_text()
