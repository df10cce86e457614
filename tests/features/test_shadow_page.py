"""docs/shadow.md, run as it stands there, with all requests as the sample."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Served
from tests.fakes import until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
PAGE = (Path(__file__).parents[2] / "docs" / "shadow.md").read_text()


async def test_the_example_is_as_the_page_says(start_engine: Start, start_router: Start) -> None:
    [catalogue] = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    models = yaml.safe_load(catalogue)["models"]
    engines = [await start_engine() for _ in models]
    for model, engine in zip(models, engines, strict=True):
        model["backends"] = [engine.url]
    models[0]["shadow"]["sample"] = 1
    served: Served = await start_router(models=models)

    answer = await served.chat(model="llama-3-8b")

    assert answer.status_code == 200
    await until(lambda: all(engine.requests and not engine.busy for engine in engines))
