"""The examples: every file is sound, and what runs without a container engine runs against the real router."""

import asyncio
import importlib.util
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from inference_api.app import ENTRY, GROUPS
from inference_api.routing.catalogue import load_catalogue
from inference_api.settings import PREFIX, fields_of
from tests.command import command, ready
from tests.fakes import FakeEngine, until
from tests.ports import free_port

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
KEYS = EXAMPLES / "keys" / "router"
CATALOGUES = [
    *sorted((EXAMPLES / "catalogues").glob("*.yaml")),
    *sorted((EXAMPLES / "providers").glob("*.yaml")),
    EXAMPLES / "compose" / "catalogue.yaml",
    KEYS / "catalogue.yaml",
]
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
COMPOSE = sorted(EXAMPLES.glob("*/compose.yaml"))


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_catalogue_has_no_problem(path: Path) -> None:
    catalogue = load_catalogue(path, ENTRY)

    assert not catalogue.problems
    assert all(entry.backends for entry in catalogue.values())


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.parent.name)
def test_a_compose_file_names_settings_and_files_that_exist(path: Path) -> None:
    services = yaml.safe_load(path.read_text())["services"]
    variables = {PREFIX + name.upper() for name in fields_of(GROUPS)}
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


def keys_environment(folder: Path) -> dict[str, str]:
    """What the compose file of the keys gives its routers, with their files in `folder`."""
    given = yaml.safe_load((EXAMPLES / "keys" / "compose.yaml").read_text())["services"]["router"]["environment"]
    return {name: value.replace("/etc/router", str(folder)) for name, value in given.items()}


def inference_api(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    called = [sys.executable, "-m", "inference_api", *arguments]
    environment = os.environ | (environment or {})
    return subprocess.run(called, env=environment, check=False, text=True, capture_output=True, timeout=50)


def test_the_policy_of_the_keys_has_nothing_wrong() -> None:
    checked = inference_api("check", environment=keys_environment(KEYS))

    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.anyio
async def test_a_key_that_is_put_into_the_policy_may_ask(tmp_path: Path) -> None:
    """As the README says: by the entry that the command prints, and without a restart."""
    files = tmp_path / "router"
    shutil.copytree(KEYS, files)
    policy = files / "policy.yaml"
    made = inference_api("keys", "new", "--name", "batch", "--organisation", "team-a", "--json")
    new = json.loads(made.stdout)
    body = {"model": "llama-3-8b", "messages": [{"role": "user", "content": "Hello"}]}
    environment = keys_environment(files) | {"INFERENCE_API_LIMITS": "local"}
    async with FakeEngine() as engine:
        catalogue = (files / "catalogue.yaml").read_text()
        (files / "catalogue.yaml").write_text(catalogue.replace("http://llama:8000", engine.url))
        async with command(tmp_path, environ=environment) as router:
            await ready(router.client, f"http://127.0.0.1:{router.port}/readyz")
            router.client.headers["authorization"] = f"Bearer {new['key']}"

            async def ask(**more: str) -> int:
                return (await router.client.post("/v1/chat/completions", json=body | more)).status_code

            assert await ask() == 401
            text = re.sub("id: batch0+", f"id: {new['entry']['id']}", policy.read_text())
            policy.write_text(re.sub('digest: "sha256:0+1"', f'digest: "{new["entry"]["digest"]}"', text))
            router.process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(20):
                while True:
                    if await ask() == 200:
                        break
                    await asyncio.sleep(0.05)
            assert await ask(model="mistral-7b") == 403
            answer = await router.client.post("/v1/chat/completions", json=body)
            assert answer.headers["x-ratelimit-limit-requests"] == "600"
            await until(lambda: '"event":"usage"' in router.output)
