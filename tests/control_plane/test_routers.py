"""Three real routers and a control plane: what it stores about keys holds at all of them, by long polls alone."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from inference_api.policy.source import Policies
from tests.conftest import Served
from tests.control_plane.conftest import SERVICE_TOKEN, Clock, Running, starting
from tests.control_plane.teams import changed, organisation
from tests.control_plane.test_keys import KEYS, ended, made, patched
from tests.policies import bearer

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
# As a router answers: 200, or a 401 with its code
Verdict = tuple[int, str | None]
OK: Verdict = (200, None)
UNKNOWN: Verdict = (401, "invalid_api_key")


Routers = Callable[[Running], Awaitable[list[Served]]]


def real_time() -> Clock:
    return Clock(time.time_ns() // 1_000_000)


@pytest.fixture
def routers_of(start_router: Start) -> Routers:
    async def start(plane: Running) -> list[Served]:
        # Without long polls nothing would arrive within the test.
        settings = {"auth": "keys", "policy": "registry", "registry_refresh": 600, "registry_token": SERVICE_TOKEN}
        return [await start_router(registry_url=plane.url, **settings) for _ in range(3)]

    return start


@pytest.fixture
async def plane(sqlite_url: str) -> AsyncIterator[Running]:
    """Its clock is that of the routers."""
    async with starting(sqlite_url) as start:
        yield await start(clock=real_time())


async def verdict(router: Served, key: str) -> Verdict:
    answer = await router.client.get("/v1/models", headers=bearer(key))
    return answer.status_code, None if answer.status_code == 200 else answer.json()["error"]["code"]


async def all_say(routers: list[Served], key: str, expected: Verdict, seconds: float = 20) -> None:
    """Wait until every router answers so."""
    deadline = time.monotonic() + seconds
    for router in routers:
        said = await verdict(router, key)
        while said != expected and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
            said = await verdict(router, key)
        assert said == expected


async def test_a_new_key_works_until_it_ends(start_plane: Start, routers_of: Routers) -> None:
    plane: Running = await start_plane(clock=real_time())
    await organisation(plane, "team-a")
    routers = await routers_of(plane)
    other, key = await made(plane.admin), await made(plane.admin, organisation="team-a")
    await all_say(routers, key["key"], OK)
    began = time.monotonic()
    assert (await ended(plane.admin, key["id"])).status_code == 204
    await all_say(routers, key["key"], UNKNOWN)

    # The promise is 1.5 s; the machine of the tests has others to serve.
    assert time.monotonic() - began < 10
    for router in routers:
        assert await verdict(router, other["key"]) == OK


async def test_a_key_that_holds_no_more_is_refused(plane: Running, routers_of: Routers) -> None:
    for name in ("disabled", "ended"):
        await organisation(plane, name)
    other, disabled, expired = [await made(plane.admin) for _ in range(3)]
    of_disabled, of_ended = [await made(plane.admin, organisation=name) for name in ("disabled", "ended")]
    routers = await routers_of(plane)
    for key in (other, disabled, expired, of_disabled, of_ended):
        await all_say(routers, key["key"], OK)
    await patched(plane.admin, disabled["id"], disabled=True)
    await patched(plane.admin, expired["id"], expires="2026-01-01T00:00:00Z")
    await changed(plane, "disabled", disabled=True)
    await changed(plane, "ended", ended_at=plane.clock.now)

    await all_say(routers, of_ended["key"], UNKNOWN)
    await all_say(routers, of_disabled["key"], (401, "api_key_disabled"))
    await all_say(routers, disabled["key"], (401, "api_key_disabled"))
    await all_say(routers, expired["key"], (401, "api_key_expired"))
    await all_say(routers, other["key"], OK)


async def test_a_replaced_secret_is_valid_for_the_overlap(plane: Running, routers_of: Routers) -> None:
    old = await made(plane.admin)
    routers = await routers_of(plane)
    await all_say(routers, old["key"], OK)
    new = (await plane.admin.post(f"{KEYS}/{old['id']}/rotate", json={"overlap": 3600})).json()
    await all_say(routers, new["key"], OK)
    for router in routers:
        assert await verdict(router, old["key"]) == OK
    last = (await plane.admin.post(f"{KEYS}/{old['id']}/rotate", json={"overlap": 0})).json()
    await all_say(routers, last["key"], OK)

    for router in routers:
        assert await verdict(router, old["key"]) == await verdict(router, new["key"]) == UNKNOWN
        policies = router.router.core.provided(Policies)
        assert policies is not None
        assert policies.failures == {"connect": 0, "timeout": 0, "status": 0, "garbage": 0}


async def test_the_catalogue_of_the_control_plane_is_what_a_router_serves(
    plane: Running, start_router: Start, start_engine: Start
) -> None:
    engine = await start_engine()
    entry = {"name": "writer", "aliases": ["w"], "backends": [{"url": engine.url}]}
    assert (await plane.admin.put("/models/writer", json=entry)).status_code == 201
    router: Served = await start_router(models=[], registry_url=plane.url, registry_refresh=0.05)
    for name in ("writer", "w"):
        assert (await router.chat(model=name)).status_code == 200
    await plane.admin.put("/models/writer", json={**entry, "aliases": []})

    async def status() -> int:
        return (await router.chat(model="w")).status_code

    deadline = time.monotonic() + 20
    found = await status()
    while found != 404 and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
        found = await status()
    assert found == 404
    assert (await router.chat(model="writer")).status_code == 200
