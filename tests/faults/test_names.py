"""Names of backends as a name server makes them fail, with the router as a process of its own.

In that process Python's getaddrinfo says what a file says, or blocks; another way to ask the system finds nothing.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.command import Command, command, ready
from tests.fakes import CHAT, FakeEngine, full_listener, json_response, raw, until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
STAND_IN = """
import json, os, socket, time
real = socket.getaddrinfo

def getaddrinfo(host, port, *more, **keywords):
    with open(os.environ["TEST_NAMES"]) as file:
        answer = json.load(file).get(host)
    if answer == "hangs":
        time.sleep(60)
    if not isinstance(answer, list):
        raise socket.gaierror(socket.EAI_AGAIN, "no answer from the name server")
    return [found for address in answer for found in real(address, port, *more, **keywords)]

socket.getaddrinfo = getaddrinfo
"""


class NameServer:
    """What names mean to a router started with its `environ`."""

    def __init__(self, folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(STAND_IN)
        self._file = folder / "names.json"
        self.environ = {"PYTHONPATH": str(folder), "TEST_NAMES": str(self._file)}

    def say(self, answers: Mapping[str, list[str] | str]) -> None:
        new = self._file.with_suffix(".new")
        new.write_bytes(orjson.dumps(answers))
        new.rename(self._file)


@pytest.fixture
def name_server(tmp_path: Path) -> NameServer:
    return NameServer(tmp_path)


def at(host: str, engine: FakeEngine) -> list[dict[str, str]]:
    return [{"url": f"http://{host}:{engine.port}"}]


def catalogue(tmp_path: Path, **models: list[dict[str, str]]) -> Path:
    path = tmp_path / "models.json"
    path.write_bytes(orjson.dumps({"models": [{"name": name, "backends": found} for name, found in models.items()]}))
    return path


async def chat(router: Command, model: str) -> int:
    return (await router.client.post(URL, json=CHAT | {"model": model})).status_code


async def test_names_that_hang_hurt_neither_requests_nor_health_checks_of_others(
    tmp_path: Path, start_engine: Start, name_server: NameServer
) -> None:
    engine = await start_engine()
    hanging = {f"slow{number}": f"slow{number}.test" for number in range(8)}
    name_server.say({"fine.test": ["127.0.0.1"]} | dict.fromkeys(hanging.values(), "hangs"))
    models = catalogue(tmp_path, fine=at("fine.test", engine), **{m: at(host, engine) for m, host in hanging.items()})
    settings: dict[str, Any] = {"catalogue": models, "health_interval": 0.2, "connect_timeout": 2}
    async with command(tmp_path, environ=name_server.environ, **settings) as router:
        await ready(router.client)
        slow = [asyncio.create_task(chat(router, model)) for model in hanging for _ in range(4)]
        for _ in range(10):
            # Each on a new connection: more than the answer is fresh would take too long here.
            assert await chat(router, "fine") == 200
            await asyncio.sleep(0.05)
        before = engine.asked.count("/health")
        await until(lambda: engine.asked.count("/health") > before + 2)

        assert set(await asyncio.gather(*slow)) == {503}
        code, _, err = await router.stop()

    # Look-ups that nobody can stop do not hold the process.
    assert (code, err) == (0, "")


async def test_a_name_that_cannot_be_looked_up_any_more_is_still_served(
    tmp_path: Path, start_engine: Start, name_server: NameServer
) -> None:
    engine = await start_engine()
    name_server.say({"a.test": ["127.0.0.1"]})
    models = catalogue(tmp_path, a=at("a.test", engine))
    # Connections do not last, so that each request needs an address.
    settings: dict[str, Any] = {"catalogue": models, "upstream_keepalive": 0.001, "health_interval": 1000}
    async with command(tmp_path, environ=name_server.environ, **settings) as router:
        await ready(router.client)
        assert await chat(router, "a") == 200
        for trouble in ({}, {"a.test": "hangs"}):
            name_server.say(trouble)
            began = time.monotonic()
            # For longer than an answer is fresh.
            while time.monotonic() < began + 7:
                assert await chat(router, "a") == 200
                await asyncio.sleep(0.2)
        code, out, err = await router.stop()

    assert (code, err) == (0, "")
    assert out.count("the host 'a.test' cannot be looked up") == 1


async def test_an_address_that_swallows_connections_is_passed_within_the_time_to_connect(
    tmp_path: Path, start_engine: Start, name_server: NameServer
) -> None:
    engine = await start_engine()
    name_server.say({"two.test": ["127.0.0.2", "127.0.0.1"]})
    models = catalogue(tmp_path, two=at("two.test", engine))
    with full_listener("127.0.0.2", engine.port):
        async with command(tmp_path, environ=name_server.environ, catalogue=models, connect_timeout=5) as router:
            await ready(router.client)
            assert [await chat(router, "two") for _ in range(5)] == [200] * 5
            code, _, err = await router.stop()

    assert (code, err) == (0, "")
    assert len(engine.requests) == 5


async def test_the_registry_is_found_in_the_same_way(
    tmp_path: Path, start_engine: Start, name_server: NameServer
) -> None:
    registry = await start_engine()
    registry.page = raw(json_response({"models": [{"name": "m"}]}))
    name_server.say({"registry.test": ["127.0.0.1"]})
    settings: dict[str, Any] = {"registry_url": f"http://registry.test:{registry.port}", "registry_refresh": 0.1}
    async with command(tmp_path, environ=name_server.environ, **settings) as router:
        await ready(router.client)
        name_server.say({})
        before = len(registry.asked)
        await until(lambda: len(registry.asked) > before + 20)
        await router.stop()
