"""The example of docs/limits.md, run as it stands there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "limits.md").read_text()
NUMBER = re.compile(r"\d+(\.\d+)?")
Start = Callable[..., Any]


def block(kind: str, place: int = 0) -> str:
    found: list[str] = re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return found[place]


def headers(text: str) -> dict[str, str]:
    return dict(line.split(": ") for line in text.splitlines()[1:])


@pytest.mark.anyio
async def test_the_example_of_the_page(tmp_path: Path, start_engine: Start, start_router: Start) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(block("yaml"))
    served = await start_router(await start_engine(), policy=str(policy))

    answers = [await served.chat() for _ in range(11)]

    assert [answer.status_code for answer in answers] == [200] * 10 + [429]
    for answer, shown in ((answers[0], headers(block("http"))), (answers[10], headers(block("http", 1)))):
        assert {name for name in answer.headers if name.startswith(("x-ratelimit-", "retry-after"))} == shown.keys()
        for name in ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests"):
            assert answer.headers[name] == shown[name]
    body, shown_body = answers[10].json(), orjson.loads(block("json"))
    # The wait depends on the second at which the test runs.
    assert NUMBER.sub("N", body["error"].pop("message")) == NUMBER.sub("N", shown_body["error"].pop("message"))
    assert body["error"] == shown_body["error"]
