"""docs/adapters.md, run as it stands there."""

import re
import shlex
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

from inference_api.app import ENTRY
from inference_api.routing.catalogue import parse_catalogue
from tests.fakes import until
from tests.listed import ListingEngine

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
async def engines() -> AsyncIterator[list[ListingEngine]]:
    async with ListingEngine("sql-lora", names=("llama-3-8b",)) as one, ListingEngine(names=("llama-3-8b",)) as two:
        yield [one, two]


async def test_the_example_is_as_the_page_says(engines: list[ListingEngine], start_router: Start) -> None:
    document = yaml.safe_load(block("yaml"))
    assert not parse_catalogue(document, ENTRY).problems
    [entry] = document["models"]
    served = await start_router(models=[entry | {"backends": [engine.url for engine in engines]}], health_interval=30)
    await until(lambda: "sql-lora" in served.router.core.fleet.by_name)

    chat, shown = map(shlex.split, block("sh").splitlines())
    url, body = chat[1].replace("http://127.0.0.1:8000", ""), chat[-1]
    headers = dict([chat[chat.index("-H") + 1].split(": ")])
    assert (await served.client.post(url, content=body, headers=headers)).status_code == 200
    assert (engines[0].models, engines[1].models) == (["sql-lora"], [])
    await until(lambda: served.router.core.fleet.by_name["sql-lora"].max_model_len)
    card = await served.client.get(shown[1].replace("http://127.0.0.1:8000", ""))
    # The time of the catalogue's file
    assert card.json() | {"created": 1795862400} == orjson.loads(block("json"))
