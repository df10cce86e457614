"""Models come from the registry while it is there, and stay when it is gone."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Engines, StartRouter
from tests.e2e.processes import BIN, Process, stopping, until

pytestmark = pytest.mark.e2e


@pytest.fixture
def registry(catalogue: Path, tmp_path: Path) -> Iterator[Process]:
    """A registry that was filled from the catalogue."""
    options = ["--port", "{port}", "--database", f"{tmp_path}/registry.sqlite3", "--catalogue", str(catalogue)]
    with stopping() as processes:
        process = Process("registry", [BIN / "registry-stub", "serve", *options], tmp_path)
        processes.append(process)
        process.wait_until_ready("/healthz", seconds=30)
        yield process


@pytest.fixture
def asker(registry: Process, start_router: StartRouter, tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """Model -> the status of a completion, by a router that knows no models but the registry's."""
    nothing = tmp_path / "nothing.yaml"
    nothing.write_text("models: []")
    router = start_router(nothing, REGISTRY_URL=registry.url, REGISTRY_REFRESH="0.5")
    with httpx.Client(base_url=router.url, timeout=60, trust_env=False) as client:

        def ask(model: str) -> int:
            assert client.get("/readyz").status_code == 200
            body = {"model": model, "prompt": "Hello", "max_tokens": 1}
            return client.post("/v1/completions", json=body).status_code

        yield ask


def test_the_registry_says_which_models_there_are(
    registry: Process, engines: Engines, asker: Callable[[str], int]
) -> None:
    entry = {"name": "writer", "served_model_name": "gpt2", "backends": [{"url": engines["gpt2"][0].url}]}
    assert asker("mistral-7b") == 200
    assert asker("writer") == 404
    httpx.put(registry.url + "/models/writer", json=entry, trust_env=False).raise_for_status()
    assert until(lambda: asker("writer") == 200, seconds=10)
    httpx.delete(registry.url + "/models/writer", trust_env=False).raise_for_status()
    assert until(lambda: asker("writer") == 404, seconds=10)


def test_models_outlive_their_registry(registry: Process, asker: Callable[[str], int]) -> None:
    assert asker("gpt2") == 200
    registry.stop()
    assert not until(lambda: asker("gpt2") != 200, seconds=2, pause=0.2)
