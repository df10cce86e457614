"""Faults of the database and of the control plane: what was acknowledged is there, and nothing is there twice."""

import asyncio
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from control_plane.data.database import Database, parse_url, usage_file
from control_plane.errors import StorageUnavailable
from control_plane.services import ingest, spend
from tests.control_plane.conftest import SERVICE_TOKEN, Running, management_token, starting
from tests.control_plane.processes import Served, served
from tests.control_plane.test_together import eventually
from tests.control_plane.usage import record, rows, send, taken
from tests.fakes import until
from tests.ports import free_port
from tests.postgresql import PostgreSQL

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]
ROUTER = {"authorization": f"Bearer {SERVICE_TOKEN}"}


@pytest.fixture
async def postgresql_plane(server: PostgreSQL, template: str) -> AsyncIterator[Running]:
    name = server.create(template)
    async with starting(server.url(name)) as start:
        yield await start()
    server.drop(name)


async def test_without_its_database_records_are_refused_and_spend_is_remembered(
    postgresql_plane: Running, server: PostgreSQL
) -> None:
    plane = postgresql_plane
    first = record()
    await taken(plane, first)
    before = (await plane.router.get("/spend")).json()
    server.stop("immediate")
    try:
        plane.clock.advance(10)
        refused = await send(plane, record())
        remembered = await plane.router.get("/spend")
    finally:
        server.start()

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_unavailable")
    assert int(refused.headers["retry-after"]) >= 1
    assert (remembered.status_code, remembered.json()) == (200, before)
    # The router sends it again, with what it had sent before.
    assert await taken(plane, first, record()) == {"accepted": 1, "duplicates": 1, "refused": []}


async def test_a_database_that_hangs_costs_seconds_not_records(postgresql_plane: Running, server: PostgreSQL) -> None:
    plane = postgresql_plane
    sent = [record() for _ in range(3)]
    await taken(plane, sent[0])
    server.hang()
    try:
        began = time.monotonic()
        with pytest.raises(StorageUnavailable):
            await ingest.store(plane.plane, sent, patience=0.5)
        with pytest.raises(StorageUnavailable):
            await spend.current(plane.plane, patience=0.5)
        took = time.monotonic() - began
    finally:
        server.go_on()

    assert took < 10
    assert plane.plane.usage.working == 0
    answer = await taken(plane, *sent)
    assert answer["accepted"] + answer["duplicates"] == 3
    assert len(await rows(plane)) == 3


async def test_more_batches_than_can_be_stored_at_once_are_refused(
    postgresql_plane: Running, server: PostgreSQL
) -> None:
    plane = postgresql_plane
    batches = [[record()] for _ in range(20)]
    server.hang()
    try:
        stores = [asyncio.create_task(ingest.store(plane.plane, batch, patience=1)) for batch in batches]
        results = await asyncio.gather(*stores, return_exceptions=True)
    finally:
        server.go_on()

    waits = [one.headers["Retry-After"] for one in results if isinstance(one, StorageUnavailable)]
    assert (len(waits), waits.count("1")) == (20, 12)


async def test_a_full_disk_refuses_records_and_keeps_what_it_has(sqlite_plane: Running) -> None:
    plane = sqlite_plane

    async def limit(pages: int) -> None:
        # Of the only connection that writes
        async with plane.plane.database.usage.write() as connection:
            used = (await connection.execute(text("PRAGMA page_count"))).scalar_one()
            await connection.execute(text(f"PRAGMA max_page_count = {used + pages}"))

    await limit(30)
    acknowledged: list[str] = []
    while True:
        batch = [record() for _ in range(50)]
        answer = await send(plane, *batch)
        if answer.status_code != 200:
            break
        acknowledged += [one["id"] for one in batch]

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
    assert sorted(acknowledged) == [row.id for row in await rows(plane)]
    # The catalogue has a file of its own.
    assert (await plane.admin.put("/models/a", json={"name": "a"})).status_code == 201
    await limit(100_000)
    assert (await taken(plane, *batch))["accepted"] == 50


async def test_a_process_that_waits_for_its_database_ends_when_it_is_stopped(sqlite_url: str, tmp_path: Path) -> None:
    """Its threads are in the middle of a statement then."""
    file = usage_file(Path(parse_url(sqlite_url).database or ""))
    async with served(tmp_path, sqlite_url, service_token=SERVICE_TOKEN) as running:
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            sends = [
                asyncio.create_task(running.client.post("/usage", json={"records": [record()]}, headers=ROUTER))
                for _ in range(3)
            ]
            # All are at the database by the time that a later request is answered.
            assert (await running.client.get("/readyz")).status_code == 200
            assert not any(one.done() for one in sends)
            code = await running.stop(signal.SIGTERM, 40)
        answers = await asyncio.gather(*sends, return_exceptions=True)

    assert code == 0, running.output
    # None was stored, and none was acknowledged.
    assert [one for one in answers if not isinstance(one, httpx.TransportError) and one.status_code < 500] == []  # type: ignore[union-attr]


class Load:
    """Routers that send batches until they are acknowledged, as INFERENCE_API_USAGE=registry does."""

    def __init__(self, urls: list[str]) -> None:
        self._urls = cycle(urls)
        self.sent: list[dict[str, Any]] = []
        self.repeats = 0
        self.stopping = False

    async def run(self, routers: int = 3) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(routers):
                group.create_task(self._deliver(number))

    async def _deliver(self, router: int) -> None:
        async with httpx.AsyncClient(timeout=15, trust_env=False, headers=ROUTER) as client:
            for batch in range(10_000):
                if self.stopping:
                    return
                now = time.time_ns() // 1_000_000
                # Over several hours, so that hours close while the load is on.
                prefix = f"router{router}batch{batch}"
                made = [record(id=f"{prefix}-{number}", at=now - number * 600_000) for number in range(40)]
                self.sent += made
                while True:
                    try:
                        answer = await client.post(f"{next(self._urls)}/usage", json={"records": made})
                        if answer.status_code == 200:
                            break
                    except httpx.TransportError:
                        pass
                    self.repeats += 1
                    await asyncio.sleep(0.05)


@asynccontextmanager
async def loaded(load: Load) -> AsyncIterator[None]:
    task = asyncio.create_task(load.run())
    try:
        yield
    finally:
        load.stopping = True
        await asyncio.wait_for(task, 60)


async def grew(load: Load, by: int) -> None:
    wanted = len(load.sent) + by
    await until(lambda: len(load.sent) >= wanted, 60)


async def manager(url: str) -> dict[str, str]:
    """Headers of a platform admin."""
    database = Database(parse_url(url))
    try:
        token = await management_token(database, "ana", "admin")
    finally:
        await database.close()
    return {"authorization": f"Bearer {token}"}


async def totals(url: str, running: Served) -> dict[str, Any]:
    answer = await running.client.get("/api/v1/usage", headers=await manager(url), params={"bucket": "1h"})
    found: dict[str, Any] = answer.json()["totals"]
    return found


async def all_summed(running: Served) -> None:
    """Wait for two turns of the keeper, so that one began after the last record, and for what it has left."""
    since = time.monotonic()

    async def done() -> bool:
        page = (await running.client.get("/metrics")).text
        return time.monotonic() - since > 12 and "unsummed_hours 0.0" in page

    await eventually(done, 90)


async def test_a_control_plane_that_is_killed_loses_and_doubles_nothing(database_url: str, tmp_path: Path) -> None:
    port = free_port()
    load = Load([f"http://127.0.0.1:{port}"])
    async with AsyncExitStack() as stack:

        async def start() -> Served:
            return await stack.enter_async_context(
                served(tmp_path, database_url, port=port, service_token=SERVICE_TOKEN)
            )

        running = await start()
        async with loaded(load):
            for _ in range(2):
                await grew(load, 400)
                await running.stop(signal.SIGKILL)
                running = await start()
            await grew(load, 400)
        found = await totals(database_url, running)

    assert load.repeats > 0
    assert (found["requests"], found["output_tokens"]) == (len(load.sent), 120 * len(load.sent))


async def test_of_two_replicas_one_is_killed_under_load(server: PostgreSQL, template: str, tmp_path: Path) -> None:
    name = server.create(template)
    url = server.url(name)
    async with AsyncExitStack() as stack:
        first, second = [
            await stack.enter_async_context(served(tmp_path, url, service_token=SERVICE_TOKEN)) for _ in range(2)
        ]
        load = Load([first.url, second.url])
        async with loaded(load):
            await grew(load, 1000)
            await first.stop(signal.SIGKILL)
            await grew(load, 1000)
        from_rows = await totals(url, second)
        await all_summed(second)
        from_sums = await totals(url, second)
    stored = server.run(name, "SELECT count(*) || ' ' || count(DISTINCT id) FROM usage")
    sums = server.run(name, "SELECT sum(records) > 0 FROM usage_hour")
    server.drop(name)

    count = len(load.sent)
    assert load.repeats > 0
    assert (stored, sums) == (f"{count} {count}", "t")
    assert from_rows["requests"] == from_sums["requests"] == count
    assert from_sums["latency_ms"]["p50"] == from_rows["latency_ms"]["p50"]


async def test_a_router_delivers_each_record_once_to_a_control_plane_that_is_killed(
    sqlite_url: str, tmp_path: Path, start_engine: Callable[..., Any], start_router: Callable[..., Any]
) -> None:
    engine, port = await start_engine(), free_port()
    async with AsyncExitStack() as stack:

        async def start() -> Served:
            return await stack.enter_async_context(served(tmp_path, sqlite_url, port=port, service_token=SERVICE_TOKEN))

        running = await start()
        headers = await manager(sqlite_url)
        entry = {"name": "m", "backends": [{"url": engine.url}], "price": {"input": 1, "output": 2}}
        assert (await running.client.put("/models/m", json=entry, headers=headers)).status_code == 201
        router = await start_router(
            models=[], registry_url=running.url, registry_token=SERVICE_TOKEN, registry_refresh=0.5, usage="registry"
        )
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
        for _ in range(2):
            for _ in range(30):
                answer = await router.client.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200
            await running.stop(signal.SIGKILL)
            running = await start()
        sent = 60

        async def arrived() -> bool:
            return bool((await totals(sqlite_url, running))["requests"] >= sent)

        await eventually(arrived, 60)
        found = await totals(sqlite_url, running)
        listed = (await running.client.get("/api/v1/requests?limit=200", headers=headers)).json()["data"]

    assert found["requests"] == sent == len({one["id"] for one in listed})
    assert (found["unpriced"], {one["model"] for one in listed}) == (0, {"m"})
