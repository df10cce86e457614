"""Documents that routers poll: conditional, compressed, waited for, and served without the database."""

import asyncio
import gzip

import pytest

from tests.control_plane.conftest import Running, starting
from tests.fakes import until
from tests.postgresql import PostgreSQL

pytestmark = pytest.mark.anyio
GPT2 = {"name": "gpt2", "backends": [{"url": "http://10.0.0.1:8000"}]}


async def test_a_known_etag_is_not_sent_again(sqlite_plane: Running) -> None:
    first = await sqlite_plane.router.get("/overrides")
    etag = first.headers["etag"]

    for given in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        again = await sqlite_plane.router.get("/overrides", headers={"if-none-match": given})
        assert [again.status_code, again.content, again.headers["etag"]] == [304, b"", etag]
    assert first.headers["cache-control"] == "no-cache"
    assert "preference-applied" not in first.headers


async def test_gzip_where_it_is_accepted(sqlite_plane: Running) -> None:
    await sqlite_plane.admin.put("/models/gpt2", json=GPT2)
    plain = await sqlite_plane.client.get("/models", headers={"accept-encoding": "identity"})
    async with sqlite_plane.client.stream("GET", "/models", headers={"accept-encoding": "gzip"}) as answer:
        raw = b"".join([chunk async for chunk in answer.aiter_raw()])

    assert answer.headers["content-encoding"] == "gzip"
    assert answer.headers["vary"] == plain.headers["vary"] == "Accept-Encoding"
    assert gzip.decompress(raw) == plain.content


@pytest.mark.parametrize(
    ("prefer", "applied"),
    [("wait=1", "wait=1"), ("respond-async, Wait=1", "wait=1"), ('wait="1"', "wait=1"), ("wait=x", None), ("x", None)],
)
async def test_a_long_poll_ends_with_its_time(sqlite_plane: Running, prefer: str, applied: str | None) -> None:
    etag = (await sqlite_plane.router.get("/overrides")).headers["etag"]

    answer = await sqlite_plane.router.get("/overrides", headers={"if-none-match": etag, "prefer": prefer})

    assert answer.status_code == 304
    assert answer.headers.get("preference-applied") == applied


async def test_a_wait_is_at_most_30_seconds(sqlite_plane: Running) -> None:
    # It has the newest one to get, so that it does not wait.
    answer = await sqlite_plane.router.get("/overrides", headers={"if-none-match": '"old"', "prefer": "wait=3600"})

    assert [answer.status_code, answer.headers["preference-applied"]] == [200, "wait=30"]


async def test_a_wait_for_one_model_ends_with_that_model_only(sqlite_plane: Running) -> None:
    etag = (await sqlite_plane.admin.put("/models/gpt2", json=GPT2)).headers["etag"]
    headers = {"if-none-match": etag, "prefer": "wait=20"}
    waiting = asyncio.create_task(sqlite_plane.client.get("/models/gpt2", headers=headers))
    await sqlite_plane.admin.put("/models/other", json=GPT2 | {"name": "other"})
    other = (await sqlite_plane.client.get("/models")).json()["models"]
    await sqlite_plane.admin.put("/models/gpt2", json=GPT2 | {"version": "2"})

    answer = await waiting
    assert len(other) == 2
    assert [answer.status_code, answer.json()["version"]] == [200, "2"]


async def test_one_that_stops_answers_all_who_wait(sqlite_url: str) -> None:
    async with starting(sqlite_url) as start:
        running: Running = await start()
        etag = (await running.router.get("/overrides")).headers["etag"]
        headers = {"if-none-match": etag, "prefer": "wait=30"}
        waiting = [asyncio.create_task(running.router.get("/overrides", headers=headers)) for _ in range(5)]
        await until(lambda: running.plane.documents.waiting == 5)
        running.stop()

        answers = await asyncio.wait_for(asyncio.gather(*waiting), 20)
    assert {answer.status_code for answer in answers} == {304}


async def test_a_database_that_is_away_leaves_the_documents(server: PostgreSQL, template: str) -> None:
    name = server.create(template)
    async with starting(server.url(name)) as start:
        running: Running = await start()
        await running.admin.put("/models/gpt2", json=GPT2)
        before = await running.client.get("/models")
        server.stop("immediate")
        try:
            await until(lambda: not running.plane.documents.reachable, 20)
            during = await running.client.get("/models")
            overrides = await running.router.get("/overrides")
            ready = await running.client.get("/readyz")
            refused = await running.admin.put("/models/other", json=GPT2 | {"name": "other"})
            metrics = (await running.client.get("/metrics")).text
        finally:
            server.start()
        await until(lambda: running.plane.documents.reachable, 20)
        after = await running.admin.put("/models/other", json=GPT2 | {"name": "other"})

    assert during.headers["etag"] == before.headers["etag"]
    assert [overrides.status_code, ready.status_code] == [200, 200]
    assert [refused.status_code, refused.json()["error"]["code"]] == [503, "storage_unavailable"]
    assert refused.headers["retry-after"] == "5"
    assert "control_plane_database_up 0.0" in metrics
    assert after.status_code == 201


async def test_a_control_plane_that_cannot_read_its_database_is_alive_but_not_ready(
    server: PostgreSQL, template: str
) -> None:
    url = server.url(server.create(template)).replace(str(server.port), "1")
    async with starting(url, seeded=False) as start:
        running: Running = await start()
        answers = [await running.client.get(path) for path in ("/healthz", "/readyz", "/models")]

    assert [answer.status_code for answer in answers] == [200, 503, 503]
