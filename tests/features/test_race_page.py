"""docs/race.md, run as it stands there."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Served
from tests.fakes import hang

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
PAGE = (Path(__file__).parents[2] / "docs" / "race.md").read_text()


async def test_the_example_is_as_the_page_says(start_engine: Start, start_router: Start) -> None:
    [catalogue] = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    models = yaml.safe_load(catalogue)["models"]
    for model, engine in zip(models, (await start_engine(hang), await start_engine()), strict=False):
        model["backends"] = [engine.url]
    served: Served = await start_router(models=models)
    [command] = re.findall(r"^    (curl .*)$", PAGE, re.MULTILINE)
    url, body = shlex.split(command)[2], shlex.split(command)[-1]

    answer = await served.client.post(
        url.removeprefix("127.0.0.1:8000"), content=body, headers={"content-type": "application/json"}
    )

    [head] = re.findall(r"^```http\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    name, value = head.splitlines()[1].split(": ")
    assert (answer.status_code, answer.headers[name]) == (200, value)
