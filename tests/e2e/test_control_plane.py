"""The control plane in front of real engines: keys, usage beside the engines' counts, a drain, an end of a key."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.conftest import Engines, StartRouter
from tests.e2e.processes import Process, clean_environ, stopping, until

pytestmark = pytest.mark.e2e

TOKEN = "service-token-of-the-e2e-tests-0123456789"
ADMIN = {"email": "ana@example.org", "password": "correct horse battery staple"}
COMMAND = [sys.executable, "-m", "control_plane"]


@pytest.fixture(scope="module")
def plane(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A control plane with an admin, and the models of the engines, each with a price."""
    folder = tmp_path_factory.mktemp("control-plane")
    (folder / "password").write_text(ADMIN["password"])
    settings = {
        "CONTROL_PLANE_DATABASE_URL": f"sqlite:///{folder}/control-plane.sqlite3",
        "CONTROL_PLANE_SERVICE_TOKEN": TOKEN,
        "CONTROL_PLANE_PORT": "{port}",
        "CONTROL_PLANE_ADMIN_EMAIL": ADMIN["email"],
        "CONTROL_PLANE_ADMIN_PASSWORD_FILE": str(folder / "password"),
    }
    document = yaml.safe_load(catalogue.read_text())
    for entry in document["models"]:
        entry["price"] = {"input": 1, "output": 2}
    priced = folder / "catalogue.yaml"
    priced.write_text(yaml.safe_dump(document, sort_keys=False))
    with stopping() as processes:
        process = Process("control-plane", [*COMMAND, "serve"], folder, **settings)
        processes.append(process)
        process.wait_until_ready("/readyz", seconds=60)
        process.stop()
        environ = clean_environ() | settings | {"CONTROL_PLANE_PORT": "0"}
        subprocess.run([*COMMAND, "import", str(priced)], env=environ, check=True, timeout=60)
        process.restart()
        process.wait_until_ready("/readyz", seconds=60)
        yield process


@pytest.fixture(scope="module")
def admin(plane: Process) -> Iterator[httpx.Client]:
    """A session of the admin, as a browser would have it."""
    headers = {"origin": plane.url}
    with httpx.Client(base_url=f"{plane.url}/api/v1", timeout=60, trust_env=False, headers=headers) as client:
        client.post("/session", json=ADMIN).raise_for_status()
        yield client


@pytest.fixture(scope="module")
def router(plane: Process, start_router: StartRouter, tmp_path_factory: pytest.TempPathFactory) -> Process:
    nothing = tmp_path_factory.mktemp("nothing") / "nothing.yaml"
    nothing.write_text("models: []")
    return start_router(
        nothing,
        REGISTRY_URL=plane.url,
        REGISTRY_TOKEN=TOKEN,
        AUTH="keys",
        POLICY="registry",
        USAGE="registry",
        REPORT_INTERVAL="0.5",
    )


@pytest.fixture
def key(admin: httpx.Client) -> dict[str, Any]:
    made = admin.post("/keys", json={"name": "e2e"})
    made.raise_for_status()
    found: dict[str, Any] = made.json()
    return found


@pytest.fixture
def ask(router: Process, key: dict[str, Any]) -> Iterator[Callable[..., httpx.Response]]:
    headers = {"authorization": f"Bearer {key['key']}"}
    with httpx.Client(base_url=router.url, timeout=120, trust_env=False, headers=headers) as client:

        def post(model: str, **more: Any) -> httpx.Response:
            body = {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": True, **more}
            return client.post("/v1/completions", json=body)

        # A new key is known after the router's next look.
        assert until(lambda: post("gpt2").status_code == 200, seconds=20)
        yield post


def test_usage_of_the_control_plane_is_what_the_engine_counted(
    idle_engines: Engines, admin: httpx.Client, ask: Callable[..., httpx.Response], key: dict[str, Any]
) -> None:
    [engine] = idle_engines["mistral-7b"]
    before = engine.sample("vllm:prompt_tokens_total"), engine.sample("vllm:generation_tokens_total")

    answers = [ask("mistral-7b", stream=number % 2 == 0) for number in range(6)]
    assert {answer.status_code for answer in answers} == {200}

    def records() -> list[Any]:
        found: list[Any] = admin.get("/requests", params={"model": "mistral-7b", "key": key["id"]}).json()["data"]
        return found

    assert until(lambda: len(records()) == 6, seconds=30)
    made = records()
    tokens = [sum(one[name] for one in made) for name in ("input_tokens", "output_tokens")]
    after = engine.sample("vllm:prompt_tokens_total"), engine.sample("vllm:generation_tokens_total")
    assert tokens == [after[0] - before[0], after[1] - before[1]]
    assert sum(one["cost_nanos"] for one in made) == tokens[0] * 1000 + tokens[1] * 2000
    assert {one["request_id"] for one in made} == {answer.headers["x-request-id"] for answer in answers}


def test_a_drained_engine_gets_nothing(
    idle_engines: Engines, admin: httpx.Client, ask: Callable[..., httpx.Response]
) -> None:
    model, [drained, _] = next((name, found) for name, found in idle_engines.items() if len(found) == 2)
    label = drained.url.removeprefix("http://")
    made = admin.post("/overrides", json={"backend": label, "action": "drain", "reason": "driver"}).json()

    def acknowledged() -> bool:
        found: dict[str, Any] = admin.get(f"/overrides/{made['id']}").json()["acknowledged"]
        return found == {"routers": 1, "of": 1, "missing": []}

    assert until(acknowledged, seconds=20)

    before = drained.sample("vllm:generation_tokens_total")
    assert {ask(model).status_code for _ in range(8)} == {200}
    assert drained.sample("vllm:generation_tokens_total") == before

    ended = admin.post("/overrides", json={"backend": label, "action": "return"}).json()
    assert ended == {"ended": [made["id"]]}

    def used() -> bool:
        ask(model)
        return drained.sample("vllm:generation_tokens_total") > before

    assert until(used, seconds=60)


def test_a_key_that_is_ended_is_refused(
    admin: httpx.Client, ask: Callable[..., httpx.Response], key: dict[str, Any]
) -> None:
    etag = admin.get(f"/keys/{key['id']}").headers["etag"]
    assert admin.delete(f"/keys/{key['id']}", headers={"if-match": etag}).status_code == 204

    assert until(lambda: ask("gpt2").status_code == 401, seconds=10)
    assert ask("gpt2").json()["error"]["code"] == "invalid_api_key"
