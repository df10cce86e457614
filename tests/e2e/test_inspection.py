"""What an inspection estimates beside what a real vLLM has once it has loaded the model."""

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from control_plane.clients.folders import Roots
from control_plane.pure import inspected
from control_plane.services.measuring import measure
from tests.e2e.conftest import BACKENDS, ENGINE_ENVIRON, VENV
from tests.e2e.processes import clean_environ

pytestmark = pytest.mark.e2e
# Bytes of cache that the engines get: VLLM_CPU_KVCACHE_SPACE
CACHE = 1024**3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    make = Path(__file__).with_name("tiny_models.py")
    subprocess.run([f"{VENV}/bin/python", str(make), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def loaded(models: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("loaded_models.py")
    paths = [str(models / name) for name in BACKENDS]
    command = [f"{VENV}/bin/python", str(script), *paths]
    environ = clean_environ() | ENGINE_ENVIRON | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True, text=True)
    said: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return {Path(path).name: one for path, one in said.items()}


@pytest.mark.parametrize("name", BACKENDS)
def test_the_estimate_is_what_vllm_has(models: Path, loaded: dict[str, Any], name: str) -> None:
    async def inspect() -> dict[str, Any]:
        return inspected.result(name, await measure(await Roots([models]).folder(str(models / name))))

    found, real = asyncio.run(inspect()), loaded[name]

    assert found["parameters"] == real["parameters"]
    assert found["weights_bytes"] == 4 * real["parameters"]
    # vLLM gives as many whole blocks as there is room for.
    assert real["blocks"] == CACHE // (found["cache_bytes_per_token"] * real["block_size"])
    assert found["context"] == real["context"]
    # The whole process, whose cache is hardly touched, so that it is not in memory: what is needed beside that.
    memory = found["memory_bytes"]
    assert memory["low"] <= real["peak_bytes"] <= memory["high"], real
