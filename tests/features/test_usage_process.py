"""Usage records of the real command: killed by -9, stopped by SIGTERM, and the example of docs/usage.md."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from jsonschema import Draft202012Validator

from tests.command import command, log_of, ready
from tests.fakes import CHAT, FakeEngine, until
from tests.features.control_plane import ControlPlane, resets
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "usage.md").read_text()


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    async with ControlPlane() as plane:
        yield plane


def spooled(directory: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in directory.glob("*.jsonl"))


async def test_what_a_killed_router_had_spooled_is_delivered_by_the_next(
    tmp_path: Path, start_engine: Start, plane: ControlPlane
) -> None:
    engine: FakeEngine = await start_engine()
    spool = tmp_path / "spool"
    settings: dict[str, Any] = {"usage": "registry", "usage_spool": spool, "registry_url": plane.url}
    plane.mishap = resets
    async with command(tmp_path, engine, **settings) as router:
        await ready(router.client)
        for _ in range(30):
            await router.client.post(URL, json=CHAT)
        await until(lambda: spooled(spool) == 30)
        router.tell(signal.SIGKILL)
        await router.stop()
    with next(iter(spool.iterdir())).open("ab") as file:
        file.write(b'{"id":"torn')
    assert {path.stat().st_mode & 0o777 for path in spool.iterdir()} == {0o600}

    plane.mishap = None
    async with command(tmp_path, engine, **settings) as router:
        await ready(router.client)
        await until(lambda: len(plane.stored) == 30)
        await until(lambda: os.listdir(spool) == [])
        router.tell(signal.SIGTERM)
        await router.stop()

    assert len({record["request_id"] for record in plane.stored.values()}) == 30
    assert len({name.partition("-")[0] for name in plane.stored}) == 1


@pytest.mark.parametrize("away", [False, True])
async def test_sigterm_loses_nothing(away: bool, tmp_path: Path, start_engine: Start, plane: ControlPlane) -> None:
    engine: FakeEngine = await start_engine()
    spool = tmp_path / "spool"
    url = f"http://127.0.0.1:{free_port()}" if away else plane.url
    async with command(tmp_path, engine, usage="registry", usage_spool=spool, registry_url=url) as router:
        await ready(router.client)
        for _ in range(20):
            await router.client.post(URL, json=CHAT)
        router.tell(signal.SIGTERM)
        code, _, err = await router.stop()

    assert (code, err) == (0, "")
    assert (len(plane.stored), spooled(spool)) == ((0, 20) if away else (20, 0))


async def test_a_router_without_a_spool_ends_within_its_drain(tmp_path: Path, start_engine: Start) -> None:
    engine: FakeEngine = await start_engine()
    url = f"http://127.0.0.1:{free_port()}"
    async with command(tmp_path, engine, usage="registry", registry_url=url, drain_timeout=2) as router:
        await ready(router.client)
        await router.client.post(URL, json=CHAT)
        router.tell(signal.SIGTERM)
        code, out, _ = await router.stop()

    assert code == 0
    assert [line["records"] for line in log_of(out) if line["event"] == "usage records were lost at the end"] == [1]


async def test_usage_without_a_control_plane_is_refused_with_both_names(tmp_path: Path) -> None:
    async with command(tmp_path, usage="registry") as router:
        await until(lambda: router.process.returncode is not None)
        code, _, err = await router.stop()

    assert code == 2
    assert err.startswith("inference-api: INFERENCE_API_USAGE='registry': ")
    assert "INFERENCE_API_REGISTRY_URL" in err
    assert len(err.splitlines()) == 1


async def test_the_example_of_the_page_sums_tokens(tmp_path: Path, start_engine: Start) -> None:
    engine: FakeEngine = await start_engine()
    async with command(tmp_path, engine, usage="log", log_level="error") as router:
        await ready(router.client)
        for stream in (False, False, True):
            await router.client.post(URL, json={**CHAT, "stream": stream})
        router.tell(signal.SIGTERM)
        _, out, _ = await router.stop()
    [program] = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    script = tmp_path / "tokens.py"
    script.write_text(program)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(script)), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    summed, _ = await process.communicate(out.encode())

    assert summed == b"None m 24\n"
    lines = [line for line in log_of(out) if line["event"] == "usage"]
    assert len(lines) == 3
    schema = Draft202012Validator(orjson.loads((DOCS / "schemas" / "usage-log.json").read_bytes()))
    assert [error.message for line in lines for error in schema.iter_errors(line)] == []


def test_the_record_of_the_page_is_one() -> None:
    [text] = re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    schema = orjson.loads((DOCS / "schemas" / "usage-record.json").read_bytes())

    Draft202012Validator(schema).validate(orjson.loads(text))
    assert orjson.loads(text).keys() == schema["properties"].keys()
