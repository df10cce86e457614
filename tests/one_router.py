"""One engine and one router for all tests of a module: most of them only differ in the bytes they send."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from inference_api.app import build
from inference_api.core import Outside
from inference_api.observe.log import Fields
from inference_api.settings import Settings
from tests.conftest import Served, serving
from tests.fakes import FakeEngine, answer


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="module")
async def _one_engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine() as engine:
        yield engine


@pytest.fixture
def engine(_one_engine: FakeEngine) -> FakeEngine:
    """The engine behind `served`; every test finds it empty and well-behaved."""
    _one_engine.requests.clear()
    _one_engine.script = answer
    return _one_engine


@pytest.fixture(scope="module")
def _one_catalogue(_one_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("router") / "catalogue.json"
    path.write_bytes(orjson.dumps({"models": [{"name": "m", "backends": [{"url": _one_engine.url}]}]}))
    return path


@pytest.fixture(scope="module")
async def _one_router(_one_catalogue: Path) -> AsyncIterator[Served]:
    settings = Settings(catalogue=_one_catalogue)
    lines: list[Fields] = []
    router = build(settings, Outside(write_line=lines.append))
    async with (
        serving(router, settings) as url,
        httpx.AsyncClient(verify=False, base_url=url, timeout=60, trust_env=False) as client,
    ):
        yield Served(router, url, client, lines)


@pytest.fixture
def served(engine: FakeEngine, _one_router: Served) -> Served:
    """A router whose model `m` runs on `engine`; the access log is empty."""
    _one_router.lines.clear()
    return _one_router
