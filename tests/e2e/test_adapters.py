"""LoRA adapters on two real engines of one model, loaded and unloaded while the router runs."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.e2e.conftest import ENGINE_ENVIRON, ENGINE_OPTIONS, VENV, StartRouter
from tests.e2e.processes import BIN, Process, clean_environ, stopping, until

pytestmark = pytest.mark.e2e

MODEL, FURTHER = "llama-3-8b", "gpt-4o-mini"
LORAS = ("sql", "support")
PROMPT = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and its adapters."""
    assert VENV is not None
    folder, here = tmp_path_factory.mktemp("adapters"), Path(__file__).parent
    loras = [folder / MODEL, folder, *LORAS]
    for script, arguments in (("tiny_models.py", [folder]), ("tiny_loras.py", loras)):
        subprocess.run([f"{VENV}/bin/python", here / script, *arguments], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Process]]:
    """Two engines without adapters; their model has two names."""
    names = ["--served-model-name", MODEL, FURTHER]
    lora = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"]
    command = [f"{VENV}/bin/vllm", "serve", str(folder / MODEL), *names, *lora, *ENGINE_OPTIONS]
    environ = ENGINE_ENVIRON | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    logs = tmp_path_factory.mktemp("engines")
    with stopping() as started:
        started += (Process(f"lora-{number}", command, logs, **environ) for number in range(2))
        for engine in started:
            engine.wait_until_ready("/health", seconds=480)
        yield started


@pytest.fixture
def engines(pair: list[Process]) -> Iterator[list[Process]]:
    yield pair
    for engine in pair:
        for name in LORAS:
            unload(engine, name)


@pytest.fixture(scope="module")
def catalogue(pair: list[Process], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("catalogue") / "catalogue.yaml"
    entry = {"name": MODEL, "backends": [engine.url for engine in pair], "discover": True}
    path.write_text(yaml.safe_dump({"models": [entry]}))
    return path


@pytest.fixture(scope="module")
def router(start_router: StartRouter, catalogue: Path) -> Process:
    return start_router(catalogue, ENGINE_INTERVAL="1")


def load(engine: Process, folder: Path, name: str) -> int:
    body = {"lora_name": name, "lora_path": str(folder / name)}
    return httpx.post(f"{engine.url}/v1/load_lora_adapter", json=body, timeout=60, trust_env=False).status_code


def unload(engine: Process, name: str) -> int:
    body = {"lora_name": name}
    return httpx.post(f"{engine.url}/v1/unload_lora_adapter", json=body, timeout=60, trust_env=False).status_code


def listed(client: httpx.Client) -> set[str]:
    return {card["id"] for card in client.get("/v1/models").json()["data"]}


def ask(url: str, model: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=PROMPT | {"model": model}, timeout=120, trust_env=False)


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["choices"][0]["text"]
    return found


def answered(engine: Process) -> float:
    return engine.sample("vllm:request_success_total")


def backends(router: Process, model: str) -> float:
    return router.sample(rf'inference_api_model_backends\{{model_name="{model}"\}}')


def test_an_adapter_is_routed_to_the_engine_that_has_it(
    engines: list[Process], folder: Path, router: Process, client: httpx.Client
) -> None:
    having, other = engines
    assert ask(router.url, "sql").status_code == 404
    assert load(having, folder, "sql") == 200
    assert until(lambda: "sql" in listed(client), seconds=10)
    before = answered(having), answered(other)
    answers = [text(ask(router.url, "sql")) for _ in range(6)]
    with client.stream("POST", "/v1/completions", json=PROMPT | {"model": "sql", "stream": True}) as stream:
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]

    assert (answered(having) - before[0], answered(other) - before[1]) == (7, 0)
    # It is the adapter that answers, not the model below it.
    assert {*answers} == {text(ask(having.url, "sql"))} != {text(ask(having.url, MODEL))}
    assert events[-1] == "[DONE]"
    assert {json.loads(event)["model"] for event in events[:-1]} == {"sql"}
    [card] = [card for card in client.get("/v1/models").json()["data"] if card["id"] == "sql"]
    assert card["parent"] == MODEL
    assert (backends(router, "sql"), backends(router, MODEL)) == (1, 2)
    # Lines of the log come a moment after the answers.
    parts = ('"model":"sql"', f'"parent":"{MODEL}"')
    assert until(lambda: all(part in router.log.read_text() for part in parts), seconds=10)

    # Both engines keep answering for the model.
    before = answered(having), answered(other)

    def both_answered() -> bool:
        assert ask(router.url, MODEL).is_success
        return answered(having) > before[0] and answered(other) > before[1]

    # Which of two idle engines is asked is chance: several in a row may be for one of them.
    assert until(both_answered, seconds=60)


def test_an_adapter_that_is_unloaded_is_gone(
    engines: list[Process], folder: Path, router: Process, client: httpx.Client
) -> None:
    having, _ = engines
    assert load(having, folder, "support") == 200
    assert until(lambda: "support" in listed(client), seconds=10)
    assert ask(router.url, "support").status_code == 200
    assert unload(having, "support") == 200
    assert until(lambda: "support" not in listed(client), seconds=10)

    refused = ask(router.url, "support")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_backend_available")
    never = ask(router.url, "never-heard-of")
    assert (never.status_code, never.json()["error"]["code"]) == (404, "model_not_found")
    assert ask(router.url, MODEL).status_code == 200

    # It comes back on the other engine.
    assert load(engines[1], folder, "support") == 200
    assert until(lambda: ask(router.url, "support").status_code == 200, seconds=10)


def test_requests_go_on_when_one_of_two_engines_unloads(
    start_router: StartRouter, catalogue: Path, engines: list[Process], folder: Path
) -> None:
    for engine in engines:
        assert load(engine, folder, "sql") == 200
    # It has asked them, and does not ask again.
    router = start_router(catalogue, ENGINE_INTERVAL="600")
    assert backends(router, "sql") == 2
    assert unload(engines[0], "sql") == 200

    assert {ask(router.url, "sql").status_code for _ in range(12)} == {200}
    assert backends(router, "sql") == 1
    # That of the engine: one request met it, and was sent on.
    assert unload(engines[1], "sql") == 200
    first, second = ask(router.url, "sql"), ask(router.url, "sql")
    assert (first.status_code, first.json()["error"]["type"]) == (404, "NotFoundError")
    assert (second.status_code, second.json()["error"]["code"]) == (503, "no_backend_available")


def test_a_second_name_of_the_engine_is_an_alias(engines: list[Process], router: Process, client: httpx.Client) -> None:
    [card] = [card for card in client.get("/v1/models").json()["data"] if card["id"] == MODEL]

    assert card["aliases"] == [FURTHER]
    assert ask(router.url, FURTHER).json()["model"] == MODEL


def test_a_wrong_name_is_told_with_the_fix(engines: list[Process], start_router: StartRouter, tmp_path: Path) -> None:
    path = tmp_path / "catalogue.yaml"
    path.write_text(yaml.safe_dump({"models": [{"name": "mine", "backends": [engines[0].url], "discover": True}]}))
    router = start_router(path, ENGINE_INTERVAL="1")

    assert ask(router.url, "mine").status_code == 503
    assert until(lambda: "set served_model_name to one of them" in router.log.read_text(), seconds=10)
    command = [str(BIN / "inference-api"), "check", "--connect", "--catalogue", str(path)]
    checked = subprocess.run(command, capture_output=True, text=True, env=clean_environ(), check=False)
    assert checked.returncode == 1
    assert "name" in checked.stdout.splitlines()[1]


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_nobody_loads_adapters_through_the_router(router: Process, path: str) -> None:
    answer = httpx.post(router.url + path, json={"lora_name": "sql"}, timeout=10, trust_env=False)

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
