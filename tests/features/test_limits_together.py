"""Several routers that count together in a real Redis, or each its share; and what they do while Redis is away."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import orjson
import pytest

from inference_api.app import GROUPS, build
from inference_api.features.stores.redis import RedisStore, SyncTiming
from inference_api.settings import SettingsError, load_settings
from tests.command import command, ready
from tests.conftest import Served
from tests.fakes import answer, hang, post, raw_client, until
from tests.features.limited import Limited, key
from tests.redis_server import RedisServer, redis_server

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
QUICK = SyncTiming(every=0.02, retry=0.05, connect=1, answer=1, patience=1)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with TemporaryDirectory() as folder, redis_server(Path(folder)) as running:
        yield running


async def ask(served: Served, name: str = "a", **more: Any) -> httpx.Response:
    headers = {"content-type": "application/json", "authorization": f"Bearer {name}"}
    return await served.client.post(URL, content=orjson.dumps(CHAT | more), headers=headers)


async def together(
    start_router: Start, engine: Any, server: RedisServer, count: int = 2, timing: SyncTiming = QUICK, **more: Any
) -> list[tuple[Served, Limited]]:
    """Routers that know of each other."""
    made = []
    for number in range(count):
        limited = Limited(shared=RedisStore(server.url, f"router-{number}", timing=timing), **more)
        made.append((await start_router(engine, features=limited.features), limited))
    await until(lambda: all(limited.limiter._asked.routers == count for _, limited in made))  # type: ignore[union-attr]
    return made


def store_of(limited: Limited) -> RedisStore:
    assert isinstance(limited.store, RedisStore)
    return limited.store


async def lost(server: RedisServer, *stores: RedisStore) -> None:
    """Kill it, and wait until every router has noticed."""
    server.kill()
    before = [sum(store.failures.values()) for store in stores]
    for store, failures in zip(stores, before, strict=True):
        # An answer from before may still be read; then three in a row fail.
        await until(lambda store=store, least=failures + 4: sum(store.failures.values()) >= least)  # type: ignore[misc]
        assert store.is_away


# How many are let through


async def test_three_routers_at_five_times_the_limit(server: RedisServer, start_engine: Start, tmp_path: Path) -> None:
    """600 a minute at 50 requests/s, which is 5 times as much: after 12 s all of them have been used."""
    async with AsyncExitStack() as stack:
        engine = await start_engine()
        # An hour, so that no window ends during the test: in a minute it is the same.
        rule = {"scope": "model", "requests": 600, "per": 3600}
        limits = [{**rule, "name": "m"}, {**rule, "name": "p", "precise": True}]
        policy, catalogue = tmp_path / "policy.json", tmp_path / "models.json"
        policy.write_bytes(orjson.dumps({"limits": limits}))
        catalogue.write_bytes(orjson.dumps({"models": [{"name": name, "backends": [engine.url]} for name in "mp"]}))
        settings: Any = {"policy": policy, "catalogue": catalogue, "limits": "redis", "redis_url": server.url}
        routers = [await stack.enter_async_context(command(tmp_path, **settings)) for _ in range(3)]
        for router in routers:
            await ready(router.client)
        await until(lambda: server.do("HLEN", "{ia}:1:routers") == 3)
        statuses: dict[str, list[int]] = {"m": [], "p": []}

        async def one(client: httpx.AsyncClient, model: str) -> None:
            statuses[model].append((await client.post(URL, json=CHAT | {"model": model})).status_code)

        loop = asyncio.get_running_loop()
        began, tasks = loop.time(), []
        for number, router in zip(range(800), cycle(routers), strict=False):
            await asyncio.sleep(began + number / 50 - loop.time())
            tasks += [asyncio.create_task(one(router.client, model)) for model in "mp"]
        await asyncio.gather(*tasks)

    assert {*statuses["m"], *statuses["p"]} == {200, 429}
    assert 588 <= statuses["m"].count(200) <= 612
    # On a busy machine, a request that Redis does not answer within 25 ms is decided by a share.
    assert 588 <= statuses["p"].count(200) <= 606


async def test_each_router_lets_its_share_through(start_engine: Start, start_router: Start) -> None:
    """LiteLLM#40291: without a share, the limit times the number of pods."""
    engine = await start_engine()
    routers = []
    for _ in range(3):
        limited = Limited(3, keys=[key("a", limits=[{"requests": 30, "per": 60}])])
        routers.append(await start_router(engine, features=limited.features))

    answers = [await ask(served) for served, _ in zip(cycle(routers), range(100), strict=False)]

    assert sum(answer.status_code == 200 for answer in answers) == 30


async def test_a_precise_limit_is_exact_among_routers(
    server: RedisServer, start_engine: Start, start_router: Start
) -> None:
    document: Any = {"keys": [key("a", limits=[{"requests": 20, "per": 3600, "precise": True}])]}
    patient = QUICK._replace(connect=20, answer=20, patience=20)
    routers = await together(start_router, await start_engine(), server, timing=patient, **document)

    answers = await asyncio.gather(*(ask(served) for served, _ in routers for _ in range(30)))

    assert sorted(answer.status_code for answer in answers) == [200] * 20 + [429] * 40
    assert all(answer.headers["x-ratelimit-limit-requests"] == "20" for answer in answers)
    assert min(int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers) == 0


async def test_what_a_precise_limit_refuses_takes_nothing_of_the_others(
    server: RedisServer, start_engine: Start, start_router: Start
) -> None:
    limits = [{"requests": 1, "per": 3600, "precise": True}, {"tokens": 9999, "per": 3600}, {"streams": 5}]
    [(served, limited)] = await together(start_router, await start_engine(), server, 1, keys=[key("a", limits=limits)])
    await ask(served)
    await until(lambda: len(served.lines) == 1)
    before = limited.used("key:a00000000000:tokens:3600", 3600)

    refused = await ask(served, stream=True)

    assert refused.status_code == 429
    assert "for key 'a': 1 requests per 3600 s." in refused.json()["error"]["message"]
    assert limited.used("key:a00000000000:tokens:3600", 3600) == before
    assert limited.store.streams("key:a00000000000").own == 0


async def test_a_client_that_leaves_while_redis_is_asked_takes_nothing(
    server: RedisServer, start_engine: Start, start_router: Start
) -> None:
    engine = await start_engine()
    limits = [{"requests": 9, "per": 3600, "precise": True}, {"output_tokens": 9999, "per": 3600}, {"streams": 5}]
    [(served, limited)] = await together(
        start_router, engine, server, 1, QUICK._replace(answer=30, patience=30), keys=[key("a", limits=limits)]
    )

    server.hang()
    async with raw_client(served.port) as client:
        await client.send(post(URL, CHAT | {"stream": True}, b"authorization: Bearer a\r\n"))
        await until(lambda: limited.store.streams("key:a00000000000").own == 1)
    await until(lambda: len(served.lines) == 1)
    server.go_on()
    await until(lambda: server.do("HLEN", "{ia}:1:routers") == 1)

    assert engine.requests == []
    assert limited.store.streams("key:a00000000000").own == 0
    assert limited.used("key:a00000000000:output_tokens:3600", 3600) == 0
    await until(lambda: limited.used("key:a00000000000:requests:3600", 3600) == 0)


async def test_streams_of_all_routers_are_counted(
    server: RedisServer, start_engine: Start, start_router: Start
) -> None:
    engine = await start_engine(hang)
    [(one, limits_of_one), (two, limits_of_two)] = await together(
        start_router, engine, server, keys=[key("a", limits=[{"streams": 1}])]
    )

    async with raw_client(one.port) as client:
        await client.send(post(URL, CHAT | {"stream": True}, b"authorization: Bearer a\r\n"))
        await until(lambda: engine.busy == 1)
        await until(lambda: server.do("HLEN", "{ia}:1:s:key:a00000000000") == 1)
        # The first one lets the second router know that it should ask.
        engine.script = answer
        await ask(two, stream=True)
        await until(lambda: limits_of_two.store.streams("key:a00000000000").others == 1)
        refused = await ask(two, stream=True)
    await until(lambda: server.do("HLEN", "{ia}:1:s:key:a00000000000") == 0)

    assert refused.status_code == 429
    assert limits_of_one.store.streams("key:a00000000000").own == 0


# Redis is away


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize(("mode", "through"), [("share", 10), ("open", 30), ("closed", 0)])
async def test_while_redis_is_away(
    mode: str, through: int, precise: bool, server: RedisServer, start_engine: Start, start_router: Start
) -> None:
    document: Any = {"keys": [key("a", limits=[{"requests": 20, "per": 3600, "precise": precise}]), key("free")]}
    routers = await together(start_router, await start_engine(), server, on_failure=mode, **document)
    await lost(server, *(store_of(limited) for _, limited in routers))
    served = routers[0][0]

    answers = [await ask(served) for _ in range(30)]
    free = await ask(served, "free")

    assert sum(answer.status_code == 200 for answer in answers) == through
    assert free.status_code == 200
    assert await served.metric("inference_api_limits_degraded") == 1
    assert await served.metric("inference_api_limits_sync_failures_total", reason="connect") >= 3
    if mode == "closed":
        assert {answer.status_code for answer in answers} == {503}
        assert answers[0].json()["error"]["code"] == "limits_unavailable"
        assert answers[0].headers["retry-after"] == "1"
        assert await served.metric("inference_api_rejected_requests_total", reason="limits") == 30
    elif mode == "share":
        assert answers[0].headers["x-ratelimit-limit-requests"] == "10"

    server.start()
    await until(lambda: not any(store_of(limited).is_away for _, limited in routers))
    back = await ask(served)
    assert back.status_code == 200
    assert back.headers["x-ratelimit-limit-requests"] == "20"
    assert await served.metric("inference_api_limits_degraded") == 0


@pytest.mark.parametrize(("mode", "through"), [("share", 2), ("open", 3), ("closed", 0)])
async def test_a_precise_limit_without_an_answer_in_time(
    mode: str, through: int, server: RedisServer, start_engine: Start, start_router: Start
) -> None:
    document: Any = {"keys": [key("a", limits=[{"requests": 4, "per": 3600, "precise": True}, {"streams": 5}])]}
    # It hangs for longer than the test takes, and is not away yet.
    timing = QUICK._replace(answer=30, patience=0.025)
    routers = await together(start_router, await start_engine(), server, 2, timing, on_failure=mode, **document)
    served = routers[0][0]
    server.hang()

    answers = [await ask(served, stream=True) for _ in range(3)]
    server.go_on()

    assert sum(answer.status_code == 200 for answer in answers) == through
    if mode == "share":
        assert "for key 'a': 2 requests per 3600 s." in answers[2].json()["error"]["message"]
    store = store_of(routers[0][1])
    assert not store.is_away
    await until(lambda: store.streams("key:a00000000000").own == 0)


async def test_a_redis_that_was_never_there_leaves_each_router_its_share(
    start_engine: Start, start_router: Start, tmp_path: Path
) -> None:
    """higress#4067: a plugin that was not connected, and no sign of it."""
    store = RedisStore(f"unix://{tmp_path}/nothing", "router-1", timing=QUICK)
    limited = Limited(3, store, keys=[key("a", limits=[{"requests": 6, "per": 3600}])])
    served = await start_router(await start_engine(), features=limited.features)
    await until(lambda: store.is_away)

    answers = [await ask(served) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert await served.metric("inference_api_limits_degraded") == 1
    assert await served.metric("inference_api_limits_routers") == 0


async def test_no_request_waits_for_redis(server: RedisServer, start_engine: Start, start_router: Start) -> None:
    document: Any = {"keys": [key("a", limits=[{"requests": 400, "per": 3600}, {"tokens": 999_999, "per": 3600}])]}
    [(served, _)] = await together(
        start_router, await start_engine(), server, 1, QUICK._replace(answer=30, patience=30), **document
    )
    server.hang()

    async with asyncio.timeout(10):
        answers = [await ask(served) for _ in range(50)]
    server.go_on()

    assert all(answer.status_code == 200 for answer in answers)


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"LIMITS": "redis"}, "LIMITS='redis': needs INFERENCE_API_REDIS_URL"),
        ({"LIMITS": "redi"}, "LIMITS='redi': must be one of local, redis"),
        ({"REDIS_URL": "http://:pw@redis"}, r"REDIS_URL='http://\*\*\*@redis': must be a redis://"),
        ({"REDIS_URL": "redis://:6379"}, "REDIS_URL='redis://:6379': must be a redis://"),
        ({"LIMITS_SHARE": "0"}, "LIMITS_SHARE='0': must be greater than or equal to 1"),
        ({"LIMITS_ON_FAILURE": "no"}, "LIMITS_ON_FAILURE='no': must be one of share, open, closed"),
    ],
)
async def test_settings_that_cannot_be_used_stop_the_start(settings: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=f"INFERENCE_API_{message}"):
        build(load_settings({f"INFERENCE_API_{name}": value for name, value in settings.items()}, GROUPS))
