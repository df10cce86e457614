"""Real engines, started once and in parallel, and the router in front of them; scripts/e2e installs what this needs."""

import os
import signal
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.e2e.processes import BIN, Process, logs, stopping, until

VENV = os.environ.get("E2E_VENV")
if VENV is None:
    collect_ignore_glob = ["test_*.py"]
# Two backends of one model, so that there is one to lose.
BACKENDS = {"llama-3-8b": 2, "mistral-7b": 1, "gpt2": 1}
ENGINE_ENVIRON = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # The engines share what cores there are; without this each would pin its threads to all of them.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # `vllm serve` always has its engine core in a child process; this keeps the core from starting a third one for its
    # worker. Those two would wait for each other by spinning, and on two virtual cores that was seen to keep everything
    # else, the tests too, from running for up to 5 s.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The routes that put an engine to sleep, and pause it.
    "VLLM_SERVER_DEV_MODE": "1",
    # vLLM compiles some sampling steps even when eager; that needs a C++ compiler, and seconds at the first request.
    "TORCHDYNAMO_DISABLE": "1",
}
# float32: the same prompt must have the same answer, whatever else is in the batch.
ENGINE_OPTIONS = [
    *("--host", "127.0.0.1", "--port", "{port}", "--disable-uvicorn-access-log"),
    *("--max-model-len", "1024", "--enforce-eager", "--dtype", "float32"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
]

Engines = dict[str, list[Process]]
BaseURL = Callable[[str], str]
StartRouter = Callable[..., Process]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if VENV is None:
        terminalreporter.write_line("tests/e2e: not run; they need a real vLLM, which scripts/e2e installs")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # It leaves a model with one backend.
    items.sort(key=lambda item: item.path.name == "test_backend_loss.py")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections += [(f"last lines of {name}", text) for name, text in logs()]
    return report


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder for each model."""
    assert VENV is not None
    # When a job is cancelled, its engines go too: pytest tears down on an interrupt, but not on SIGTERM.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = tmp_path_factory.mktemp("models")
    make_models = Path(__file__).with_name("tiny_models.py")
    subprocess.run([f"{VENV}/bin/python", str(make_models), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def engines(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """The engines by the name of their model; ready."""
    home = tmp_path_factory.mktemp("engines")
    by_model: Engines = {}
    with stopping() as started:
        for name, count in BACKENDS.items():
            command = [f"{VENV}/bin/vllm", "serve", str(models / name), "--served-model-name", name, *ENGINE_OPTIONS]
            started += (Process(f"{name}-{number}", command, home, **ENGINE_ENVIRON) for number in range(count))
            by_model[name] = started[-count:]
        for engine in started:
            engine.wait_until_ready("/health", seconds=480)
        yield by_model


@pytest.fixture(scope="session")
def catalogue(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue of all engines. Mistral has an alias, which its engine does not know."""
    entries = [
        {"name": name, "owner": "ml-platform", "created": 1700000000, "backends": [{"url": e.url} for e in backends]}
        for name, backends in engines.items()
    ]
    entries[1] |= {"aliases": ["mistral"], "served_model_name": "mistral-7b"}
    path = tmp_path_factory.mktemp("catalogue") / "catalogue.yaml"
    path.write_text(yaml.safe_dump({"models": entries}))
    return path


@pytest.fixture(scope="session")
def start_router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartRouter]:
    """`start_router(catalogue, NAME=value)` -> a router with these settings; ready, and stopped with the session."""
    with stopping() as started:

        def start(catalogue: Path, **settings: str) -> Process:
            settings = {"PORT": "{port}", "CATALOGUE": str(catalogue), "LOG_FORMAT": "json"} | settings
            environ = {f"INFERENCE_API_{name}": value for name, value in settings.items()}
            router = Process("router", [BIN / "inference-api", "serve"], tmp_path_factory.mktemp("router"), **environ)
            started.append(router)
            router.wait_until_ready("/readyz", seconds=30)
            return router

        yield start


@pytest.fixture(scope="session")
def router(start_router: StartRouter, catalogue: Path) -> Process:
    return start_router(catalogue)


@pytest.fixture(scope="session", params=["direct", "router"])
def base_url(request: pytest.FixtureRequest, engines: Engines) -> BaseURL:
    """Model -> where to ask for it: at its engine, and at the router. What holds at the one holds at the other."""
    if request.param == "direct":
        return lambda model: engines[model][0].url
    router: Process = request.getfixturevalue("router")
    return lambda model: router.url


@pytest.fixture
def client(router: Process) -> Iterator[httpx.Client]:
    """A plain HTTP client of the router, without retries."""
    with httpx.Client(base_url=router.url, timeout=120, trust_env=False) as client:
        yield client


def unfinished(engine: Process) -> float:
    """The generations that the engine is working on or has waiting."""
    return engine.sample("vllm:num_requests_(?:running|waiting)")


@pytest.fixture
def idle_engines(engines: Engines) -> Engines:
    """The engines, once nothing is left in them of what earlier tests asked for."""
    everyone = [engine for backends in engines.values() for engine in backends if engine.alive]
    assert until(lambda: not any(unfinished(engine) for engine in everyone), seconds=30)
    return engines
