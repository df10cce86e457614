"""docs/keys.md, run as it stands there."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

from inference_api.commands.keys import flow
from tests.conftest import Served

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
PAGE = (Path(__file__).parents[2] / "docs" / "keys.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


async def test_the_example_is_as_the_page_says(tmp_path: Path, start_engine: Start, start_router: Start) -> None:
    (tmp_path / "policy.yaml").write_text(block("yaml"))
    models = [{"name": "llama-3-8b"}, {"name": "mistral"}]
    served: Served = await start_router(models=models, auth="keys", policy=str(tmp_path / "policy.yaml"))

    answers = []
    for line in block("sh").splitlines():
        _, url, *header = shlex.split(line)
        headers = dict([header[1].split(": ", 1)]) if header else {}
        answers.append(await served.client.get(url.replace("http://127.0.0.1:8000", ""), headers=headers))

    bearer, api_key, none = answers
    assert [[card["id"] for card in one.json()["data"]] for one in (bearer, api_key)] == [["llama-3-8b"]] * 2
    assert none.status_code == 401
    refused = none.json()
    del refused["request_id"]
    assert refused == orjson.loads(block("json"))


def test_the_entry_of_the_command_is_that_of_the_policy() -> None:
    [key] = yaml.safe_load(block("yaml"))["keys"]
    [shown] = re.findall(r"^    - (\{id.*\})$", PAGE, re.MULTILINE)

    assert yaml.safe_load(shown) == key
    assert flow(key) == shown
