"""Real engines as processes of the control plane: held requests start them, they are killed, fail, and are stopped."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.conftest import ENGINE_ENVIRON, ENGINE_OPTIONS, VENV, StartRouter
from tests.e2e.processes import Process, free_port, stopping, until
from tests.e2e.test_control_plane import ADMIN, COMMAND, TOKEN

pytestmark = pytest.mark.e2e

# Seconds in which an engine starts on a machine that is busy
LOADING = 300
# Models, and the processes of each; the first is that of its deployment.
PROCESSES = {"gpt2": ("gpt2",), "llama-3-8b": ("llama-a", "llama-b"), "broken": ("broken",), "taken": ("taken",)}
DEPLOYMENTS = {"gpt2": {"scale_to_zero": True, "idle_seconds": 10}}


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    return {name: free_port() for names in PROCESSES.values() for name in names}


@pytest.fixture(scope="module")
def plane(models: Path, ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A control plane with these processes; only the second of the model that has two runs."""
    folder = tmp_path_factory.mktemp("engines-of-a-control-plane")
    (folder / "password").write_text(ADMIN["password"])
    found = []
    for model, names in PROCESSES.items():
        for name in names:
            listens = ports["llama-b" if model == "taken" else name]
            options = [option.replace("{port}", str(listens)) for option in ENGINE_OPTIONS]
            served = "gpt2" if model == "taken" else model
            one = {
                "name": name,
                "command": [f"{VENV}/bin/vllm", "serve", str(models / served), "--served-model-name", model, *options],
                "environment": ENGINE_ENVIRON,
                "health": f"http://127.0.0.1:{ports[name]}/health",
                "stop_after": 20,
                "starts": name == "llama-b",
            }
            found.append(one)
    (folder / "processes.yaml").write_text(yaml.safe_dump({"processes": found}))
    (folder / "processes.yaml").chmod(0o600)
    settings = {
        "CONTROL_PLANE_DATABASE_URL": f"sqlite:///{folder}/control-plane.sqlite3",
        "CONTROL_PLANE_SERVICE_TOKEN": TOKEN,
        "CONTROL_PLANE_PORT": "{port}",
        "CONTROL_PLANE_ADMIN_EMAIL": ADMIN["email"],
        "CONTROL_PLANE_ADMIN_PASSWORD_FILE": str(folder / "password"),
        "CONTROL_PLANE_PROCESSES": str(folder / "processes.yaml"),
    }
    with stopping() as processes:
        process = Process("control-plane-of-engines", [*COMMAND, "serve"], folder, **settings)
        processes.append(process)
        process.wait_until_ready("/readyz", seconds=60)
        yield process


@pytest.fixture(scope="module")
def admin(plane: Process, ports: dict[str, int]) -> Iterator[httpx.Client]:
    """A session of the admin, once there are models and their deployments."""
    headers = {"origin": plane.url}
    with httpx.Client(base_url=f"{plane.url}/api/v1", timeout=60, trust_env=False, headers=headers) as client:
        client.post("/session", json=ADMIN).raise_for_status()
        for model, names in PROCESSES.items():
            entry = {"name": model, "backends": [f"http://127.0.0.1:{ports[name]}" for name in names], "hold": LOADING}
            deployment = {"driver": "processes", "object": names[0], **DEPLOYMENTS.get(model, {})}
            for resource, body in (("models", entry), ("deployments", deployment)):
                put = client.put(f"/{resource}/{model}", json=body, headers={"if-none-match": "*"})
                assert put.status_code == 201, put.text
        yield client


@pytest.fixture(scope="module")
def router(plane: Process, start_router: StartRouter, tmp_path_factory: pytest.TempPathFactory) -> Process:
    nothing = tmp_path_factory.mktemp("nothing") / "nothing.yaml"
    nothing.write_text("models: []")
    settings = {"REGISTRY_URL": plane.url, "REGISTRY_TOKEN": TOKEN, "USAGE": "registry", "REPORT_INTERVAL": "0.5"}
    return start_router(nothing, **settings)


@pytest.fixture(scope="module")
def ask(admin: httpx.Client, router: Process) -> Iterator[Callable[..., httpx.Response]]:
    with httpx.Client(base_url=router.url, timeout=LOADING, trust_env=False) as client:

        def post(model: str, **more: Any) -> httpx.Response:
            body = {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": True, **more}
            return client.post("/v1/completions", json=body)

        def drained() -> bool:
            rows = admin.get("/backends", params={"model": "gpt2"}).json()["data"]
            return any(row["model"] == "gpt2" and row["state"] == "draining" for row in rows)

        assert until(drained, seconds=30)
        yield post


def state(admin: httpx.Client, model: str) -> str:
    found: str = deployment(admin, model)["state"]
    return found


def deployment(admin: httpx.Client, model: str) -> dict[str, Any]:
    found: dict[str, Any] = admin.get(f"/deployments/{model}").json()
    return found


def act(admin: httpx.Client, model: str, action: str) -> None:
    answer = admin.post("/model-actions", json={"model": model, "action": action, "reason": "e2e"})
    assert answer.status_code == 202, answer.text


def becomes(admin: httpx.Client, model: str, wanted: str, seconds: float = LOADING) -> dict[str, Any]:
    assert until(lambda: state(admin, model) == wanted, seconds, pause=0.1), deployment(admin, model)
    return deployment(admin, model)


def family(port: int) -> dict[int, str]:
    """The processes of the engine on a port, by what they are: its server, and what that has started."""
    found: dict[int, tuple[int, str]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(folder.name)] = parent, line
    servers = {pid for pid, (_, line) in found.items() if f"--port {port} " in line and "supervisor.py" not in line}
    family = set(servers)
    while more := {pid for pid, (parent, _) in found.items() if parent in family} - family:
        family |= more
    return {pid: found[pid][1] for pid in family}


def test_the_first_requests_start_a_stopped_model_and_it_stops_when_idle(
    admin: httpx.Client, ask: Callable[..., httpx.Response], ports: dict[str, int]
) -> None:
    assert state(admin, "gpt2") == "stopped"
    assert family(ports["gpt2"]) == {}

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: ask("gpt2", stream=number % 2 == 0), range(4)))
    running = family(ports["gpt2"])
    becomes(admin, "gpt2", "stopped")

    assert [answer.status_code for answer in answers] == [200] * 4
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers[::2])
    assert len(running) > 1
    assert family(ports["gpt2"]) == {}
    rows = admin.get("/audit", params={"object": "model:gpt2"}).json()["data"]
    deeds = [(row["action"], row["actor"]["kind"], row["reason"]) for row in reversed(rows)]
    starts = [actor for action, actor, _ in deeds if action == "deployment.start"]
    assert starts == ["router"]
    assert ("deployment.stop", "system", "idle for 10 s") in deeds


def test_a_stop_with_a_stream_open_leaves_nothing(
    admin: httpx.Client, ask: Callable[..., httpx.Response], ports: dict[str, int], router: Process
) -> None:
    assert ask("gpt2").status_code == 200
    body = {"model": "gpt2", "prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "stream": True}

    lines: list[str] = []
    url = f"{router.url}/v1/completions"
    # A stream that is broken has no end of its body.
    with (
        httpx.stream("POST", url, json=body, timeout=120, trust_env=False) as answer,
        suppress(httpx.RemoteProtocolError),
    ):
        for line in filter(None, answer.iter_lines()):
            if not lines:
                act(admin, "gpt2", "stop")
            lines.append(line)
    becomes(admin, "gpt2", "stopped", seconds=60)

    assert answer.status_code == 200
    assert lines[-1] == "data: [DONE]" or "upstream_stream_interrupted" in lines[-1], lines[-3:]
    assert family(ports["gpt2"]) == {}


def last_exit(admin: httpx.Client, model: str) -> dict[str, Any]:
    found: dict[str, Any] | None = deployment(admin, model)["instances"][0]["last_exit"]
    return found or {}


def failures(admin: httpx.Client, model: str) -> list[str]:
    return [event["message"] for event in deployment(admin, model)["events"] if event["reason"] == "Failed"]


@pytest.mark.parametrize("of", ["server", "core"])
def test_an_engine_that_is_killed_starts_again_and_the_other_answers(
    admin: httpx.Client, ask: Callable[..., httpx.Response], ports: dict[str, int], of: str
) -> None:
    act(admin, "llama-3-8b", "start")
    before = becomes(admin, "llama-3-8b", "ready")["instances"][0]
    # The other one
    assert until(lambda: ask("llama-3-8b").status_code == 200, seconds=LOADING)
    engine = family(ports["llama-a"])
    [core] = [pid for pid, line in engine.items() if "EngineCore" in line]
    stop, statuses = threading.Event(), list[int]()

    def asking() -> None:
        while not stop.is_set():
            statuses.append(ask("llama-3-8b").status_code)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(asking)
        try:
            os.kill(core if of == "core" else min(engine), signal.SIGKILL)
            assert until(lambda: last_exit(admin, "llama-3-8b") != (before["last_exit"] or {}), seconds=120, pause=0.1)
            code = last_exit(admin, "llama-3-8b")["code"]
            assert until(lambda: not family(ports["llama-a"]).keys() & engine.keys(), seconds=60)
            again = becomes(admin, "llama-3-8b", "ready")["instances"][0]
        finally:
            stop.set()

    assert set(statuses) == {200}
    assert (code == 137) is (of == "server")
    assert failures(admin, "llama-3-8b")[0] == ("SIGKILL" if of == "server" else f"exit code {code}")
    assert again["restarts"] == before["restarts"] + 1


@pytest.mark.parametrize(("model", "said"), [("broken", "broken"), ("taken", "Address already in use")])
def test_an_engine_that_cannot_start_says_why(
    admin: httpx.Client, ask: Callable[..., httpx.Response], model: str, said: str
) -> None:
    # The other engine must have its port first.
    assert until(lambda: ask("llama-3-8b").status_code == 200, seconds=LOADING)

    act(admin, model, "start")
    assert until(lambda: bool(failures(admin, model)), seconds=LOADING, pause=0.1)
    query = f"/logs?model={model}&pod={model}&tail=2000&previous="
    logs = [admin.get(query + previous) for previous in ("true", "false")]
    lines = [line for log in logs if log.status_code == 200 for line in log.json()["lines"]]
    act(admin, model, "stop")
    becomes(admin, model, "stopped", seconds=60)

    assert failures(admin, model)[0] == "exit code 1"
    assert any(said in line for line in lines)
