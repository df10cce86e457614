"""docs/prompts.md, run as it stands there."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from inference_api.cli import main
from tests.conftest import Served
from tests.fakes import FakeEngine

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
PAGE = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


async def test_the_example_is_as_the_page_says(tmp_path: Path, start_engine: Start, start_router: Start) -> None:
    engine: FakeEngine = await start_engine()
    policy = tmp_path / "policy.yaml"
    policy.write_text(blocks("yaml")[0])
    models = [{"name": "llama-3-8b", "backends": [engine.url]}]
    served: Served = await start_router(models=models, policy=str(policy))
    asked, made, refusal = (orjson.loads(block) for block in blocks("json"))

    answer = await served.client.post("/v1/chat/completions", json=asked)
    del asked["prompt"]["variables"]["product"]
    refused = (await served.client.post("/v1/chat/completions", json=asked)).json()

    assert answer.headers["x-inference-prompt"] == "support@2"
    assert orjson.loads(engine.requests[0].body) == made
    assert refused["error"] == refusal["error"]


def test_the_command_shows_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "policy.yaml").write_text(blocks("yaml")[0])
    monkeypatch.setenv("INFERENCE_API_POLICY", str(tmp_path / "policy.yaml"))
    [(line, shown)] = re.findall(r"^    \$ inference-api (prompts .*)\n((?:    .*\n)+)", PAGE, re.MULTILINE)

    assert main(shlex.split(line)) == 0
    assert capsys.readouterr().out == re.sub("^    ", "", shown, flags=re.MULTILINE)
