"""What the chart runs of the control plane, for real: its scripts, commands and variables, on either database."""

import asyncio
import os
import re
import stat
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from tests.command import ready
from tests.fakes import until
from tests.k8s.charts import ROOT, Installed, Json, environ, installed, require_helm
from tests.k8s.test_chart_control import GIVEN, container, jobs, pod, variables
from tests.ports import free_port
from tests.postgresql import PostgreSQL, postgresql

require_helm()
pytestmark = [pytest.mark.timeout(600), pytest.mark.anyio]
SQLITE, POSTGRESQL = "control-sqlite on 1.37", "a control plane, the same"
README = ROOT / "k8s" / "README.md"
BEARER = {"authorization": f"Bearer {GIVEN['SERVICE_TOKEN']}"}


class Container:
    """A running one."""

    def __init__(self, process: Process, output: Path) -> None:
        self.process = process
        self._output = output

    @property
    def log(self) -> str:
        return self._output.read_text()

    async def ended(self, code: int = 0) -> None:
        assert await asyncio.wait_for(self.process.wait(), 120) == code, self.log


class Cluster:
    """The places of one install on this machine: its volumes are folders, and its ports free ones."""

    def __init__(self, found: Installed, folder: Path, database: str | None = None) -> None:
        self.found = found
        self._folder = folder
        self._database = database
        self._numbers = count()
        self.port, self.api_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        (data,) = [o["data"] for o in found.of("ConfigMap") if o["metadata"]["name"].endswith("-catalogue")]
        self.fill(data["catalogue.yaml"])
        for name in ("data", "tmp", "bin", "bootstrap"):
            (folder / name).mkdir()
        (folder / "bootstrap" / "password").write_text("correct horse battery staple")
        # As the image has it in PATH.
        command = folder / "bin" / "control-plane"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m control_plane "$@"\n')
        command.chmod(command.stat().st_mode | stat.S_IXUSR)

    def fill(self, catalogue: str) -> None:
        (self._folder / "catalogue").mkdir(exist_ok=True)
        (self._folder / "catalogue" / "catalogue.yaml").write_text(catalogue)

    def variables(self, of: Json) -> dict[str, str]:
        given = {name: self._here(value) for name, value in variables(of).items()}
        here = {"PORT": self.port, "API_PORT": self.api_port, "DATABASE_URL": self._database, "HOST": "127.0.0.1"}
        return given | {f"CONTROL_PLANE_{name}": str(value) for name, value in here.items() if value is not None}

    async def start(self, of: Json) -> "Container":
        """As the kubelet does."""
        command = [self._here(part) for part in (*of["command"], *of["args"])]
        path = f"{self._folder / 'bin'}:{os.environ['PATH']}"
        environment = {"PATH": path, "PYTHONPATH": str(ROOT)} | self.variables(of)
        output = self._folder / f"{next(self._numbers)}.log"
        with output.open("wb") as log:
            process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=log, stderr=log)
        return Container(process, output)

    async def run(self, of: Json) -> None:
        """One that ends."""
        await (await self.start(of)).ended()

    def _here(self, text: str) -> str:
        places = {"/etc/inference-api": "catalogue", "/data": "data", "/tmp": "tmp"}
        places["/etc/control-plane-bootstrap"] = "bootstrap"
        for there, here in places.items():
            # Neither part of another path, nor one that is replaced already.
            text = text.replace(f"{there}/", f"@{here}/")
        for here in places.values():
            text = text.replace(f"@{here}/", f"{self._folder / here}/")
        return text

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[httpx.AsyncClient]:
        running = await self.start(container(self.found))
        try:
            async with httpx.AsyncClient(base_url=self.url, timeout=20, trust_env=False) as client:
                await ready(client, "/readyz")
                yield client
        finally:
            if running.process.returncode is None:
                running.process.terminate()
            await running.ended()


async def reported(client: httpx.AsyncClient) -> None:
    """Wait until a router has reported, and was counted."""
    async with asyncio.timeout(30):
        while True:
            if 'control_plane_routers{state="reporting"} 1.0' in (await client.get("/metrics")).text:
                return
            await asyncio.sleep(0.1)


async def names(client: httpx.AsyncClient) -> set[str]:
    return {model["name"] for model in (await client.get("/models")).json()["models"]}


def prepare(found: Installed) -> Json:
    (one,) = pod(found)["initContainers"]
    read: Json = one
    return read


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQL]:
    with postgresql() as server:
        yield server


async def test_one_pod_with_sqlite(tmp_path: Path) -> None:
    """It is filled once; routers, people and `helm test` find it; the backup of the README is one."""
    cluster = Cluster(installed(SQLITE), tmp_path)
    await cluster.run(prepare(cluster.found))
    async with cluster.serving() as client:
        assert await names(client) == {"gpt2", "llama-3-8b", "mistral-7b"}
        # The token of the routers, and nobody else's.
        assert (await client.get("/policy", headers=BEARER)).status_code == 200
        assert (await client.get("/policy")).status_code == 401
        await the_first_admin_logs_in(client, cluster)
        async with router(cluster.found, tmp_path, cluster.url) as ops:
            await ready(client, f"{ops}/readyz")
            assert (await client.get(f"{ops}/readyz")).json()["catalogue"] == "registry"
            await reported(client)
        await helm_test_passes(cluster)
        (script,) = re.findall(r"exec deploy/inference-api-control -- sh -c '\n(.*?)'", README.read_text(), re.DOTALL)
        await cluster.run({**container(cluster.found), "command": ["sh", "-ec"], "args": [script]})

    # As the files would be put back. A start after the values have changed: what is there stays.
    for name in ("sqlite3", "usage.sqlite3"):
        (tmp_path / "data" / f"backup.{name}").replace(tmp_path / "data" / f"control-plane.{name}")
    cluster.fill(yaml.safe_dump({"models": [{"name": "other", "backends": [{"url": "http://other:8000"}]}]}))
    await cluster.run(prepare(cluster.found))
    async with cluster.serving() as client:
        assert await names(client) == {"gpt2", "llama-3-8b", "mistral-7b"}


async def the_first_admin_logs_in(client: httpx.AsyncClient, cluster: Cluster) -> None:
    """By the password of the Secret, on the port of people alone."""
    login = {"email": "ana@example.com", "password": "correct horse battery staple"}
    origin = {"origin": cluster.variables(container(cluster.found))["CONTROL_PLANE_PUBLIC_URL"]}
    here = await client.post("/api/v1/session", json=login, headers=origin)
    there = await client.post(f"http://127.0.0.1:{cluster.api_port}/api/v1/session", json=login, headers=origin)

    assert here.status_code == 404
    assert there.status_code == 200, there.text
    assert there.json()["platform_role"] == "admin"


async def helm_test_passes(cluster: Cluster) -> None:
    """The program of the hook, but for its host."""
    (hook,) = [hook for hook in cluster.found.hooks if hook["metadata"]["name"].endswith("-test-control")]
    (test,) = hook["spec"]["containers"]
    url, key, probe, wanted = test["args"]
    assert {urlsplit(place).netloc for place in (url, probe)} == {"inference-api-control:8081"}
    places = [cluster.url + urlsplit(url).path, key, cluster.url + urlsplit(probe).path, wanted]
    command = [sys.executable, "-c", test["command"][-1], *places]
    done = await asyncio.to_thread(subprocess.run, command, text=True, capture_output=True, timeout=30)

    assert (done.returncode, done.stderr) == (0, "")
    assert "401 invalid_api_key at" in done.stdout


async def test_pods_wait_for_the_job_that_migrates_postgresql(tmp_path: Path, server: PostgreSQL) -> None:
    cluster = Cluster(installed(POSTGRESQL), tmp_path, server.url(server.create()))
    (job,) = [one["spec"]["template"]["spec"]["containers"][0] for one in jobs(cluster.found.objects)]
    waiting = await cluster.start(prepare(cluster.found))
    await until(lambda: "empty" in waiting.log, 60)
    # Without waiting it would not even start.
    refused = await cluster.start(container(cluster.found))
    await refused.ended(2)
    assert "run `control-plane migrate`" in refused.log

    await cluster.run(job)
    await waiting.ended()
    async with cluster.serving() as client:
        assert await names(client) == {"gpt2", "llama-3-8b", "mistral-7b"}


@asynccontextmanager
async def router(found: Installed, folder: Path, registry: str) -> AsyncIterator[str]:
    """The URL of the ops port of a router of the release."""
    ops = free_port()
    for name in ("policy", "usage"):
        (folder / name).mkdir()
    here: Mapping[str, Any] = {
        "CATALOGUE": folder / "catalogue" / "catalogue.yaml",
        "PORT": free_port(),
        "OPS_PORT": ops,
        "DRAIN_DELAY": 0,
        "REGISTRY_URL": registry,
        "REGISTRY_TOKEN": GIVEN["SERVICE_TOKEN"],
        "POLICY_CACHE": folder / "policy" / "policy.json",
        "USAGE_SPOOL": folder / "usage",
    }
    given = environ(found) | {f"INFERENCE_API_{name}": str(value) for name, value in here.items()}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "inference_api", "serve"),
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | given,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{ops}"
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 30) == 0
