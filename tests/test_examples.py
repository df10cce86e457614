"""The examples: every file is sound, and what runs without a container engine runs against the real router."""

import asyncio
import importlib.util
import os
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from inference_api.routing.catalogue import load_catalogue
from inference_api.settings import PREFIX, Settings
from tests.command import command
from tests.fakes import FakeEngine
from tests.ports import free_port

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CATALOGUES = [*sorted((EXAMPLES / "catalogues").glob("*.yaml")), EXAMPLES / "compose" / "catalogue.yaml"]
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
COMPOSE = sorted(EXAMPLES.glob("*/compose.yaml"))


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: path.stem)
def test_a_catalogue_has_no_problem(path: Path) -> None:
    catalogue = load_catalogue(path)

    assert not catalogue.problems
    assert all(entry.backends for entry in catalogue.values())


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.parent.name)
def test_a_compose_file_names_settings_and_files_that_exist(path: Path) -> None:
    services = yaml.safe_load(path.read_text())["services"]
    variables = {PREFIX + name.upper() for name in Settings.model_fields}
    for service in services.values():
        given = {name for name in service.get("environment", {}) if name.startswith(PREFIX)}
        assert given <= variables
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (path.parent / source).exists(), source
        assert "build" not in service or (path.parent / service["build"] / "Dockerfile").exists()


def test_every_example_is_listed() -> None:
    table = (EXAMPLES / "README.md").read_text()

    assert [folder.name for folder in EXAMPLES.iterdir() if folder.is_dir() and f"({folder.name})" not in table] == []


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for `localhost`; its key is beside it, as key.pem."""
    path = tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run(
        [*command.split(), "-keyout", str(tmp_path / "key.pem"), "-out", str(path)], check=True, capture_output=True
    )
    return path


@pytest.mark.anyio
@pytest.mark.skipif(NGINX is None, reason="there is no nginx here (apt-get install nginx)")
async def test_nginx_ends_tls_checks_the_key_and_passes_events_as_they_come(tmp_path: Path, certificate: Path) -> None:
    assert NGINX is not None
    async with FakeEngine() as engine, command(tmp_path, engine) as router:
        port = free_port()
        config = (EXAMPLES / "nginx-tls" / "nginx.conf").read_text()
        for name, value in (
            ("CERTIFICATE", str(certificate)),
            ("CERT-KEY", f"{tmp_path}/key.pem"),
            ("API-KEY", "sk-Example"),
            ("127.0.0.1:8000", f"127.0.0.1:{router.port}"),
            ("8443", f"127.0.0.1:{port}"),
        ):
            assert name in config
            config = config.replace(name, value)
        path = tmp_path / "nginx.conf"
        path.write_text(config)
        options = ["-c", str(path), "-p", str(tmp_path), "-g", f"daemon off; pid {tmp_path}/nginx.pid;"]
        process = await asyncio.create_subprocess_exec(NGINX, *options)
        try:
            trust = ssl.create_default_context(cafile=certificate)
            async with httpx.AsyncClient(base_url=f"https://localhost:{port}", verify=trust, trust_env=False) as client:
                client.headers["authorization"] = "Bearer sk-Example"
                answer = await _first_answer(client)
                anthropic = await client.get("/v1/models", headers={"authorization": "", "x-api-key": "sk-Example"})
                refused = [
                    await client.get("/v1/models", headers={"authorization": value})
                    for value in ("", "Bearer sk-example", "Bearer sk-Example2", "sk-Example")
                ]
                body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
                async with client.stream("POST", "/v1/chat/completions", json=body) as stream:
                    text = "".join([part async for part in stream.aiter_text()])
        finally:
            process.terminate()
            await process.wait()

    assert answer.json()["data"][0]["id"] == "m"
    assert anthropic.status_code == 200
    assert {(each.status_code, each.json()["error"]["code"]) for each in refused} == {(401, "invalid_api_key")}
    assert text.endswith("data: [DONE]\n\n")


async def _first_answer(client: httpx.AsyncClient) -> httpx.Response:
    async with asyncio.timeout(20):
        while True:
            try:
                answer = await client.get("/v1/models")
            except httpx.ConnectError:
                await asyncio.sleep(0.05)
                continue
            if answer.status_code == 200:
                return answer


@pytest.mark.anyio
async def test_langchain_asks_and_streams(tmp_path: Path) -> None:
    if importlib.util.find_spec("langchain_openai") is None:
        pytest.skip("langchain-openai is not installed (pip install langchain-openai)")
    async with FakeEngine() as engine, command(tmp_path, engine) as router:
        script = EXAMPLES / "langchain" / "chat.py"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(script), f"http://127.0.0.1:{router.port}/v1", "m"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        said, wrong = await asyncio.wait_for(process.communicate(), 50)

    assert process.returncode == 0, wrong.decode()
    assert said.decode().splitlines() == ["hi", "word0 word1 word2 word3 word4 "]
