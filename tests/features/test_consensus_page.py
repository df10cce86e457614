"""docs/consensus.md, run as it stands there."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Served
from tests.fakes import json_response, raw

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
PAGE = (Path(__file__).parents[2] / "docs" / "consensus.md").read_text()


async def test_the_example_is_as_the_page_says(start_engine: Start, start_router: Start) -> None:
    [catalogue] = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    models = yaml.safe_load(catalogue)["models"]
    [said] = re.findall(r"^If the three say (.*):$", PAGE, re.MULTILINE)
    for model, text in zip(models, re.findall("`(.*?)`", said), strict=False):
        answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
        model["backends"] = [(await start_engine(raw(json_response(answer)))).url]
    served: Served = await start_router(models=models)
    [command] = re.findall(r"^    (curl .*)$", PAGE, re.MULTILINE)
    url, body = shlex.split(command)[2], shlex.split(command)[-1]

    response = await served.client.post(
        url.removeprefix("127.0.0.1:8000"), content=body, headers={"content-type": "application/json"}
    )

    [head] = re.findall(r"^```http\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    shown = dict(line.split(": ") for line in head.splitlines()[1:])
    assert response.status_code == 200
    assert {name: response.headers[name] for name in shown} == shown
